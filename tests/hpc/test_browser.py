"""The report's page in a real Chromium: opened as a file, without a network, used as people use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from hpc import frozen, page
from tests.hpc import results


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """The page from file://; ends with an error where a script failed or anything outside was asked for."""
    path = tmp_path / "report.html"
    page.write(frozen.collect(*results.make(tmp_path)), path)
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900})
    problems: list[str] = []
    asked: list[str] = []
    found = context.new_page()
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    found.on("request", lambda request: asked.append(request.url))
    found.goto(path.as_uri())
    yield found
    context.close()
    assert problems == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


def column(found: Page, number: int) -> list[str]:
    return [text.split()[0] for text in found.locator(f"#results tbody td:nth-child({number})").all_text_contents()]


def test_a_click_on_a_heading_sorts_and_a_cell_without_a_number_is_last(opened: Page) -> None:
    assert column(opened, 3)[-1] == "running/skipped"
    heading = opened.locator("#results th", has_text="t/x")
    heading.click()
    up = column(opened, 3)
    assert [float(text) for text in up[:-1]] == sorted(float(text) for text in up[:-1])
    assert up[-1] == "running/skipped"
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.press("Enter")
    assert column(opened, 3) == [*reversed(up[:-1]), up[-1]]
    assert heading.get_attribute("aria-sort") == "descending"


def test_behind_a_number_stand_its_runs_commits_and_commands(opened: Page) -> None:
    row = opened.locator("#results tbody tr", has_text="reported 0.750")
    assert not opened.locator("#behind").is_visible()
    row.locator("td[data-metric='0']").click()
    shown = opened.locator("#behind tbody tr").all_text_contents()
    assert [text.startswith("made from") for text in shown] == [False, True] * len(results.SEEDS)
    assert [text.startswith(f"made fromtrain-1.0-256-{seed}") for seed, text in zip(results.SEEDS, shown[1::2], strict=True)] == [True] * 2
    for seed, text in zip(results.SEEDS, shown[::2], strict=True):
        assert text.startswith(f"{results.value_of(1.0, 256, seed)!r}test-1.0-256-{seed}")
        assert results.COMMIT in text
        assert "with uncommitted changes" in text
        assert "equihpc submit jobs/job.yaml" in text
    opened.locator("#behind a").first.click()
    assert opened.url.endswith("#run-test-1.0-256-0")


def test_every_metric_has_a_heat_map_that_follows_the_choice(opened: Page) -> None:
    def cells(number: int = 0) -> list[list[str]]:
        return [row.locator("th, td").all_text_contents() for row in opened.locator(".heat-map").nth(number).locator("tr").all()]

    def mean(lam: float, d: int) -> float:
        return sum(results.value_of(lam, d, seed) for seed in results.SEEDS) / len(results.SEEDS)

    assert opened.locator(".heat-map caption").all_text_contents() == ["t/x", "t/y"]
    head, *rows = cells()
    assert head[1:] == ["256", "512"]
    assert [row[0] for row in rows] == ["0.1", "1", "5"]
    expected = [[f"{mean(lam, d):.3f}" for d in results.DIMS] for lam in results.LAMBDAS]
    expected[1][0] += "reported 0.750"
    expected[2][1] = "–"  # the run that failed
    assert [row[1:] for row in rows] == expected
    assert cells(1)[1][1] == f"{1 - mean(0.1, 256):.3f}"
    assert opened.locator("#heat-maps > div").first.locator("> small").all_text_contents() == ["baseline lambda – · d –: 0.505"]
    colours = {
        cell.evaluate("cell => getComputedStyle(cell).backgroundColor") for cell in opened.locator(".heat-map").first.locator("td").all()
    }
    assert len(colours) == 6
    opened.select_option("#heat-metric", label="t/y")
    assert opened.locator(".heat-map caption").all_text_contents() == ["t/y"]
    opened.select_option("#heat-x", label="train.lambda")
    opened.select_option("#heat-y", label="train.d")
    assert cells()[0][1:] == ["0.1", "1", "5"]
    assert not opened.locator("#heat-where").is_visible()


def test_differences_to_the_baseline_are_bars(opened: Page) -> None:
    plots = opened.locator(".difference")
    assert plots.count() == 2
    assert opened.locator("#difference-plots strong").all_text_contents() == ["t/x", "t/y"]
    num_bars = len(results.LAMBDAS) * len(results.DIMS) - 1  # without the row that has no number
    bars = plots.first.locator("rect")
    assert bars.count() == num_bars
    assert plots.first.locator("rect.up").count() == num_bars
    assert plots.nth(1).locator("rect.down").count() == num_bars
    widths = [float(bar.get_attribute("width") or 0) for bar in bars.all()]
    values = [results.value_of(lam, d, 0) - results.value_of(None, None, 0) for lam in results.LAMBDAS for d in results.DIMS][:num_bars]
    assert [width / widths[0] for width in widths] == pytest.approx([value / values[0] for value in values], rel=1e-3)


def test_curves_are_drawn_and_can_be_chosen(opened: Page) -> None:
    curves = opened.locator("#plot path")
    num_runs = len(results.SEEDS) * (1 + len(results.LAMBDAS) * len(results.DIMS))
    assert curves.count() == num_runs
    assert opened.locator("#curve-name").evaluate("select => select.selectedOptions[0].textContent") == "loss"
    box = curves.first.bounding_box()
    assert box is not None
    assert box["width"] > 700, "over the whole width"
    before = curves.first.get_attribute("d")
    opened.check("#curve-log")
    assert curves.first.get_attribute("d") != before
    opened.select_option("#curve-name", label="lr")
    assert curves.count() == num_runs
    opened.locator("#legend input").first.uncheck()
    assert curves.count() == num_runs - 1
    opened.locator("#legend label").last.hover()
    assert opened.locator("#plot path.quiet").count() == num_runs - 2


def test_pictures_and_causes_are_shown_as_they_are(opened: Page) -> None:
    sizes = opened.locator("#pictures img").evaluate_all("images => images.map(each => [each.naturalWidth, each.naturalHeight])")
    assert sizes == [[40, 20]] * 14
    assert opened.locator("#run-train-5\\.0-512-1 td").last.text_content() == results.BAD
    assert "equihpc submit jobs/job.yaml --set train.steps=100" in (opened.locator("#fills").text_content() or "")


def test_a_page_without_curves_maps_or_pictures(browser: Browser, tmp_path: Path) -> None:
    """Of a frozen set: the scripts do without."""
    job, statuses = results.make(tmp_path)
    (tmp_path / "job" / ".equihpc").mkdir()
    frozen.freeze(frozen.collect(job, statuses), tmp_path / "paper.json", tmp_path / "job")
    page.write(frozen.load(tmp_path / "paper.json"), tmp_path / "paper.html", live=False)
    found = browser.new_page()
    problems: list[str] = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.goto((tmp_path / "paper.html").as_uri())
    assert "Frozen 20" in (found.locator("#frozen").text_content() or "")
    assert not found.locator("#curves").is_visible()
    assert found.locator(".heat-map td").count() == 2 * 6
    found.close()
    assert problems == []
