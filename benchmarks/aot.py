"""Compile the Triton kernels for GPUs that are not here, and count registers, spills and shared memory.

``avsep bench aot``, or ``python -m avsep.benchmarks.aot``. Every entry of the operations' ``aot_cases()``, which are
the configurations that their launchers really use, is compiled for every architecture; the counts are ptxas's own.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import functools
import hashlib
import importlib
import importlib.util
import io
import os
import re
import sys
import tempfile
import tokenize
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avsep.errors import AvsepError, ConfigError, MissingExtraError
from avsep.files import write_text
from avsep.kernels._backend import OPERATIONS, interpreting

if TYPE_CHECKING:
    from avsep.kernels._triton import AotCase

__all__ = ["ARCHITECTURES", "COLUMNS", "compile_all", "read_results", "source_hash", "summary"]

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 120)
"""Compute capabilities, as in sm_75: Turing to Blackwell."""

_KIB = 1024
SHARED_LIMIT_BYTES = {
    75: 64 * _KIB,
    80: 163 * _KIB,
    86: 99 * _KIB,
    87: 163 * _KIB,
    89: 99 * _KIB,
    90: 227 * _KIB,
    100: 227 * _KIB,
    120: 99 * _KIB,
}
"""Shared memory that one block may have (CUDA C++ Programming Guide, table of technical specifications)."""

COLUMNS = (
    "op",
    "kernel",
    "settings",
    "sm",
    "registers",
    "spill_stores_bytes",
    "spill_loads_bytes",
    "stack_bytes",
    "shared_bytes",
    "shared_limit_bytes",
    "num_warps",
    "num_stages",
    "triton",
    "source",
)
"""Of the CSV file; ``source`` is :func:`source_hash` of the case when it was compiled."""

_KEY = ("op", "kernel", "settings", "sm")


_LAYOUT = (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE)


def _code(source: str) -> str:
    """Tokens without comments, docstrings and line breaks inside brackets: alike in every version of Python."""
    kept = ["NEWLINE"]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            continue
        statement = kept[-1] in ("INDENT", "NEWLINE")
        if statement and token.type in (tokenize.STRING, tokenize.NEWLINE):
            continue
        kept.append(tokenize.tok_name[token.type] if token.type in _LAYOUT else token.string)
    return " ".join(kept)


def _pieces(op: str) -> dict[str, tuple[str, set[str]]]:
    """What stands at the top level of an operation's ``triton_kernel.py``: by name its code, and the names in it."""
    spec = importlib.util.find_spec(f"avsep.kernels.{op}.triton_kernel")
    if spec is None or spec.origin is None:
        raise ConfigError(f"there is no Triton kernel of '{op}'")
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    pieces: dict[str, tuple[str, set[str]]] = {}
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        code = _code("".join(lines[node.lineno - 1 : node.end_lineno])) if names else ""
        pieces |= dict.fromkeys(names, (code, {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}))
    return pieces


_pieces_as_imported = functools.cache(_pieces)  # the file may change while others of its cases are compiled


