"""`equihpc report` on real runs: formats, frozen sets, what is missing, and that nothing changes without being said."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

JOB = """
stages:
  train:
    entry: toy
    config: {steps: 2}
    sweep:
      list: [{value: 1.0}, {value: 2.0}, {value: 3.0, fail_at: 1}]
  check:
    entry: toy
    after: train
    config: {steps: 1, upstream: "${train}"}
seeds: [0, 1]
report: {rows: [train.value], baseline: {train.value: 1.0}}
"""


def test_formats_frozen_sets_and_what_is_missing(toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(JOB)
    submitted = equihpc("submit", "job.yaml", "--cluster", "local", "--set", "check.value=4.0", "--wait")
    assert submitted.returncode == 1, "two runs fail"
    command = "equihpc submit job.yaml --cluster local --set check.value=4.0"
    spec = next((toy / "runs" / "job" / "train").glob("*/spec.json"))
    assert json.loads(spec.read_text())["command"] == command

    shown = equihpc("report", "job").stdout
    assert f": {command}\n" in shown
    assert "RuntimeError: boom at step 1" in shown
    why = equihpc("why", next((toy / "runs" / "job" / "check").glob("value-3*")).name).stdout
    assert f"{command} starts both" in why

    found = json.loads(equihpc("report", "job", "--json").stdout)
    assert [fill["command"] for fill in found["fill"]] == [command]
    assert [(fill["state"], len(fill["runs"]), fill["cells"]) for fill in found["fill"]] == [("failed", 2, 1)]
    lines = list(csv.DictReader(io.StringIO(equihpc("report", "job", "--csv").stdout)))
    assert [line["train.value"] for line in lines] == ["1", "2", "3"]
    assert [line["toy/x n"] for line in lines] == ["2", "2", "0"]
    assert [line["runs not complete"].count(":") for line in lines] == [0, 0, 4]
    assert r"\emph{skipped}" in equihpc("report", "job", "--latex").stdout
    assert f"`{command}`" in equihpc("report", "job", "--markdown").stdout
    refused = equihpc("report", "job", "--latex", "--csv")
    assert (refused.returncode, refused.stderr) == (2, "equihpc: one format at a time, not --csv and --latex\n")

    frozen = equihpc("report", "job", "--json", "--freeze", "paper.json")
    assert frozen.stderr.startswith("frozen: paper.json; of some cells numbers are missing: 1 cell waits for value-3")
    assert json.loads(frozen.stdout) == found
    assert equihpc("report", "job", "--freeze", "paper.json").returncode == 2
    assert "changed" not in equihpc("report", "job").stdout

    result = next((toy / "runs" / "job" / "check").glob("value-2*")) / "result.json"
    data = json.loads(result.read_text())
    was = data["metrics"]["toy/x"]
    result.write_text(json.dumps({**data, "metrics": {"toy/x": 99.0}}))
    said = f"{was!r} then, 99.0 now"
    assert said in equihpc("report", "job").stdout
    assert said in (toy / "runs" / "job" / "report.html").read_text()
    assert said in json.loads(equihpc("report", "job", "--json").stdout)["changes"][0]
    assert said in equihpc("report", "job", "--csv").stderr
    old = json.loads(equihpc("report", "paper.json", "--json").stdout)
    assert said in old["changes"][0]
    assert old["rows"] == found["rows"], "the frozen numbers are those of then"
    assert "frozen 20" in equihpc("report", "paper.json").stdout
    assert "99.0 now" in (toy / "paper.html").read_text()
    assert "no number" not in equihpc("report", "paper.json", "--runs", "elsewhere", "--markdown").stdout

    page = toy / "paper.html"
    page.write_text(page.read_text() + "old")
    assert "; page: paper.html" in equihpc("report", "paper.json").stdout
    assert not page.read_text().endswith("old"), "one of a frozen set is written anew"
    page.write_text("mine")
    assert f"no page: {page.name} is there already and is none of a frozen set" in equihpc("report", "paper.json").stdout
    assert page.read_text() == "mine"

    # the folder of somebody else, or a full disk: also root cannot replace a folder by a file
    table = toy / "runs" / "job" / "report.csv"
    table.unlink()
    table.mkdir()
    done = equihpc("report", "job")
    assert done.returncode == 0, done.stderr
    assert "99.0" in done.stdout
    assert "note: report.csv and report.html are not both written: " in done.stdout
