"""Bundles whose files were changed, and which a hash of the manifest does not give away."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def write_sealed(bundle: Path, manifest: dict[str, Any], *, files: bool = True) -> None:
    """Write a changed manifest with the hash that belongs to it, and (``files``) those of the files that it names."""
    from avsep.export.runtime.manifest import MANIFEST, sealed

    if files:
        for name in manifest["files"]:
            manifest["files"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(sealed(manifest)))
