"""Import paths of earlier versions: ``import avsep.learner`` still works, with a warning that names the new path."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import CodeType, ModuleType

__all__ = ["MOVED", "install"]

# Of 0.1, to go with 0.3.
MOVED = {
    "avsep.audio": "avsep.media.audio",
    "avsep.checkpoint": "avsep.runs.checkpoint",
    "avsep.chunking": "avsep.inference.chunking",
    "avsep.convert": "avsep.separator.convert",
    "avsep.data.checking": "avsep.data.store.checking",
    "avsep.data.listings": "avsep.data.prepare.listings",
    "avsep.data.shards": "avsep.data.store.sharding",
    "avsep.data.synthesis": "avsep.data.synth.synthesis",
    "avsep.data.visualfile": "avsep.media.timeline",
    "avsep.detection": "avsep.media.detection",
    "avsep.devices": "avsep.environment",
    "avsep.fidelity": "avsep.presets.fidelity",
    "avsep.footage": "avsep.media.footage",
    "avsep.io": "avsep.files",
    "avsep.learner": "avsep.training.learner",
    "avsep.loggers": "avsep.training.loggers",
    "avsep.memory.budget": "avsep.evaluation.budget",
    "avsep.provenance": "avsep.environment",
    "avsep.ranks": "avsep.distributed.ranks",
    "avsep.seeding": "avsep.environment",
    "avsep.export.verify": "avsep.export.runtime.verify",
}

# Names that something else has now. Answering for them would put a module in its place (``avsep.separate(...)``).
_TAKEN = {"avsep.separate": "avsep.inference.recordings"}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for an old name with the module that took its place, the same object."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in _TAKEN:
            raise ModuleNotFoundError(f"{name} is a function now, and no module: import {_TAKEN[name]}", name=name)
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        # at the line that imports: warnings do not count the import system's own frames
        warnings.warn(f"{spec.name} is now {new}: import that", FutureWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def get_code(self, name: str) -> CodeType:
        """What ``python -m`` of an old name runs: the new module, under its own name."""
        source = f"import runpy\nrunpy.run_module({MOVED[name]!r}, run_name='__main__', alter_sys=True)\n"
        return compile(source, f"<{name}, which moved>", "exec")

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the old name's in its place


def install() -> None:
    """Answer for the old names from here on; last of all finders, so that what is there comes first."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
