"""The site in a browser: the same sounds as Python's, from files of any kind, and nothing sent anywhere."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from avsep.export import ExportPlan, export, open_bundle
from avsep.export.runtime import BundleSeparator
from avsep.export.runtime.wav import read_wav, write_wav
from avsep.export.targets.website import MOST_SITE_BYTES, write_site
from avsep.media.audio import resample
from support.browsers import browser, browser_bundle, chromium, opened_page, ort_web, separate_in_page, served

RATE = 11025


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    chromium()
    return browser_bundle(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture(scope="module")
def site(bundle, tmp_path_factory) -> Path:
    with open_bundle(bundle) as opened:
        return write_site(opened, tmp_path_factory.mktemp("sites") / "site", ort_web=ort_web(), pack=False)


@pytest.fixture(scope="module")
def chrome():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def address(site):
    with served(site) as url:
        yield url


@pytest.fixture
def page(chrome, address):
    with opened_page(chrome, address) as found:
        yield found


def two_tones(samples: int, rate: int = RATE) -> np.ndarray:
    """[2, L], other tones in each channel, in a little noise."""
    times = np.arange(samples) / rate
    tones = np.stack([np.sin(2 * np.pi * hz * times) for hz in (440.0, 660.0)])
    return (0.2 * tones + np.random.default_rng(0).normal(0, 0.01, tones.shape)).astype(np.float32)


def sdr_db(reference: np.ndarray, estimate: np.ndarray) -> float:
    error = np.sum((reference.astype(np.float64) - estimate) ** 2)
    return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / (error + 1e-30)))


def test_a_wav_file_gives_the_samples_of_the_runtime(page, bundle, tmp_path):
    """Stereo, several chunks, at the separator's rate."""
    mixture = two_tones(30_000)
    write_wav(tmp_path / "two tones.wav", mixture, RATE, "FLOAT")
    files = separate_in_page(page, tmp_path / "two tones.wav", ["peep", "ding"], tmp_path)
    assert [f.name for f in files] == ["two tones_peep.wav", "two tones_ding.wav", "two tones_residual.wav"]
    with BundleSeparator.load(bundle, "cpu", threads=1) as separator:
        expected = separator.separate_with_presence(mixture, None, ["peep", "ding"])
    for file, signal in zip(files, [*expected.sources, mixture - expected.sources.sum(axis=0)], strict=True):
        found, rate = read_wav(file)
        assert rate == RATE
        np.testing.assert_allclose(found, signal, rtol=0, atol=2e-5)
        assert sdr_db(signal, found) > 60
    shown = page.locator("#tracks .track").all_inner_texts()
    assert len(shown) == 4
    for text, probability in zip(shown[1:3], expected.presence, strict=True):
        assert f"{100 * probability:.0f} %)" in text
    assert page.locator("#engine").inner_text().startswith("Verified: 7 files have their SHA-256")


