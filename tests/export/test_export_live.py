"""Causal separators in the browser: recordings as streams, and live through the audio thread."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from avsep.export import open_bundle
from avsep.export.runtime import BundleSeparator
from avsep.export.runtime.streaming import FrameStream, StreamLayout
from avsep.export.runtime.wav import read_wav, write_wav
from avsep.export.targets.website import write_site
from support.browsers import (
    LISTEN,
    SIDEWAYS,
    browser,
    causal_bundle,
    chromium,
    node,
    opened_page,
    ort_web,
    separate_in_page,
    served,
    tap,
    tapped_sound,
)
from support.causal import RATE_HZ, noise

CLASSES = ["flute", "violin"]


# --- the modules, under Node ------------------------------------------------------------------------------------------


def _toy(count: int, states: dict[str, list[int]]):
    """A graph of which every output depends on place, order, states and clip, for windows of 16 and hops of 4."""

    def run(inputs):
        length = inputs["mixture"].shape[-1]
        joined = np.concatenate([inputs["state_samples"], inputs["mixture"]], axis=-1)  # [1, 2, 12 + l]
        scale = (inputs["class_ids"][0] + 1).astype(np.float32)[:, None, None]
        told = inputs["state_presence_sum"] + inputs.get("counted", np.ones((1, 1), np.float32)).sum()
        return {
            "sources": (scale * joined[:, None, :, :length] + inputs["start"][..., None]).astype(np.float32),
            "presence": np.broadcast_to(told, (1, count)).astype(np.float32),
            "next_samples": joined[..., length:],
            "next_overlap": (scale * joined[:, None, :, length:] / 8).astype(np.float32),
            "next_envelope": (inputs["state_envelope"] / 2 + 1).astype(np.float32),
            "next_presence_sum": told.astype(np.float32),
        }

    return run


TOY_IN_JAVASCRIPT = """
const toy = (count) => async (inputs) => {
  const rows = [0, 1], length = inputs.mixture.shape[2], f = Float32Array;
  const joined = rows.map((c) => [...inputs.state_samples.data.subarray(12 * c, 12 * c + 12),
    ...inputs.mixture.data.subarray(c * length, (c + 1) * length)]);
  const counted = inputs.counted?.data ?? [1];
  const told = inputs.state_presence_sum.data[0] + counted.reduce((a, b) => a + b, 0);
  const scale = [...inputs.class_ids.data].map((id) => Number(id) + 1), start = inputs.start.data;
  const made = (s, n) => joined.flatMap((row) => row.slice(0, length).map((x) => s * x + start[n]));
  return {
    sources: f.from(scale.flatMap(made)),
    presence: new f(count).fill(told),
    next_samples: f.from(joined.flatMap((row) => row.slice(length))),
    next_overlap: f.from(scale.flatMap((s) => joined.flatMap((row) => row.slice(length).map((x) => (s * x) / 8)))),
    next_envelope: inputs.state_envelope.data.map((x) => x / 2 + 1),
    next_presence_sum: f.of(told),
  };
};
"""


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("total", [1, 203])
def test_a_stream_goes_as_the_runtime_s_does(frames, channels, total):
    """Blocks of any length, fewer sources than the graph takes, clips, the end, and presence."""
    states = {"samples": [1, 2, 12], "overlap": [1, 3, 2, 12], "envelope": [1, 12], "presence_sum": [1]}
    layout = StreamLayout(4, 16, frames, 5, 2, 3, {name: (tuple(shape), "float32") for name, shape in states.items()})
    mixture = noise(total, channels) / 8

    def look(start):
        return {"class_ids": np.array([[4, 7]]), "start": np.full((1, 2, 1), start / 64, np.float32)}

    stream = FrameStream(_toy(3, states), layout, 2, look, channels=channels)
    size = 13
    expected = [stream.push(mixture[:, k : k + size]) for k in range(0, total, size)] + [stream.flush()]
    script = (
        'import { FrameStream } from "./stream.js";\n'
        + TOY_IN_JAVASCRIPT
        + """
