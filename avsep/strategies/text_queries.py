"""Text queries: the query of a class is made of a vector that a language model has of its name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.strategies.base import Strategy, TaskContext
from avsep.strategies.teaching import check_queries

if TYPE_CHECKING:
    from torch import Tensor

    from avsep.separator import Separator

__all__ = ["TextQueries", "projection"]


@STRATEGIES.register(
    "text_queries",
    source="after Ni et al., Enhancing Visual Continual Learning with Language-Guided Supervision, CVPR 2024",
    example={
        "vectors": {"ding": [1, 0, 2], "hum": [0, 1, 1], "peep": [2, 1, 0], "whirr": [1, 1, 1]},
    },
)
class TextQueries(Strategy):
    """Start the query of every class from a vector of its name, or keep it there; combine it with any method.

    q_c = |n| unit(R (t_c - mean t)), with the vectors t of all classes in the file, of later ones too, a fixed matrix R
    of orthonormal rows (or columns, where queries are longer than the vectors) and the length of a fresh query n.
    ``frozen``: queries do not learn, and so cannot be forgotten.

    ``vectors``: the path of a safetensors file with one vector for each class by its name, all of one length, such as
    the text embeddings of CLIP; or the same as plain data. A run records the path as it is given, and reads it again on
    a resume: give a full one where runs are resumed from another folder.
    """

    across_ranks = True
    sets_weights = ("begin_task",)
    differs = (
        "The paper compares a classifier's features with frozen text embeddings; here they are the queries of a "
        "decoder, by a fixed projection, and may learn."
    )

    def __init__(self, *, vectors: str | Mapping[str, Sequence[float]], frozen: bool = False) -> None:
        self.frozen = frozen
        self._vectors = _read(vectors)

    def check(self, separator: Separator) -> None:
        check_queries(separator, "text_queries", "makes the queries of classes")

    def check_classes(self, names: Sequence[str]) -> None:
        if missing := [name for name in names if name not in self._vectors]:
            known = ", ".join(list(self._vectors)[:5]) + (", ..." if len(self._vectors) > 5 else "")
            raise ConfigError(
                f"strategy 'text_queries' has no vector of {len(missing)} of the {len(names)} classes, such as "
                f"'{missing[0]}': add them to the vectors, which are those of {known}"
            )

    def first_task(self) -> dict[str, Any]:
        names = sorted(self._vectors)
        digest = hashlib.sha256(b"".join(self._vectors[name].numpy().tobytes() for name in names)).hexdigest()
        return {"text_queries": [names, digest, self.frozen]}

    @torch.no_grad()
    def begin_task(self, ctx: TaskContext) -> None:
        decoder = ctx.student.mask_decoder
        queries = decoder.get_parameter(decoder.query_parameter)
        if self.frozen:
            queries.requires_grad_(False)
        if ctx.resumed:
            return
        self.check_classes(ctx.task.seen)
        mean = torch.stack(list(self._vectors.values())).mean(dim=0)
        matrix = projection(queries.shape[1], len(mean))
        for number, name in enumerate(ctx.task.seen):
            if name in ctx.task.classes:
                target = F.normalize(matrix @ (self._vectors[name] - mean), dim=0).to(queries)
                queries[number] = queries[number].norm() * target


def projection(rows: int, columns: int) -> Tensor:
    """A fixed matrix [rows, columns] with orthonormal rows, or columns where there are more rows."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64)
    matrix = torch.linalg.qr(noise).Q.float()
    made: Tensor = matrix if rows >= columns else matrix.T
    return made


def _read(vectors: str | Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """By class name, float32 [D] each, in the order of the names."""
    if isinstance(vectors, str):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(vectors).expanduser().resolve()
        if not path.exists():
            raise ValueError(f"vectors: there is no file {path}")
        try:
            named: Mapping[str, Any] = load_file(path)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is no safetensors file with a vector for each class ({reason})") from None
    elif isinstance(vectors, Mapping):
        named = vectors
    else:
        raise ValueError(f"vectors must be the path of a file, or numbers by class name, got {vectors!r}")
    found = {}
    for name in sorted(named, key=str):
        try:
            found[str(name)] = torch.as_tensor(named[name], dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"the vector of class '{name}' must be numbers, got {named[name]!r}") from None
    shapes = {tuple(vector.shape) for vector in found.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"vectors must be one for each class, all of one length, got shapes {sorted(shapes)}")
    if not all(vector.isfinite().all() for vector in found.values()):
        raise ValueError("vectors must be finite")
    return found
