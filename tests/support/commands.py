"""The command line, called from within."""

from __future__ import annotations

import pytest

from avsep.cli import main
from support.tones import TINY_TASKS

TASKS = ";".join(",".join(names) for names in TINY_TASKS)


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    return int(stop.value.code or 0)
