"""`RUNS/JOB/.equihpc/`: what was submitted. An intent is written before each sbatch and the job id after it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.files import append_json, read_json, read_lines, write_json
from hpc.slurm import Allocation, QueueEntry, query


@dataclass(frozen=True, slots=True)
class Submitted:
    """One array as it was handed to Slurm."""

    uid: str
    job_id: str
    cluster: str
    slurm_conf: str | None
    elements: list[list[str]]  # run folders
    mirrors: str | None  # uid
    waits_for: list[str]  # uids
    chain_of: str | None = None  # uid of the first segment, of which these are others; its own for the first; None: no chain
    time: float = 0.0  # when Slurm had taken it

    def name(self, index: int) -> str:
        """What Slurm calls an element; submitit makes an array only of several."""
        return f"{self.job_id}_{index}" if len(self.elements) > 1 else self.job_id


def new_uid() -> str:
    return uuid.uuid4().hex[:12]


class Journal:
    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def of_job(cls, job_dir: Path) -> Journal:
        return cls(job_dir / ".equihpc")

    @property
    def path(self) -> Path:
        return self.folder / "journal.jsonl"

    def write_array(self, elements: Sequence[Sequence[Path]], slots: int, gpus: int, uid: str, chain_of: str | None = None) -> Path:
        """The list that the elements of one array read; returns its place."""
        path = self.folder / "arrays" / f"{uid}.json"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        runs = [[str(run) for run in element] for element in elements]
        write_json(path, {"elements": runs, "slots": slots, "gpus": gpus, "chain_of": chain_of})
        return path

    def add(self, event: str, **record: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        append_json(self.path, {"event": event, "time": time.time(), **record})

    def slurm_confs(self) -> set[str | None]:
        return {record["slurm_conf"] for record in read_lines(self.path) if record["event"] == "intent"}

    def submitted(self, queue: Mapping[str, QueueEntry] | None = None) -> list[Submitted]:
        """Oldest first. Intents whose job id was never written are looked for in `queue` by the job's unique name."""
        records = read_lines(self.path)
        job_ids = {record["uid"]: record["job_id"] for record in records if record["event"] == "submitted"}
        times = {record["uid"]: record["time"] for record in records if record["event"] in ("intent", "submitted")}
        by_name = {entry.job_name.rpartition(".")[2]: name.partition("_")[0] for name, entry in (queue or {}).items()}
        found = []
        for intent in (record for record in records if record["event"] == "intent"):
            uid = intent["uid"]
            job_id = job_ids.get(uid) or by_name.get(uid)
            if job_id is not None:
                elements = (read_json(self.folder / "arrays" / f"{uid}.json") or {"elements": []})["elements"]
                keys = ("cluster", "slurm_conf", "mirrors", "waits_for")
                chain = intent.get("chain_of")
                more = {key: intent[key] for key in keys}
                found.append(Submitted(uid=uid, job_id=job_id, elements=elements, chain_of=chain, time=times[uid], **more))
        return found

    def adopt(self) -> None:
        """Note the job ids of arrays whose submission died between sbatch and its record."""
        records = read_lines(self.path)
        known = {record["uid"] for record in records if record["event"] == "submitted"}
        for conf in {record["slurm_conf"] for record in records if record["event"] == "intent" and record["uid"] not in known}:
            for array in self.submitted(query(conf)[0]):
                if array.uid not in known:
                    self.add("submitted", uid=array.uid, job_id=array.job_id)

    def local_runs(self) -> dict[str, float]:
        """Run folders that local runners were given, and when (the last time)."""
        return {
            path: record["time"]
            for record in read_lines(self.path)
            if record["event"] == "local"
            for uid in record["uids"]
            for element in (read_json(self.folder / "arrays" / f"{uid}.json") or {"elements": []})["elements"]
            for path in element
        }


def dependents(folder: Path, allocation: Allocation) -> tuple[list[str], list[str]]:
    """Slurm's names of what waits for this element and has all its upstream complete, and of later segments of the same runs."""
    submitted = Journal(folder).submitted()
    mine = next((array for array in submitted if array.job_id == allocation.array), None)
    if mine is None:
        return [], []
    first = mine.chain_of or mine.uid
    waiting, segments = [], []
    for position, array in enumerate(submitted):
        if array.chain_of == first and position > submitted.index(mine):
            segments.append(array.name(allocation.index or 0))
        elif array.chain_of not in (None, array.uid):
            continue  # of a chain that waits, the first segment alone; the others wait for that one
        elif array.mirrors == first and allocation.index is not None:
            if _can_start(array.elements[allocation.index]):
                waiting.append(array.name(allocation.index))
        elif array.waits_for == [first] and len(mine.elements) == 1 and _can_start(path for element in array.elements for path in element):
            waiting.append(array.job_id)
    return waiting, segments


def _can_start(run_dirs: Iterable[str]) -> bool:
    """Whether all that these runs are made from is complete: a release lifts every dependency of a job."""
    specs = (read_json(Path(path) / "spec.json") or {"upstream": {}} for path in run_dirs)
    return all((Path(upstream) / "COMPLETE").exists() for spec in specs for upstream in spec["upstream"].values())