def source_hash(op: str, case: AotCase, pieces: Mapping[str, tuple[str, set[str]]] | None = None) -> str:
    """Of all that a case is compiled from: its kernel with what that calls, its types and its constants."""
    pieces = _pieces(op) if pieces is None else pieces
    used: set[str] = set()
    waiting = {case.kernel.fn.__name__}
    while waiting:
        name = waiting.pop()
        used.add(name)
        waiting |= (pieces[name][1] & pieces.keys()) - used
    parts = [pieces[name][0] for name in sorted(used)]
    parts += [repr(sorted(part.items())) for part in (case.signature, case.constants)]
    parts.append(repr((sorted(case.aligned), case.num_warps, case.num_stages)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def cases_of(op: str) -> list[AotCase]:
    """An operation's cases. Raises :class:`ConfigError` where two have the same name and settings."""
    cases: list[AotCase] = importlib.import_module(f"avsep.kernels.{op}.triton_kernel").aot_cases()
    seen = set()
    for case in cases:
        if (case.name, case.settings) in seen:
            raise ConfigError(f"{op}: two cases are named '{case.name}' with the settings '{case.settings}'")
        seen.add((case.name, case.settings))
    return cases


def operations_with_kernels() -> tuple[str, ...]:
    return tuple(op for op in OPERATIONS if importlib.util.find_spec(f"avsep.kernels.{op}.triton_kernel"))


def compile_case(op: str, case: AotCase, architecture: int) -> dict[str, Any]:
    """Compile one case for one architecture; the row of :data:`COLUMNS`."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    known = case.signature.keys() | case.constants.keys()
    if set(names) != known:
        raise ConfigError(f"{op}, {case.name}: signature and constants differ in {sorted(set(names) ^ known)}")
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    log = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="avsep-aot-") as folder, contextlib.ExitStack() as scopes:
        for group in (knobs.nvidia, knobs.compilation, knobs.cache):
            scopes.enter_context(group.scope())
        knobs.cache.dir = folder  # a kernel from the cache would come without ptxas's words
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Triton's own changes to come
            compiled = triton.compile(
                source,
                target=GPUTarget("cuda", architecture, 32),
                options={"num_warps": case.num_warps, "num_stages": case.num_stages},
            )
    return {
        "op": op,
        "kernel": case.name,
        "settings": case.settings,
        "sm": architecture,
        **_resources(log.getvalue()),
        "shared_bytes": compiled.metadata.shared,
        "shared_limit_bytes": SHARED_LIMIT_BYTES[architecture],
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "triton": triton.__version__,
        "source": source_hash(op, case, _pieces_as_imported(op)),
    }


def _resources(log: str) -> dict[str, int]:
    """What ptxas -v said of one kernel."""
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    if frame is None or used is None:
        raise AvsepError(f"ptxas said nothing of registers and spills: {log.strip()[:200]!r}")
    return {
        "registers": int(used[1]),
        "spill_stores_bytes": int(frame[2]),
        "spill_loads_bytes": int(frame[3]),
        "stack_bytes": int(frame[1]),
    }


def _compile_number(op: str, number: int, architecture: int, digest: str) -> dict[str, Any]:
    """In a worker process: kernels do not travel, so it makes the cases itself."""
    case = cases_of(op)[number]
    if source_hash(op, case, _pieces_as_imported(op)) != digest:
        raise AvsepError(f"the kernels of {op} changed while they were compiled: run again")
    try:
        return compile_case(op, case, architecture)
    except AvsepError:
        raise
    except Exception as error:  # Triton's own errors may not come back from another process
        text = " ".join(str(error).split())[:300]
        raise AvsepError(
            f"{op}, {case.name} ({case.settings}) for sm_{architecture}: {type(error).__name__}: {text}"
        ) from None


def read_results(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file that :func:`compile_all` wrote; none where it is missing.

    Raises :class:`ConfigError` for another kind of file.
    """
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(COLUMNS):
            raise ConfigError(
                f"{path} is not a file of compiled kernels (its columns are others): choose another --out"
            )
        return list(reader)


def compile_all(
    out: str | Path,
    *,
    ops: Sequence[str] = (),
    architectures: Sequence[int] = ARCHITECTURES,
    jobs: int | None = None,
    fresh: bool = False,
    done: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[dict[str, Any]]:
    """Compile the cases of these operations for these architectures and write ``out``.

    Rows that ``out`` has already, of the same source and Triton, are kept, so an interrupted run goes on; those of
    cases that no longer exist are dropped, and those of other operations and architectures stay.

    Args:
        out: a CSV file.
        ops: operations; all that have kernels when none is named.
        architectures: of :data:`ARCHITECTURES`.
        jobs: processes; as many as there are cores when None.
        fresh: compile also what ``out`` has.
        done: is told how many of how many are compiled.

    Returns:
        All rows of the file.

    Raises:
        ConfigError: for an unknown operation or architecture, another kind of file, or under Triton's interpreter.
        MissingExtraError: Triton is not installed.
        AvsepError: for a kernel that does not compile; what was compiled before it is kept.
    """
    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError("triton", "gpu", "compiling kernels")
    if interpreting():
        raise ConfigError("TRITON_INTERPRET=1 is set, under which Triton compiles nothing: unset it and run again")
    for op in ops:
        if op not in OPERATIONS:
            raise ConfigError(f"no operation named '{op}': {', '.join(OPERATIONS)}")
    for architecture in architectures:
        if architecture not in SHARED_LIMIT_BYTES:
            raise ConfigError(f"unknown architecture sm_{architecture}: {', '.join(map(str, ARCHITECTURES))}")
    import triton

    before = {tuple(row[k] for k in _KEY): row for row in read_results(out)}
    rows: dict[tuple[str, ...], Mapping[str, Any]] = {}
    wanted: list[tuple[tuple[str, int, int, str], tuple[str, ...]]] = []
    order: list[tuple[str, ...]] = []
    for op in operations_with_kernels():
        if ops and op not in ops:
            rows |= {key: row for key, row in before.items() if key[0] == op}
            order += [key for key in before if key[0] == op]
            continue
        pieces = _pieces(op)
        for number, case in enumerate(cases_of(op)):
            digest = source_hash(op, case, pieces)
            for architecture in case.architectures or ARCHITECTURES:
                key = (op, case.name, case.settings, str(architecture))
                order.append(key)
                row = before.get(key)
                current = row is not None and row["source"] == digest and row["triton"] == triton.__version__
                if architecture in architectures and (fresh or not current):
                    wanted.append(((op, number, architecture, digest), key))
                elif row is not None:
                    rows[key] = row

    def save() -> list[dict[str, Any]]:
        kept = [dict(rows[key]) for key in order if key in rows]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_text(out, buffer.getvalue())
        return kept

    # "spawn": torch and Triton have threads, which a fork would break
    pool = ProcessPoolExecutor(min(jobs or os.cpu_count() or 1, max(1, len(wanted))), get_context("spawn"))
    try:
        running = {pool.submit(_compile_number, *what): key for what, key in wanted}
        done(0, len(running))
        for count, future in enumerate(as_completed(running), 1):
            rows[running[future]] = future.result()
            done(count, len(running))
            if count % 50 == 0:
                save()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        kept = save()
    return kept


def summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many were compiled; by name, what spills, or needs more shared memory than there is."""
    rows = list(rows)

    def named(row: Mapping[str, Any], what: str) -> str:
        return f"  {row['op']}, {row['kernel']} ({row['settings']}) on sm_{row['sm']}: {what}"

    spills = [r for r in rows if int(r["spill_stores_bytes"]) + int(r["spill_loads_bytes"]) > 0]
    large = [r for r in rows if int(r["shared_bytes"]) > int(r["shared_limit_bytes"])]
    lines = [
        f"{len(rows)} kernels for {len({int(r['sm']) for r in rows})} architectures; spills: {len(spills) or 'none'}; "
        f"above the shared memory of a block: {len(large) or 'none'}"
    ]
    lines += [named(r, f"spills {r['spill_stores_bytes']} + {r['spill_loads_bytes']} bytes") for r in spills]
    lines += [named(r, f"shared {r['shared_bytes']} of {r['shared_limit_bytes']} bytes") for r in large]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m avsep.benchmarks.aot", description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/aot.csv")
    parser.add_argument("--op", action="append", default=[], help="operation; again for more [default: all]")
    parser.add_argument(
        "--sm", action="append", default=[], type=int, help="architecture such as 90; again for more [default: all]"
    )
    parser.add_argument("--jobs", type=int, help="processes [default: as many as cores]")
    parser.add_argument("--fresh", action="store_true", help="compile again what the file has")
    chosen = parser.parse_args(arguments)

    def done(count: int, total: int) -> None:
        if count == total or count % 20 == 0:
            print(f"... {count} of {total}", file=sys.stderr, flush=True)

    try:
        rows = compile_all(
            chosen.out,
            ops=chosen.op,
            architectures=chosen.sm or ARCHITECTURES,
            jobs=chosen.jobs,
            fresh=chosen.fresh,
            done=done,
        )
    except AvsepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
