"""Forward transfer: what a separator makes of classes before it has learned them, beside the mixture as it is.

A decoder whose masks do not depend on the class is asked as it is. One that has a query for each class gets queries for
the new ones from those it knows, mixed by how much the classes look alike: the softmax over the known classes of
``TEMPERATURE`` times the cosine similarity of the classes' mean object features (as Wang et al., Few-Shot
Class-Incremental Learning via Training-Free Prototype Calibration, NeurIPS 2023, weigh prototypes).

The measure is that of Lopez-Paz and Ranzato, NeurIPS 2017, with the mixture's score in the place of a network's before
training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avsep.data.class_means import mean_pictures
from avsep.data.protocol import Protocol
from avsep.data.store import Store
from avsep.errors import ConfigError
from avsep.evaluation.scores import evaluate_separator, is_headline, rows_of

if TYPE_CHECKING:
    from avsep.separator import Separator

__all__ = ["TEMPERATURE", "forward_transfer", "nearest_weights", "with_unlearned"]

TEMPERATURE = 16.0


def nearest_weights(unknown: Tensor, known: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """How much each of the known classes counts for each of the unknown ones.

    Mean features [U, D] and [C, D] -> [U, C], each row of sum 1.
    """
    cosine = torch.nn.functional.normalize(unknown, dim=-1) @ torch.nn.functional.normalize(known, dim=-1).T
    return torch.softmax(temperature * cosine, dim=-1)


@torch.no_grad()
def with_unlearned(
    separator: Separator, store: Store, classes: Sequence[str], device: torch.device | str = "cpu"
) -> Separator:
    """A copy that can be asked for ``classes``, none of which it has learned.

    Pictures of the training clips of ``store`` say which classes look alike; the global random state is left as it was.

    Raises:
        ConfigError: the decoder has weights for each class that are no queries, or there are no object features.
    """
    decoder, known = separator.mask_decoder, len(separator.classes)
    name = "" if decoder.class_agnostic else decoder.query_parameter
    if not name and not decoder.class_agnostic:
        raise ConfigError(
            f"mask decoder '{separator.spec.mask_decoder.name}' has weights of each class that are no queries: it "
            "cannot be asked for classes before it has learned them"
        )
    if name and separator.object_encoder is None:
        raise ConfigError(
            "a query for a class that is not learned yet is found by what the class looks like, and this separator has "
            "no object encoder"
        )
    made = copy.deepcopy(separator).to(device).eval()
    with torch.random.fork_rng(devices=[]):
        made.grow(known + len(classes), classes=(*separator.classes, *classes))
    if name:
        clips = {one: [(clip, None) for clip in store.select(classes=[one], split="train")] for one in made.classes}
        means = mean_pictures(made, store, clips, device)["object"]
        queries = made.mask_decoder.get_parameter(name)
        queries[known:] = nearest_weights(means[known:], means[:known]).to(queries) @ queries[:known]
    return made


def forward_transfer(
    separator: Separator,
    store: Store,
    protocol: Protocol,
    task: int,
    *,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    task_of: Mapping[str, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """The scores of a separator that has learned the tasks before ``task``, on the mixtures of that task's own classes.

    One row a source (:func:`avsep.evaluation.scores.rows_of`; SIR and SAR are left out), with the numbers that the
    mixtures have in ``protocol.at(task)``. Their mean ``sdri`` is what was known of the task before it was learned.

    Raises:
        ConfigError: as :func:`with_unlearned`.
    """
    own, known = set(protocol.tasks[task]), separator.classes  # of tasks that overlap some classes are known before
    chosen = [
        (number, mixture)
        for number, mixture in enumerate(protocol.at(task))
        if own.issuperset(mixture.classes) and is_headline({"list": mixture.list_name})
    ]
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(chosen))

    scores = evaluate_separator(
        with_unlearned(separator, store, [name for name in protocol.tasks[task] if name not in known], device),
        store,
        [mixture for _, mixture in chosen],
        batch_size=batch_size,
        device=device,
        progress=advance,
        task_of=task_of,
        interference=False,
    )
    return rows_of(scores, [number for number, _ in chosen])
