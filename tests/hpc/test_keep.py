"""gc removes only what is not needed; an archive brings everything back, and nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc import archive, gc, rebase
from hpc.errors import EquiHPCError, UserError
from hpc.files import locked, write_json
from hpc.journal import Journal
from hpc.runs import Ledger, RunFolder, end_attempt, start_attempt
from hpc.status import JobRecord, Record, RunStatus, collect

Run = Callable[..., subprocess.CompletedProcess[str]]
WEIGHTS = b"weights" * 100


class Job:
    """A job on disk; `queue` is what squeue says, None: it fails."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dir, self.folder = folder / "runs" / "job", folder
        (self.dir / ".equihpc").mkdir(parents=True)
        self.records: list[Record] = []
        self.queue("")
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))

    def queue(self, text: str | None) -> None:
        (self.folder / "squeue").write_text("#!/bin/sh\nexit 1\n" if text is None else f"#!/bin/sh\ncat <<X\n{text}\nX\n")
        (self.folder / "squeue").chmod(0o755)

    def add(self, name: str, *, complete: bool = False, ended: str = "", job_id: str = "", code: str = "new", after: str = "") -> Path:
        self.records.append(Record(name, name, "train", {}, [after] if after else [], 9))
        run = RunFolder(self.dir / "train" / name)
        run.create({"id": name, "code": {"hash": code}, "config": {}, "upstream": {}})
        for step in (2, 4, 6):
            checkpoint = run.path / "checkpoints" / f"step_{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "__0_0.distcp").write_bytes(bytes(1000))
            write_json(checkpoint / "checksums.json", {"files": {"__0_0.distcp": {"bytes": 1000, "sha256": ""}}})
        if job_id:
            Journal.of_job(self.dir).write_array([[run.path]], 1, 0, name)
            Journal.of_job(self.dir).add("intent", uid=name, cluster="x", slurm_conf=None, mirrors=None, waits_for=[])
            Journal.of_job(self.dir).add("submitted", uid=name, job_id=job_id)
            (self.dir / ".equihpc" / "slurm" / name).mkdir(parents=True)
        if ended:
            end_attempt(run, start_attempt(run, {"host": "h", "step": 0}), ended, "cause")
        if complete:
            (run.path / "teacher.safetensors").write_bytes(WEIGHTS)
            write_json(run.result, {"metrics": {"knn/top1": 0.5}, "weights_sha256": hashlib.sha256(WEIGHTS).hexdigest()})
            run.complete.touch()
        write_json(self.dir / ".equihpc" / "job.json", self.record.to_json())
        return run.path

    @property
    def record(self) -> JobRecord:
        return JobRecord("job", "job.yaml", "x", None, str(self.folder / "ledger"), {}, self.records)

    def status(self, name: str) -> RunStatus:
        statuses = collect(self.dir, self.records, Ledger(self.folder / "ledger"))[0]
        return next(status for status in statuses if status.record.id == name)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.dir)) for path in self.dir.rglob("*") if path.is_dir()}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def test_gc_removes_what_is_shown_and_nothing_of_a_run_that_is_needed(job: Job) -> None:
    job.add("done", complete=True, job_id="1")
    (job.add("other-weights", complete=True, code="older") / "teacher.safetensors").write_bytes(b"half")
    (job.add("not-exported", complete=True) / "teacher.safetensors").unlink()
    (job.add("spoiled", complete=True) / ".invalid").write_text("because")
    job.add("queued", job_id="2", ended="stopped")
    failed = job.add("bug", ended="failed", job_id="3")
    (job.add("torn", ended="failed") / "checkpoints" / "step_6" / "__0_0.distcp").write_bytes(b"")
    for run in (failed, job.dir / "train" / "queued"):
        (run / "checkpoints" / ".writing_8").mkdir()
        (run / ".nodes" / "3-0").mkdir(parents=True)
    old, new = (time.strftime("%Y%m%d-%H%M%S", time.localtime(time.time() - days * 86400)) for days in (8, 1))
    for name in (f".stale-x-{old}", f".stale-x-{new}"):
        (job.dir / "train" / name).mkdir()
    for code in ("new", "older", "nobody"):
        (job.dir / ".equihpc" / "code" / code).mkdir(parents=True)
        (job.dir / ".equihpc" / "code" / f"{code}.diff").touch()
        for name in (code, f"{code}.diff"):
            os.utime(job.dir / ".equihpc" / "code" / name, (0, 0))
    (job.dir / ".equihpc" / "code" / "made-now").mkdir()
    outside = job.folder / "elsewhere"
    outside.mkdir()
    (outside / "keep").touch()
    (job.add("linked", complete=True) / "checkpoints" / "step_2").rename(job.folder / "x")
    shutil.rmtree(job.dir / "train" / "linked" / "checkpoints")
    (job.dir / "train" / "linked" / "checkpoints").symlink_to(outside)

    def names(options: gc.Options) -> set[str]:
        return {str(item.path.relative_to(job.dir)) for item in gc.find(job.dir, options)}

    job.queue("2|N/A|2026-01-01T00:00:00|PENDING|Priority|a.queued")
    always = {"train/bug/checkpoints/.writing_8", "train/bug/.nodes", f"train/.stale-x-{old}", ".equihpc/slurm/done"}
    checkpoints = {"train/done/checkpoints", "train/other-weights/checkpoints"}
    assert names(gc.Options(keep_checkpoints=True)) == always
    assert names(gc.Options()) == always | checkpoints
    assert names(gc.Options(everything=True)) == always | checkpoints | {f"train/bug/checkpoints/step_{step}" for step in (2, 4)}
    job.queue("")
    assert names(gc.Options()) == always | checkpoints | {
        ".equihpc/code/nobody",
        ".equihpc/code/nobody.diff",
        "train/queued/checkpoints/.writing_8",
        "train/queued/.nodes",
    }

    before = job.files()
    shown = gc.find(job.dir, gc.Options(everything=True))
    assert before == job.files()
    job.queue("2|N/A|2026-01-01T00:00:00|PENDING|Priority|a.queued")  # submitted while somebody read the table
    with locked(job.dir / "train" / "bug" / ".lock"):
        removed, notes = gc.remove(job.dir, shown, gc.Options(everything=True))
    gone = {str(item.path.relative_to(job.dir)) for item in removed}
    assert gone == {"train/done/checkpoints", f"train/.stale-x-{old}", ".equihpc/slurm/done"}
    assert job.files() == {name for name in before if not any(name == path or name.startswith(f"{path}/") for path in gone)}
    assert sum("is being executed" in note for note in notes) == 4
    assert sum("its run has started" in note for note in notes) == 4
    assert sum("no exported weights in" in note for note in notes) == 1
    assert (outside / "keep").exists()
    assert job.status("done").state == "complete"
    assert gc.size_of(job.dir / "train" / "torn" / "checkpoints" / "step_2")[1] == 3
    gc.remove(job.dir, gc.find(job.dir, gc.Options(everything=True)), gc.Options(everything=True))
    assert sorted(path.name for path in (failed / "checkpoints").iterdir()) == ["step_6"]
    job.queue(None)
    with pytest.raises(EquiHPCError, match=r"Slurm does not answer .* nothing was removed"):
        gc.find(job.dir)


