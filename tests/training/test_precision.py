"""Mixed precision: what ``auto`` takes, what a CPU says of it, and what stays in full precision all the same."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avsep import environment
from avsep.environment import bf16_instructions
from avsep.training import setup
from avsep.training.loop import TaskLoop
from support.commands import TASKS, run
from support.continual_runs import differing, make_learner, resume_killed, trained, weights
from support.tones import stream_of

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tests what a machine without a GPU does")


@pytest.fixture
def processor(monkeypatch):
    """A function that makes this processor one with these capabilities, as PyTorch or Linux tells them."""

    def has(*names, told_by_torch=True):
        known = {"avx2": True, "avx512_bf16": False, **dict.fromkeys(names, True)}
        if told_by_torch:
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
        else:
            monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
            monkeypatch.setattr(environment, "_flags_of_linux", lambda: {n for n, there in known.items() if there})
        bf16_instructions.cache_clear()

    yield has
    bf16_instructions.cache_clear()


@pytest.mark.parametrize("told_by_torch", [True, False])
def test_the_widest_instructions_are_named(told_by_torch, processor):
    for names, expected in (
        ((), ""),
        (("avx512_f", "amx_tile"), ""),  # tiles of int8 alone
        (("avx512_bf16",), "avx512_bf16"),
        (("avx512_bf16", "amx_bf16"), "amx_bf16"),
        (("neon", "bf16", "sve_bf16"), "bf16"),
    ):
        processor(*names, told_by_torch=told_by_torch)
        assert bf16_instructions() == expected


LARGE = setup.BF16_LEAST


def test_the_flags_of_linux_are_those_of_its_file(monkeypatch):
    lines = "processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16\n\nFeatures\t: fp asimd bf16\nmodel name\t: amx_int8\n"
    monkeypatch.setattr(environment.Path, "read_text", lambda self: lines)
    assert environment._flags_of_linux() == {"fpu", "avx512_bf16", "amx_bf16", "fp", "asimd", "bf16"}


@NO_GPU
def test_auto_is_full_precision_on_every_cpu_that_was_not_measured(processor, monkeypatch):
    assert set(setup.BF16_GAINS) <= set(environment._BF16_SETS)
    assert all(gain > 1 for gain in setup.BF16_GAINS.values())
    monkeypatch.setattr(setup, "BF16_GAINS", {})
    for names in ((), ("avx512_bf16",), ("amx_bf16", "avx512_bf16")):
        processor(*names)
        assert setup._precision("auto", "auto", LARGE) == setup._precision("auto", "cpu", LARGE) == "32-true"
        assert setup._precision("16-mixed", "cpu", LARGE) == "16-mixed"
    monkeypatch.setattr(setup, "BF16_GAINS", {"amx_bf16": 1.5})
    assert setup._precision("auto", "cpu", LARGE) == "bf16-mixed"
    assert setup._precision("auto", "cpu", LARGE - 1) == "32-true"  # a small separator gains nothing
    assert setup._precision("32-true", "cpu", LARGE) == "32-true"
    for names in ((), ("avx512_bf16",)):  # measured for another's
        processor(*names)
        assert setup._precision("auto", "cpu", LARGE) == "32-true"


@NO_GPU
def test_a_cpu_without_such_instructions_warns(processor):
    processor()
    for precision in ("bf16-mixed", "16-mixed"):
        with pytest.warns(UserWarning, match=f"train.precision={precision} will be slow: this processor has no"):
            setup.make_fabric("cpu", precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup.make_fabric("cpu", "auto")
        setup.make_fabric("cpu", "32-true")
        processor("avx512_bf16")
        setup.make_fabric("cpu", "bf16-mixed")


@NO_GPU
def test_the_command_warns_in_one_line(processor, tone_store, tmp_path, capsys):
    processor()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")  # so that nothing is trained
    options = ("--tasks", TASKS, "--preset", "iquery_small", "--set", "train.precision=bf16-mixed")
    assert run("train", tone_store, "--out", tmp_path / "out", "--device", "cpu", *options) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("avsep: train.precision=bf16-mixed will be slow: this processor has no instructions for")
    assert "not a run folder" in second


class _Types(TorchDispatchMode):
    """Remembers which types of floating point numbers each operation was given, and gave."""

    def __init__(self):
        super().__init__()
        self.taken, self.given = {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        for values, found in ((args, self.taken), (result, self.given)):
            of_this = found.setdefault(name, [])
            of_this.append([x.dtype for x in torch.utils._pytree.tree_leaves(values) if _is_floating(x)])
        return result


def _is_floating(value):
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _all(lists):
    return {dtype for one in lists for dtype in one}


def test_transforms_losses_statistics_and_optimisers_stay_in_full_precision(tone_store, tmp_path, monkeypatch):
    """A step of the second task, with a teacher and all of ContAV-Sep's terms, under autocast to bf16."""
    step, seen = TaskLoop._step, []

    def watched(self, batch, total):
        if self._task.index == 0:
            return step(self, batch, total)
        with _Types() as types:
            step(self, batch, total)
        seen.append((types, [p.grad for p in self._student.parameters()], self._optimizers))

    monkeypatch.setattr(TaskLoop, "_step", watched)
    learner = make_learner("contavsep", "random_per_class", precision="bf16-mixed", steps_per_epoch=1)
    loss, terms = learner.strategy.loss, []
    learner.strategy.loss = lambda step: terms.append(loss(step)) or terms[-1]
    learner.fit(stream_of(tone_store), tmp_path / "run", progress=False)
    ((types, gradients, optimizers),) = seen

    full = {torch.float32, torch.complex64}
    assert torch.bfloat16 in _all(types.taken["convolution"])  # else nothing here means anything
    assert torch.bfloat16 in _all(types.taken["convolution_backward"])
    assert torch.bfloat16 in _all(types.given["mm"]) | _all(types.given["addmm"])
    # the transforms; the losses' sigmoids, distances and softmaxes, and their gradients
    for name in ("_fft_r2c", "log1p", "sigmoid", "sigmoid_backward", "abs", "sgn", "logsumexp", "linalg_vector_norm"):
        assert _all(types.taken[name]) <= full, name
    assert set(terms[-1]) == {"separation", "instance", "class", "mask"}
    assert {t.dtype for t in terms[-1].values()} == {torch.float32}
    # weights and running statistics of norms, and what they find in a batch, of features in bf16
    for name in ("native_batch_norm", "native_layer_norm", "native_group_norm"):
        assert torch.bfloat16 in _all(types.taken[name])
        for taken, given in zip(types.taken[name], types.given[name], strict=True):
            assert set(taken[1:]) == {torch.float32}, name
            assert set(given[1:]) == {torch.float32}, name
    # what the optimisers see and keep
    assert all(g is None or g.dtype == torch.float32 for g in gradients)
    for optimizer in optimizers.values():
        kept = [v for state in optimizer.state.values() for v in state.values() if _is_floating(v)]
        assert kept
        assert {v.dtype for v in kept} == {torch.float32}
    updates = [name for name in types.taken if name.startswith("_fused_adam")]
    assert updates
    assert _all(_all(types.taken[name]) for name in updates) == {torch.float32}


def test_a_killed_run_in_bf16_goes_on_to_the_same_weights(tone_store):
    run = trained(tone_store, "contavsep", "random_per_class", precision="bf16-mixed")
    resumed = resume_killed(tone_store, run, "contavsep", "random_per_class", precision="bf16-mixed")
    assert differing(weights(run), weights(resumed)) == []
    full = trained(tone_store, "contavsep", "random_per_class")
    assert differing(weights(run), weights(full)) != []
