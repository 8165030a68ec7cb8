"""Commands that look at a job: status, why, logs, report, tensorboard; and what `submit --wait` shows."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hpc.commands.common import DEFAULT_RUNS, JSON, NAME, RUN, RUNS, find_job, find_run, make_console, print_json, statuses_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from hpc.cluster import Cluster
    from hpc.frozen import ResultSet
    from hpc.status import JobRecord, RunStatus

WATCH_SECONDS = 2.0  # between two looks at the run folders; Slurm is asked less often


def register(app: typer.Typer) -> None:
    app.command("status")(status_command)
    app.command("report")(report_command)
    app.command("logs")(logs_command)
    app.command("why")(why_command)
    app.command("tensorboard")(tensorboard_command)


def wait(job_dir: Path, profile: Cluster, console: Console, json_: bool, waiting: int, more: Callable[[], int]) -> int:
    """Watch, submit what the site's limit kept back, then show the table. 1 if a run failed.

    Ctrl-C stops local runs at their next step and leaves Slurm's alone.
    """
    from hpc import local, slurm, view
    from hpc.cancel import BUSY
    from hpc.status import JobRecord

    job = JobRecord.read(job_dir)
    submitted = time.monotonic()

    def collect() -> tuple[list[RunStatus], str, float]:
        nonlocal waiting, submitted
        statuses, note, hours = _look(job_dir, job)
        num_busy = sum(status.state in BUSY for status in statuses)
        if waiting and not note and (not num_busy or time.monotonic() - submitted > 10 * profile.poll_seconds):
            waiting, submitted = more(), time.monotonic()
            statuses, note, hours = _look(job_dir, job)
            if waiting and not any(status.state in BUSY for status in statuses) and not slurm.query(job.slurm_conf)[0]:
                waiting = 0  # the queue is empty, and they did not fit
        return statuses, note, hours

    try:
        statuses = view.watch(collect, WATCH_SECONDS if profile.scheduler == "slurm" else 0.5, console, lambda: waiting > 0)
    except KeyboardInterrupt:
        if profile.scheduler == "local":
            console.print("\nstopping: every run saves at its next step …")
            local.stop(job_dir)
            console.print("stopped; the same submit continues")
        else:
            console.print(f"\nthe jobs go on; equihpc status {job.name} shows them, equihpc cancel {job.name} ends them")
        return 130
    show_report(job_dir, job, statuses, console, json_)
    bad = [status for status in statuses if status.state not in ("complete", "purged")]  # what is purged was complete
    for status in bad:
        console.print(  # a cause is somebody's text, not markup
            f"{status.record.stage}/{status.record.id}: {status.state}" + (f": {status.cause}" if status.cause else ""),
            markup=False,
            style="red",
            soft_wrap=True,
        )
    if bad:
        console.print(f"see equihpc logs {bad[0].record.id}", soft_wrap=True)
    return 1 if bad else 0


def show_report(job_dir: Path, job: JobRecord, statuses: list[RunStatus], console: Console, json_: bool) -> ResultSet:
    """The table, and `report.csv` and `report.html` in the job's folder."""
    from hpc import page
    from hpc.files import write_atomic

    found = _result_set(job_dir, job, statuses)
    csv_path, html_path = job_dir / "report.csv", job_dir / "report.html"
    if json_:
        print_json(found.to_json())
    else:
        _show_results(found, console)
    written = f"table: {csv_path} and {html_path}"
    try:
        write_atomic(csv_path, found.table.to_csv())
        page.write(found, html_path)
    except OSError as error:  # somebody else's job, an archive, a full disk: the numbers are shown all the same
        written = f"note: {csv_path.name} and {html_path.name} are not both written: {error}"
    if json_:
        return found
    console.print(written, soft_wrap=True, markup=False)
    console.print(f"curves and pictures: equihpc tensorboard {job.name}")
    return found


def _frozen_page(found: ResultSet, path: Path) -> str:
    """The page beside a frozen set, unless another file of that name is there."""
    from hpc import page

    try:
        if path.exists() and page.FROZEN_MARK not in path.read_text(errors="replace"):
            return f"no page: {path} is there already and is none of a frozen set"
        page.write(found, path, live=False)
    except OSError as error:
        return f"no page: {error}"
    return f"page: {path}"


