"""The local server of ``avsep app``: a site's files, and what Python does for the page where the browser cannot.

It listens on this computer alone. Every request must name it by a loopback address, so that a page from elsewhere whose
name was made to lead here is refused. The page, and whatever it asks Python for, is given for a token alone, which
stands in the address that is printed and opened: other people on this computer do not have it.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import io
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from avsep.errors import AvsepError, ConfigError, DataError
from avsep.export.runtime.errors import one_line
from avsep.export.runtime.recordings import Separated
from avsep.export.runtime.timeline import VisualSource, VisualTimeline
from avsep.export.runtime.wav import write_wav

__all__ = ["App", "Engine", "serve"]

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
}
# Threads of WebAssembly share memory, which browsers give to isolated pages alone.
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_MOST_QUESTION_BYTES = 1 << 20  # of a question in JSON; files have no limit but the disk
_BLOCK = 1 << 20
_MOST_KEPT = 4  # recordings and results that are kept; the oldest go first


class Engine(Protocol):
    """What separates in Python: a bundle's separator (:class:`avsep.export.runtime.BundleSeparator`)."""

    sample_rate_hz: int
    channels: int

    @property
    def provider(self) -> str: ...

    @property
    def visual_sources(self) -> tuple[VisualSource, ...]: ...

    @property
    def frame_sizes(self) -> dict[str, tuple[int, int]]: ...

    def separate_with_presence(
        self,
        mixture: NDArray[Any],
        features: Mapping[str, VisualTimeline | Mapping[str, Any]] | None = None,
        classes: Sequence[str] = (),
        rate_hz: int | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Separated: ...


class _Stopped(Exception):
    """The page no longer wants the result."""


@dataclass
class _Job:
    """A separation under way: what it does, and what became of it."""

    folder: Path
    text: str = "reading"
    done: int = 0
    total: int = 1
    error: str = ""
    result: dict[str, Any] | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def tell(self, text: str) -> Callable[[int, int], None]:
        """A function to report progress to; it ends the job where the page asked for that."""

        def report(done: int, total: int) -> None:
            if self.stopped.is_set():
                raise _Stopped
            self.text, self.done, self.total = text, done, total

        return report


class App:
    """What the server knows and does, whatever asks for it.

    Args:
        site: folder of the page's files; ``bundle/manifest.json`` in it is the separator's.
        engine: separates in Python.
        folder: for recordings and results, emptied by whoever made it.
        browser: whether the browser can run the bundle.
        detector: makes what finds objects, called once; None where the extra ``vision`` is not installed.
    """

    def __init__(
        self,
        site: Path,
        engine: Engine,
        folder: Path,
        *,
        browser: bool = True,
        detector: Callable[[], Any] | None = None,
    ) -> None:
        self.site = site
        self.engine = engine
        self.folder = folder
        self.browser = browser
        self.token = secrets.token_urlsafe(24)
        self._make_detector = detector
        self._detector: Any = None
        self._lock = threading.Lock()  # one recording is worked on at a time
        self._files: dict[str, tuple[str, Path]] = {}
        self._jobs: dict[str, _Job] = {}
        root = site.resolve()
        self._served = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}

    # --- the page -----------------------------------------------------------------------------------------------------

    def page(self) -> bytes:
        """The page, with what it is to know of this server."""
        told = {
            "token": self.token,
            "detector": self._make_detector is not None,
            "browser": self.browser,
            "engine": self.engine.provider,
        }
        text = self._served["index.html"].read_text(encoding="utf-8")
        meta = f'<meta name="avsep-app" content="{html.escape(json.dumps(told))}">'
        return text.replace("<title>", f"{meta}\n<title>", 1).encode("utf-8")

    def file(self, name: str) -> Path | None:
        """A file of the site by its path, None where it has none such. The service worker is none here: the server is
        at hand."""
        return None if name == "sw.js" else self._served.get(name)

    # --- recordings ---------------------------------------------------------------------------------------------------

    def receive(self, name: str, size: int, read: Callable[[int], bytes]) -> str:
        """Take a file of ``size`` bytes; gives the name it goes by here.

        Raises:
            DataError: fewer bytes come than were promised.
        """
        number = secrets.token_hex(8)
        suffix = "".join(c for c in Path(name).suffix if c.isalnum() or c == ".")[:12]
        path = self.folder / f"{number}{suffix}"
        with open(path, "wb") as file:
            left = size
            while left > 0:
                block = read(min(left, _BLOCK))
                if not block:
                    path.unlink()
                    raise DataError(f"{name} ended after {size - left} of {size} bytes: drop it again")
                file.write(block)
                left -= len(block)
        self._files[number] = (name, path)
        while len(self._files) > _MOST_KEPT:
            _, old = self._files.pop(next(iter(self._files)))
            old.unlink(missing_ok=True)
        return number

    def _path(self, asked: Mapping[str, Any]) -> Path:
        try:
            return self._files[asked["id"]][1]
        except (KeyError, TypeError):
            raise DataError("the recording is no longer here: choose it again") from None

    @contextlib.contextmanager
    def _named(self, asked: Mapping[str, Any]) -> Iterator[Path]:
        """The recording's path; in messages its own name stands in the place of it."""
        path = self._path(asked)
        try:
            yield path
        except AvsepError as error:
            raise type(error)(str(error).replace(str(path), self._files[asked["id"]][0])) from None

    def about(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Whether a recording has pictures."""
        from avsep.media.video import is_video

        with self._named(asked) as path:
            return {"pictures": is_video(path)}

    def sound(self, asked: Mapping[str, Any]) -> bytes:
        """The sound of a recording as WAV of floats, at its own rate and with its channels."""
        from avsep.media.video import read_sound

        with self._named(asked) as path:
            audio, rate_hz = read_sound(path, mono=False)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            target = Path(folder) / "sound.wav"
            write_wav(target, audio, rate_hz, "FLOAT")
            return target.read_bytes()

    def boxes(self, asked: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        """Where the detector finds each source: times with boxes."""
        from avsep.media.footage import track_objects

        if self._make_detector is None:
            raise ConfigError("boxes are found with the extra vision: pip install 'avsep[vision]'")
        with self._lock, self._named(asked) as path:
            if self._detector is None:
                self._detector = self._make_detector()
            named = {source["name"]: source["class"] for source in asked["sources"]}
            track = track_objects(path, named, self._detector)
        return [[{"time": s, "box": list(found.box)} for s, found in track.entries[name]] for name in named]

    def _timelines(
        self, path: Path, sources: Sequence[Mapping[str, Any]], report: Callable[[int, int], None] | None = None
    ) -> dict[str, VisualTimeline]:
        from avsep.media.detection import GIVEN, BoxTrack, Found
        from avsep.media.footage import timelines_of_video

        track = BoxTrack(
            {
                source["name"]: [
                    (float(entry["time"]), Found(_box(entry["box"]), 1.0, GIVEN)) for entry in source["track"]
                ]
                for source in sources
            }
        )
        return timelines_of_video(
            path, list(track.classes), self.engine.visual_sources, track, sizes=self.engine.frame_sizes, report=report
        )

    def frames(self, asked: Mapping[str, Any]) -> bytes:
        """What the separator sees of each source, as .npz: by the source's number its frames and their rates."""
        with self._named(asked) as path:
            found = self._timelines(path, asked["sources"])
        arrays: dict[str, Any] = {}
        for number, timeline in enumerate(found.values()):
            for role in ("object", "motion"):
                frames = getattr(timeline, role)
                if frames is not None:
                    arrays[f"{number}/{role}"] = np.ascontiguousarray(frames)
                    arrays[f"{number}/{role}_rate_hz"] = np.float64(getattr(timeline, f"{role}_rate_hz"))
        packed = io.BytesIO()
        np.savez(packed, **arrays)
        return packed.getvalue()

    # --- separating ---------------------------------------------------------------------------------------------------

    def separate(self, asked: Mapping[str, Any]) -> dict[str, str]:
        """Begin to separate a recording; gives the job's name."""
        self._path(asked)
        name = secrets.token_hex(8)
        folder = self.folder / f"job-{name}"
        folder.mkdir()
        job = self._jobs[name] = _Job(folder)
        while len(self._jobs) > _MOST_KEPT:
            old = self._jobs.pop(next(iter(self._jobs)))
            old.stopped.set()
            shutil.rmtree(old.folder, ignore_errors=True)
        threading.Thread(target=self._work, args=(job, asked), daemon=True).start()
        return {"job": name}

    def _work(self, job: _Job, asked: Mapping[str, Any]) -> None:
        from avsep.inference.recordings import read_mixture

        try:
            with self._lock, self._named(asked) as path:
                begun = time.perf_counter()
                rate_hz = self.engine.sample_rate_hz
                _, mixture, _ = read_mixture(path, rate_hz, mono=asked["channels"] == 1)
                sources = asked["sources"]
                seen = None
                if asked["looks"]:
                    seen = self._timelines(path, sources, job.tell("looking at the video"))
                texts = [f"{s['name']}={s['class']}" if s["name"] != s["class"] else s["class"] for s in sources]
                separated = self.engine.separate_with_presence(
                    mixture, seen, texts, rate_hz, progress=job.tell("separating")
                )
                signals = [*separated.sources, mixture - separated.sources.sum(axis=0)]
                for number, signal in enumerate(signals):
                    write_wav(job.folder / f"{number}.wav", signal, rate_hz, "FLOAT")
                presence = None if separated.presence is None else [float(p) for p in separated.presence]
                job.result = {
                    "presence": presence,
                    "alike": _correlations([*separated.sources, mixture]),
                    "seconds": time.perf_counter() - begun,
                }
        except _Stopped:
            job.error = "stopped"
        except (AvsepError, OSError, KeyError, TypeError, ValueError) as error:
            job.error = one_line(error, 1000) or type(error).__name__

    def _job(self, asked: Mapping[str, Any]) -> _Job:
        try:
            return self._jobs[asked["job"]]
        except (KeyError, TypeError):
            raise DataError("the result is no longer here: separate again") from None

    def state(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """How far a job is, and what became of it."""
        job = self._job(asked)
        return {"text": job.text, "done": job.done, "total": job.total, "error": job.error, "result": job.result}

    def stop(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """End a job before its time."""
        self._job(asked).stopped.set()
        return {}

    def result(self, asked: Mapping[str, Any]) -> bytes:
        """A signal of a job that is done: sources in their order, then the residual."""
        path = self._job(asked).folder / f"{int(asked['n'])}.wav"
        if not path.is_file():
            raise DataError("the result is no longer here: separate again")
        return path.read_bytes()


def _correlations(signals: Sequence[NDArray[np.float32]]) -> list[list[float]]:
    """Of the mono signals of each two of [(C,) L], the later one's row first; silence is like nothing."""
    units = []
    for signal in signals:
        mono = np.atleast_2d(signal).mean(axis=0, dtype=np.float64)
        mono -= mono.mean()
        units.append(mono / max(float(np.linalg.norm(mono)), 1e-12))
    return [[float(one @ other) for other in units[: row + 1]] for row, one in enumerate(units)]


def _box(values: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = (min(max(float(value), 0.0), 1.0) for value in values)
    if not (left < right and top < bottom):
        raise DataError(f"a box from {left:.2f}, {top:.2f} to {right:.2f}, {bottom:.2f} is empty: draw it again")
    return left, top, right, bottom


def find_detector() -> Callable[[], Any] | None:
    """What makes the detector of boxes, None where the extra ``vision`` is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "PIL", "av")):
        return None

    def make() -> Any:
        from avsep.media.detection import OWLv2Detector

        return OWLv2Detector()

    return make


class _Handler(BaseHTTPRequestHandler):
    """Speaks HTTP; the server's ``app`` does the work."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "avsep"
    sys_version = ""

    def log_message(self, *_: object) -> None:
        """The terminal is for what a person should read."""

    def _refused(self) -> bool:
        """Answer what comes from elsewhere; whether it does."""
        if self.headers.get("Host", "") not in self.server.names:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"this server is reached by its loopback address alone")
            return True
        return False

    def _is_ours(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.server.app.token.encode())

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        """The page, or a file of the site."""
        if self._refused():
            return
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        if name in ("", "index.html"):
            if not self._is_ours(urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query).get("key", [""])[0]):
                self._answer(HTTPStatus.FORBIDDEN, b"open the address that avsep app printed")
                return
            self._answer(HTTPStatus.OK, self.server.app.page(), _TYPES[".html"])
            return
        path = self.server.app.file(name)
        if path is None:
            self._answer(HTTPStatus.NOT_FOUND, f"there is no {name[:100]}".encode())
            return
        self._answer(HTTPStatus.OK, path.read_bytes(), _TYPES.get(path.suffix, "application/octet-stream"))

    def do_POST(self) -> None:
        """A file, or a question in JSON."""
        self.close_connection = True  # a body that is not read would be taken for the next request
        if self._refused():
            return
        app = self.server.app
        if not self._is_ours(self.headers.get("X-Avsep-Token", "")):
            self._answer(HTTPStatus.FORBIDDEN, b"the page is of an earlier avsep app: load it again")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._answer(HTTPStatus.LENGTH_REQUIRED, b"the request does not say how long it is")
            return
        address = urllib.parse.urlsplit(self.path)
        what = address.path.removeprefix("/app/")
        try:
            if what == "files":
                name = urllib.parse.parse_qs(address.query).get("name", ["recording"])[0]
                number = app.receive(one_line(name, 200), int(length), self.rfile.read)
                self._answer(HTTPStatus.OK, number.encode())
                return
            if what not in _ANSWERS or int(length) > _MOST_QUESTION_BYTES:
                self._answer(HTTPStatus.NOT_FOUND, b"avsep app does no such thing")
                return
            found = getattr(app, what)(json.loads(self.rfile.read(int(length))))
        except (AvsepError, OSError) as error:
            self._answer(HTTPStatus.BAD_REQUEST, one_line(error, 1000).encode())
            return
        except (KeyError, TypeError, ValueError) as error:
            self._answer(HTTPStatus.BAD_REQUEST, f"the page asks in a wrong way ({one_line(error, 200)})".encode())
            return
        if isinstance(found, bytes):
            self._answer(HTTPStatus.OK, found, "application/octet-stream")
        else:
            self._answer(HTTPStatus.OK, json.dumps(found).encode(), _TYPES[".json"])


_ANSWERS = ("about", "sound", "boxes", "frames", "separate", "state", "stop", "result")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, app: App, port: int) -> None:
        self.app = app
        super().__init__(("127.0.0.1", port), _Handler)
        bound = self.server_address[1]
        self.names = {f"{host}:{bound}" for host in ("127.0.0.1", "localhost")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed midway is no mistake."""


@contextlib.contextmanager
def serve(app: App, port: int = 0) -> Iterator[str]:
    """Serve until the block ends; gives the page's address. Port 0 takes a free one.

    Raises:
        ConfigError: the port is taken, or may not be used.
    """
    try:
        server = _Server(app, port)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"port {port} cannot be used ({reason}): choose another by --port, or leave it out") from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/?key={app.token}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
