"""Commands for space and safe-keeping: gc, archive, restore."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hpc.commands.common import DEFAULT_RUNS, JSON, NAME, RUNS, find_job, find_run, make_console, print_json, statuses_of

if TYPE_CHECKING:
    from rich.console import Console

    from hpc.gc import Item

YES = Annotated[bool, typer.Option("--yes", help="Ask nothing.")]


def register(app: typer.Typer) -> None:
    app.command("gc")(gc_command)
    app.command("archive")(archive_command)
    app.command("restore")(restore_command)


def gc_command(
    name: NAME = None,
    runs: RUNS = DEFAULT_RUNS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    yes: YES = False,
    keep_checkpoints: Annotated[bool, typer.Option("--keep-checkpoints", help="Leave all checkpoints.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also milestones, older checkpoints of cancelled and failed runs, and all cached features.")
    ] = False,
    json_: JSON = False,
) -> None:
    """Remove what a job does not need any more: optimizer state of complete runs whose weights are exported, and what was left over."""
    from hpc import gc

    job_dir, job = find_job(runs, name)
    options = gc.Options(keep_checkpoints, everything)
    items = gc.find(job_dir, options)
    console = make_console(to_stderr=json_)
    removed: list[gc.Item] = []
    notes: list[str] = []
    if not json_ or not (yes or dry_run):
        _show(items, job.name, console)
    if items and not dry_run and (yes or typer.confirm("remove these?", err=json_)):
        removed, notes = gc.remove(job_dir, items, options)
    if json_:
        listed = [{"path": str(i.path), "kind": i.kind, "bytes": i.num_bytes, "inodes": i.inodes, "removed": i in removed} for i in items]
        print_json({"job": job.name, "items": listed, "bytes": sum(i.num_bytes for i in items), "notes": notes})
        return
    if removed:
        from hpc.view import size

        freed = f"{size(sum(item.num_bytes for item in removed))} and {sum(item.inodes for item in removed):,} inodes"
        console.print(f"removed {len(removed)} items: {freed} are free again")
    for note in notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)


def _show(items: list[Item], job: str, console: Console) -> None:
    from rich.table import Table

    from hpc import gc
    from hpc.view import size

    if not items:
        console.print(f"{job}: there is nothing to remove")
        return
    table = Table(title=f"{job}: may be removed", title_justify="left", header_style="bold")
    for heading in ("what", "items", "size", "inodes"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for kind, (count, num_bytes, inodes) in gc.totals(items).items():
        table.add_row(kind, str(count), size(num_bytes), f"{inodes:,}")
    console.print(table)
    for item in items[:10]:
        console.print(f"  {item.path}", style="dim", soft_wrap=True, markup=False)
    if len(items) > 10:
        console.print(f"  and {len(items) - 10} more; --dry-run --json lists all", style="dim")


def archive_command(
    run: Annotated[list[str], typer.Argument(help="Complete runs (ids, hashes or unique parts).")],
    runs: RUNS = DEFAULT_RUNS,
    to: Annotated[Optional[Path], typer.Option("--to", help="The file, or a folder for several. Default: this folder.")] = None,  # noqa: UP045
    with_checkpoints: Annotated[bool, typer.Option("--with-checkpoints", help="The optimizer's state too.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove each folder when its archive has been read back.")] = False,
    json_: JSON = False,
) -> None:
    """One tar per run with all that evaluations and the report need; `equihpc restore` puts it back."""
    from hpc import archive
    from hpc.errors import UserError

    statuses = [find_run(runs.resolve(), text) for text in run]
    into = to if to is not None and to.is_dir() else Path() if to is None else None
    if into is None and len(statuses) > 1:
        raise UserError(f"--to {to}: for several runs give a folder that exists")
    written = []
    for status in statuses:
        job_dir, job = find_job(runs, status.path.parent.parent.name)
        target = to if into is None and to is not None else (into or Path()) / archive.file_name(status)
        manifest = archive.write(status, job, target, with_checkpoints)
        if remove:
            archive.remove(status, statuses_of(job_dir, job, former=True)[0])
        written.append({"id": status.record.id, "file": str(target), "files": len(manifest.files), "bytes": target.stat().st_size})
        if not json_:
            gone = ", its folder is removed" if remove else ""
            make_console().print(f"{status.record.id}: {len(manifest.files)} files in {target}{gone}", soft_wrap=True)
    if json_:
        print_json({"archives": written, "removed": remove})


def restore_command(
    file: Annotated[list[Path], typer.Argument(help="Archives that equihpc archive wrote.")], runs: RUNS = DEFAULT_RUNS, json_: JSON = False
) -> None:
    """Put archived runs back under the runs' folder. Nothing is overwritten."""
    from hpc import archive

    targets = []
    for path in file:
        targets.append(archive.restore(path, runs.resolve()))
        if not json_:
            make_console().print(f"restored {targets[-1]}", soft_wrap=True)
    if json_:
        print_json({"restored": [str(target) for target in targets]})
