"""One tar per run: everything that an evaluation and the report need, with a manifest of checksums as its first member.

A plain tar: `tar -tf` lists it, and weights do not compress.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from hpc import gc
from hpc.cancel import BUSY
from hpc.errors import EquiHPCError, UserError
from hpc.files import locked, read_json, write_atomic, write_json
from hpc.journal import Journal
from hpc.runs import Ledger, RunFolder
from hpc.spec import Frozen
from hpc.status import JobRecord, Record, RunStatus

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
LEFT_OUT = {".lock", ".nodes", ".cancel", ".hold"}  # of an execution, not of the run
BLOCK_BYTES = 2**20
Name = Annotated[str, Field(pattern=r"^[^./\x00-\x1f][^/\x00-\x1f]*$")]  # one part of a path, not hidden


def _inside(files: dict[str, File]) -> dict[str, File]:
    for name in files:
        if name.startswith("/") or ".." in Path(name).parts or str(Path(name)) != name:
            raise ValueError(f"{name!r} is not a file inside of a run's folder")
    return files


class File(Frozen):
    bytes: int
    sha256: str


class Manifest(Frozen):
    format: Literal[1]
    job: Name
    stage: Name
    id: Name
    hash: Annotated[str, Field(pattern=r"^\w+$")]
    runs_dir: str  # at that time
    record: dict[str, Any]  # a status.Record
    file: str  # the job's
    cluster: str
    report: dict[str, Any]
    ledger: dict[str, Any]
    files: Annotated[dict[str, File], AfterValidator(_inside)]

    @model_validator(mode="after")
    def _of_one_run(self) -> Self:
        try:
            record = Record(**self.record)
        except TypeError as error:
            raise ValueError(f"record: {error}") from None
        if (record.stage, record.id, record.hash) != (self.stage, self.id, self.hash):
            raise ValueError(f"record is of {record.stage}/{record.id}, not of {self.stage}/{self.id}")
        return self


def file_name(status: RunStatus) -> str:
    real = status.path.resolve()
    return f"{real.parent.parent.name}-{real.parent.name}-{real.name}.tar"


def write(status: RunStatus, job: JobRecord, to: Path, with_checkpoints: bool = False) -> Manifest:
    """Write the archive of a complete run and read it back; returns its manifest. Raises UserError where it cannot be made."""
    run_dir = status.path.resolve()
    if status.state != "complete":
        raise UserError(f"{status.record.id} is {status.state}: only complete runs can be archived")
    if to.exists():
        raise UserError(f"{to} exists; give another place with --to")
    stage, run_id = run_dir.parent.name, run_dir.name
    manifest = Manifest(
        format=FORMAT,
        job=run_dir.parent.parent.name,
        stage=stage,
        id=run_id,
        hash=status.record.hash,
        runs_dir=str(run_dir.parents[2]),
        record=asdict(replace(status.record, stage=stage, id=run_id)),
        file=job.file,
        cluster=job.cluster,
        report=job.report,
        ledger=Ledger(Path(job.ledger)).read(status.record.hash),
        files={
            name: File(bytes=(run_dir / name).stat().st_size, sha256=gc.sha256(run_dir / name))
            for name in _files(run_dir, with_checkpoints)
        },
    )
    text = (manifest.model_dump_json(indent=1) + "\n").encode()
    temporary = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                _add(tar, MANIFEST, len(text), io.BytesIO(text))
                for name, about in manifest.files.items():
                    with open(run_dir / name, "rb") as content:
                        _add(tar, _member(manifest, name), about.bytes, content)
            file.flush()
            os.fsync(file.fileno())
        check(temporary)
        if to.exists():
            raise UserError(f"{to} exists; give another place with --to")
        temporary.rename(to)
    finally:
        temporary.unlink(missing_ok=True)
    return manifest


def _files(run_dir: Path, with_checkpoints: bool) -> list[str]:
    """Relative names, the marker of completion last."""
    found = []
    for folder, folders, names in os.walk(run_dir):
        here = Path(folder)
        folders[:] = [name for name in folders if not name.startswith((".writing", ".nodes")) and name != gc.CACHE]
        if here == run_dir and not with_checkpoints and "checkpoints" in folders:
            folders.remove("checkpoints")
        for name in (*folders, *names):
            if (here / name).is_symlink():
                raise UserError(f"{here / name} is a link: an archive holds files only; put the file in its place")
        found += [str((here / name).relative_to(run_dir)) for name in names if not (here == run_dir and name in LEFT_OUT)]
    return sorted(found, key=lambda name: (name == "COMPLETE", name))


def _member(manifest: Manifest, name: str) -> str:
    return f"{manifest.job}/{manifest.stage}/{manifest.id}/{name}"


def _add(tar: tarfile.TarFile, name: str, num_bytes: int, content: IO[bytes]) -> None:
    about = tarfile.TarInfo(name)
    about.size, about.mode = num_bytes, 0o600
    tar.addfile(about, content)


def remove(status: RunStatus, statuses: Sequence[RunStatus]) -> None:
    """Remove the folder of an archived run; the ledger keeps it from being run again. Raises UserError where it is in use."""
    waiting = [other.record.id for other in statuses if status.record.id in other.record.after and other.state in BUSY]
    if waiting:
        raise UserError(f"{status.record.id} is archived and not removed: {waiting[0]} is under way and needs it")
    real = status.path.resolve()
    with locked(RunFolder(real).lock, wait=False) as free:
        if not free:
            raise UserError(f"{status.record.id} is archived and not removed: it is being executed")
        gone = real.with_name(f".archived-{real.name}-{uuid.uuid4().hex[:8]}")
        real.rename(gone)
        shutil.rmtree(gone)


def _open(path: Path) -> tuple[tarfile.TarFile, Manifest]:
    """The archive and its manifest. Raises UserError."""
    try:
        tar = tarfile.open(path, mode="r:")  # noqa: SIM115 (the caller closes it)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} cannot be read as a tar: {error}") from None
    try:
        first = tar.next()
        content = (
            tar.extractfile(first) if first and first.name == MANIFEST and first.isreg() and first.size <= MAX_MANIFEST_BYTES else None
        )
        if content is None:
            raise UserError(f"{path} is not an archive that equihpc wrote: it does not begin with its {MANIFEST}")
        return tar, Manifest.model_validate_json(content.read())
    except (tarfile.TarError, ValidationError) as error:
        tar.close()
        raise UserError(f"{path} is not an archive that equihpc wrote: {str(error).splitlines()[-1].strip()}") from None
    except UserError:
        tar.close()
        raise


def check(path: Path, into: Path | None = None) -> Manifest:
    """Read the whole archive against its manifest, and write the files below `into` where that is given.

    Raises EquiHPCError for a damaged one, and for members that are no plain files or lead out of the run's folder.
    """
    tar, manifest = _open(path)
    missing = {_member(manifest, name): (name, about) for name, about in manifest.files.items()}
    with tar:
        try:
            for member in tar:
                if member.name == MANIFEST:
                    continue
                if not member.isreg() or member.name not in missing:
                    raise EquiHPCError(f"{path}: {member.name!r} is not one of the files in its manifest")
                name, about = missing.pop(member.name)
                tarfile.data_filter(member.replace(name=name, deep=False), str(into or path.parent))
                content = tar.extractfile(member)
                assert content is not None  # it is a file
                if member.size != about.bytes or _copy(content, into / name if into else None) != about.sha256:
                    raise EquiHPCError(f"{path} is damaged: {member.name} is not what its manifest says")
        except tarfile.TarError as error:
            raise EquiHPCError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if missing:
        raise EquiHPCError(f"{path} is damaged: {len(missing)} files are missing, for example {next(iter(missing))}")
    return manifest


def _copy(content: IO[bytes], to: Path | None) -> str:
    """Returns the sha256 of what was copied (or only read)."""
    digest = hashlib.sha256()
    if to:
        to.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(to, "xb") if to else io.BytesIO() as file:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
            if to:
                file.write(block)
        if to:
            file.flush()
            os.fsync(file.fileno())
    return digest.hexdigest()


def restore(path: Path, runs_dir: Path) -> Path:
    """Put an archived run back; returns its folder. Raises UserError where the folder exists, EquiHPCError for a bad archive.

    Paths in its spec and config that led into the runs' folder of that time lead into this one.
    """
    tar, manifest = _open(path)
    tar.close()
    stage_dir = runs_dir / manifest.job / manifest.stage
    target = stage_dir / manifest.id
    with locked(runs_dir / manifest.job / ".equihpc" / "lock"):
        if os.path.lexists(target):
            raise UserError(f"{target} exists: nothing is overwritten; move it away first")
        temporary = stage_dir / f".restoring-{manifest.id}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True, mode=0o700)
        try:
            check(path, temporary)
            for name in ("spec.json", "config.json", "COMPLETE"):  # which holds the config too
                if (data := read_json(temporary / name)) is not None:
                    write_json(temporary / name, _moved(data, manifest.runs_dir, str(runs_dir)))
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _make_known(runs_dir, manifest, target)
    return target


def _moved(data: Any, old: str, new: str) -> Any:
    if isinstance(data, dict):
        return {key: _moved(value, old, new) for key, value in data.items()}
    if isinstance(data, list):
        return [_moved(value, old, new) for value in data]
    return new + data[len(old) :] if isinstance(data, str) and data.startswith(old.rstrip("/") + "/") else data


def _make_known(runs_dir: Path, manifest: Manifest, target: Path) -> None:
    """In the ledger, and in the job's record where the run is not yet in it. A job that was never submitted here has a record
    of what was restored."""
    job_dir, record = runs_dir / manifest.job, Record(**manifest.record)
    if (job_dir / ".equihpc" / "job.json").exists():
        job = JobRecord.read(job_dir)
        if all(known.hash != record.hash for known in (*job.records, *job.former)):
            if Journal.of_job(job_dir).path.exists():
                job.former.append(record)
            else:  # upstream first
                job.records.insert(next((i for i, other in enumerate(job.records) if record.id in other.after), len(job.records)), record)
    else:
        job = JobRecord(manifest.job, manifest.file, manifest.cluster, None, str(runs_dir / ".ledger"), manifest.report, [record])
    write_json(job_dir / ".equihpc" / "job.json", job.to_json())
    known = {"id": record.id, "state": "complete", **manifest.ledger, "result": read_json(target / "result.json"), "path": str(target)}
    ledger = Ledger(Path(job.ledger))
    if because := ledger.read(record.hash).get("invalid"):  # since it was archived
        known["invalid"] = because
        write_atomic(RunFolder(target).invalid_mark, because + "\n")
    ledger.write(record.hash, known)