def _result_set(job_dir: Path, job: JobRecord, statuses: list[RunStatus]) -> ResultSet:
    """With what is no longer as it was frozen."""
    from hpc import frozen

    found = frozen.collect(job, statuses)
    for path, before in frozen.known(job_dir).items():
        found.changes += frozen.changes(before, found.table, path.name)
    return found


def _show_results(found: ResultSet, console: Console) -> None:
    from hpc import view

    console.print(view.result_table(found.table))
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)
    for source in found.table.sources:
        console.print(f"reported: {source}", style="dim", soft_wrap=True, markup=False)
    for fill in found.fills:
        console.print(f"missing: {fill.text}: {fill.command}", soft_wrap=True, markup=False)


def _look(job_dir: Path, job: JobRecord) -> tuple[list[RunStatus], str, float]:
    """(statuses, note, GPU hours used); Slurm is asked only where the user's last answer is too old."""
    from hpc.budget import used_hours
    from hpc.status import lift_holds

    statuses, note = statuses_of(job_dir, job, fresh=False)
    lift_holds(statuses, job.slurm_conf)
    return statuses, note, used_hours(job_dir, [*job.records, *job.former])


def status_command(
    name: NAME = None,
    runs: RUNS = DEFAULT_RUNS,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="One live screen until nothing runs any more; q leaves.")] = False,
    json_: JSON = False,
) -> None:
    """The state of every run of a job. Slurm is not asked more often than the profile's poll_seconds."""
    from hpc import view
    from hpc.cancel import BUSY
    from hpc.errors import UserError

    if watch and json_:
        raise UserError("--json is one answer: leave out --watch")
    job_dir, job = find_job(runs, name)
    console = make_console()
    if watch:
        try:
            view.watch(lambda: _look(job_dir, job), WATCH_SECONDS, console)
        except KeyboardInterrupt:
            return
    statuses, note, hours = _look(job_dir, job)
    present = {status.record.hash for status in statuses}
    everything = statuses_of(job_dir, job, former=True, fresh=False)[0] if job.former else []
    former = [status for status in everything if status.record.hash not in present and status.state in BUSY]
    if json_:
        found = {"runs": [status.to_json() for status in statuses], "former": [status.to_json() for status in former]}
        print_json({"job": job.name, "note": note, "gpu_hours": hours, **found})
        return
    console.print(view.status_table(statuses, hours=hours))
    if former:
        first = former[0].record.id
        console.print(f"and {len(former)} runs in flight that left the job's file, for example {first}; submit --prune cancels them")
    if note:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)


def report_command(
    name: Annotated[Optional[str], typer.Argument(help="A job's name, or a frozen set's FILE.json; default: the newest job.")] = None,  # noqa: UP045
    runs: RUNS = DEFAULT_RUNS,
    json_: JSON = False,
    csv: Annotated[bool, typer.Option("--csv", help="One line per row.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="A tabular for booktabs.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="For notes and issues.")] = False,
    freeze: Annotated[Optional[Path], typer.Option("--freeze", help="Keep these numbers in a new file while the runs go on.")] = None,  # noqa: UP045
) -> None:
    """The table of a job's results so far; also writes report.csv and report.html. Or a frozen set, and what has changed since."""
    from hpc import frozen, report_formats
    from hpc.errors import UserError

    chosen = [option for option, is_chosen in (("json", json_), ("csv", csv), ("latex", latex), ("markdown", markdown)) if is_chosen]
    if len(chosen) > 1:
        raise UserError(f"one format at a time, not --{' and --'.join(chosen)}")
    console = make_console(to_stderr=bool(chosen))
    if name is not None and name.endswith(".json"):
        if freeze is not None:
            raise UserError(f"{name} is frozen already: --freeze takes a job's name")
        path = Path(name)
        found = frozen.load(path)
        if (runs / found.table.job / ".equihpc" / "job.json").exists():
            job_dir, job = find_job(runs, found.table.job)
            found.changes = frozen.changes(found, frozen.collect(job, statuses_of(job_dir, job)[0]).table, path.name)
        if not chosen:
            _show_results(found, console)
            console.print(f"frozen {found.frozen}; {_frozen_page(found, path.with_suffix('.html'))}", soft_wrap=True, markup=False)
    else:
        job_dir, job = find_job(runs, name)
        statuses = statuses_of(job_dir, job)[0]
        found = _result_set(job_dir, job, statuses) if chosen else show_report(job_dir, job, statuses, console, json_=False)
        if freeze is not None:
            forgotten = frozen.freeze(found, freeze, job_dir)
            missing = f"; of some cells numbers are missing: {'; '.join(fill.text for fill in found.fills)}" if found.fills else ""
            console.print(f"frozen: {freeze}{missing}", soft_wrap=True)
            if forgotten:
                console.print(f"note: {forgotten}", style="yellow", soft_wrap=True, markup=False)
    if json_:
        print_json(found.to_json())
    elif csv:
        print(found.table.to_csv(), end="")
    elif latex:
        print(report_formats.latex(found), end="")
    elif markdown:
        print(report_formats.markdown(found), end="")
    if csv or latex:  # of which nothing is seen in a paper or a spreadsheet
        for note in found.notes:
            console.print(f"note: {note}", style="yellow", soft_wrap=True, markup=False)


