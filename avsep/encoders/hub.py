"""Published weights: in a folder, in the Hugging Face hub's cache, or downloaded at a pinned revision."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from avsep.errors import MissingExtraError, MissingWeightsError

__all__ = ["HubModel"]

WEIGHTS_VARIABLE = "AVSEP_WEIGHTS"


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
                # the PyTorch file only where there is no better one
                for patterns in (["*.json", "*.txt", "*.safetensors"], ["pytorch_model.bin"]):
                    folder = Path(
                        snapshot_download(
                            self.repository, revision=self.revision, allow_patterns=patterns, local_files_only=local
                        )
                    )
                    if _weight_files(folder):
                        return _checked(folder, self)
            except Exception as error:  # whatever the network, a proxy or the hub has to say
                reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise MissingWeightsError(
            f"the weights of {self.repository} at revision {self.revision[:8]} are not here and cannot be downloaded "
            f"({reason}): where there is a network, run '{self.command()}', copy the folder, and set "
            f"{WEIGHTS_VARIABLE} to the folder that holds {self.folder_name}, or give its path as weights"
        )


def _weight_files(folder: Path) -> list[Path]:
    return [p for p in (folder / "model.safetensors", folder / "pytorch_model.bin") if p.is_file()]


def _checked(folder: Path, model: HubModel) -> Path:
    if not (folder / "config.json").is_file() or not _weight_files(folder):
        lacks = "config.json" if not (folder / "config.json").is_file() else "model.safetensors"
        raise MissingWeightsError(
            f"{folder} is not a folder of weights (it has no {lacks}): fill it with '{model.command()}'"
        )
    return folder