def test_gc_keeps_milestones_unless_all_shall_go(job: Job) -> None:
    checkpoints = job.add("done", complete=True) / "checkpoints"
    marker = json.loads((checkpoints / "step_4" / "checksums.json").read_text())
    write_json(checkpoints / "step_4" / "checksums.json", {**marker, "milestone": True})
    for options, left in ((gc.Options(), ["step_4"]), (gc.Options(), ["step_4"]), (gc.Options(everything=True), [])):
        gc.remove(job.dir, gc.find(job.dir, options), options)
        assert [path.name for path in checkpoints.glob("*")] == left
    assert not checkpoints.exists()


def test_gc_removes_features_that_nobody_used_lately(job: Job) -> None:
    run = job.add("done", complete=True)
    entries = {name: run.parent / gc.CACHE / name for name in ("old", "new", "held")}
    for name, entry in entries.items():
        entry.mkdir(parents=True)
        (entry / "00000.x.safetensors").write_bytes(bytes(500))
        (entry / gc.CACHE_LOCK).touch()
        if name != "new":
            os.utime(entry / gc.CACHE_LOCK, (0, 0))
    (run.parent / gc.CACHE / "not-an-entry").mkdir()
    keep = gc.Options(keep_checkpoints=True)
    shown = gc.find(job.dir, keep)
    assert {item.path.name for item in shown} == {"old", "held"}
    assert gc.totals(shown) == {gc.FEATURES: (2, 1000, 6)}
    with locked(entries["held"] / gc.CACHE_LOCK):
        removed, notes = gc.remove(job.dir, shown, keep)
    assert [item.path.name for item in removed] == ["old"]
    assert notes == [f"{entries['held']}: an evaluation uses these features"]
    job.add("queued", job_id="2")
    job.queue("2|N/A|2026-01-01T00:00:00|PENDING|Priority|a.queued")
    everything = gc.Options(keep_checkpoints=True, everything=True)
    assert not [item for item in gc.find(job.dir, everything) if gc.CACHE in item.path.parts], "a run in the queue may need them"
    job.queue("")
    assert {item.path.name for item in gc.find(job.dir, everything) if item.kind == gc.ALL_FEATURES} == {"new", "held"}


