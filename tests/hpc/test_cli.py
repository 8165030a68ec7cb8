"""The command as people meet it: messages, exit codes, JSON that scripts read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc import cli, yamlfile
from hpc.commands.common import find_cluster, make_plan
from hpc.plan import described_by

ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the project's own job files."""
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["equihpc", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


# fmt: off
# ruff: noqa: E501
BAD = {
    "misspelt key": (("lambda: [0, 1]", "lamda: [0, 1]"), r"quickstart.yaml:\d+: .*unknown key 'lamda'; allowed here: .*lambda.*did you mean 'lambda'"),
    "duplicate key": (("      batch: 32", "      batch: 32\n      batch: 64"), r"quickstart.yaml:\d+: key 'batch' stands twice"),
    "wrong type": (("batch: 32", "batch: many"), r"quickstart.yaml:\d+: stages.pretrain.config.batch: 'many' is not allowed: it must be a valid integer"),
    "unknown stage": (("after: pretrain", "after: pretrian"), r"unknown stage 'pretrian'; choose from .*did you mean 'pretrain'"),
    "unknown method": (("name: ibot", "name: ibto"), r"stages.pretrain.config.method.*'ibto'.*'ibot'"),
    "unknown transformation": (("name: se2", "name: se3"), r"stages.pretrain.config.transformation.*'se3'.*'rot', 'trans', 'se2'"),
    "a border of colour": (("{name: se2, border: inside}", "{name: color, border: zero}"), r"transformation.border: unknown key 'border'; allowed here: max_brightness"),
    "rot without a rotation": (("transformation: {name: se2, border: inside}", "transformation: se2\n      augmentation: rot"), r"rotation alone, but the transformation is se2: choose transformation rot"),
    "unknown entry": (("equissl.evaluate", "equissl.evalute"), r"unknown entry 'equissl.evalute'.*did you mean 'evaluate'"),
    "unknown backbone": (("vit_tiny_patch16_224", "vit_teeny"), r"unknown backbone 'vit_teeny'; choose from vit_tiny_patch16_224"),
    "unknown task": (("task: knn", "task: nkk"), r"stages.evaluate.config.task.*'nkk'.*'knn'"),
    "cycle": (("entry: equissl.prepare\n", "entry: equissl.prepare\n    after: evaluate\n"), r"wait for each other.*a cycle"),
    "empty grid": (("auxiliary.lambda: [0, 1]", "auxiliary.lambda: []"), r"auxiliary.lambda is empty: give at least one value"),
    "sweep path": (("auxiliary.lambda: [0, 1]", "auxiliary.lambda.x: [0, 1]"), r"quickstart.yaml:\d+: stages.pretrain.config.auxiliary.lambda"),
    "negative lambda": (("[0, 1]", "[0, -1]"), r"auxiliary.lambda: -1.* is not allowed: it must be greater than or equal to 0"),
    "d too large": (("d: 128", "d: 300"), r"auxiliary.d 300 must be smaller than method.representation 256"),
    "batch over ranks": (("batch: 32", "batch: 40"), r"batch 40 cannot be shared by 2 processes in whole groups of 8"),
    "too many processes": (("nodes: 2, gpus_per_node: 1", "nodes: 200, gpus_per_node: 1"), r"200 processes per node are asked for"),
    "YAML": (("stages:", "stages: ["), r"quickstart.yaml:\d+: not valid YAML"),
    "Python tag": (("batch: 32", "batch: !!python/object/apply:os.getpid []"), r"quickstart.yaml:\d+: tag .* is not allowed"),
    "missing shard": (('data: "${prepare}"', "data: ./nowhere"), r"data set './nowhere': .*nowhere/manifest.json does not exist"),
    "unknown reference": (('checkpoint: "${pretrain}"', 'checkpoint: "${train}"'), r"\$\{train\} is not a stage that evaluate comes after.*pretrain"),
    "report row": (("rows: [pretrain.auxiliary.lambda]", "rows: [pretrain.auxiliary.lamda]"), r"report.rows.*'pretrain.auxiliary.lamda' is no parameter"),
}
# fmt: on


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["plan", "submit"])
def test_bad_input_is_one_message_and_nothing_is_started(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    (old, new), words = BAD[name]
    path = here / "jobs" / "quickstart.yaml"
    text = path.read_text()
    assert old in text, "the quickstart changed: adapt this test"
    path.write_text(text.replace(old, new))
    code, out, err = call(monkeypatch, capsys, command, "jobs/quickstart.yaml", "--cluster", "local")
    assert code == 2
    assert re.search(words, err), err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "jobs/none.yaml"], r"jobs/none.yaml: cannot be read: No such file"),
        (
            ["plan", "jobs/quickstart.yaml", "--cluster", "juwels"],
            r"--cluster juwels: there is no such profile.*did you mean 'juwels-booster'",
        ),
        (["plan", "jobs/quickstart.yaml", "--cluster", "../x"], r"not a name"),
        (["plan", "jobs/quickstart.yaml", "--set", "pretrain.auxiliary.d=0", "--cluster", "local"], r"0 is not allowed"),
        (["plan", "jobs/quickstart.yaml", "--variant", "x", "--cluster", "local"], r"unknown variant 'x'"),
        (
            ["plan", "jobs/sweep_lambda_d.yaml", "--cluster", "juwels-booster", "--set", "pretrain.resources.hours=25"],
            r"25 hours per segment.*allows 24",
        ),
        (["status", "nothing"], r"there is no job 'nothing'"),
        (["report"], r"there are no jobs in .* yet; submit one"),
        (["logs", "nothing"], r"run 'nothing' is unknown"),
        (["submit", "jobs/quickstart.yaml", "--cluster", "local", "--retry", "all"], r"--retry all: choose from cancelled"),
        (["submit", "jobs/sweep_lambda_d.yaml", "--cluster", "juwels-booster"], r"needs Slurm|EQUIHPC_ACCOUNT is not set"),
    ],
)
def test_bad_arguments(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert re.search(words, err), err
    assert len(err.strip().splitlines()) == 1
    assert not list((here / "runs").glob("*")) if (here / "runs").exists() else True


def test_unknown_options_are_refused(equihpc: Run) -> None:
    done = equihpc("plan", "--colour", "x")
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert "Traceback" not in done.stderr


def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["equihpc", "plan", *arguments, "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_plan_of_the_papers_sweep(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(monkeypatch, capsys, "jobs/sweep_lambda_d.yaml", "--cluster", "juwels-booster")
    pretrainings = [run for run in found["runs"] if run["stage"] == "pretrain"]
    grid = {(run["params"].get("pretrain.auxiliary.lambda"), run["params"].get("pretrain.auxiliary.d")) for run in pretrainings}
    assert grid == {(weight, d) for weight in (0.1, 1, 5) for d in (256, 512, 1024, 2048, 4096, 5120)} | {(None, None)}
    assert sum(run["config"]["auxiliary"] is None for run in pretrainings) == 1
    assert len(found["runs"]) == 19 * 11
    packed = [("evaluate", [4] * 10)] * 4 + [("evaluate", [4] * 7 + [2])]
    assert [(array["stage"], [len(element) for element in array["elements"]]) for array in found["arrays"]] == [
        ("pretrain", [1] * 19),
        *packed,
    ]
    assert found["billed_gpu_hours"] < found["billed_gpu_hours_unpacked"] - 20
    script = found["arrays"][0]["sbatch"]
    for line in (
        "#SBATCH --array=0-18%19",
        "#SBATCH --nodes=4",
        "#SBATCH --gres=gpu:4",
        "#SBATCH --time=1440",
        "#SBATCH --partition=booster",
    ):
        assert line in script.splitlines()
    assert "--kill-on-bad-exit=1" in script
    assert "--dependency=afterany:JOB_ID_OF_pretrain_0:JOB_ID_OF_pretrain_1:" in found["arrays"][1]["sbatch"]
    assert all(run["gpu_hours"] > 1 for run in pretrainings)
    assert found["bytes"] > 1e9
    assert found["inodes"] > 500
    assert not (here / "runs").exists()


def test_job_files_that_say_so_have_runs_in_common(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By their headers; such runs are made once, whichever file is submitted first."""

    def hashes(file: str, stage: str = "") -> set[str]:
        found = plan(monkeypatch, capsys, f"jobs/{file}.yaml", "--cluster", "juwels-booster")["runs"]
        return {run["id"].rpartition("-")[2] for run in found if stage in ("", run["stage"])}

    parts = [hashes(f"equimod/{method}_{data}") for method in ("simclr", "byol") for data in ("cifar10", "imagenet")]
    assert hashes("equimod/table1") == set().union(*parts)
    assert len(hashes("equimod/table1")) == sum(map(len, parts)) == 32
    assert hashes("paper/table6") < hashes("paper/table4")
    assert hashes("paper/table4", "pretrain") < hashes("paper/table3", "pretrain")


JOB_FILES = {str(path.relative_to(ROOT)): yamlfile.load(path).data for path in sorted((ROOT / "jobs").rglob("*.yaml"))}


@pytest.mark.parametrize(
    ("file", "variant"), [(file, each) for file, data in JOB_FILES.items() for each in (None, *data.get("variants", ()))]
)
def test_every_job_file_and_variant_is_planned(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str, variant: str | None
) -> None:
    cluster = "juwels-booster" if "imagenet1k" in (here / file).read_text() and not variant else "local"
    found = plan(monkeypatch, capsys, file, "--cluster", cluster, *(["--variant", variant] if variant else []))
    assert found["runs"]
    if variant == "smoke":
        assert all(run["config"].get("num_steps", 0) <= 40 for run in found["runs"] if run["stage"] == "pretrain"), "minutes on two cores"
    if cluster != "local":
        assert all(run["gpu_hours"] and run["recipe"] for run in found["runs"] if run["stage"] == "pretrain")
    if not variant:
        runs = make_plan(here / file, find_cluster(cluster)[1], [], None).runs
        for reported in JOB_FILES[file].get("report", {}).get("reported", ()):
            assert reported.get("name") or described_by(reported["params"], runs), f"{reported} is of no run"


def test_every_job_file_has_a_small_variant() -> None:
    assert [file for file, data in JOB_FILES.items() if "smoke" not in data.get("variants", ())] == ["jobs/quickstart.yaml"], "small itself"


CLAIM = yamlfile.load(ROOT / "jobs" / "claim_small.yaml").data


@pytest.mark.parametrize("variant", [None, *CLAIM["variants"]])
def test_the_plan_of_the_claim_at_small_scale(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variant: str | None
) -> None:
    """Of every variant: three arms of three seeds, each with k-NN and with R² of all four transformations."""
    method = variant if variant in ("simclr", "ibot", "dinov2") else "vicreg"
    found = plan(monkeypatch, capsys, "jobs/claim_small.yaml", "--cluster", "local", *(["--variant", variant] if variant else []))
    configs = [run["config"] for run in found["runs"] if run["stage"] == "pretrain"]
    arms = [
        (config["transformation"] and config["transformation"]["name"], config["auxiliary"] and config["auxiliary"]["lambda"])
        for config in configs
    ]
    assert sorted(arms, key=str) == [("se2", 0)] * 3 + [("se2", 1)] * 3 + [(None, None)] * 3
    assert sorted(config["seed"] for config in configs) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {config["method"]["name"] for config in configs} == {method}
    tasks = [run["config"]["task"] for run in found["runs"] if run["stage"] == "evaluate"]
    assert [sum(task["name"] == name for task in tasks) for name in ("knn", "r2")] == [9, 9]
    assert all(set(task["transformations"]) == {"rotation", "colour", "blur", "translation"} for task in tasks if task["name"] == "r2")
    assert found["job"] == (f"claim_small-{variant}" if variant else "claim_small")


def test_keys_that_scripts_read(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(monkeypatch, capsys, "jobs/quickstart.yaml", "--cluster", "local")
    assert {"job", "runs", "arrays"} <= found.keys()
    assert all({"id", "stage", "params", "config", "after", "gpu_hours"} <= run.keys() for run in found["runs"])
    assert all({"stage", "runs", "sbatch"} <= array.keys() for array in found["arrays"])


@pytest.mark.parametrize("value", ["; rm -rf x", "$(touch injected)", "a\n#SBATCH --uid=0", "`touch injected`", "'", "%j"])
def test_nothing_from_a_profile_or_a_path_reaches_a_shell_unquoted(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    (here / "slurm").mkdir()
    import yaml

    profile = yaml.safe_load((ROOT / "slurm" / "testbed.yaml").read_text())
    profile |= {"account": value, "environment": {"X": value}, "modules": [value], "srun_args": [value], "sbatch": {"comment": value}}
    (here / "slurm" / "site.yaml").write_text(yaml.safe_dump(profile))
    monkeypatch.setattr(sys, "argv", ["equihpc", "plan", "jobs/quickstart.yaml", "--cluster", "site", "--json", "--runs", f"runs{value}"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    if "\n" in value:
        assert end.value.code == 2
        assert "line break" in err
        return
    (here / f"runs{value}" / "quickstart/.equihpc/slurm/UID").mkdir(parents=True)  # the script looks whose it is
    for array in json.loads(out)["arrays"]:
        script = array["sbatch"].replace("srun ", "true ").replace("module load", "true")
        script = "\n".join(line for line in script.splitlines() if "hpc.worker" not in line and "exit $?" not in line)
        done = subprocess.run(["bash", "-c", script], cwd=here, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        assert not list(here.rglob("injected"))
        directives = [line for line in array["sbatch"].splitlines() if line.startswith("#SBATCH --uid")]
        assert not directives


def test_help_and_plan_are_quick_enough_to_be_used(equihpc: Run) -> None:
    """Not timed (that is tests/benchmarks): what makes them slow must not be loaded."""
    code = "import sys; sys.argv = ['equihpc', '--help']\nimport hpc.cli\ntry: hpc.cli.main()\nexcept SystemExit: pass\nprint('LOADED', *sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("LOADED")[1].split())
    assert not loaded & {"torch", "timm", "numpy", "pydantic", "submitit", "jinja2"}


MIXED = """
stages:
  train:
    entry: toy
    config: {steps: 2}
    sweep: {grid: {value: [1.0, 2.0]}}
  check:
    entry: toy
    after: train
    config: {steps: 1, upstream: "${train}"}
report: {rows: [train.value]}
"""


def test_the_report_says_where_code_versions_mix_and_leaves_out_what_is_spoiled(toy: Path, equihpc: Run) -> None:
    def table() -> tuple[dict[str, Any], str]:
        return json.loads(equihpc("report", "job", "--json").stdout), equihpc("report", "job").stdout

    (toy / "job.yaml").write_text(MIXED)
    assert equihpc("submit", "job.yaml", "--cluster", "local", "--wait").returncode == 0
    found, shown = table()
    assert [row["code"] for row in found["rows"]] == [[found["versions"][0]["hash"]]] * 2
    assert found["notes"] == []
    assert "code" not in shown.splitlines()[1]
    with open(toy / "toy.py", "a") as file:
        file.write("# mended\n")
    (toy / "job.yaml").write_text(MIXED.replace("[1.0, 2.0]", "[1.0, 2.0, 3.0]"))
    assert equihpc("submit", "job.yaml", "--cluster", "local", "--wait").returncode == 0
    found, shown = table()
    old, new = (version["hash"] for version in found["versions"])
    assert [row["code"] for row in found["rows"]] == [[old], [old], [new]]
    assert [version["stages"] for version in found["versions"]] == [{"train": 2, "check": 2}, {"train": 1, "check": 1}]
    assert re.search(rf"note: train: rows of 2 code versions: {old}.* \(2 runs.*\), {new}.* \(1 runs", shown)
    assert "rows of 2 code versions" in (toy / "runs" / "job" / "report.html").read_text()
    assert (toy / "runs" / "job" / "report.csv").read_text().splitlines()[-1].endswith(new)
    spoiled = next((toy / "runs" / "job" / "train").glob("value=3*"), None) or next((toy / "runs" / "job" / "train").glob("*value*3*"))
    assert equihpc("invalidate", spoiled.name, "--because", "wrong labels").returncode == 0
    found, shown = table()
    assert [len(row["metrics"]) for row in found["rows"]] == [1, 1, 0]
    assert [row["code"] for row in found["rows"]] == [[old], [old], []]
    assert found["notes"] == []
    assert "stale" in shown


REPORTED = """
  reported:
    - {source: "Somebody, Table 1", params: {train.value: 2.0}, metrics: {toy/x: 0.75}}
    - {source: "Others, p. 3", name: "a [large] model", metrics: {toy/x: 0.5, other/y: 1.0}}
    - {source: "Nobody", params: {train.value: 7.0}, metrics: {toy/x: 0.1}}
"""


def test_what_others_report_stands_beside_and_is_never_mixed(toy: Path, equihpc: Run) -> None:
    (toy / "job.yaml").write_text(MIXED.replace("report: {rows: [train.value]}", "report:\n  rows: [train.value]") + REPORTED)
    assert equihpc("submit", "job.yaml", "--cluster", "local", "--wait").returncode == 0
    found = json.loads(equihpc("report", "job", "--json").stdout)
    first, second = found["rows"]
    assert (first["reported"], second["reported"]) == ({}, {"toy/x": {"value": 0.75, "source": "Somebody, Table 1"}})
    assert second["metrics"]["toy/x"]["mean"] != 0.75
    others = {"name": "a [large] model", "metrics": {"toy/x": {"value": 0.5, "source": "Others, p. 3"}}}
    assert found["reported"] == [others], "and no column that nothing here measures"
    shown = equihpc("report", "job").stdout
    assert re.search(r"reported 0\.750", shown)
    assert "a [large] model" in shown
    assert "reported: Somebody, Table 1\nreported: Others, p. 3\n" in shown
    folder = toy / "runs" / "job"
    assert "reported 0.750" in (folder / "report.html").read_text()
    head, *lines = [line.split(",") for line in (folder / "report.csv").read_text().splitlines()]
    assert [line[head.index("toy/x reported")] for line in lines] == ["", "0.75", "0.5"]
    assert [line[0] for line in lines] == ["1", "2", "a [large] model"]
    assert "no run has {'train.value': 7.0} (Nobody)" in equihpc("plan", "job.yaml", "--cluster", "local").stdout


def test_logs_are_followed_over_nodes_and_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hpc import logs

    for name in ("PAUSE_SECONDS", "CHECK_SECONDS"):
        monkeypatch.setattr(logs, name, 0.0)

    def play(rank: int | None) -> list[str]:
        """What is printed while a run is preempted, goes on with other nodes, and ends in the middle of a line."""
        run = tmp_path / f"run_{rank}"
        run.mkdir()
        steps = iter(
            [
                lambda: (run / "node_0.log").write_text("[0] one\n[1] on"),
                lambda: (run / "node_1.log").write_text("[2] two\n[3] [0] of three\n"),
                lambda: add("node_0.log", "e\nequihpc: preempted\n"),
                lambda: None,
                lambda: add("node_1.log", "[2] again\n"),
                lambda: add("node_10.log", "[20] far\n"),
                lambda: (add("node_0.log", "[0] last"), add("node_1.log", "[2] a \x0c b\r\n")),
            ]
        )

        def add(name: str, text: str) -> None:
            with open(run / name, "a", newline="") as file:
                file.write(text)

        def is_over() -> bool:
            """Something is written just before every answer, also before the last one."""
            step = next(steps)
            step()
            return "last" in (run / "node_0.log").read_text()

        logs.show(run, rank, True, is_over)
        followed = capsys.readouterr().out.splitlines(keepends=True)
        logs.show(run, rank, False, is_over)
        assert sorted(capsys.readouterr().out.splitlines(keepends=True)) == sorted(followed)
        return "".join(followed).split("\n")[:-1]

    assert play(None) == [
        *("[0] one", "[2] two", "[3] [0] of three", "[1] one", "equihpc: preempted"),
        *("[2] again", "[20] far", "[0] last", "[2] a \x0c b\r"),
    ]
    assert play(0) == ["[0] one", "equihpc: preempted", "[0] last"]
    assert play(2) == ["[2] two", "[2] again", "[2] a \x0c b\r"]
    assert play(20) == ["[20] far"]


def test_the_live_screen_shows_what_needs_attention_first_and_fits(toy: Path, equihpc: Run) -> None:
    import fcntl
    import os
    import pty
    import select
    import struct
    import termios
    import time

    values = ", ".join(f"{{value: {number}.0}}" for number in range(12))
    (toy / "job.yaml").write_text(
        "stages: {train: {entry: toy, resources: {gpus: 1}, config: {steps: 600, seconds: 0.1}, "
        f"sweep: {{list: [{values}, {{value: 99.0, fail_at: 1}}]}}}}}}"
    )
    assert equihpc("submit", "job.yaml", "--cluster", "local", "--set", "train.steps=600").returncode == 0
    assert equihpc("status", "--watch", "--json").returncode == 2
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 110, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "hpc.cli", "status", "--watch"],
        cwd=toy,
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | {"TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    shown, deadline = b"", time.monotonic() + 60
    try:
        while b" running" not in re.sub(rb"\x1b\[[\d;?]*[a-zA-Z]", b" ", shown.rpartition(b"\x1b[H")[2]):
            assert time.monotonic() < deadline, shown
            if select.select([main], [], [], 1)[0]:
                shown += os.read(main, 65536)
        time.sleep(0.5)
        os.write(main, b"q")
        while process.poll() is None:
            assert time.monotonic() < deadline, shown
            if select.select([main], [], [], 0.1)[0]:
                shown += os.read(main, 65536)
        assert process.returncode == 0
        assert termios.tcgetattr(terminal)[3] & termios.ICANON, "the terminal is as it was"
    finally:
        process.kill()
        equihpc("cancel", "job")
        os.close(main)
        os.close(terminal)
    frame = re.sub(rb"\x1b\[[\d;?]*[a-zA-Z]", b"", shown.rpartition(b"\x1b[H")[2]).decode().replace("\r", "")
    lines = [line.rstrip() for line in frame.splitlines()]
    assert len(lines) <= 10
    assert lines[0].split()[:4] == ["stage", "run", "state", "segment"]
    order = [word for line in lines[1:6] for word in ("failed", "running", "pending") if f" {word}" in line]
    assert order == sorted(order, key=["failed", "running", "pending"].index)
    assert len(order) == 5
    assert "(showing 1 to 5 of 13)" in frame
    assert "GPU hours used" in frame