@pytest.mark.slow
def test_sixteen_bits_and_other_rates_are_python_s_to_a_hundredth_of_a_decibel(page, bundle, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    own = two_tones(4 * 44_100, 44_100)
    soundfile.write(tmp_path / "cd.flac", own.T, 44_100)
    files = separate_in_page(page, tmp_path / "cd.flac", ["ding", "hum"], tmp_path, format_name="PCM_16")
    mixture = resample(soundfile.read(tmp_path / "cd.flac", dtype="float32")[0].T, 44_100, RATE)
    with BundleSeparator.load(bundle, "cpu", threads=1) as separator:
        expected = separator.separate(mixture, None, ["ding", "hum"])
    truth = resample(own, 44_100, RATE)
    for file, signal in zip(files, expected, strict=False):
        found, _ = read_wav(file)
        assert found.shape == signal.shape
        assert abs(sdr_db(truth, found) - sdr_db(truth, signal)) < 0.01


@pytest.mark.slow
def test_a_video_gives_what_python_gives(page, bundle, tmp_path):
    """Frames by boxes that were drawn, sound of a length that is whole for its codec: the browser cuts the rest."""
    pytest.importorskip("av")
    pytest.importorskip("pretty_midi")
    from avsep.media.detection import read_boxes
    from avsep.media.footage import timelines_of_video
    from avsep.media.video import read_sound
    from support.duet_video import write_duet_video, write_halves

    path = tmp_path / "duet.mp4"
    truth = write_duet_video(path, ("accordion", "violin"), seconds=172 * 1024 / 44_100)
    boxes = {"ding": [0.0, 0.0, 0.5, 1.0], "peep": [0.5, 0.0, 1.0, 1.0]}
    files = separate_in_page(page, path, list(boxes), tmp_path, boxes)
    track = read_boxes(write_halves(tmp_path / "boxes.json", ("ding", "peep")))
    sound, rate = read_sound(path, mono=False)
    mixture = resample(sound, rate, RATE)
    with BundleSeparator.load(bundle, "cpu", threads=1) as separator:
        seen = timelines_of_video(path, list(boxes), separator.visual_sources, track, sizes=separator.frame_sizes)
        expected = separator.separate(mixture[0], seen, list(boxes))
        unseen = separator.separate(mixture[0], None, list(boxes))
    for number, signal in enumerate(expected):
        found = read_wav(files[number])[0][0]
        length = min(len(found), truth.shape[1])
        assert abs(len(found) - len(signal)) <= 1
        shared = slice(0, length)
        difference = sdr_db(truth[number][shared], found[shared]) - sdr_db(truth[number][shared], signal[shared])
        assert abs(difference) < 0.01
        assert sdr_db(signal[shared], found[shared]) > sdr_db(signal[shared], unseen[number][shared]) + 6
    assert page.locator("#watch video").evaluate("video => video.videoWidth") == 224


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    ["aligned_small", "iquery_small", "sound_of_pixels_small", "coseparation_small", "aligned_44k", "causal_small"],
)
def test_the_small_presets_compute_what_they_should(chrome, preset, tmp_path):
    """Golden outputs within the tolerance of their manifests, in a site of which a visitor loads less than 30 MB."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from avsep.separator import build_separator

    separator = build_separator(preset, classes=("flute", "piano", "cello"), seed=0)
    bundle = export(separator.eval(), ExportPlan(), tmp_path / "bundle", made_from="a test")
    said = []
    site = write_site(bundle, tmp_path / "site", ort_web=ort_web(), tell=said.append)
    assert not said
    kept = json.loads((site / "site.json").read_text())["files"]
    assert sum((site / name).stat().st_size for name in kept) < MOST_SITE_BYTES
    with served(site) as url, opened_page(chrome, url) as page:
        assert "compute what they should on WebAssembly" in page.inner_text("#engine")


@pytest.mark.slow
def test_webgpu_gives_what_webassembly_gives(chrome, address, bundle, tmp_path):
    """On an adapter that computes on the CPU, so that it needs no GPU."""
    mixture = two_tones(12_000)
    write_wav(tmp_path / "a.wav", mixture, RATE, "FLOAT")
    options = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with browser(*options, beside=chrome) as other:
        with opened_page(other, address, ready=False) as page:
            adapter = "(async () => Boolean(navigator.gpu && (await navigator.gpu.requestAdapter())))()"
            if not page.evaluate(adapter) or not page.evaluate("'Suspending' in WebAssembly"):
                pytest.skip("no WebGPU, not even on the CPU")
        with opened_page(other, f"{address}?backend=webgpu") as page:
            assert "compute what they should on WebGPU" in page.inner_text("#engine")
            files = separate_in_page(page, tmp_path / "a.wav", ["peep", "ding"], tmp_path)
    with BundleSeparator.load(bundle, "cpu", threads=1) as separator:
        expected = separator.separate(mixture, None, ["peep", "ding"])
    for file, signal in zip(files, expected, strict=False):
        assert sdr_db(signal, read_wav(file)[0]) > 60


@pytest.mark.slow
def test_a_site_whose_bundle_was_changed_says_so(chrome, site, tmp_path):
    changed = shutil.copytree(site, tmp_path / "site")
    graph = changed / "bundle" / "object_encoder.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    with served(changed) as url, opened_page(chrome, url, ready=False) as page:
        page.wait_for_selector("#alert:not([hidden])", timeout=120_000)
        assert "object_encoder.onnx is not the file that was exported" in page.inner_text("#alert")
        assert page.locator("#file").is_disabled()


@pytest.mark.slow
def test_files_that_cannot_be_used_are_told_in_a_line(page, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    wrong = {
        "empty.wav": (b"", "empty.wav is empty (0 bytes)"),
        "notes.mp4": (b"no film at all " * 500, "notes.mp4 holds no sound that this browser can decode"),
        "silent.wav": (None, "silent.wav is silent: there is nothing to separate"),
        "odd.wav": (None, "odd.wav has NaN or infinite samples"),
    }
    soundfile.write(tmp_path / "silent.wav", np.zeros(5000), RATE)
    soundfile.write(tmp_path / "odd.wav", np.array([0, np.nan] * 100, np.float32), RATE, subtype="FLOAT")
    for name, (data, said) in wrong.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        page.set_input_files("#file", str(tmp_path / name))
        page.wait_for_selector("#alert:not([hidden])", timeout=60_000)
        assert page.inner_text("#alert").startswith(said)
        assert page.locator("#setup").is_hidden()
    write_wav(tmp_path / "short.wav", two_tones(7), RATE)  # a mistake is over with the next file
    files = separate_in_page(page, tmp_path / "short.wav", ["ding", "hum"], tmp_path)
    assert [read_wav(file)[0].shape for file in files] == [(2, 7)] * 3


@pytest.mark.slow
def test_a_separation_that_is_stopped_leaves_the_page_as_it_was(page, tmp_path):
    write_wav(tmp_path / "long.wav", np.tile(two_tones(RATE * 10), 60), RATE)
    page.set_input_files("#file", str(tmp_path / "long.wav"))
    page.wait_for_selector("#setup:not([hidden])", timeout=60_000)
    page.click("#go")
    page.click("#stop")
    page.wait_for_selector("#work", state="hidden", timeout=60_000)
    assert page.locator("#result").is_hidden()
    assert page.locator("#alert").is_hidden()
    write_wav(tmp_path / "short.wav", two_tones(9000), RATE)
    files = separate_in_page(page, tmp_path / "short.wav", ["ding", "hum"], tmp_path)
    assert read_wav(files[0])[0].shape == (2, 9000)


@pytest.mark.slow
def test_two_of_a_class_need_boxes_of_their_own(page, tmp_path):
    write_wav(tmp_path / "a.wav", two_tones(9000), RATE)
    page.set_input_files("#file", str(tmp_path / "a.wav"))
    page.wait_for_selector("#setup:not([hidden])")
    for number in range(2):
        page.locator("#sources select").nth(number).select_option(label="hum")
    page.click("#go")
    page.wait_for_selector("#alert:not([hidden])")
    assert "hum 1 and hum 2 are of one class, and nothing moving is seen of them" in page.inner_text("#alert").lower()


@pytest.mark.slow
def test_nothing_leaves_the_site_and_it_works_without_a_server(chrome, site, tmp_path):
    """All requests go to the site, and once loaded a visitor needs no network; then threads may be used, too."""
    write_wav(tmp_path / "a.wav", two_tones(9000), RATE)
    asked = []
    context = chrome.new_context(accept_downloads=True)
    try:
        with served(site) as url:
            page = context.new_page()
            page.on("request", lambda request: asked.append((request.method, request.url)))
            page.goto(url)
            page.wait_for_selector("#file:not([disabled])", timeout=120_000, state="attached")
            page.wait_for_timeout(200)
            page.evaluate("navigator.serviceWorker.ready.then(() => true)")
            separate_in_page(page, tmp_path / "a.wav", ["ding", "hum"], tmp_path)
        assert {method for method, _ in asked} == {"GET"}
        assert all(where.startswith((url, "blob:", "data:")) for _, where in asked)
        page.goto(f"{url}?threads=2")  # the server is gone
        page.wait_for_selector("#file:not([disabled])", timeout=120_000, state="attached")
        assert page.evaluate("crossOriginIsolated")
        assert "on WebAssembly, 2 threads" in page.inner_text("#engine")
        separate_in_page(page, tmp_path / "a.wav", ["ding", "hum"], tmp_path)
    finally:
        context.close()


@pytest.mark.slow
def test_one_that_is_asked_by_name_looks_once_a_box_is_drawn(chrome, tmp_path):
    pytest.importorskip("av")
    from support.media_files import brightness_ramp, write_video

    path = tmp_path / "ramp.mp4"
    write_video(path, brightness_ramp(16), two_tones(88_200, 44_100)[:1], fps=8)
    bundle = browser_bundle(tmp_path / "bundle", by_name=True, left_out={"hum": "a test"})
    with open_bundle(bundle) as opened:
        site = write_site(opened, tmp_path / "site", ort_web=ort_web(), pack=False)
    with served(site) as address, opened_page(chrome, address) as page:
        for box, told in ((None, True), ({"ding": [0.1, 0.1, 0.5, 0.9], "peep": [0.5, 0.1, 0.9, 0.9]}, False)):
            page.set_input_files("#file", [])
            separate_in_page(page, path, ["ding", "peep"], tmp_path, box)
            assert page.locator("#sources select").first.locator("option").all_inner_texts() == ["ding", "peep"]
            assert page.locator("#look").is_checked() != told
            assert ("asked for by name alone" in page.inner_text("#summary")) == told


@pytest.mark.slow
def test_the_keyboard_reaches_everything(page, tmp_path):
    pytest.importorskip("av")
    from support.media_files import brightness_ramp, write_video

    path = tmp_path / "ramp.mp4"
    write_video(path, brightness_ramp(16), two_tones(88_200, 44_100)[:1], fps=8)
    page.set_input_files("#file", str(path))
    page.wait_for_selector("#setup:not([hidden])", timeout=60_000)
    box = page.locator("#stage .box").first
    box.focus()
    for _ in range(10):
        page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("ArrowRight")
    assert "left 2 %, top 0 %, right 82 %, bottom 100 %" in box.get_attribute("aria-label")
    page.locator("#go").press("Enter")
    page.wait_for_selector("#result:not([hidden])", timeout=120_000)
    assert page.evaluate("document.activeElement.id") == "resulttitle"
    page.keyboard.press("Space")
    page.wait_for_selector('#play:has-text("Pause")')
    page.wait_for_selector('#play:has-text("Play")', timeout=20_000)  # to the end
    page.locator("#seek").focus()
    page.keyboard.press("Home")
    assert page.inner_text("#clock").startswith("0:00 /")
    solo = page.locator('button[aria-label="Solo: hum"]')
    solo.press("Enter")
    assert solo.get_attribute("aria-pressed") == "true"
    assert page.locator("#tracks .track.off").count() == 2
    names = page.locator("button, input, select").evaluate_all(
        "all => all.filter(n => n.checkVisibility()).map(n => n.ariaLabel || n.labels?.[0]?.innerText || n.innerText)"
    )
    assert all(name.strip() for name in names), names


def _memory_mb(pids: set[int]) -> float:
    """What processes hold in memory that is no file's."""
    total = 0.0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
    return total