def test_an_archive_leaves_features_out(job: Job) -> None:
    run = job.add("done", complete=True)
    (run / gc.CACHE / "entry").mkdir(parents=True)
    (run / gc.CACHE / "entry" / "00000.x.safetensors").write_bytes(bytes(500))
    assert not any(gc.CACHE in name for name in archive.write(job.status("done"), job.record, job.folder / "a.tar").files)


PROBE = """
import hashlib, json
from pathlib import Path
from pydantic import BaseModel, ConfigDict, Field

class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    value: float = 1.0
    seed: int = 0
    upstream: str | None = None
    def check(self, world_size, upstream_configs):
        pass

def main(config, run_dir, stop):
    x = config["value"]
    if config["upstream"]:  # as an evaluation does: the weights, and the data set of the upstream's own config
        up = Path(config["upstream"])
        data = Path(json.loads((up / "config.json").read_text())["upstream"] or up)
        x += float((up / "weights.safetensors").read_text()) / 3 + json.loads((data / "result.json").read_text())["metrics"]["probe/x"] / 7
    (run_dir / "weights.safetensors").write_text(repr(x))
    (run_dir / "tensorboard").mkdir(exist_ok=True)
    (run_dir / "tensorboard" / "events").write_bytes(bytes(range(256)))
    (run_dir / "checkpoints" / "step_1").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints" / "step_1" / "state").write_text("large")
    return {"metrics": {"probe/x": x}, "weights_sha256": hashlib.sha256(repr(x).encode()).hexdigest()}
"""
JOB = """
stages:
  prepare: {entry: probe, config: {value: 0.1}}
  train: {entry: probe, after: prepare, config: {value: 0.2, upstream: "${prepare}"}}
  evaluate: {entry: probe, after: train, config: {value: 0.3, upstream: "${train}"}}
"""


