"""Published weights: in a folder, in the Hugging Face hub's cache, or downloaded at a pinned revision."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from avsep.errors import MissingExtraError, MissingWeightsError
from avsep.files import sha256_file

__all__ = ["HubModel"]

WEIGHTS_VARIABLE = "AVSEP_WEIGHTS"
_ANSWER_S = 2.5  # until the hub answers at all
_DOWNLOAD_S = 1800.0  # of one download in all
_T = TypeVar("_T")


@dataclass(frozen=True)
class HubModel:
    """A model on the Hugging Face hub at one revision: what is downloaded never changes unseen."""

    repository: str
    revision: str
    licence: str

    @property
    def folder_name(self) -> str:
        """Its folder below ``AVSEP_WEIGHTS``."""
        return self.repository.rpartition("/")[2]

    def command(self) -> str:
        """The shell command that fetches it."""
        return f"hf download {self.repository} --revision {self.revision} --local-dir {self.folder_name}"

    def here(self) -> Path | None:
        """The folder of the weights on this machine, which :meth:`locate` would take; None where it would download.

        Nothing in it is read: whether it is whole, and of this revision, is told by :meth:`locate`.
        """
        root = os.environ.get(WEIGHTS_VARIABLE)
        if root and (folder := Path(root) / self.folder_name).is_dir():
            return folder
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            return None
        found = try_to_load_from_cache(self.repository, "config.json", revision=self.revision)
        if not isinstance(found, str) or not _weight_files(Path(found).parent):
            return None
        return Path(found).parent

    def locate(self, weights: str | os.PathLike[str] = "auto") -> Path:
        """The folder of config and weights.

        ``weights`` is that folder, or ``auto``: the folder of this model below ``$AVSEP_WEIGHTS``, else the hub's
        cache, else a download (which ``HF_HUB_OFFLINE=1`` forbids).

        Raises:
            MissingWeightsError: when there are none and none can be had; it names the command and the folder.
        """
        if str(weights) != "auto":
            return _checked(Path(weights), self)
        if root := os.environ.get(WEIGHTS_VARIABLE):
            folder = Path(root) / self.folder_name
            if folder.is_dir():
                return _checked(folder, self)
        try:
            from huggingface_hub import snapshot_download
        except ImportError:
            raise MissingExtraError("transformers", "vision", self.repository) from None
        reason = "it is not in the hub's cache"
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # or it would tell of every attempt
        for local in (True, False):
            try:
                if not local:
                    self._check_hub()
                # the PyTorch file only where there is no better one
                for patterns in (["*.json", "*.txt", "*.safetensors"], ["pytorch_model.bin"]):
                    fetch = functools.partial(
                        snapshot_download,
                        self.repository,
                        revision=self.revision,
                        allow_patterns=patterns,
                        local_files_only=local,
                    )
                    folder = Path(fetch() if local else _within(_DOWNLOAD_S, fetch))
                    if _weight_files(folder):
                        return _checked(folder, self)
            except MissingWeightsError:
                raise
            except Exception as error:  # whatever the network, a proxy or the hub has to say
                reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise MissingWeightsError(
            f"the weights of {self.repository} at revision {self.revision[:8]} are not here and cannot be downloaded "
            f"({reason}): where there is a network, run '{self.command()}', copy the folder, and set "
            f"{WEIGHTS_VARIABLE} to the folder that holds {self.folder_name}, or give its path as weights"
        )

    def _check_hub(self) -> None:
        """Raise at once where there is no network, or something in it that never answers; else say what is awaited."""
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        ask = functools.partial(HfApi().model_info, self.repository, revision=self.revision, timeout=_ANSWER_S)
        _within(_ANSWER_S, ask)
        print(f"avsep: fetching the weights of {self.repository} from {constants.ENDPOINT}", file=sys.stderr)


def _within(seconds: float, work: Callable[[], _T]) -> _T:
    """The result of ``work``, for which nobody waits longer; a name that is looked up has no time limit of its own."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"the hub gave no answer within {seconds:g} s")
    return results[0]


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, size: int, changed_ns: int) -> str:
    """Of a file as it is; read once a process."""
    return sha256_file(file)


def _check_hash(file: Path, model: HubModel) -> None:
    """Hold a file against the SHA-256 that the hub states for it at this revision, where that is known.

    The hub's cache names a file's content by it, and a folder that ``hf download`` filled has it in a file beside;
    folders that were filled by hand have neither.
    """
    stated, revision = file.resolve().name, model.revision
    beside = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if beside.is_file():
        lines = beside.read_text(encoding="utf-8", errors="replace").split()
        revision, stated = (*lines[:2], "", "")[:2]
    way_out = f"fetch it again with '{model.command()}'"
    if revision != model.revision:
        raise MissingWeightsError(f"{file.parent} has revision {revision[:8]}, not {model.revision[:8]}: {way_out}")
    if not re.fullmatch("[0-9a-f]{64}", stated):
        return
    status = file.stat()
    if _sha256(file, status.st_size, status.st_mtime_ns) != stated:
        raise MissingWeightsError(f"{file} is damaged or was changed (its SHA-256 is not {stated[:12]}...): {way_out}")


def _weight_files(folder: Path) -> list[Path]:
    return [p for p in (folder / "model.safetensors", folder / "pytorch_model.bin") if p.is_file()]


def _checked(folder: Path, model: HubModel) -> Path:
    if not (folder / "config.json").is_file() or not _weight_files(folder):
        lacks = "config.json" if not (folder / "config.json").is_file() else "model.safetensors"
        raise MissingWeightsError(
            f"{folder} is not a folder of weights (it has no {lacks}): fill it with '{model.command()}'"
        )
    for file in _weight_files(folder):
        _check_hash(file, model)
    return folder
