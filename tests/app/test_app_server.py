"""The local server of ``avsep app``: who is let in, and what Python does for the page."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest

from avsep.app.server import App, serve
from avsep.cli import main
from avsep.errors import ConfigError
from avsep.export.runtime import BundleSeparator
from avsep.export.runtime.wav import read_wav, write_wav
from avsep.export.targets.website import write_page
from support.browsers import browser_bundle

RATE = 11025


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return browser_bundle(tmp_path_factory.mktemp("bundles") / "small")


class Client:
    """Asks as the page does."""

    def __init__(self, address, app):
        self.page, self.app = address, app
        self.address = address.partition("?")[0]

    def get(self, path=None, **headers):
        request = urllib.request.Request(self.page if path is None else self.address + path, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read(), answer.headers

    def post(self, path, body, token=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}app/{path}", data=data, method="POST")
        request.add_header("X-Avsep-Token", self.app.token if token is None else token)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def error(self, path, body, **options):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            self.post(path, body, **options)
        return refusal.value.code, refusal.value.read().decode()

    def separate(self, asked):
        job = {"job": json.loads(self.post("separate", asked))["job"]}
        for _ in range(600):
            state = json.loads(self.post("state", job))
            if state["error"] or state["result"]:
                return job, state
            time.sleep(0.1)
        raise AssertionError(f"it does not end: {state}")


@pytest.fixture
def client(bundle, tmp_path):
    from avsep.export import open_bundle

    with open_bundle(bundle) as opened:
        site = write_page(opened, tmp_path / "site")
    (tmp_path / "recordings").mkdir()
    with BundleSeparator.load(bundle, "cpu", threads=1) as engine:
        app = App(site, engine, tmp_path / "recordings", detector=None)
        with serve(app) as address:
            yield Client(address, app)


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "two tones.wav"
    rng = np.random.default_rng(0)
    times = np.arange(20_000) / RATE
    tones = np.stack([np.sin(2 * np.pi * hz * times) for hz in (440.0, 660.0)])
    write_wav(path, (0.2 * tones + rng.normal(0, 0.01, tones.shape)).astype(np.float32), RATE, "FLOAT")
    return path


def test_the_page_knows_its_server_and_is_isolated(client):
    page, headers = client.get()
    told = json.loads(re.search(rb'name="avsep-app" content="(.*?)"', page)[1].replace(b"&quot;", b'"'))
    assert told == {
        "token": client.app.token,
        "detector": False,
        "browser": True,
        "engine": "CPUExecutionProvider",
    }
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert client.get("page.js")[1]["Content-Type"].startswith("text/javascript")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "0.0.0.0", ""])
def test_a_name_that_was_made_to_lead_here_is_refused(client, host):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        client.get(Host=host)
    assert refusal.value.code == 421


def test_the_loopback_names_are_let_in(client):
    port = client.address.rstrip("/").rpartition(":")[2]
    assert b"avsep-app" in client.get(Host=f"localhost:{port}")[0]


@pytest.mark.parametrize("path", ["", "index.html", "?key=guess", "?key="])
def test_the_page_is_given_to_whoever_has_the_address_alone(client, path):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        client.get(path)
    assert refusal.value.code == 403
    assert client.app.token not in refusal.value.read().decode()


@pytest.mark.parametrize(
    "path", ["../manifest.json", "%2e%2e/recordings", "/etc/passwd", "sw.js", "bundle/separator.onnx"]
)
def test_only_the_files_of_the_site_are_given(client, path):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        client.get(path)
    assert refusal.value.code == 404


def test_without_the_token_nothing_is_done(client, recording):
    code, said = client.error("files?name=a.wav", recording.read_bytes(), token="guess")
    assert (code, said) == (403, "the page is of an earlier avsep app: load it again")
    assert not list(client.app.folder.iterdir())


@pytest.mark.parametrize("what", ["page", "receive", "nothing", "__init__", "_work"])
def test_only_what_the_page_asks_for_is_done(client, what):
    assert client.error(what, {})[0] == 404


def test_what_it_separates_is_what_the_runtime_separates(client, bundle, recording):
    number = client.post(f"files?name={urllib.parse.quote(recording.name)}", recording.read_bytes()).decode()
    sources = [{"name": name, "class": name, "track": [{"time": 0, "box": [0, 0, 1, 1]}]} for name in ("ding", "peep")]
    asked = {"id": number, "sources": sources, "looks": False, "channels": 2}
    job, state = client.separate(asked)
    assert state["error"] == ""
    mixture, _ = read_wav(recording)
    with BundleSeparator.load(bundle, "cpu", threads=1) as separator:
        expected = separator.separate_with_presence(mixture, None, ["ding", "peep"])
    signals = [*expected.sources, mixture - expected.sources.sum(axis=0)]
    for place, expected_signal in enumerate(signals):
        path = recording.parent / f"{place}.wav"
        path.write_bytes(client.post("result", {**job, "n": place}))
        np.testing.assert_allclose(read_wav(path)[0], expected_signal, rtol=0, atol=1e-6)
    np.testing.assert_allclose(state["result"]["presence"], expected.presence, atol=1e-5)
    monos = np.stack([*expected.sources, mixture]).mean(axis=1, dtype=np.float64)
    for row, line in enumerate(state["result"]["alike"]):
        np.testing.assert_allclose(line, np.corrcoef(monos)[row, : row + 1], atol=1e-5)


def test_sound_that_only_python_decodes_comes_as_wav(client, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    audio = np.random.default_rng(1).uniform(-0.5, 0.5, (3000, 2))
    soundfile.write(tmp_path / "a.aiff", audio, 22050, subtype="PCM_24")
    number = client.post("files?name=a.aiff", (tmp_path / "a.aiff").read_bytes()).decode()
    (tmp_path / "a.wav").write_bytes(client.post("sound", {"id": number}))
    found, rate = read_wav(tmp_path / "a.wav")
    assert rate == 22050
    np.testing.assert_allclose(found, audio.T, atol=2**-22)
    assert json.loads(client.post("about", {"id": number})) == {"pictures": False}


def test_frames_are_those_of_a_video(client, tmp_path):
    pytest.importorskip("av")
    from avsep.media.video import cut_frame, iter_frames
    from support.media_files import brightness_ramp, tone, write_video

    path = tmp_path / "ramp.mp4"
    write_video(path, brightness_ramp(16), tone(2.0), fps=8)
    number = client.post("files?name=ramp.mp4", path.read_bytes()).decode()
    box = [0.0, 0.25, 0.5, 1.0]
    packed = client.post("frames", {"id": number, "sources": [{"name": "ding", "track": [{"time": 0, "box": box}]}]})
    with np.load(io.BytesIO(packed)) as arrays:
        size = client.app.engine.frame_sizes["motion"]
        expected = [cut_frame(f, box, size) for f in iter_frames(path, 16.0, grey=True)]
        assert np.array_equal(arrays["0/motion"], np.stack(expected))
        assert arrays["0/motion_rate_hz"] == 16.0
        assert arrays["0/object"].shape[0] == 2


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("notes.wav", b"no sound at all" * 9, "notes.wav cannot be read as audio"),
        ("nothing.wav", b"", "nothing.wav is empty (0 bytes)"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_by_its_own_name(client, name, data, said):
    number = client.post(f"files?name={name}", data).decode()
    code, line = client.error("sound", {"id": number})
    assert code == 400
    assert line.startswith(said)
    assert str(client.app.folder) not in line


def test_a_mistake_in_a_job_is_told_in_its_state(client, recording):
    number = client.post("files?name=a.wav", recording.read_bytes()).decode()
    sources = [{"name": "ding", "class": "ding", "track": [{"time": 0, "box": [0, 0, 1, 1]}]}]
    _, state = client.separate({"id": number, "sources": sources, "looks": False, "channels": 2})
    assert "1 classes are asked for, and this bundle's graph takes 2" in state["error"]


def test_boxes_without_the_extra_and_recordings_that_went_are_told(client, recording):
    assert "avsep[vision]" in client.error("boxes", {"id": "x", "sources": []})[1]
    assert client.error("sound", {"id": "x"})[1] == "the recording is no longer here: choose it again"
    first = client.post("files?name=a.wav", recording.read_bytes()).decode()
    for _ in range(4):
        client.post("files?name=a.wav", recording.read_bytes())
    assert client.error("sound", {"id": first})[0] == 400
    assert len(list(client.app.folder.iterdir())) == 4


class LeftAndRight:
    """Finds the first class at the left and any other at the right, in every frame."""

    def best(self, frames, prompts):
        boxes = np.empty((len(frames), len(prompts), 4))
        boxes[:] = [0.5, 0.0, 1.0, 1.0]
        boxes[:, 0] = [0.0, 0.0, 0.5, 1.0]
        return np.full((len(frames), len(prompts)), 0.9), boxes


def test_boxes_are_those_of_the_detector(client, tmp_path):
    pytest.importorskip("av")
    from avsep.media.footage import track_objects
    from support.media_files import brightness_ramp, tone, write_video

    path = tmp_path / "ramp.mp4"
    write_video(path, brightness_ramp(16), tone(2.0), fps=8)
    number = client.post("files?name=ramp.mp4", path.read_bytes()).decode()
    client.app._make_detector = LeftAndRight
    sources = [{"name": "ding 1", "class": "ding"}, {"name": "hum", "class": "hum"}]
    found = json.loads(client.post("boxes", {"id": number, "sources": sources}))
    expected = track_objects(path, {"ding 1": "ding", "hum": "hum"}, LeftAndRight())
    for source, track in zip(sources, found, strict=True):
        assert track == [{"time": s, "box": list(f.box)} for s, f in expected.entries[source["name"]]]
    assert [track[0]["box"][0] for track in found] == [0.0, 0.5]


def test_a_job_that_the_page_stops_ends_and_leaves_room_for_the_next(client, tmp_path):
    write_wav(tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.1, (2, 400 * 8191)).astype(np.float32), RATE)
    number = client.post("files?name=long.wav", (tmp_path / "long.wav").read_bytes()).decode()
    sources = [{"name": n, "class": n, "track": [{"time": 0, "box": [0, 0, 1, 1]}]} for n in ("ding", "hum")]
    asked = {"id": number, "sources": sources, "looks": False, "channels": 2}
    job = json.loads(client.post("separate", asked))
    client.post("stop", job)
    for _ in range(600):
        state = json.loads(client.post("state", job))
        if state["error"] or state["result"]:
            break
        time.sleep(0.1)
    assert (state["error"], state["result"]) == ("stopped", None)
    assert client.app._lock.acquire(timeout=30)
    client.app._lock.release()


def test_a_port_that_is_taken_is_named(client):
    port = int(client.address.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError, match=rf"port {port} cannot be used.*--port"), serve(client.app, port):
        pass


def test_what_is_no_separator_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["app", str(tmp_path), "--no-open"])
    assert stop.value.code == 2
    assert "is no run, bundle or site" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_the_command_serves_until_it_is_interrupted_and_leaves_nothing(more, bundle, tmp_path):
    """Without ONNX Runtime's builds for browsers everything runs in Python."""
    script = "import sys; from avsep.cli import main; main(sys.argv[1:])"
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path / "temporary"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "https_proxy": "http://127.0.0.1:9",  # no network
        "PYTHONUNBUFFERED": "1",
    }
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", script, "app", str(bundle), "--no-open", "--provider", "cpu", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/[^\s\"]*", line)[0]
        if more:
            assert json.loads(line) == {"format": "avsep-app", "address": address, "in_browser": False}
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert b"&quot;browser&quot;: false" in answer.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "everything runs in Python: onnxruntime-web cannot be downloaded" in err
    assert out == ("" if more else "ended; the recordings are deleted\n")
    assert not list((tmp_path / "temporary").glob("avsep*"))


@pytest.mark.slow
def test_the_page_separates_in_python_what_the_browser_cannot_decode(client, bundle, tmp_path):
    """AIFF is a format of libsndfile that Chromium does not know."""
    from support.browsers import browser, opened_page, separate_in_page

    soundfile = pytest.importorskip("soundfile")
    audio = np.random.default_rng(1).normal(0, 0.1, (30_000, 2))
    soundfile.write(tmp_path / "a.aiff", audio, RATE, subtype="PCM_24")
    client.app.browser = False  # the site of this client has no build for browsers
    with browser() as chrome, opened_page(chrome, client.page) as page:
        assert page.inner_text("#engine") == "Ready: CPUExecutionProvider, on this computer."
        files = separate_in_page(page, tmp_path / "a.aiff", ["ding", "peep"], tmp_path)
    mixture = soundfile.read(tmp_path / "a.aiff", dtype="float32")[0].T
    with BundleSeparator.load(bundle, "cpu", threads=1) as separator:
        expected = separator.separate(mixture, None, ["ding", "peep"])
    for file, source in zip(files, expected, strict=False):
        np.testing.assert_allclose(read_wav(file)[0], source, rtol=0, atol=1e-6)