def test_a_restored_run_is_complete_and_is_evaluated_identically(toy: Path, equihpc: Run) -> None:
    (toy / "probe.py").write_text(PROBE)
    (toy / "job.yaml").write_text(JOB)

    def states(runs: str = "runs") -> dict[str, str]:
        return {run["stage"]: run["state"] for run in json.loads(equihpc("status", "--json", "--runs", runs).stdout)["runs"]}

    assert equihpc("submit", "job.yaml", "--cluster", "local", "--wait").returncode == 0
    first = json.loads(equihpc("report", "--json").stdout)
    paths = {stage: next((toy / "runs" / "job" / stage).iterdir()) for stage in ("prepare", "train", "evaluate")}
    listed = json.loads(equihpc("gc", "--dry-run", "--json").stdout)
    assert {item["path"] for item in listed["items"]} == {str(path / "checkpoints") for path in paths.values()}
    assert (listed["bytes"], listed["items"][0]["inodes"]) == (15, 3)
    refused = equihpc("gc")
    assert refused.returncode == 1, "nobody said yes"
    assert "optimizer state of complete runs" in refused.stdout
    assert "removed 1 items" not in refused.stdout
    assert (paths["evaluate"] / "checkpoints").exists()
    assert "removed 3 items: 15 B and 9 inodes" in equihpc("gc", "--yes").stdout
    assert "there is nothing to remove" in equihpc("gc").stdout
    assert set(states().values()) == {"complete"}
    done = equihpc("archive", paths["prepare"].name, paths["train"].name, "--remove", "--json")
    archives = [toy / written["file"] for written in json.loads(done.stdout)["archives"]]
    assert [path.name for path in archives] == [f"job-{stage}-{paths[stage].name}.tar" for stage in ("prepare", "train")]
    assert not paths["train"].exists()
    assert states() == {"prepare": "purged", "train": "purged", "evaluate": "complete"}
    assert "0 runs started" in equihpc("submit", "job.yaml", "--cluster", "local").stdout, "a purged run is never silently run again"
    (toy / "runs").rename(toy / "away")  # the new place is all there is
    for archived in reversed(archives):
        assert equihpc("restore", archived.name, "--runs", "elsewhere").returncode == 0
    assert states("elsewhere") == {"prepare": "complete", "train": "complete"}
    again = equihpc("submit", "job.yaml", "--cluster", "local", "--wait", "--runs", "elsewhere")
    assert "1 runs started" in again.stdout
    assert "left alone: 2 complete" in again.stdout
    second = json.loads(equihpc("report", "--json", "--runs", "elsewhere").stdout)
    assert second["rows"][0]["metrics"] == first["rows"][0]["metrics"]
    restored = toy / "elsewhere" / "job" / "train" / paths["train"].name
    assert not [
        path
        for path in (*restored.glob("*.json"), restored / "COMPLETE")
        if str(toy / "runs") + "/" in path.read_text().replace("/.equihpc/code", "")
    ]
    assert not (restored / "checkpoints").exists()
    assert (restored / "tensorboard" / "events").read_bytes() == bytes(range(256))
    assert "from the beginning" not in equihpc("why", paths["train"].name, "--runs", "elsewhere").stdout
    refused = equihpc("restore", archives[1].name, "--runs", "elsewhere")
    assert refused.returncode == 2
    assert "nothing is overwritten" in refused.stderr


def test_what_cannot_be_archived_or_removed_is_refused(job: Job) -> None:
    run = job.add("done", complete=True)
    job.add("bug", ended="failed")
    job.add("waits", job_id="5", after="done")
    job.queue("5|N/A|2026-01-01T00:00:00|PENDING|Priority|a.waits")
    to = job.folder / "a.tar"
    with pytest.raises(UserError, match="bug is failed: only complete runs"):
        archive.write(job.status("bug"), job.record, to)
    manifest = archive.write(job.status("done"), job.record, to)
    assert not any(name.startswith("checkpoints") for name in manifest.files)
    assert len(archive.write(job.status("done"), job.record, job.folder / "b.tar", with_checkpoints=True).files) == len(manifest.files) + 6
    with pytest.raises(UserError, match="exists"):
        archive.write(job.status("done"), job.record, to)
    with pytest.raises(UserError, match="waits is under way and needs it"):
        archive.remove(job.status("done"), [job.status(name) for name in ("done", "bug", "waits")])
    with locked(run / ".lock"), pytest.raises(UserError, match="it is being executed"):
        archive.remove(job.status("done"), [])
    (run / "more").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="more is a link"):
        archive.write(job.status("done"), job.record, job.folder / "c.tar")
    assert sorted(path.name for path in job.folder.glob("*.tar")) == ["a.tar", "b.tar"]
    assert run.is_dir()


