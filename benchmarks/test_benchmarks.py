"""The cases of ``avsep bench`` under pytest-benchmark: ``python -m pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from avsep.benchmarks import cases
from avsep.benchmarks.kernel_cases import KernelCase, Variant, kernel_cases
from avsep.benchmarks.kernels import calls_of, check_case
from avsep.benchmarks.measure import Case
from avsep.data.store.sharding import shard_store
from avsep.errors import MissingExtraError

# case -> (its variants, repeats, the function that gives the cases of its group)
KNOWN: dict[str, tuple[tuple[str, ...], int, Callable[[Any], Iterator[Case]]]] = {
    "data": (
        tuple(f"{n}{w}" for w in ("", ", 2 workers") for n in ("whole files", "store", "shards")),
        9,
        lambda folder: _data(folder),
    ),
    "metrics": (("mir_eval", "avsep"), 5, lambda _: cases.metrics_cases()),
    "train step": (("literal", "avsep"), 3, lambda _: cases.train_cases()),
    "unet": (("literal", "avsep", "avsep, plain upsampling"), 3, lambda _: cases.train_cases()),
}


def _data(folder: Any) -> Iterator[Case]:
    store = cases.temporary_store(folder / "store", clips=160)
    yield from cases.data_cases(store, shards=shard_store(store, folder / "shards", shard_mb=64))


SPEEDS = [(name, number) for name, (variants, _, _) in KNOWN.items() for number in range(len(variants))]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A case whose variants were found to agree; one that fails its check has no speed."""
    try:
        found = next(c for c in KNOWN[request.param][2](tmp_path_factory.mktemp("bench")) if c.name == request.param)
    except MissingExtraError as error:
        pytest.skip(str(error))
    found.check()
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "number"), SPEEDS, indirect=["case"], ids=[f"{n}-{k}" for n, k in SPEEDS])
def test_speed(case: Case, number: int, benchmark: Any) -> None:
    variants, repeats, _ = KNOWN[case.name]
    assert tuple(case.variants) == variants
    benchmark.group = case.name
    benchmark.name = variants[number]
    benchmark.extra_info.update(settings=case.settings, items=case.items, item=case.item)
    benchmark.pedantic(case.variants[variants[number]], rounds=repeats, iterations=1, warmup_rounds=1)


# --- the kernels: AVSEP_BENCH_SIZES and AVSEP_BENCH_DEVICE choose other sizes and the GPU -----------------------------

SIZES = os.environ.get("AVSEP_BENCH_SIZES", "paper")
DEVICE = os.environ.get("AVSEP_BENCH_DEVICE", "cpu")


def _kernel_variants() -> list[tuple[str, str]]:
    return [(c.name, v.name) for c in kernel_cases(sizes=SIZES, device=DEVICE) for v in c.variants]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["forward", "total"])
@pytest.mark.parametrize(("case_name", "variant_name"), _kernel_variants())
def test_kernel_speed(case_name: str, variant_name: str, way: str, benchmark: Any) -> None:
    """One that cannot run here is skipped; one that fails its check has no speed. Total is forward and backward."""
    case: KernelCase = next(c for c in kernel_cases(sizes=SIZES, device=DEVICE) if c.name == case_name)
    variant: Variant = next(v for v in case.variants if v.name == variant_name)
    if variant.unavailable or not variant.timed:
        pytest.skip(variant.unavailable or variant.note)
    if way == "total" and not case.leaves:
        pytest.skip("has no gradient")
    found = check_case(case, variant)
    forward, total = calls_of(case, variant)
    function = forward if way == "forward" else total
    benchmark.group = f"{case.name}, {way}"
    benchmark.name = variant.name
    benchmark.extra_info.update(settings=case.settings, check=found)

    def settled() -> None:
        function()
        if DEVICE.startswith("cuda"):
            torch.cuda.synchronize()

    benchmark.pedantic(settled, rounds=10, iterations=1, warmup_rounds=2)
