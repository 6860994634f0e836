"""The ``avsep`` command. One module a command; heavy imports happen inside the command that needs them."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Entry point. A user's mistake ends in one line on standard error and exit code 2, never in a traceback.

    Ctrl-C ends in one line and exit code 130, as in a shell.
    """
    import os
    import warnings

    # Before torch is imported: OpenMP threads that wait by spinning make training many times slower on a machine that
    # also does something else (a step of 0.5 s took 13 s with two busy neighbours on two cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from avsep.cli.app import Interrupted, build_app
        from avsep.errors import AvsepError

        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            build_app()(args=argv, standalone_mode=True)
        except Interrupted as stop:
            _interrupted(str(stop))
        except AvsepError as error:
            print(f"avsep: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            print(f"avsep: {_os_error(error)}", file=sys.stderr)
            sys.exit(2)
    except KeyboardInterrupt:  # while modules were being imported
        _interrupted("")


def _interrupted(way_on: str) -> None:
    print(f"avsep: stopped{': ' if way_on else ''}{way_on}", file=sys.stderr)
    sys.exit(130)


def _os_error(error: OSError) -> str:
    import errno

    name = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device{name}: free some and run again"
    return f"{error.strerror or error}{name}"
