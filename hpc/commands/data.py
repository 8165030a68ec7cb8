"""`equihpc data …`: what a job needs of data."""

from __future__ import annotations

from typing import Any

import typer

from hpc.commands.common import CLUSTER, FILE, JSON, SET, VARIANT, find_cluster, make_console, make_plan, print_json

app = typer.Typer(help="Data sets: what a job needs and what is there.", no_args_is_help=True, rich_markup_mode=None)


@app.command("needed")
def needed_command(file: FILE, cluster: CLUSTER = None, set_: SET = None, variant: VARIANT = None, json_: JSON = False) -> None:
    """The data sets that a job's runs name: where they should be, whether they are there. Exit code 1 if one is missing."""
    name, profile, _ = find_cluster(cluster)
    plan = make_plan(file, profile, set_ or [], variant)
    found: dict[str, dict[str, Any]] = {}
    for run in plan.runs:
        for data in run.data:
            entry = found.setdefault(
                data, {"place": profile.datasets.get(data, data), "problem": plan.data_problems.get(data), "runs": 0, "stages": []}
            )
            entry["runs"] += 1
            if run.stage not in entry["stages"]:
                entry["stages"].append(run.stage)
    if json_:
        print_json({"cluster": name, "data": found})
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("data set", "runs", "stages", "place", "state"):
            table.add_column(heading, overflow="fold")
        for data, entry in found.items():
            state = Text(entry["problem"] or "there", style="red" if entry["problem"] else "green")
            table.add_row(data, str(entry["runs"]), ", ".join(entry["stages"]), Text(entry["place"]), state)
        make_console().print(table if found else "the job's runs name no data sets: they come from its own stages")
    if any(entry["problem"] for entry in found.values()):
        raise typer.Exit(1)
