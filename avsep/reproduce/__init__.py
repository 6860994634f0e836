"""The paper's tables and figures from one resumable command: grids of runs, a runner, and ours beside the paper's.

A grid's unit is a :class:`~avsep.reproduce.grid.Cell`: one method on one base separator with one seed. Cells that
several tables share are run once, and so is a first task that several cells share.
"""

from avsep.reproduce.grid import BASES, TABLES, Cell, Grid, Row, build_grid
from avsep.reproduce.plots import write_table
from avsep.reproduce.preset import GridPreset, load_grid_preset
from avsep.reproduce.results import CellResult, ResultStore
from avsep.reproduce.runner import LAUNCHERS, run_grid
from avsep.reproduce.tables import Table, build_table, render_into
from avsep.reproduce.tuning import Choice, build_tuning, choices

__all__ = [
    "BASES",
    "LAUNCHERS",
    "TABLES",
    "Cell",
    "CellResult",
    "Choice",
    "Grid",
    "GridPreset",
    "ResultStore",
    "Row",
    "Table",
    "build_grid",
    "build_table",
    "build_tuning",
    "choices",
    "load_grid_preset",
    "render_into",
    "run_grid",
    "write_table",
]
