"""A board as CSV, Markdown, pictures and one HTML page with filters."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from avsep.errors import MissingExtraError
from avsep.evaluation.drawing import markup
from avsep.files import write_text
from avsep.registry import MEMORIES, MIXERS, STRATEGIES
from avsep.reproduce.grid import BASE_TITLES, Grid, Row
from avsep.reproduce.plots import plot_table
from avsep.reproduce.tables import Line, Table, csv_rows, markdown, stars

__all__ = ["board_rows", "write_board"]

COLUMNS = {
    "method": "method",
    "sdr": "SDR",
    "difference": "difference",
    "least": "",
    "sir": "SIR",
    "sar": "SAR",
    "forgetting": "forgetting",
    "staleness": "staleness",
    "kept": "kept, MB",
    "updates": "updates",
    "seconds": "core s",
    "seeds": "seeds",
}


def board_rows(
    tables: Sequence[Table], grid: Grid, titles: Mapping[str, str], references: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """What the page shows of each row, as plain data; ``titles`` are the budgets' by table."""
    papers: dict[str, str] = {}
    for name, of_base in grid.rows.items():
        control = next((table.control for table in tables if table.name == name), "")
        for rows in of_base.values():
            usual = next((row.memory.name for row in rows if row.name == control and row.memory), None)
            papers |= {row.name: _papers(row, usual) for row in rows}
    made = []
    for table in tables:
        for base, lines in table.lines.items():
            for line in lines:
                role = "control" if line.row == table.control else "reference" if line.row in references else ""
                known = {"base": base, "budget": titles[table.name], "role": role, "source": papers.get(line.row, "")}
                made.append(known | _row(line))
    return made


def _papers(row: Row, usual_memory: str | None) -> str:
    """Where the parts of a row come from, beside what the control has too."""
    found = [STRATEGIES.get(name).source for name in (row.strategy, *(ref.name for ref in row.beside))]
    others = []
    if mixer := row.train.get("mixer"):
        others.append(MIXERS.get(mixer["name"]).source)
    if row.memory is not None and row.memory.name != usual_memory:
        others.append(MEMORIES.get(row.memory.name).source)
    if others and row.strategy == "finetune" and not row.beside:
        found = []
    return "; ".join(dict.fromkeys(part for text in (*found, *others) for part in text.split("; ")))


def _row(line: Line) -> dict[str, Any]:
    ours = line.ours
    sdr = ours.values.get("sdr") if ours else None
    difference = ours.differences.get("sdr") if ours else None
    kept = ours.memory_bytes if ours else None
    found: dict[str, Any] = {
        "name": line.row,
        "method": line.label,
        "memory": line.memory,
        "sdr": sdr and sdr.mean,
        "low": sdr and sdr.low,
        "high": sdr and sdr.high,
        "difference": difference and difference.mean,
        "least": difference and difference.low,
        "most": difference and difference.high,
        "stars": "" if difference is None else stars(difference, line.p_holm),
        "kept": None if kept is None else kept / 1e6,
        "updates": line.updates,
        "seconds": ours.seconds if ours else None,
        "seeds": len(ours.seeds) if ours else 0,
        "full": bool(ours) and not line.missing,
    }
    for name in ("sir", "sar", "forgetting", "staleness"):
        value = ours.values.get(name) if ours else None
        found[name] = value and value.mean
    return found


def write_board(
    folder: Path,
    name: str,
    tables: Sequence[Table],
    grid: Grid,
    *,
    title: str,
    titles: Mapping[str, str],
    lead: Sequence[str],
    references: Sequence[str] = (),
) -> list[Path]:
    """Write ``NAME.md``, ``NAME.csv``, ``NAME.html`` and a picture for each table; returns what was written."""
    from avsep import __version__

    rows = [{"budget": titles[table.name], **row} for table in tables for row in csv_rows(table)]
    buffer = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row)) or ["budget"]
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    written = [folder / f"{name}.csv", folder / f"{name}.md", folder / f"{name}.html"]
    write_text(written[0], buffer.getvalue())
    write_text(written[1], "\n".join(markdown(table) for table in tables))
    bases = {base: BASE_TITLES.get(base, base) for table in tables for base in table.lines}
    labels = (x.label for t in tables for lines in t.lines.values() for x in lines if x.row == t.control)
    control = next(labels, "the control")
    found = board_rows(tables, grid, titles, references)
    several = len({row["updates"] for row in found if row["updates"] is not None}) > 1
    data = json.dumps(found).replace("<", "\\u003c")
    page = _template().render(
        version=__version__,
        title=title,
        lead=list(lead),
        bases=bases,
        budgets=list(titles.values()),
        columns=COLUMNS if several else {key: head for key, head in COLUMNS.items() if key != "updates"},
        control=control,
        notes=list(dict.fromkeys(note for table in tables for note in table.notes)),
        rows=markup(data),
    )
    write_text(written[2], page)
    for table in tables:
        if any(line.ours for lines in table.lines.values() for line in lines):
            written.append(folder / f"{name}{'' if len(tables) == 1 else f'-{_slug(table.name)}'}.png")
            plot_table(table, written[-1])
    return written


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


def _template() -> Any:
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("Jinja2", "report", "the page") from None

    def load(name: str) -> str:
        package = "avsep.reproduce" if name == "board.html" else "avsep.evaluation"
        return resources.files(package).joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("board.html")
