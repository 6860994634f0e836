"""What each of several processes runs for test_ranks.py: ``python rank_checks.py WHAT FOLDER STORE``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from avsep.distributed.ranks import ALONE, Ranks, synchronise_batch_norm
from avsep.registry import STRATEGIES
from avsep.separator import build_from_spec
from avsep.spec import SeparatorSpec, validated
from avsep.strategies.base import TaskContext
from avsep.training.learner import ContinualLearner
from avsep.training.loop import StepInputs, TaskLoop, TrainingStep
from avsep.types import Batch, Task, VisualInputs, move_to
from support.continual_runs import SEPARATORS, make_learner
from support.tones import TINY_FRONT_END, stream_of, tiny_learner

# name -> strategy, parameters, separator, dtype
STEPS = {
    "finetune": ("finetune", {}, "sound_of_pixels", torch.float32),  # the map behind f_a gets no gradient
    "contavsep": ("contavsep", {}, "iquery", torch.float32),
    "contavsep_double": ("contavsep", {}, "iquery", torch.float64),
    "contavsep_coseparation": ("contavsep", {}, "coseparation", torch.float64),
    "contavsep_released": (
        "contavsep",
        {"teacher_batch_norm": "train", "instance": "features", "modality_pairs": "within"},
        "iquery",
        torch.float64,
    ),
    "avcil": ("avcil", {}, "iquery", torch.float64),
    "lwf": ("lwf", {}, "iquery", torch.float64),
    "lwf_grown": ("lwf", {"variant": "grown_teacher"}, "iquery", torch.float64),
    "ewf": ("ewf", {}, "coseparation", torch.float64),
    "ewc": ("ewc", {}, "iquery", torch.float64),
    "plop": ("plop", {}, "iquery", torch.float64),
    "plop_agnostic": ("plop", {}, "coseparation", torch.float64),
    "query_extension": ("query_extension", {"head": True}, "iquery", torch.float64),
    "gated_distillation": ("gated_distillation", {}, "iquery", torch.float64),
    "derpp": ("derpp", {"batch_size": 4}, "iquery", torch.float64),
    "slot_span": ("slot_span", {"classes": 1}, "iquery", torch.float64),
    "reference": ("reference", {"classes": 1}, "iquery", torch.float64),
    "slot_span_own": ("slot_span", {"conditioning": "own"}, "iquery", torch.float64),
    "grad_surgery": ("grad_surgery", {}, "iquery", torch.float64),
    "topology": ("topology", {}, "iquery", torch.float64),
    "prototype_relations": ("prototype_relations", {}, "iquery", torch.float64),
    "agem": ("agem", {}, "iquery", torch.float64),
    "task_adapters": ("task_adapters", {}, "iquery_adapters", torch.float64),
    "drift_compensation": ("drift_compensation", {"weight": 1.0}, "iquery_projection", torch.float64),
    "l2_anchor": ("l2_anchor", {}, "iquery", torch.float64),
    "feature_distillation": ("feature_distillation", {}, "coseparation", torch.float64),
    "first_session": ("first_session", {"adapt": "film"}, "coseparation", torch.float64),
    "perturb_and_merge": ("perturb_and_merge", {"perturbation": 0.5}, "iquery", torch.float64),
}
# four mixtures, of which the first two have no source of an old class: so has one of two ranks
CLASS_IDS = torch.tensor([[2, 3], [3, 2], [1, 3], [0, 0]])
VIDEO_IDS = torch.tensor([[5, 6], [6, 8], [7, 1], [9, 9]])
TASK = Task(1, ("peep", "whirr"), ("ding", "hum", "peep", "whirr"))


def _batch(separator, dtype):
    rng = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 255, (4, 2, 3, 3, 32, 32), dtype=torch.uint8, generator=rng)
    motion = torch.randint(0, 255, (4, 2, 6, 1, 16, 16), dtype=torch.uint8, generator=rng)
    return Batch(
        sources=0.2 * torch.randn(4, 2, TINY_FRONT_END["clip_samples"], generator=rng).to(dtype),
        class_ids=CLASS_IDS,
        video_ids=VIDEO_IDS,
        is_memory=CLASS_IDS < 2,
        visual=VisualInputs(
            frames.to(dtype) / 255, None if separator.motion_encoder is None else motion.to(dtype) / 255
        ),
    )


def _build(separator, num_classes, seed, dtype):
    spec = validated(SeparatorSpec, {**SEPARATORS[separator], "num_classes": 2}, "test")
    spec = spec.grown(num_classes)
    torch.manual_seed(seed)
    return build_from_spec(spec).to(dtype)


def _stored(batch):
    """What DER++ keeps, made of the first sources of a batch."""
    rng = torch.Generator().manual_seed(1)
    return {
        "sounds": (32767 * batch.sources).round().clamp(-32767, 32767).to(torch.int16),
        "masks": torch.randint(0, 256, (4, 128, 128), dtype=torch.uint8, generator=rng),
        "class_ids": torch.tensor([0, 1, 1, 0]),
        "video_ids": torch.arange(4),
        "object": batch.visual.object[:, 0].half(),
        "motion": batch.visual.motion[:, 0].half(),
    }


def _statistics(batch, teacher):
    """What slot_span keeps of the two old classes, made of two mixtures."""
    features = teacher.encode_visual(batch.visual)
    deviation = features.object[:2, 1].abs()
    kept = {"object": features.object[:2, 0], "object_deviation": deviation, "motion": features.motion[:2, 0]}
    return {**{k: v.detach().half() for k, v in kept.items()}, "counts": torch.tensor([1, 1])}


def one_step(name: str, ranks: Ranks = ALONE) -> dict[str, torch.Tensor]:
    """The terms of one training step, and afterwards the gradients and buffers of the student."""
    strategy_name, parameters, separator, dtype = STEPS[name]
    student, teacher = _build(separator, 4, 1, dtype), _build(separator, 2, 2, dtype).requires_grad_(False).eval()
    strategy = STRATEGIES.create(strategy_name, parameters)
    if strategy_name == "ewc":
        strategy.load_state_dict({n: p.detach().square() + 0.1 for n, p in teacher.named_parameters()})
    if strategy_name == "derpp":
        strategy.load_state_dict(_stored(_batch(student, dtype)))
    if strategy_name == "prototype_relations":
        strategy.load_state_dict({name: torch.eye(2, 16, dtype=dtype) for name in ("object", "motion")})
    if name in ("slot_span", "reference"):
        strategy.load_state_dict(_statistics(_batch(student, dtype), teacher))
    old_shapes = {name: tuple(value.shape) for name, value in teacher.state_dict().items()}
    strategy.begin_task(TaskContext(TASK, student, teacher, None, ranks, old_shapes=old_shapes))
    student.train()
    for one in (student, teacher):
        synchronise_batch_norm(one, ranks)
    module = inner = TrainingStep(student, strategy, ranks, cross_entropy_weight=0.5)
    batch = _batch(student, dtype)
    if ranks.several:
        module = torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        rows = ranks.part(torch.arange(len(batch.sources)))
        parts = {k: v[rows] for k, v in vars(batch).items() if k != "clips" and v is not None}
        batch = Batch(**parts)
    torch.manual_seed(7)  # a rank that drew for itself would draw otherwise
    with strategy.train_weights(student):
        terms = module(StepInputs(move_to(batch, "cpu"), teacher, 2))
        torch.stack([t.to(dtype) for t in terms.values()]).sum().backward()
    strategy.after_backward(inner.step)
    return {
        **{f"term {k}": ranks.mean(v.detach().to(dtype)) for k, v in terms.items()},
        **{f"gradient {k}": p.grad for k, p in student.named_parameters() if p.grad is not None},
        **{f"buffer {k}": b.clone() for k, b in student.named_buffers()},
    }


class Killed(Exception):
    """Stands for a kill on all ranks."""


@contextlib.contextmanager
def dying_at(calls: int):
    """Training ends before its ``calls``-th step from here."""
    step, count = TaskLoop._step, [0]

    def dies(self, *args):
        count[0] += 1
        if count[0] == calls:
            raise Killed
        return step(self, *args)

    TaskLoop._step = dies
    try:
        with contextlib.suppress(Killed):
            yield
    finally:
        TaskLoop._step = step


def fit(store, out, strategy="contavsep", **how):
    make_learner(strategy, "random_per_class").fit(stream_of(store), out, progress=False, **how)


def kill(store, out, first):
    """A run that dies in its second task, before the third step and after the checkpoint of the second."""
    with dying_at(3):
        fit(store, out, first_task=first)


def several(folder: Path, store: str) -> None:
    """All that test_ranks.py looks at, in one start of the processes; ends as :func:`broken` does."""
    learner = tiny_learner(validation_pairs=3)
    ranks = learner.ranks
    for name in STEPS:
        found = one_step(name, ranks)
        if ranks.first:
            save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{name}.safetensors")
    torch.manual_seed(7)
    stream = stream_of(store)
    facts = {"sdr": learner._validation(stream, stream.tasks[0]).score(learner.separator)[0]}
    mixtures = learner._mixtures(stream, stream.tasks[0])
    drawn = [[c for m in b.clips for c in m] for b in mixtures.training_batches(mixtures.epoch(0), 1)]
    facts["drawn"] = [[c for part in parts for c in part] for parts in zip(*ranks.all_gather(drawn), strict=True)]
    fit(store, folder / "whole", first_task=folder / "first")
    kill(store, folder / "killed", folder / "first")
    kill(store, folder / "killed_for_one", folder / "first")
    fit(store, folder / "killed", resume=True)
    fit(store, folder / "killed_by_one", resume=True)
    if ranks.first:
        (folder / "facts.json").write_text(json.dumps(facts))
    broken(folder, store, "error")


def go_on(run: Path) -> None:
    """Resume, with this process alone, a run that the command line began."""
    from avsep.data.store import Store
    from avsep.runs.folder import RunFolder

    spec = RunFolder(run).spec()
    stream = stream_of(Store.open(spec.store), spec.tasks)
    ContinualLearner.from_spec(spec, accelerator="cpu").fit(stream, run, resume=True, progress=False)


def broken(folder: Path, store: str, how: str) -> None:
    """``avsep train`` on every rank; rank 1 fails at its second step."""
    from avsep.cli import main
    from avsep.errors import DataError

    step, calls = TaskLoop._step, []

    def fails(self, *args):
        calls.append(1)
        if len(calls) == 2 and self._ranks.rank == 1:
            if how == "kill":
                os.kill(os.getpid(), 9)
            raise DataError("clip 'x' is gone")
        return step(self, *args)

    TaskLoop._step = fails
    main(
        ["train", store, "--preset", str(folder / "tiny.yaml"), "--out", str(folder / f"run-{how}"), "--device", "cpu"]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"several": several, "broken": broken}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
