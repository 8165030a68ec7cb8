"""The report's page and formats, without a browser: what they say, what they escape, and that their size is bounded."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpc import frozen, page, report_formats
from hpc.frozen import ResultSet
from hpc.report import Cell, Row, Table
from hpc.runs import RunFolder
from tests.hpc import results


@pytest.fixture
def found(tmp_path: Path) -> ResultSet:
    return frozen.collect(*results.make(tmp_path))


def test_the_page_stands_alone_and_escapes_what_it_shows(found: ResultSet, tmp_path: Path) -> None:
    page.write(found, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"<(link|iframe|object|embed|base)\b|@import|url\(|fetch\(|XMLHttp|import\(", text)
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'\bsrc="([^"]*)', text))
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    assert text.count("</script>") == 2
    assert "<b>boom" not in text
    assert results.BAD in html.unescape(text)
    data = json.loads(text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])
    assert len(data["cells"]) == len(found.table.rows)
    assert data["cells"][0][0] == [[f"test-None-None-{seed}", results.value_of(None, None, seed)] for seed in results.SEEDS]
    assert data["cells"][-1][0] == [["test-5.0-512-0", "running"], ["test-5.0-512-1", "skipped"]]
    assert "1 of 4: 1 running, 1 failed, 1 skipped" in text
    assert re.findall(r'data-value="([^"]*)">[^<]* <small>baseline', text) == ["–"], "it is sorted by its value"
    assert len(re.findall(results.COMMIT, text)) == len(found.runs)


def test_a_heat_map_is_of_two_numbers_that_are_swept() -> None:
    def table(*params: dict[str, Any]) -> Table:
        rows = [Row(each, {"x": Cell([float(number)])}) for number, each in enumerate(params)]
        return Table("job", list(params[0]), ["x"], [*rows, Row({}, {"x": Cell()}, name="others")], [])

    points = page.points(table(*({"t.l": lam, "t.d": d, "t.m": m} for lam in (None, 1, 2.0) for d in (3, 4) for m in ("a", "b"))))
    assert points["axes"] == ["t.l", "t.d"]
    assert len(points["rows"]) == 8, "without those that have no lambda"
    assert points["rows"][1] == {"row": 5, "at": {"t.l": 1, "t.d": 3}, "others": "m b", "means": [5.0], "reported": [None]}
    assert page.points(table({"t.l": 1, "t.on": True}, {"t.l": 2, "t.on": False}))["rows"] == [], "yes and no are no axis"
    assert page.points(table({"t.l": 1, "t.d": 5}, {"t.l": 2, "t.d": 5}))["rows"] == [], "nor is what is not swept"


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300), st.integers(4, 60))
def test_thinning_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    series = list(enumerate(values))
    thinned = page.thin(series, most)
    assert len(thinned) <= max(most, 0)
    assert [thinned[0], thinned[-1]] == [series[0], series[-1]]
    assert {min(values), max(values)} <= {value for _, value in thinned}
    assert thinned == sorted(set(thinned))
    assert set(thinned) <= set(series)


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("num", [3, 1998, 2001, 50_000])
def test_of_a_long_file_some_records_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int, is_large: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in range(1, num + 1)) + '{"step": 77, "lo')
    if is_large:
        monkeypatch.setattr(page, "WHOLE_BYTES", 0)
        monkeypatch.setattr(page, "TAIL_BYTES", min(2**16, path.stat().st_size - 30))
    steps = [record["step"] for record in page.sample(path)]
    assert [steps[0], steps[-1]] == [1, num]
    assert steps == sorted(set(steps))
    assert min(num, page.MAX_RECORDS) / 3 < len(steps) <= page.MAX_RECORDS
    assert max(later - earlier for earlier, later in itertools.pairwise(steps)) <= 3 * max(1, num / page.MAX_RECORDS)


def test_curves_and_pictures_have_a_bounded_size(found: ResultSet, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = found.table.statuses
    curves = page.curves(statuses)
    assert curves["names"] == ["loss", "lr"]
    assert curves["left_out"] == []
    assert [len(curves["runs"]), len(curves["runs"][0]["series"][0][0])] == [14, 100], "the line that is being written is not there"

    metrics = RunFolder(statuses[0].path).metrics
    names = [f"q{number}" for number in range(500)]
    metrics.write_text("".join(json.dumps({"step": s, **dict.fromkeys(names, s / 3)}) + "\n" for s in range(900)))
    many = page.curves(statuses)
    assert len(json.dumps(many)) < 25 * page.ALL_POINTS
    assert many["left_out"] == [f"of 502 quantities the first {page.ALL_POINTS // (page.MIN_POINTS * 14)} are shown"]
    monkeypatch.setattr(page, "MAX_RUNS", 3)
    assert page.curves(statuses)["left_out"][0] == "of 14 runs with curves the first 3 are shown"

    large = statuses[0].path / "pictures" / "views.png"
    Image.new("RGB", (4000, 3000), (10, 200, 10)).save(large)
    broken = statuses[2].path / "pictures" / "views.png"
    broken.write_bytes(b"not a picture")
    pictures = page.pictures(statuses)
    assert pictures["left_out"] == [f"{broken} (cannot be read)"]
    with Image.open(io.BytesIO(base64.b64decode(pictures["shown"][0]["source"].partition(",")[2]))) as image:
        assert image.size == (1024, 768)
    monkeypatch.setattr(page, "PICTURE_BYTES", 1)
    assert [len(page.pictures(statuses)[key]) for key in ("shown", "left_out")] == [1, 13]


@pytest.mark.parametrize("num", [1000, 1005, 10001])
def test_what_is_not_measured_at_every_step_has_a_curve(found: ResultSet, num: int) -> None:
    """k-NN at every tenth record: a stride of ten would never meet it, or meet nothing else."""
    lines = [{"step": step, "loss": 1.0, **({"knn_top1": 0.5} if step % 10 == 0 else {})} for step in range(1, num + 1)]
    metrics = RunFolder(found.table.statuses[0].path).metrics
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = page.sample(metrics)
    assert len(read) <= page.MAX_RECORDS
    assert sum("knn_top1" in line for line in read) >= 100
    assert sum("knn_top1" not in line for line in read) >= 100
    assert "knn_top1" in page.curves(found.table.statuses)["names"]


def test_values_that_are_no_numbers_are_not_drawn(found: ResultSet) -> None:
    metrics = RunFolder(found.table.statuses[0].path).metrics
    metrics.write_text(
        '{"step": 1, "loss": null, "ok": true}\n{"step": 2, "loss": 0.123456789, "images_per_s": null}\n[]\n{"step": 3, "loss": 2}\n'
    )
    curves = page.curves(found.table.statuses[:1])
    assert curves["names"] == ["loss"]
    assert curves["runs"][0]["series"] == [[[2, 3], [0.12346, 2.0]]]


# --- formats -----------------------------------------------------------------------------------------------------------


def test_latex_is_a_table_of_equal_rows(found: ResultSet) -> None:
    remark, _, begin, *lines = report_formats.latex(found).splitlines()
    assert remark == f"% 2 cells wait for train-5.0-512-1 (failed: {results.BAD}): equihpc submit jobs/job.yaml --set train.steps=100"
    assert begin == r"\begin{tabular}{llrr}"
    assert [lines[0], lines[2], lines[-3], lines[-1]] == [r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"]
    rows = [line.removesuffix(r" \\").split(" & ") for line in [lines[1], *lines[3:-3]]]
    assert {len(row) for row in rows} == {4}
    assert rows[1] == ["--", "-- (baseline)", r"$0.505 \pm 0.007$ (2)", r"$0.495 \pm 0.007$ (2)"]
    assert rows[4][2] == r"$0.551 \pm 0.007$ (2) ($+0.046 \pm 0.000$) \textit{0.750}\textsuperscript{a}"
    assert rows[-1][2:] == [r"\emph{running/skipped}"] * 2
    assert lines[-2] == r"\multicolumn{4}{l}{\footnotesize \textsuperscript{a}reported: Somebody \& al., Table 1} \\"


def test_special_signs_of_latex_are_escaped() -> None:
    assert report_formats.escape("a_b & 50% of $x^2 {y}~\\z #1\nnext") == (
        r"a\_b \& 50\% of \$x\textasciicircum{}2 \{y\}\textasciitilde{}\textbackslash{}z \#1 next"
    )


def test_a_list_at_the_beginning_of_a_row_is_no_option_of_the_line_before() -> None:
    r"""LaTeX reads `[0.25, 1.0]` after a line break as a distance."""
    assert report_formats.escape("[0.25, 1.0]") == "{[}0.25, 1.0]"
    assert report_formats.escape("*") == "{*}"


def test_a_command_with_backticks_stays_code() -> None:
    assert report_formats._code("a `b`") == "`` a `b` ``"
    assert report_formats._code("a") == "`a`"


def test_a_remark_stays_a_remark(found: ResultSet) -> None:
    """A cause of several lines would otherwise begin a line of the document."""
    fill = replace(found.fills[0], runs={"r": "one\n\\input{/etc/passwd}"})
    text = report_formats.latex(replace(found, fills=[fill], changes=["a\nb"]))
    assert text.partition(r"\begin{tabular}")[0].splitlines() == [
        "% note: a b",
        r"% 2 cells wait for r (failed: one \input{/etc/passwd}): equihpc submit jobs/job.yaml --set train.steps=100",
    ]


def test_markdown_has_the_same(found: ResultSet) -> None:
    table, *more = report_formats.markdown(replace(found, changes=["a | b"])).split("\n\n")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
    assert {len(row) for row in rows} == {5}
    assert [cell.strip() for cell in rows[0]] == ["lambda", "d", "t/x", "t/y", "runs"]
    assert rows[5][2].strip() == "0.551 ± 0.007 (2) (+0.046 ± 0.000) (reported 0.750)"
    assert rows[-1][2].strip() == "running/skipped"
    assert rows[-1][4].strip() == "1 of 4: 1 running, 1 failed, 1 skipped"
    assert [text.strip() for text in more[:2]] == [r"Note: a \| b", "Reported: Somebody & al., Table 1"]
    assert more[2].endswith("`equihpc submit jobs/job.yaml --set train.steps=100`")


@given(st.text(max_size=40))
def test_no_text_breaks_a_row_of_markdown(text: str) -> None:
    row = f"| {report_formats._markdown(text)} |"
    assert len(re.split(r"(?<!\\)(?:\\\\)*\|", row)) == 3
    assert "\n" not in row


def test_bars_that_are_left_out_are_counted(found: ResultSet, monkeypatch: pytest.MonkeyPatch) -> None:
    every = page.differences(found.table)
    assert [len(each["bars"]) > 2 for each in every] == [True, True]
    assert [each["left_out"] for each in every] == [0, 0]
    monkeypatch.setattr(page, "MAX_BARS", 2)
    assert [(len(each["bars"]), each["left_out"]) for each in page.differences(found.table)] == [(2, len(of["bars"]) - 2) for of in every]