const { layout, channels, mixture, size } = given;
const look = async (start, width) => ({
  class_ids: { data: BigInt64Array.from([4n, 7n, 7n].slice(0, width)), shape: [1, width] },
  start: { data: new Float32Array(width).fill(start / 64), shape: [1, width, 1] },
});
const stream = new FrameStream(toy(3), layout, 2, look, channels);
const out = [];
for (let k = 0; k < mixture[0].length; k += size) {
  out.push(await stream.push(mixture.map((row) => Float32Array.from(row.slice(k, k + size)))));
}
out.push(await stream.flush());
const presence = stream.presence;
console.log(JSON.stringify([out.map((part) => part.map((source) => source.map((row) => [...row]))), presence]));
"""
    )
    shapes = [{"name": name, "dtype": "float32", "shape": shape} for name, shape in states.items()]
    given = {"hop": 4, "nFft": 16, "frames": frames, "clipFrames": 5, "channels": 2, "sources": 3, "states": shapes}
    found, presence = node(script, {"layout": given, "channels": channels, "mixture": mixture.tolist(), "size": size})
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(one, np.float32).reshape(other.shape), other, rtol=1e-6, atol=1e-6)
    assert sum(part.shape[-1] for part in expected) == total
    np.testing.assert_allclose(np.max(presence, axis=0), stream.presence)


PROCESSOR = """
globalThis.AudioWorkletProcessor = class { constructor() { this.port = { postMessage: (m) => reports.push(m) }; } };
globalThis.registerProcessor = (_, made) => (globalThis.Made = made);
globalThis.sampleRate = 1000;
globalThis.currentFrame = 0;
const reports = [];
await import(PAGE + "live_processor.js");
const make = (options) => {
  const processor = new Made({ processorOptions: options });
  const sent = [];
  const worker = { postMessage: (m) => sent.push(m) };
  processor.port.onmessage({ data: { worker } });
  processor.port.onmessage({ data: { begin: 128 } });
  return { processor, sent, worker };
};
const played = [];
const step = ({ processor }, k) => {
  globalThis.currentFrame = 128 * k;
  const input = [Float32Array.from({ length: 128 }, (_, i) => 128 * (k - 1) + i + 1)];
  const outputs = [[new Float32Array(128)], [new Float32Array(128)]];
  processor.process([input], outputs);
  if (k >= 1) outputs.forEach(([row], n) => (played[n] ??= []).push(...row));
};
// what a worker gives: the block, and twice the block
const answer = ({ worker }, { start, block }) => {
  const rows = Float32Array.of(...block, ...block.map((x) => 2 * x));
  worker.onmessage({ data: { start, rows, count: block.length, ms: 1 } });
};
"""


def test_a_late_block_is_silence_that_is_counted_and_the_rest_stays_in_place():
    """Sample k of the input is k + 1; blocks of 192, which end within quanta, and one that is answered too late."""
    played, reports, starts = node(
        PROCESSOR
        + """
const live = make({ block: 192, channels: 1, delay: 400, most: 8 });
let done = 0;
for (let k = 0; k < 30; k += 1) {
  // before a quantum begins all blocks are there but the fifth, which comes after four more quanta
  while (done < live.sent.length && !(done === 4 && k < 13)) answer(live, live.sent[done++]);
  step(live, k);
}
console.log(JSON.stringify([played, reports, live.sent.map(({ start }) => start)]));
"""
    )
    assert starts == list(range(0, 192 * len(starts), 192))
    expected = np.maximum(np.arange(len(played[0])) - 400 + 1, 0)
    late = (expected > 4 * 192) & (np.array(played[0]) == 0)
    np.testing.assert_array_equal(played[0], np.where(late, 0, expected))
    np.testing.assert_array_equal(played[1], 2 * np.array(played[0]))
    (begin,) = np.flatnonzero(np.diff(late.astype(int)) == 1)
    assert (begin + 1 - 400) % 192 == 0
    assert 0 < late.sum() < 2 * 192
    assert (reports[-1]["missing"], reports[-1]["dropouts"]) == (late.sum(), 1)
    assert min(report["reserve"] for report in reports if report["reserve"] is not None) < 0
    assert len([one for report in reports for one in report["ms"]]) <= len(starts)


def test_a_worker_that_is_far_behind_is_given_no_more():
    played, reports, starts = node(
        PROCESSOR
        + """