def logs_command(
    run: RUN,
    runs: RUNS = DEFAULT_RUNS,
    rank: Annotated[Optional[int], typer.Option("--rank", help="Only this rank's lines.")] = None,  # noqa: UP045
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the run goes on.")] = False,
) -> None:
    """What the ranks of a run printed."""
    from hpc import logs

    status = find_run(runs.resolve(), run, fresh=False)
    logs.show(
        status.path,
        rank,
        follow,
        is_over=lambda: find_run(runs.resolve(), status.record.hash, fresh=False).state not in ("running", "pending", "requeued"),
    )


def why_command(run: RUN, runs: RUNS = DEFAULT_RUNS, json_: JSON = False) -> None:
    """What happened to a run: its attempts, where, how each ended and why, and what will happen next."""
    from hpc import why

    status = find_run(runs.resolve(), run, fresh=False)
    job_dir, job = find_job(runs, status.path.parent.parent.name)
    story = why.tell(status, statuses_of(job_dir, job, former=True, fresh=False)[0], job)
    if json_:
        print_json(story.to_json())
        return
    console = make_console()
    console.print(f"{status.record.stage}/{status.record.id}: {status.state}", soft_wrap=True, markup=False)
    for attempt in story.attempts:
        console.print(why.attempt_text(story, attempt), soft_wrap=True, markup=False)
        if error := why.error_text(attempt):
            console.print(error, style="dim", soft_wrap=True, markup=False)
    for name, text in story.jobs.items():
        console.print(f"Slurm job {name} never came to execute it: {text}", soft_wrap=True, markup=False)
    if story.note:
        console.print(f"note: {story.note}", style="yellow", soft_wrap=True, markup=False)
    if story.logs:
        console.print(f"logs: {', '.join(map(str, story.logs))}", soft_wrap=True, markup=False)
    console.print(f"next: {story.next}", style="bold", soft_wrap=True, markup=False)


def tensorboard_command(
    name: NAME = None,
    runs: RUNS = DEFAULT_RUNS,
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 6006,
    write: Annotated[bool, typer.Option("--write", help="Only write the sweep's HParams; start no TensorBoard.")] = False,
) -> None:
    """A job's runs in the browser (TensorBoard on this machine): curves, pictures, points, and the sweep with its metrics (HPARAMS)."""
    from hpc import board, report

    job_dir, job = find_job(runs, name)
    num_sessions = 0
    try:
        num_sessions = board.write(report.build(job, statuses_of(job_dir, job)[0]), job_dir)
    except OSError as error:  # somebody else's job
        if write:
            raise
        note = f"note: the sweep's HParams are as they were: {error}"
        make_console(to_stderr=True).print(note, style="yellow", soft_wrap=True, markup=False)
    if write:
        print(f"{job_dir / board.FOLDER}: {num_sessions} sessions; tensorboard --logdir {job_dir} shows them")
        return
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", "--logdir", str(job_dir), "--port", str(port)])
