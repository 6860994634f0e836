"""Several processes on this machine, started by torchrun (:mod:`torch.distributed.run`)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

__all__ = ["launch", "record_error"]


def launch(count: int, command: Sequence[str]) -> int:
    """Run ``command`` as ``count`` ranks on this machine and return the exit code.

    When one rank fails, the others are ended, and the error that it recorded (:func:`record_error`) is printed.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when all ranks have ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))  # the ranks inherit it
    with tempfile.TemporaryDirectory(prefix="avsep-ranks-") as folder, _put_back():
        config = LaunchConfig(  # torchrun --standalone --nproc-per-node COUNT
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="avsep",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",  # the machine's own name, which torchrun takes, need not resolve
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, command[0])(*command[1:])
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
                print(f"avsep: stopped by {stop.sigval.name}; go on with --resume", file=sys.stderr)
            return 128 + stop.sigval
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            print(_text(failure.message, rank, count, failure.exitcode), file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _text(recorded: object, rank: int, count: int, code: int) -> str:
    """What to print of a rank that failed."""
    if isinstance(recorded, dict):  # by record_error; torchrun's own messages are text
        return str(recorded["message"])
    if code < 0:
        why = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"avsep: process {rank} of {count} was ended by signal {-code}{why}; go on with --resume"
    return f"avsep: process {rank} of {count} ended with exit code {code}"


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    """Quieten torchrun, which logs every rank that ends, and put back the signal handlers that it changes."""
    kinds = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
    before = {kind: signal.getsignal(kind) for kind in kinds}
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def record_error(text: str) -> None:
    """Write why this rank fails to the file that torchrun gave it, or to standard error where it gave none.

    torchrun reports the error of the rank that failed first.
    """
    if not (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        print(text, file=sys.stderr, flush=True)
        return
    details = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": text, "extraInfo": details}}, file)
