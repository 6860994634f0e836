"""Several processes on one machine, and what a process knows of having been started as one of several.

The environment is torchrun's, so that a rank need not know which of the two started it. This module imports nothing
heavy: the command line asks it on every start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["follow_launcher", "launch", "local_world_size", "speaks", "world_size"]

_LAUNCHER_PIPE = "AVSEP_LAUNCHER_PIPE"
_GRACE_S = 10.0


def world_size() -> int:
    """How many processes torchrun, or :func:`launch`, has started with this one; 1 for an ordinary process."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def local_world_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def speaks() -> bool:
    """Whether this process is to tell of an error: the first of the run that asks. An ordinary process always is."""
    if world_size() == 1:
        return True
    from datetime import timedelta

    import torch.distributed as dist

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return int(store.add(_told_key(), 1)) == 1
    except (KeyError, ValueError, RuntimeError):  # nobody to agree with: twice told is better than not at all
        return True


def _told_key() -> str:
    return f"avsep/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def launch(count: int, command: Sequence[str]) -> int:
    """Run ``command`` as ``count`` ranks on this machine; returns the exit code when all have ended.

    When one fails the others are ended. Ctrl-C and SIGTERM are handed on, and should this process itself be killed, the
    ranks end too. The command must call :func:`follow_launcher` early: only then does Ctrl-C reach it.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when no rank had come so far as to speak of it.
    """
    from datetime import timedelta

    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=30))
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "avsep",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with _kept_pipe() as (pipe, how):
        if pipe is not None:
            environment[_LAUNCHER_PIPE] = str(pipe)
        ranks: list[subprocess.Popen[bytes]] = []
        with _handed_on(ranks) as stopped:
            try:
                with _without_interrupts():
                    for rank in range(count):
                        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                        ranks.append(subprocess.Popen(list(command), env=own, **how))
                failed = _first_failure(ranks, stopped)
            finally:
                _end(ranks)
    told = store.check([_told_key()])
    if stopped:
        if stopped[0] == signal.SIGINT and not told:
            raise KeyboardInterrupt
        if stopped[0] != signal.SIGINT:
            with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
                print(f"avsep: stopped by {signal.Signals(stopped[0]).name}; go on with --resume", file=sys.stderr)
        return 128 + stopped[0]
    if failed is None:
        return 0
    code = ranks[failed].returncode
    if code < 0 and not told:  # killed from outside, so that it could not say so
        why = " (out of memory?)" if code == -signal.SIGKILL else ""
        print(
            f"avsep: process {failed} of {count} was ended by signal {-code}{why}; go on with --resume", file=sys.stderr
        )
    return code if code > 0 else 1


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]], stopped: list[int]) -> int | None:
    """Wait for all ranks, or for the first to fail; which one it is."""
    since = None
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if None not in codes:
            return None
        if stopped and since is None:
            since = time.monotonic()
        if since is not None and time.monotonic() - since > _GRACE_S:
            return None
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs. A rank that waits for a lost one cannot even take note of Ctrl-C, but of SIGTERM."""
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + _GRACE_S
    for process in ranks:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _handed_on(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Hand Ctrl-C, SIGTERM and SIGHUP on to the ranks; yields the list of those that came."""
    stopped: list[int] = []

    def hand_on(number: int, _: Any) -> None:
        if not stopped:
            stopped.append(number)
            for process in ranks:
                if process.poll() is None:
                    process.send_signal(number)

    kinds = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {kind: signal.signal(kind, hand_on) for kind in kinds}
    try:
        yield stopped
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits for what is started inside: for this process till the end, for a rank until it can speak of it.

    Python would end with a traceback while it starts.
    """
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _kept_pipe() -> Iterator[tuple[int | None, dict[str, Any]]]:
    """A pipe whose other end closes with this process, however it ends; and how ranks are started with it.

    They get a session of their own, so that Ctrl-C reaches them once, through here.
    """
    if os.name != "posix":
        yield None, {}
        return
    reading, writing = os.pipe()
    try:
        yield reading, {"pass_fds": (reading,), "start_new_session": True}
    finally:
        os.close(reading)
        os.close(writing)


def follow_launcher() -> None:
    """Let Ctrl-C through, and end this process when the one that :func:`launch` ran in is gone. Nothing in others.

    Raises:
        KeyboardInterrupt: when there was one before.
    """
    if pipe := os.environ.pop(_LAUNCHER_PIPE, ""):

        def follow() -> None:
            with contextlib.suppress(OSError):
                os.read(int(pipe), 1)
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
