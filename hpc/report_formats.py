"""The table for papers and notes: LaTeX (booktabs) and Markdown. What has no number yet is shown as what it is."""

from __future__ import annotations

import re
import string
from collections import Counter

from hpc.frozen import ResultSet
from hpc.report import Cell, Row, Table, labels

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "[": "{[}",  # at the beginning of a row it would be an option of the line break before it
    "*": "{*}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def short_name(parameter: str) -> str:
    """A parameter without its stage."""
    return parameter.partition(".")[2] or parameter


def is_partial(table: Table, row: Row) -> bool:
    states = {status.record.id: status.state for status in table.statuses}
    return any(states[run] != "complete" for run in row.runs)


def runs_text(table: Table, row: Row) -> str:
    """`4 of 6: 1 failed, 1 running` of all runs that belong to a row; `6` where all are complete."""
    of_row = set(row.runs)
    counts = Counter(status.state for status in table.statuses if status.record.id in of_row)
    complete = counts.pop("complete", 0)
    if not counts:
        return str(complete)
    return f"{complete} of {complete + counts.total()}: " + ", ".join(f"{count} {state}" for state, count in counts.items())


# --- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(found: ResultSet) -> str:
    table = found.table
    with_runs, with_code = any(is_partial(table, row) for row in table.rows), bool(table.notes)
    names = [*map(short_name, table.parameters), *table.metrics, *(["runs"] if with_runs else []), *(["code"] if with_code else [])]
    lines = [
        _line(map(_markdown, names)),
        _line(["---"] * len(table.parameters) + ["---:"] * len(table.metrics) + ["---"] * (with_runs + with_code)),
    ]
    for row in table.rows:
        texts = [_markdown(text) for text in labels(table, row)]
        if row.is_baseline and texts:
            texts[-1] += " (baseline)"
        for metric in table.metrics:
            text, difference = row.cells[metric].text(table.digits), table.difference(row, metric)
            text += f" ({difference.beside(row.cells[metric], table.digits)})" if difference is not None else ""
            text += f" (reported {row.reported[metric][0]:.{table.digits}f})" if metric in row.reported else ""
            texts.append(_markdown(text))
        texts += [_markdown(runs_text(table, row)) if row.runs else "–"] if with_runs else []
        texts += [_markdown(", ".join(row.code))] if with_code else []
        lines.append(_line(texts))
    more = [f"Note: {_markdown(note)}" for note in found.notes]
    more += [f"Reported: {_markdown(source)}" for source in table.sources]
    more += [f"{_markdown(fill.text)}: {_code(fill.command)}" for fill in found.fills]
    more += [f"Frozen: {found.frozen}"] if found.frozen else []
    return "\n".join(lines) + "\n" + "".join(f"\n{text}\n" for text in more)


def _line(cells: object) -> str:
    return f"| {' | '.join(cells)} |"  # type: ignore[arg-type]


def _code(text: str) -> str:
    """In more backticks than stand together in it."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>~\[\]])", r"\\\1", " ".join(text.split()))


# --- LaTeX -------------------------------------------------------------------------------------------------------------


def latex(found: ResultSet) -> str:
    r"""A `tabular` for `\usepackage{booktabs}`; values of publications are in italics with a letter for the source below."""
    table = found.table
    letters = {source: string.ascii_lowercase[number % 26] * (1 + number // 26) for number, source in enumerate(table.sources)}
    names = [*map(short_name, table.parameters), *table.metrics]
    lines = [f"% {' '.join(text.split())}" for text in _remarks(found)]
    lines += [rf"\begin{{tabular}}{{{'l' * len(table.parameters)}{'r' * len(table.metrics)}}}", r"\toprule"]
    lines += [" & ".join(map(escape, names)) + r" \\", r"\midrule"]
    for row in table.rows:
        texts = [escape(text) for text in labels(table, row)]
        if row.is_baseline and texts:
            texts[-1] += " (baseline)"
        for metric in table.metrics:
            cell, difference = row.cells[metric], table.difference(row, metric)
            parts = [_latex_cell(cell, table.digits)] if cell.n or cell.waiting or metric not in row.reported else []
            parts += [f"(${_beside(difference, cell, table.digits)}$)"] if difference is not None else []
            if metric in row.reported:
                value, source = row.reported[metric]
                parts.append(rf"\textit{{{value:.{table.digits}f}}}\textsuperscript{{{letters[source]}}}")
            texts.append(" ".join(parts))
        lines.append(" & ".join(texts) + r" \\")
    lines.append(r"\bottomrule")
    for source, letter in letters.items():
        lines.append(rf"\multicolumn{{{len(names)}}}{{l}}{{\footnotesize \textsuperscript{{{letter}}}reported: {escape(source)}}} \\")
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def _remarks(found: ResultSet) -> list[str]:
    lines = [f"note: {note}" for note in found.notes] + [f"{fill.text}: {fill.command}" for fill in found.fills]
    return [f"frozen: {found.frozen}", *lines] if found.frozen else lines


def _latex_cell(cell: Cell, digits: int) -> str:
    states = "/".join(sorted(set(cell.waiting.values())))
    if not cell.n:
        return rf"\emph{{{escape(states)}}}" if states else "--"
    spread = rf" \pm {cell.std:.{digits}f}" if cell.std is not None else ""
    n = rf"{cell.n} of {cell.n + len(cell.waiting)}: \emph{{{escape(states)}}}" if cell.waiting else str(cell.n)
    return (
        f"${cell.mean:.{digits}f}{spread}$" + (f" ({n})" if spread or cell.waiting else "") + (f" {escape(cell.mark)}" if cell.mark else "")
    )


def _beside(difference: Cell, cell: Cell, digits: int) -> str:
    return difference.beside(cell, digits).replace("±", r"\pm")


def escape(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in " ".join(text.split()))