def rewrite(source: Path, to: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]], dict[str, Any]], None]) -> None:
    """A copy of an archive with other members or another manifest."""
    with tarfile.open(source) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    manifest = json.loads(members[0][1])
    change(members, manifest)
    with tarfile.open(to, "w") as tar:
        for member, content in members:
            if member.name == "manifest.json":
                content = json.dumps(manifest).encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def hostile(kind: bytes = tarfile.REGTYPE, name: str = "job/train/done/spec.json", link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


Members = list[tuple[tarfile.TarInfo, bytes]]
BAD: dict[str, Callable[[Members, dict[str, Any]], Any]] = {
    "absolute": lambda members, manifest: members.append((hostile(name="/var/tmp/evil"), b"")),
    "upwards": lambda members, manifest: members.append((hostile(name="job/train/done/../../../../evil"), b"")),
    "link": lambda members, manifest: members.insert(1, (hostile(tarfile.SYMTYPE, link="/etc/passwd"), b"")),
    "hard link": lambda members, manifest: members.insert(1, (hostile(tarfile.LNKTYPE, link="../../x"), b"")),
    "device": lambda members, manifest: members.insert(1, (hostile(tarfile.CHRTYPE), b"")),
    "twice": lambda members, manifest: members.append(members[-1]),
    "missing": lambda members, manifest: members.pop(),
    "changed": lambda members, manifest: members.__setitem__(-2, (members[-2][0], b"x" + members[-2][1][1:])),
    "manifest upwards": lambda members, manifest: (
        manifest["files"].update({"../../../evil": {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}}),
        members.append((hostile(name="job/train/done/../../../evil"), b"")),
    ),
    "manifest absolute": lambda members, manifest: manifest["files"].update({"/var/tmp/evil": {"bytes": 0, "sha256": ""}}),
    "job upwards": lambda members, manifest: manifest.update(job=".."),
    "stage with a path": lambda members, manifest: manifest.update(stage="a/b"),
    "id of another": lambda members, manifest: manifest.update(id="other"),
    "hash with a path": lambda members, manifest: (manifest.update(hash="../x"), manifest["record"].update(hash="../x")),
    "record": lambda members, manifest: manifest["record"].update(unknown=1),
    "format": lambda members, manifest: manifest.update(format=2),
    "no manifest": lambda members, manifest: members.pop(0),
}


@pytest.mark.parametrize("because", ["wrong labels", None])
def test_what_was_spoiled_since_it_was_archived_is_spoiled_when_it_is_restored(job: Job, because: str | None) -> None:
    path, ledger = job.add("done", complete=True), Ledger(job.folder / "ledger")
    ledger.write("done", {"id": "done", "state": "complete", "result": {"metrics": {}}})
    archive.write(job.status("done"), job.record, job.folder / "done.tar")
    rebase.invalidate([job.status("done")], "wrong labels")
    shutil.rmtree(path)
    assert job.status("done").state == "stale"
    rebase.invalidate([job.status("done")], because)
    archive.restore(job.folder / "done.tar", job.folder / "runs")
    status = job.status("done")
    assert (status.state, status.cause) == (("stale", "invalidated: wrong labels") if because else ("complete", ""))
    assert Ledger(job.folder / "ledger").read("done").get("invalid") == because


@pytest.mark.parametrize("name", BAD)
def test_a_hostile_or_damaged_archive_leaves_nothing_behind(job: Job, name: str) -> None:
    job.add("done", complete=True)
    archive.write(job.status("done"), job.record, job.folder / "good.tar")
    rewrite(job.folder / "good.tar", job.folder / "bad.tar", BAD[name])
    before = set(job.folder.rglob("*"))
    into = job.folder / "there" / "runs"
    with pytest.raises(EquiHPCError):
        archive.restore(job.folder / "bad.tar", into)
    left = {path for path in job.folder.rglob("*") if path.is_file()} - before
    assert {path.name for path in left} <= {"lock"}
    assert not Path("/var/tmp/evil").exists()
    rewrite(job.folder / "good.tar", job.folder / "same.tar", lambda members, manifest: None)
    assert (archive.restore(job.folder / "same.tar", into) / "COMPLETE").exists()


def test_no_flipped_byte_and_no_cut_goes_unnoticed(job: Job) -> None:
    run = job.add("done", complete=True)
    tar = job.folder / "good.tar"
    archive.write(job.status("done"), job.record, tar)
    content = tar.read_bytes()
    truth = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    dice, noticed = random.Random(0), 0
    for number in range(150):
        at = dice.randrange(len(content))
        bad = content[:at] + bytes([content[at] ^ (1 << dice.randrange(8))]) + content[at + 1 :] if number % 3 else content[:at]
        (job.folder / "bad.tar").write_bytes(bad)
        into = job.folder / f"runs{number}"
        try:
            target = archive.restore(job.folder / "bad.tar", into)
        except EquiHPCError:
            noticed += 1
            assert not (into / "job" / "train" / "done").exists()
        else:  # a byte of the padding, or of what only describes
            assert {path.name: path.read_bytes() for path in target.iterdir()} == truth
    assert 20 < noticed < 150
