"""A static site that separates in the visitor's browser: the page, a bundle, and ONNX Runtime's builds for browsers.

Nothing is sent anywhere: whatever serves files serves the site, and once loaded it works without a network.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import urllib.request
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

from avsep.errors import ConfigError, ExportError
from avsep.export.bundle.packing import refuse_surroundings, staged
from avsep.export.runtime.errors import one_line
from avsep.export.runtime.files import atomic_path, refuse_file, sha256_file
from avsep.export.runtime.manifest import MANIFEST
from avsep.export.runtime.reader import Bundle
from avsep.files import read_json, write_json, write_text

__all__ = [
    "MOST_SITE_BYTES",
    "ORT_WEB_VERSION",
    "check_for_browsers",
    "check_place",
    "ort_web_files",
    "write_page",
    "write_site",
]

ORT_WEB_VERSION = "1.30.0"
ORT_WEB_URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{ORT_WEB_VERSION}.tgz"
# npm's own hash of the archive, SHA-512 in base 64.
ORT_WEB_INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# Of its folder dist, with the SHA-256 of each: the build for WebAssembly, and the one for WebGPU, which needs a browser
# whose WebAssembly can wait for the GPU (JSPI).
ORT_WEB_FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.jspi.min.mjs": "bc57179d923fda2d88d4a395359c8df44399dde087bf9ff44fc0e40ab398e4d9",
    "ort-wasm-simd-threaded.jspi.mjs": "270e2c6da9f297239d301d329782b6446641cb1e16a77967690adcfca35f3268",
    "ort-wasm-simd-threaded.jspi.wasm": "a54c76f86b0f0d9572380cf1c6292a7b3903716ffcbcd6b0e5c7050bf430eb93",
}
_MOST_ARCHIVE_BYTES = 100_000_000
# What a visitor loads at most; a larger site is written too, and said to be so.
MOST_SITE_BYTES = 30_000_000
_FORMAT = "avsep-site"
_PAGE = Path(__file__).parent / "web"
_NOT_SERVED = {"tsconfig.json", "onnxruntime-web.LICENSE"}

Tell = Callable[[str], None]


def check_for_browsers(bundle: Bundle) -> None:
    """Refuse a bundle that no browser can run.

    Raises:
        ExportError: both transforms are outside of its graph, or it must see features that only Python extracts.
    """
    graphs = [graph for graph in bundle.graphs if graph.kind in ("separator", "stream")]
    if not graphs:
        raise ExportError(f"{bundle.path} was exported with --spectral, which no browser runs: export it without")
    if any(tensor.name == "seen" for tensor in graphs[0].inputs):
        return
    for source in bundle.manifest["visual"]:
        if source["graph"] is None:
            raise ExportError(
                f"{bundle.path} looks at stored {source['role']} features '{source['name']}', which a browser cannot "
                "extract: open it with avsep app, where Python does, or train with an encoder that takes frames"
            )


def write_site(
    bundle: Bundle,
    out: str | os.PathLike[str],
    *,
    ort_web: str | os.PathLike[str] | None = None,
    pack: bool = True,
    tell: Tell = lambda line: None,
) -> Path:
    """Write the site of a bundle into a folder, which appears whole; an older site there is replaced.

    Args:
        bundle: with its hashes checked.
        ort_web: folder of the unpacked npm package onnxruntime-web; None: of the cache, or downloaded.
        pack: compress ONNX Runtime's builds, which takes seconds; a site that is not sent over a network needs it not.
        tell: called with a line that whoever exports should read.

    Raises:
        ExportError: the bundle runs in no browser, or ONNX Runtime's builds cannot be had or are others.
        ConfigError: ``out`` holds something else than a site, or lies inside a run or a bundle.
    """
    target = Path(os.path.abspath(out))
    check_for_browsers(bundle)
    check_place(target)
    builds = ort_web_files(ort_web, tell=tell)
    with staged(target) as staging:
        _copy_page(staging)
        _write_builds(staging / "ort", builds, pack)
        shutil.copytree(bundle.folder(), staging / "bundle", ignore=_only_own(bundle))
        names = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
        hashes = {name: sha256_file(staging / name) for name in names}
        state = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]
        worker = staging / "sw.js"
        write_text(worker, worker.read_text(encoding="utf-8").replace("@STATE@", state))
        # A browser fetches its service worker by itself, and the build for WebGPU where it has a use for it; what of
        # the bundle it does not run is not kept.
        kept = [n for n in names if n != "sw.js" and "jspi" not in n and not n.endswith((".whl", ".py"))]
        write_json(staging / "site.json", {"format": _FORMAT, "state": state, "files": kept})
        size = sum((staging / name).stat().st_size for name in kept)
    if pack and size > MOST_SITE_BYTES:
        tell(
            f"note: a visitor loads {size / 1e6:.0f} MB of {out}, once: a smaller separator loads faster, and avsep "
            "app runs large ones in Python"
        )
    return target


def write_page(bundle: Bundle, out: str | os.PathLike[str]) -> Path:
    """Write the page and a bundle's manifest alone, for a server that runs the bundle itself (``avsep app``)."""
    target = Path(out)
    (target / "bundle").mkdir(parents=True)
    _copy_page(target)
    (target / "bundle" / MANIFEST).write_bytes((bundle.folder() / MANIFEST).read_bytes())
    return target