def _below(pid: int) -> set[int]:
    """A process with all that it started."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(text.rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_minutes_take_bounded_memory(page, tmp_path):
    """106 MB of a stereo file at 44.1 kHz: no more is held than the results and some chunks."""
    piece = two_tones(44_100 * 10, 44_100)
    write_wav(tmp_path / "long.wav", np.tile(piece, 60), 44_100)
    before = _memory_mb(_below(os.getpid()))
    page.set_input_files("#file", str(tmp_path / "long.wav"))
    page.wait_for_selector("#setup:not([hidden])", timeout=300_000)
    for number, name in enumerate(("ding", "hum")):
        page.locator("#sources select").nth(number).select_option(label=name)
    most = 0.0
    page.click("#go")
    while page.locator("#result").is_hidden():
        assert page.locator("#alert").is_hidden(), page.inner_text("#alert")
        most = max(most, _memory_mb(_below(os.getpid())))
        page.wait_for_timeout(500)
    results = 4 * 600 * RATE * 2 * 4 / 1e6  # mixture, two sources, residual; the browser may keep them on disk
    assert most - before < results + 300
    with page.expect_download() as download:
        page.click('button[aria-label="Download residual as WAV"]')
    assert Path(download.value.path()).stat().st_size == 44 + 600 * RATE * 2 * 2
    page.click("#play")
    page.wait_for_selector('#clock:has-text("0:01")', timeout=30_000)
