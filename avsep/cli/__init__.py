"""The ``avsep`` command. One module a command; heavy imports happen inside the command that needs them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Entry point. A user's mistake ends in one line on standard error and exit code 2, never in a traceback.

    Ctrl-C ends in one line and exit code 130, as in a shell. SIGTERM, by which systems and clusters end a program, does
    the same with exit code 143: what is half-written goes, and the line says how to go on.
    """
    import warnings

    # Before torch is imported: OpenMP threads that wait by spinning make training many times slower on a machine that
    # also does something else (a step of 0.5 s took 13 s with two busy neighbours on two cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # But for some microseconds (GCC's OpenMP), since waking threads up costs more than that: on two free cores a
    # training step of iquery took 2.4 s without, and 2.0 s with; separating three minutes took 1.1 and 0.65 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        from avsep.environment import die_with_parent, world_size

        if world_size() > 1:
            die_with_parent()
        from avsep.cli._output import tracebacks
        from avsep.cli.app import Interrupted, build_app
        from avsep.errors import AvsepError

        tracebacks(False)
        if world_size() > 1:  # DDP warns each process that it looks for unused parameters, and finds none
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            given = sys.argv[1:] if argv is None else argv
            with _sigterm_as_ctrl_c():
                build_app(given)(args=argv, standalone_mode=True, obj=given)
        except Interrupted as stop:
            _interrupted(str(stop))
        except AvsepError as error:
            if tracebacks():
                import traceback

                traceback.print_exc()
            _fail(f"avsep: {' '.join(str(error).split())}", 2, error)
        except OSError as error:
            _fail(f"avsep: {_os_error(error)}", 2)
        except ModuleNotFoundError as error:
            _fail(_without_package(error), 2)
        except Exception:
            if world_size() == 1:
                raise
            import traceback

            _fail(traceback.format_exc().rstrip(), 1)
    except ModuleNotFoundError as error:  # a package of those that everything needs
        _fail(_without_package(error), 2)
    except KeyboardInterrupt:  # while modules were being imported
        _interrupted("")


def _without_package(error: ModuleNotFoundError) -> str:
    package = (error.name or str(error)).partition(".")[0]
    return f"avsep: the package '{package}' is missing: install avsep with what it needs (pip install avsep)"


_terminated = False


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM interrupts this process as Ctrl-C does, once; a second one changes nothing, so that what was
    begun is tidied up. Ranks and processes that were forked from this one end at once, as ever."""
    import signal
    import threading

    from avsep.environment import world_size

    global _terminated
    _terminated = False
    here = threading.current_thread() is threading.main_thread()
    if not here or world_size() > 1 or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    own = os.getpid()

    def stop(number: int, frame: object) -> None:
        global _terminated
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not _terminated:
            _terminated = True
            if callable(getattr(signal, "SIGCHLD", None) and signal.getsignal(signal.SIGCHLD)):
                # Whoever ends a whole group ends the readers of data too. PyTorch's handler of that would raise where
                # nothing can catch it, in the midst of what is tidied up.
                signal.signal(signal.SIGCHLD, lambda *_: None)
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupted(way_on: str) -> None:
    from avsep.environment import world_size

    text = f"avsep: stopped{': ' if way_on else ''}{way_on}"
    if way_on and world_size() > 1 and os.environ["RANK"] == "0":
        print(text, file=sys.stderr, flush=True)  # torchrun reports no error of ranks that it interrupts
    _fail(text, 143 if _terminated else 130)


def _fail(text: str, code: int, error: Exception | None = None) -> None:
    """Print what is wrong and end. A rank of several records it for torchrun, which reports the first one, and ends
    without waiting for the others."""
    from avsep.environment import world_size
    from avsep.progress import printable

    if code == 2:
        text = printable(text)
    if world_size() == 1:
        print(text, file=sys.stderr)
        sys.exit(code)
    import time

    from avsep.distributed.launch import record_error
    from avsep.errors import LostRankError

    if isinstance(error, LostRankError):
        time.sleep(5)  # the rank that is gone knows why, and torchrun ends this one meanwhile
    record_error(text)
    sys.stdout.flush()
    os._exit(code)  # ending in order would wait for the group


def _os_error(error: OSError) -> str:
    import errno

    name = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device{name}: free some and run again"
    return f"{error.strerror or error}{name}"