def _copy_page(folder: Path) -> None:
    for source in sorted(_PAGE.iterdir()):
        if source.is_file() and source.name not in _NOT_SERVED:
            shutil.copyfile(source, folder / source.name)


def _only_own(bundle: Bundle) -> Callable[[str, list[str]], set[str]]:
    """For copytree: leaves out what is not of the bundle, such as engines."""
    own = {MANIFEST, *bundle.manifest["files"]}
    return lambda _, names: {name for name in names if name not in own}


def _write_builds(folder: Path, builds: dict[str, Path], pack: bool) -> None:
    folder.mkdir()
    for name, path in builds.items():
        if name.endswith(".wasm"):  # packed a quarter of the size; the page takes it either way
            data = path.read_bytes()
            (folder / f"{name}.gz").write_bytes(gzip.compress(data, 9, mtime=0) if pack else data)
        else:
            shutil.copyfile(path, folder / name)
    shutil.copyfile(_PAGE / "onnxruntime-web.LICENSE", folder / "LICENSE")


def check_place(out: str | os.PathLike[str]) -> None:
    """Raise :class:`ConfigError` where a site cannot be written: something else than a site is there or around it."""
    target = Path(os.path.abspath(out))
    refuse_file(target.parent)
    refuse_surroundings(Path(out), "site")
    if target.is_file():
        raise ConfigError(f"{target} is a file: give a folder for the site")
    if not target.exists() or not any(target.iterdir()):
        return
    try:
        found = read_json(target / "site.json")
    except ConfigError:
        found = None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        first = sorted(p.name for p in target.iterdir())[0]
        raise ConfigError(f"{target} holds other files ({first}) and no site: choose another folder")


def ort_web_files(folder: str | os.PathLike[str] | None = None, *, tell: Tell = lambda line: None) -> dict[str, Path]:
    """ONNX Runtime's builds for browsers, of the pinned version, by name; each is held against its SHA-256.

    Args:
        folder: of the unpacked npm package; None: the cache's, filled by a download where it is empty.
        tell: called with a line before a download.

    Raises:
        ExportError: a file is missing or of another version, or the download fails.
    """
    if folder is not None:
        place = Path(folder)
        place = place / "dist" if (place / "dist").is_dir() else place
        return _checked(place, str(folder))
    cache = _cache()
    try:
        return _checked(cache, str(cache))
    except ExportError:
        pass
    tell(f"downloading onnxruntime-web {ORT_WEB_VERSION} ({ORT_WEB_URL})")
    _download(cache)
    return _checked(cache, str(cache))


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "avsep" / f"onnxruntime-web-{ORT_WEB_VERSION}"


def _checked(place: Path, shown: str) -> dict[str, Path]:
    found = {}
    for name, digest in ORT_WEB_FILES.items():
        path = place / name
        if not path.is_file():
            raise ExportError(f"{shown} has no {name}: give the unpacked npm package onnxruntime-web {ORT_WEB_VERSION}")
        if sha256_file(path) != digest:
            raise ExportError(
                f"{path} is not of onnxruntime-web {ORT_WEB_VERSION} (its SHA-256 differs): unpack that version again"
            )
        found[name] = path
    return found


def _download(cache: Path) -> None:
    way_out = f"unpack it elsewhere (npm pack onnxruntime-web@{ORT_WEB_VERSION}) and give its folder by --ort-web"
    try:
        with urllib.request.urlopen(ORT_WEB_URL, timeout=60) as answer:
            data = answer.read(_MOST_ARCHIVE_BYTES + 1)
    except OSError as error:
        raise ExportError(f"onnxruntime-web cannot be downloaded ({one_line(error, 200)}): {way_out}") from None
    if hashlib.sha512(data).digest() != b64decode(ORT_WEB_INTEGRITY):
        raise ExportError(f"{ORT_WEB_URL} is not the archive that avsep was made with (its SHA-512 differs): {way_out}")
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for name in ORT_WEB_FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None  # the archive's hash is known
            with atomic_path(cache / name) as temporary:
                temporary.write_bytes(member.read())