const live = make({ block: 128, channels: 1, delay: 256, most: 3 });
let done = 0;
for (let k = 0; k < 40; k += 1) {
  while (done < live.sent.length && (k < 5 || k > 20)) answer(live, live.sent[done++]);
  step(live, k);
}
console.log(JSON.stringify([played, reports, live.sent.map(({ start }) => start)]));
"""
    )
    gap = np.flatnonzero(np.diff(starts) > 128)
    assert len(gap) == 1
    expected = np.maximum(np.arange(len(played[0])) - 256 + 1, 0)
    wrong = np.array(played[0]) != expected
    assert not np.array(played[0])[wrong].any()
    assert reports[-1]["missing"] == wrong.sum() > 10 * 128
    assert reports[-1]["dropouts"] == 1
    assert not wrong[-128 * 10 :].any()


@pytest.mark.parametrize("rate", [8000, 11_025, 48_000])
def test_blocks_come_back_at_their_places(rate):
    """A separator that halves and is 100 samples late, at 8 kHz, behind a context of another rate; and after a gap."""
    found = node(
        """
import { LiveBlocks, timing } from "./live_blocks.js";
const { rate } = given;
const offsets = [];
const separator = { manifest: { sample_rate_hz: 8000 }, stream: (sources, channels, offset) => {
  offsets.push(offset);
  let held = new Float32Array(0);
  return { push: async ([row]) => {
    const all = Float32Array.of(...held, ...row), ready = Math.max(0, all.length - 100);
    held = all.slice(ready);
    return [[all.slice(0, ready).map((x) => x / 2)]];
  } };
} };
const out = [];
const port = { postMessage: (piece) => out.push(piece), close() {} };
const live = new LiveBlocks(separator, [{}], 1, rate, port, (error) => { throw error; });
const { block } = timing({ hop: 32, frames: 1, nFft: 128 }, 8000, rate);
const wave = (k) => 0.5 * Math.sin((2 * Math.PI * 300 * k) / rate);
const gap = 20 * block;
for (let k = 0; k < 60; k += 1) {
  const start = k < 30 ? k * block : k * block + gap;
  await live.take({ start, block: Float32Array.from({ length: block }, (_, i) => wave(start + i)) });
}
const pieces = out.map(({ start, rows, count }) => ({ start, rows: [...rows], count }));
console.log(JSON.stringify({ block, offsets, gap, pieces }));
""",
        {"rate": rate},
    )
    block, gap = found["block"], found["gap"]
    ratio = rate / RATE_HZ
    assert [round(30 * block / ratio + gap / ratio)] == found["offsets"][1:]
    next_of = 0
    for number, piece in enumerate(found["pieces"]):
        if number == 30:
            next_of = 30 * block + gap
        assert piece["start"] == next_of
        next_of += piece["count"]
        rows = np.array(piece["rows"]).reshape(2, piece["count"])
        places = np.arange(piece["start"], next_of)
        wave = 0.25 * np.sin(2 * np.pi * 300 * places / rate)
        inner = places >= (0 if number < 30 else 30 * block + gap) + (0 if rate == RATE_HZ else rate // 20)
        np.testing.assert_allclose(rows[0][inner], wave[inner], atol=1e-6 if rate == RATE_HZ else 1e-4)
        np.testing.assert_allclose(rows[1][inner], wave[inner], atol=1e-6 if rate == RATE_HZ else 1e-4)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    chromium()
    return causal_bundle(tmp_path_factory.mktemp("bundles") / "causal", channels=2)


@pytest.fixture(scope="module")
def site(bundle, tmp_path_factory) -> Path:
    with open_bundle(bundle) as opened:
        made = write_site(opened, tmp_path_factory.mktemp("sites") / "site", ort_web=ort_web(), pack=False)
    return tap(made)


@pytest.fixture(scope="module")
def heard(tmp_path_factory) -> Path:
    """What the microphone hears, again and again."""
    path = tmp_path_factory.mktemp("sounds") / "heard.wav"
    write_wav(path, 0.9 * noise(44_100), 44_100)
    return path


@pytest.fixture(scope="module")
def chrome(heard):
    microphone = ("--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={heard}")
    with browser(*microphone, "--use-fake-ui-for-media-stream") as opened:
        yield opened


@pytest.fixture(scope="module")
def address(site):
    with served(site) as url:
        yield url


@pytest.fixture
def page(chrome, address):
    with opened_page(chrome, address, before=LISTEN) as found:
        yield found


def listen(page, buffering_ms: int = 10_000, file: Path | None = None) -> None:
    """Begin to listen, with so much buffering that a busy machine is never late."""
    if file is None:
        page.click("#mic")
    else:
        page.set_input_files("#file", str(file))
    page.wait_for_selector("#setup:not([hidden])", timeout=60_000)
    for number, name in enumerate(CLASSES):
        page.locator("#sources select").nth(number).select_option(label=name)
    page.evaluate("ms => buffering.add(new Option(ms, ms, true, true))", str(buffering_ms))
    page.click("#listen")
    page.wait_for_selector("#live:not([hidden]), #alert:not([hidden])", timeout=60_000)
    assert page.locator("#alert").is_hidden(), page.inner_text("#alert")


def wait_for_calls(page, count: int) -> None:
    """Until the audio thread was called so often."""
    for _ in range(600):
        if page.evaluate("tapped.length") > count:
            return
        page.wait_for_timeout(200)
    raise AssertionError("the sound stands still")


def parts(bundle: Path, mixture: np.ndarray) -> np.ndarray:
    """[C, L] -> [3, C, L]: what the runtime makes of it, and the rest."""
    with BundleSeparator.load(bundle, "cpu", threads=1) as separator:
        given = mixture if len(mixture) > 1 else mixture[0]
        sources = separator.separate(given, None, CLASSES).reshape(2, *mixture.shape)
    return np.concatenate([sources, mixture[None] - sources.sum(axis=0)])


@pytest.mark.slow
def test_a_graph_that_forgets_its_states_is_refused(chrome, bundle, tmp_path):
    """A golden sequence of which the last call differs: every call is made, with the states of the one before."""
    from avsep.export.bundle.export import sealed
    from avsep.files import sha256_file

    copy = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    (graph,) = (one for one in manifest["graphs"] if one["kind"] == "stream")
    golden = copy / graph["golden"]
    with np.load(golden) as archive:
        arrays = dict(archive)
    arrays["sources"][-1] += 0.01
    np.savez(golden, **arrays)
    manifest["files"][golden.name] = sha256_file(golden)
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with open_bundle(copy) as opened:
        site = write_site(opened, tmp_path / "site", ort_web=ort_web(), pack=False)
    with served(site) as url, opened_page(chrome, url, ready=False) as page:
        page.wait_for_selector("#alert:not([hidden])", timeout=120_000)
        assert "stream.onnx differs from its golden output by 1.0e-2" in page.inner_text("#alert")


@pytest.mark.slow
def test_three_frames_a_call_and_more_sources_than_the_graph_takes(chrome, tmp_path):
    bundle = causal_bundle(tmp_path / "bundle", frames=3)
    with open_bundle(bundle) as opened:
        site = write_site(opened, tmp_path / "site", ort_web=ort_web(), pack=False)
    mixture = 0.9 * noise(4321)
    write_wav(tmp_path / "song.wav", mixture, RATE_HZ, "FLOAT")
    asked = ["flute", "violin", "piano"]
    with served(site) as url, opened_page(chrome, url) as page:
        page.set_input_files("#file", str(tmp_path / "song.wav"))
        page.wait_for_selector("#setup:not([hidden])")
        page.click("#more")
        files = separate_in_page(page, tmp_path / "song.wav", asked, tmp_path)
    with BundleSeparator.load(bundle, "cpu", threads=1) as separator:
        expected = separator.separate(mixture, None, asked)
    for file, signal in zip(files, expected, strict=False):
        np.testing.assert_allclose(read_wav(file)[0][0], signal, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_file_that_is_heard_live_gives_the_samples_of_the_runtime(page, bundle, tmp_path):
    """From its first sample on, exactly as late as the page says."""
    mixture = 0.9 * noise(16_000, 2)
    write_wav(tmp_path / "song.wav", mixture, RATE_HZ, "FLOAT")
    listen(page, file=tmp_path / "song.wav")
    assert page.locator("#feedback").is_hidden()
    page.wait_for_selector('#liveplay:has-text("Start")', timeout=60_000)
    sound, outputs, options = tapped_sound(page)
    delay = options["delay"]
    assert (options["rate"], delay) == (RATE_HZ, 128 + 128 - 32 + 10 * RATE_HZ)
    assert np.array_equal(sound[:, :16_000], mixture)
    assert not outputs[..., :delay].any()
    assert outputs.shape[-1] >= delay + 16_000
    expected = parts(bundle, sound)[..., : outputs.shape[-1] - delay]
    np.testing.assert_allclose(outputs[..., delay:], expected, rtol=0, atol=1e-5)
    assert "Dropouts\nnone" in page.inner_text("#livefacts")
    assert f"{1000 * 224 / RATE_HZ:.0f} ms" in page.inner_text("#livefacts")  # the window, as samples wait for it


@pytest.mark.slow
def test_two_clicks_begin_one_stream(page, tmp_path):
    """What is opened twice could be stopped once."""
    page.evaluate(
        "() => { window.contexts = []; const Given = window.AudioContext;"
        "window.AudioContext = class extends Given { constructor(...o) { super(...o); contexts.push(this); } }; }"
    )
    page.click("#mic")
    listen(page)
    page.click("#liveplay")
    page.wait_for_selector('#liveplay:has-text("Start")')
    page.evaluate("() => { liveplay.click(); liveplay.click(); buffering.dispatchEvent(new Event('change')); }")
    page.wait_for_selector('#liveplay:has-text("Stop")')
    page.click("#liveplay")
    page.wait_for_selector('#liveplay:has-text("Start")')
    page.wait_for_function("contexts.every((one) => one.state === 'closed')")
    assert page.evaluate("contexts.length") == 2


@pytest.mark.slow
def test_the_microphone_gives_the_samples_of_the_runtime(page, bundle):
    """Asked for when the button is pressed, and closed when it is stopped."""
    page.evaluate(
        "() => { const devices = navigator.mediaDevices, own = devices.getUserMedia.bind(devices); window.opened = [];"
        "devices.getUserMedia = async (wish) => { const made = await own(wish); opened.push([wish, made]);"
        "return made; }; }"
    )
    page.click("#mic")
    assert page.locator("#go").is_hidden()
    assert page.evaluate("opened.length") == 0
    listen(page)
    wait_for_calls(page, 62 * 13)  # the buffering and some seconds
    assert page.locator("#feedback").is_visible()
    page.click("#liveplay")
    page.wait_for_selector('#liveplay:has-text("Start")')
    ((wish, closed),) = page.evaluate(
        "opened.map(([w, s]) => [w.audio, s.getTracks().every((t) => t.readyState === 'ended')])"
    )
    assert closed
    assert not any(wish[kind] for kind in ("echoCancellation", "noiseSuppression", "autoGainControl"))
    sound, outputs, options = tapped_sound(page)
    delay = options["delay"]
    assert np.abs(sound).max() > 0.05
    expected = parts(bundle, sound)[..., : outputs.shape[-1] - delay]
    assert expected.shape[-1] > RATE_HZ
    np.testing.assert_allclose(outputs[..., delay:], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["file", "microphone"])
def test_a_browser_that_refuses_the_separator_s_rate_resamples(chrome, address, bundle, source, tmp_path):
    """There and back: what comes out is what the runtime makes of the sound as it was, up to the two filters."""
    refuse = (
        "const Given = window.AudioContext; window.AudioContext = class extends Given { constructor(options) {"
        "if (options?.sampleRate) throw new DOMException('no', 'NotSupportedError'); super({ sampleRate: 48000 }); } };"
    )
    from avsep.media.audio import resample

    times = np.arange(2 * RATE_HZ) / RATE_HZ
    tones = sum(np.sin(2 * np.pi * hz * times) for hz in (220, 700, 1900))
    mixture = (0.2 * tones * np.hanning(len(times))).astype(np.float32)[None]
    write_wav(tmp_path / "song.wav", mixture, RATE_HZ, "FLOAT")
    with opened_page(chrome, address, before=LISTEN + refuse) as page:
        listen(page, file=tmp_path / "song.wav" if source == "file" else None)
        if source == "file":
            page.wait_for_selector('#liveplay:has-text("Start")', timeout=90_000)
        else:
            wait_for_calls(page, 375 * 13)
            page.click("#liveplay")
        sound, outputs, options = tapped_sound(page)
        assert "Dropouts\nnone" in page.inner_text("#livefacts")
    assert options["rate"] == 48_000
    length = outputs.shape[-1] - options["delay"]
    expected = resample(parts(bundle, resample(sound, 48_000, RATE_HZ)), RATE_HZ, 48_000)[..., :length]
    inner = slice(4800, min(length, expected.shape[-1]) - 4800)
    found = outputs[..., options["delay"] :][..., inner]
    error = np.sum((found - expected[..., inner]) ** 2) / np.sum(expected[..., inner] ** 2)
    assert 10 * np.log10(error) < -40


@pytest.mark.slow
def test_a_worker_that_stalls_is_silence_that_is_counted(chrome, site, bundle, tmp_path):
    """9 s in which no block is answered, where 8 s are buffered: from there on a second or more is lost, all of it
    counted, and what is played is what belongs there."""
    stalled = shutil.copytree(site, tmp_path / "site")
    blocks = stalled / "live_blocks.js"
    text = blocks.read_text()
    place = "    const begun = performance.now();\n"
    assert text.count(place) == 1
    at = 125 * 128
    wait = f"    if (start === {at}) for (const t = performance.now(); performance.now() - t < 9000; );\n"
    blocks.write_text(text.replace(place, wait + place))
    mixture = 0.9 * noise(12 * RATE_HZ)[None]
    write_wav(tmp_path / "song.wav", mixture, RATE_HZ, "FLOAT")
    with served(stalled) as url, opened_page(chrome, url, before=LISTEN) as page:
        listen(page, 8000, tmp_path / "song.wav")
        page.wait_for_selector('#liveplay:has-text("Start")', timeout=120_000)
        sound, outputs, options = tapped_sound(page)
        told = page.inner_text("#livefacts")
    delay = options["delay"]
    found = outputs[..., delay:][..., : 12 * RATE_HZ]
    expected = parts(bundle, sound)[..., : found.shape[-1]]
    lost = (np.abs(found).max(axis=(0, 1)) == 0) & (np.abs(expected).max(axis=(0, 1)) > 0)
    assert np.flatnonzero(lost)[0] == at - 96  # the first that the stalled block would have given
    assert lost.sum() > 0.7 * RATE_HZ
    silence = int(re.search(r"Dropouts\n\d+, ([\d,]+) ms of silence", told)[1].replace(",", ""))
    assert silence >= 1000 * lost.sum() / RATE_HZ - 260  # what the page has heard of, every 250 ms
    # a stream that begins anew has not heard what the network looks back at
    right = np.abs(found - expected).max(axis=(0, 1)) <= 1e-5
    anew = np.convolve(lost, np.ones(RATE_HZ // 2), "full")[: len(lost)] > 0
    assert (right | anew).all()


@pytest.mark.slow
def test_what_is_heard_is_chosen_while_it_sounds(chrome, address, tmp_path):
    """Mute, solo and volume reach the gains; every control has a name; nothing is wider than a phone."""
    write_wav(tmp_path / "song.wav", 0.9 * noise(30 * RATE_HZ), RATE_HZ)
    gains = (
        "window.gains = []; const own = BaseAudioContext.prototype.createGain;"
        "BaseAudioContext.prototype.createGain = function () {"
        "const made = own.call(this); gains.push(made); return made; };"
    )
    sizes = {"viewport": {"width": 390, "height": 844}}
    with opened_page(chrome, address, before=LISTEN + gains, **sizes) as page:
        listen(page, 160, tmp_path / "song.wav")

        def settle(*wanted: float) -> None:
            for _ in range(100):
                found = page.evaluate("gains.slice(0, 3).map((one) => one.gain.value)")
                if np.allclose(found, wanted, atol=0.01):
                    return
                page.wait_for_timeout(100)
            raise AssertionError(f"gains are {found}, not {wanted}")

        settle(1, 1, 1)
        page.locator('button[aria-label="Mute: violin"]').press("Enter")
        settle(1, 0, 1)
        page.locator('button[aria-label="Solo: the rest"]').press("Space")
        settle(0, 0, 1)
        volume = page.locator('input[aria-label="Volume of the rest"]')
        for _ in range(4):
            volume.press("ArrowLeft")
        assert volume.get_attribute("aria-valuetext") == "80 %"
        settle(0, 0, 0.8)
        assert page.locator("#livetracks .track.off").count() == 2
        names = page.locator("button, input, select, meter").evaluate_all(
            "all => all.filter(n => n.checkVisibility())"
            ".map(n => n.ariaLabel || n.labels?.[0]?.innerText || n.innerText)"
        )
        assert all(name.strip() for name in names), names
        assert not page.evaluate(SIDEWAYS)
        page.locator("#liveplay").press("Enter")
        page.wait_for_selector('#liveplay:has-text("Start")')


@pytest.mark.slow
def test_a_microphone_that_is_refused_is_told_in_a_line(address, chrome):
    """Refused by the browser itself, which would first say of a machine without a microphone that there is none."""
    device = "--use-fake-device-for-media-stream"
    with browser(device, beside=chrome) as other, opened_page(other, address) as page:
        alert = listen_in_vain(page)
    assert "was not allowed" in alert


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("NotFoundError", "No microphone is there: connect one."),
        ("NotReadableError", "cannot be opened (it is in use)"),
    ],
)
def test_a_microphone_that_cannot_be_had_is_told_in_a_line(error, said, address, chrome):
    """As a browser reports what this machine cannot be brought into."""
    gone = f"navigator.mediaDevices.getUserMedia = async () => {{ throw new DOMException('it is in use', '{error}'); }}"
    with opened_page(chrome, address, before=gone) as page:
        alert = listen_in_vain(page)
    assert said in alert


def listen_in_vain(page) -> str:
    """What a page says that should listen to a microphone and cannot."""
    page.click("#mic")
    page.click("#listen")
    page.wait_for_selector("#alert:not([hidden])")
    assert page.locator("#live").is_hidden()
    return page.inner_text("#alert")
