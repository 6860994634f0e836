"""The runtime as a wheel of its own, ``avsep-runtime``, which lies in every bundle.

A wheel is a zip with three texts beside its files (PEP 427). Writing it here takes less than calling a build backend,
none of which need be installed where a bundle is exported; nothing is fetched, and the same sources give the same
bytes: members sorted, of one time, and stored as they are, since compressors differ between versions of zlib.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from avsep.export import runtime

__all__ = ["write_wheel"]

_PACKAGE = "avsep_runtime"

_METADATA = """\
Metadata-Version: 2.4
Name: avsep-runtime
Version: {version}
Summary: Separates sounds with a bundle that avsep exported: NumPy and one inference library
License-Expression: MIT
License-File: LICENSE
Requires-Python: >=3.10
Requires-Dist: numpy>=1.21
Description-Content-Type: text/markdown

# avsep-runtime

Separates recordings with a bundle of `avsep export`. It needs NumPy and one library that runs the bundle's graphs or
engines: onnxruntime (or onnxruntime-gpu), openvino, tensorrt or tensorrt_rtx. The bundle's README.md says more.

    avsep-runtime BUNDLE recording.wav --classes flute,piano --features features.npz --out separated
    python -m avsep_runtime.verify BUNDLE
"""
_WHEEL = """\
Wheel-Version: 1.0
Generator: avsep ({version})
Root-Is-Purelib: true
Tag: py3-none-any
"""
_SCRIPTS = """\
[console_scripts]
avsep-runtime = avsep_runtime.command:main
"""


def write_wheel(folder: Path, licence: str) -> str:
    """Write the wheel into ``folder``. Returns its file name.

    Args:
        licence: text of the licence that goes into it.
    """
    version = runtime.__version__
    sources = Path(runtime.__file__).parent
    files = {f"{_PACKAGE}/{path.name}": path.read_bytes() for path in sorted(sources.glob("*.py"))}
    files[f"{_PACKAGE}/py.typed"] = b""
    info = f"{_PACKAGE}-{version}.dist-info"
    for name, text in (
        ("METADATA", _METADATA.format(version=version)),
        ("WHEEL", _WHEEL.format(version=version)),
        ("entry_points.txt", _SCRIPTS),
        ("licenses/LICENSE", licence),
    ):
        files[f"{info}/{name}"] = text.encode()
    rows = [f"{name},{_digest(data)},{len(data)}\n" for name, data in files.items()]
    files[f"{info}/RECORD"] = "".join([*rows, f"{info}/RECORD,,\n"]).encode()
    wheel = f"{_PACKAGE}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / wheel, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo(name)  # its time is 1980
            member.external_attr = 0o644 << 16
            archive.writestr(member, data)
    return wheel


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
