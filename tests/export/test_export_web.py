"""The site that separates in a browser: how it is written, and its ports of the runtime's rules (under Node)."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from avsep.errors import ConfigError, ExportError
from avsep.export import open_bundle
from avsep.export.runtime.chunking import plan_chunks, separate_long
from avsep.export.runtime.timeline import VisualSource, VisualTimeline
from avsep.export.runtime.wav import write_wav
from avsep.export.targets import website
from avsep.media.audio import resample
from support.browsers import PAGE, browser_bundle, node
from support.bundles import write_sealed
from support.commands import run

BUILDS = {name: name.encode() * 50 for name in website.ORT_WEB_FILES}


@pytest.fixture
def builds(tmp_path, monkeypatch) -> Path:
    """Stand-ins of ONNX Runtime's builds, and their hashes in place of the true ones."""
    folder = tmp_path / "package" / "dist"
    folder.mkdir(parents=True)
    for name, data in BUILDS.items():
        (folder / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in BUILDS.items()}
    monkeypatch.setattr(website, "ORT_WEB_FILES", hashes)
    return folder.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return browser_bundle(tmp_path_factory.mktemp("bundles") / "small")


def test_a_site_holds_the_page_the_bundle_and_the_packed_builds(bundle, builds, tmp_path):
    said = []
    with open_bundle(bundle) as opened:
        site = website.write_site(opened, tmp_path / "site", ort_web=builds, tell=said.append)
    kept = json.loads((site / "site.json").read_text())
    assert not said
    for name in ("index.html", "page.js", "worker.js", "ort/LICENSE", "bundle/manifest.json", "bundle/separator.onnx"):
        assert name in kept["files"]
        assert (site / name).is_file()
    assert "sw.js" not in kept["files"]
    assert f'const STATE = "{kept["state"]}"' in (site / "sw.js").read_text()
    for name, data in BUILDS.items():
        packed = site / "ort" / f"{name}.gz"
        assert (
            gzip.decompress(packed.read_bytes()) if name.endswith(".wasm") else (site / "ort" / name).read_bytes()
        ) == data
    with open_bundle(site / "bundle") as copy:
        assert copy.manifest == open_bundle(bundle).manifest


def test_another_bundle_gives_another_state_and_replaces_the_site(bundle, builds, tmp_path):
    site = tmp_path / "site"
    with open_bundle(bundle) as opened:
        website.write_site(opened, site, ort_web=builds)
        before = json.loads((site / "site.json").read_text())["state"]
        website.write_site(opened, site, ort_web=builds)
        assert json.loads((site / "site.json").read_text())["state"] == before
    changed = shutil.copytree(bundle, tmp_path / "changed")
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["licence"] = "another"
    write_sealed(changed, manifest)
    with open_bundle(changed) as opened:
        website.write_site(opened, site, ort_web=builds)
    assert json.loads((site / "site.json").read_text())["state"] != before


def test_what_is_no_site_is_left_alone(bundle, builds, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with (
        open_bundle(bundle) as opened,
        pytest.raises(ConfigError, match=r"holds other files \(thesis.txt\) and no site"),
    ):
        website.write_site(opened, other, ort_web=builds)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


def test_a_site_inside_a_bundle_would_spoil_it(bundle, builds):
    with open_bundle(bundle) as opened, pytest.raises(ConfigError, match="lies inside the bundle"):
        website.write_site(opened, bundle / "site", ort_web=builds)
    open_bundle(bundle)


def test_a_changed_build_is_refused_by_name(bundle, builds, tmp_path):
    (builds / "dist" / "ort.wasm.min.mjs").write_bytes(b"another")
    with (
        open_bundle(bundle) as opened,
        pytest.raises(ExportError, match=r"ort\.wasm\.min\.mjs is not of onnxruntime-web"),
    ):
        website.write_site(opened, tmp_path / "site", ort_web=builds)
    assert not (tmp_path / "site").exists()


def test_an_archive_with_another_hash_is_not_unpacked(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(website.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"not the archive"))
    with pytest.raises(ExportError, match="its SHA-512 differs"):
        website.ort_web_files()
    assert not list(tmp_path.rglob("*.mjs"))


def test_without_a_network_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fails(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(website.urllib.request, "urlopen", fails)
    with pytest.raises(ExportError, match=r"Network is unreachable.*--ort-web"):
        website.ort_web_files()


def test_a_bundle_that_must_see_stored_features_is_refused(tiny_bundle, builds, tmp_path):
    with (
        open_bundle(tiny_bundle) as opened,
        pytest.raises(ExportError, match=r"stored object features 'clip'.*avsep app"),
    ):
        website.write_site(opened, tmp_path / "site", ort_web=builds)


def test_the_command_writes_a_site_of_a_bundle(bundle, builds, tmp_path, capsys):
    command = ("export", "build", bundle)
    assert run(*command, "--target", "web", "--out", tmp_path / "site", "--ort-web", builds) == 0
    assert "wrote the site" in capsys.readouterr().out
    assert (tmp_path / "site" / "index.html").is_file()
    assert run(*command, "--target", "web") == 2
    assert "needs a folder for the site" in capsys.readouterr().err
    assert run(*command, "--ort-web", builds) == 2
    assert "does nothing without --target web" in capsys.readouterr().err


@pytest.mark.slow  # exports a run; the quick ones take a bundle that is there
def test_the_command_writes_a_site_of_a_run(tone_run, builds, tmp_path, capsys):
    out = tmp_path / "site"
    command = ("export", tone_run, "--out", out, "--target", "web", "--ort-web", builds)
    assert run(*command, "--spectral") == 2
    assert "--spectral" in capsys.readouterr().err
    assert not out.exists()
    assert run(*command, "--allow-drift") == 0
    assert json.loads((out / "bundle" / "manifest.json").read_text())["format"] == "avsep-bundle"
    assert {p.name for p in tmp_path.iterdir()} == {"site", "package"}
    assert run(*command) == 2
    assert "is a site already: --overwrite replaces it" in capsys.readouterr().err


# --- the page's modules, under Node -----------------------------------------------------------------------------------


def test_types_of_the_page_hold():
    tsc = shutil.which("tsc")
    if tsc is None:
        pytest.skip("no tsc on the PATH (npm install --global typescript@5.9)")
    done = subprocess.run([tsc, "-p", PAGE], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout


def test_chunks_lie_where_python_puts_them():
    chunking = {"clip_samples": 8191, "context_samples": 1023, "crossfade_samples": 63, "align_samples": 64}
    totals = [1, 8190, 8191, 8192, 8300, 14336, 20000, 123_457]
    found = node(
        'import { planChunks } from "./chunking.js";\n'
        "console.log(JSON.stringify(given.totals.map((t) => planChunks(t, given.chunking))));",
        {"totals": totals, "chunking": chunking},
    )
    del chunking["crossfade_samples"]
    for total, chunks in zip(totals, found, strict=True):
        planned = plan_chunks(total, **chunking)
        assert chunks == [{"start": c.start, "left": c.left, "right": c.right} for c in planned]


@pytest.mark.parametrize("total", [50, 300, 1000])
def test_chunks_are_joined_as_in_python(total):
    chunking = {"clip_samples": 301, "context_samples": 40, "crossfade_samples": 11, "align_samples": 16}
    mixture = np.random.default_rng(3).normal(0, 0.1, total).astype(np.float32)

    def separate(chunks, starts):  # depends on the place in the chunk, so that a wrong seam shows
        slope = np.arange(301, dtype=np.float32)
        return np.stack([chunks * slope, chunks + slope * np.float32(0.125)], axis=1)

    expected = separate_long(separate, mixture, **chunking)
    found = node(
        """
import { Joiner, planChunks } from "./chunking.js";
const { mixture, chunking } = given;
const joiner = new Joiner(mixture.length, 2, chunking.crossfade_samples);
const out = [[], []];
for (const chunk of planChunks(mixture.length, chunking)) {
  const samples = Float32Array.from({ length: 301 }, (_, k) => mixture[chunk.start + k] ?? 0);
  const rows = [samples.map((x, k) => x * k), samples.map((x, k) => x + k * 0.125)];
  joiner.add(chunk, rows).forEach((done, row) => out[row].push(...done));
}
console.log(JSON.stringify(out));
""",
        {"mixture": mixture.tolist(), "chunking": chunking},
    )
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_chunks_see_the_frames_that_python_shows_them():
    """Frames that hold their own number, cut by both."""
    rate, clip, total = 11025, 32767, 154_368
    sources = [VisualSource("object", "frames", frames=3), VisualSource("motion", "frames", rate_hz=16.0)]
    sources.append(VisualSource("motion", "frames", rate_hz=5.0))
    numbers = {"object": np.arange(14, dtype=np.uint8), "motion": np.arange(224, dtype=np.uint8)}
    timeline = VisualTimeline(
        object=np.repeat(numbers["object"], 3).reshape(14, 3, 1, 1),
        motion=numbers["motion"].reshape(224, 1, 1, 1),
        motion_rate_hz=16.0,
    )
    starts = [0, 24_576, 98_304, 121_856]
    expected = [
        [timeline.read(s, s.middle_s(start, clip, total, rate), clip / rate)[:, 0, 0, 0].tolist() for start in starts]
        for s in sources
    ]
    found = node(
        """
import { middleOf, motionFrames, objectFrames } from "./timeline.js";
const frames = (count, rate) => ({ data: Uint8Array.from({ length: count }, (_, k) => k), count, rate });
const timeline = { name: "a", object: frames(14, 1), motion: frames(224, 16), moves: true };
const { rate, clip, total, starts, sources } = given;
console.log(JSON.stringify(sources.map((s) => starts.map((start) => {
  const pick = s.role === "object" ? objectFrames : motionFrames;
  return [...pick(timeline, s, middleOf(s.role, start, clip, total, rate), clip / rate).data];
}))));
""",
        {
            "rate": rate,
            "clip": clip,
            "total": total,
            "starts": starts,
            "sources": [{"role": s.role, "frames": s.frames, "rate_hz": s.rate_hz} for s in sources],
        },
    )
    assert found == expected


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44_100, 11_025), (48_000, 11_025), (8_000, 11_025), (11_025, 11_025)])
def test_sound_is_resampled_as_python_does(from_hz, to_hz):
    """Up to 60 % of the band: from there on soxr itself loses up to 64 dB where the ratio is no whole number."""
    lower = min(from_hz, to_hz)
    times = np.arange(9001) / from_hz
    signal = sum(np.sin(2 * np.pi * share * lower * times + k) for k, share in enumerate((0.01, 0.1, 0.3)))
    signal = (0.2 * signal).astype(np.float32)
    expected = resample(signal, from_hz, to_hz)
    found = np.array(
        node(
            """
import { Resampler } from "./resample.js";
const { signal, from, to } = given;
const one = new Resampler(from, to), out = [];
for (let at = 0; at < signal.length; at += 1234) out.push(...one.push(Float32Array.from(signal.slice(at, at + 1234))));
out.push(...one.flush());
console.log(JSON.stringify(out));
""",
            {"signal": signal.tolist(), "from": from_hz, "to": to_hz},
        )
    )
    assert found.shape == expected.shape
    inner = slice(200, -200)  # a sine that begins at once holds every frequency
    error = np.sum((found - expected)[inner] ** 2) / np.sum(expected[inner].astype(np.float64) ** 2)
    assert 10 * np.log10(error + 1e-30) < -110


def test_the_manifest_s_hash_is_that_of_python(bundle):
    text = (bundle / "manifest.json").read_text()
    script = """
import { readManifest } from "./bundle.js";
const read = (text) => readManifest(new TextEncoder().encode(text)).then((m) => m.name, (e) => e.message);
console.log(JSON.stringify([await read(given), await read(given.replace('"licence": "MIT"', '"licence": "XXX"'))]));
"""
    name, refused = node(script, text)
    assert name == json.loads(text)["name"]
    assert "manifest_sha256 differs" in refused


def test_numbers_and_letters_are_hashed_as_python_writes_them():
    value = {"b": [1.0, 1e-05, 0.1, -3, 2**53], "a": {"é\u2028\U0001f3bb": '\x7f"\\\n', "": None, "B": [True, {}, []]}}
    text = json.dumps({**value, "seal": 1}, indent=1, ensure_ascii=False)
    found = node(
        'import { canonical } from "./bundle.js";\nconsole.log(JSON.stringify(canonical(given, "seal")));', text
    )
    assert found == json.dumps(value, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize("packed", [False, True])
def test_golden_arrays_are_read_as_numpy_writes_them(tmp_path, packed):
    rng = np.random.default_rng(0)
    arrays = {
        "floats": rng.normal(size=(2, 3)).astype(np.float32),
        "flags": np.array([[True, False]]),
        "ids": np.array([[5, -7]]),
        "bytes": rng.integers(0, 255, (2, 1, 4), dtype=np.uint8),
    }
    (np.savez_compressed if packed else np.savez)(tmp_path / "golden.npz", **arrays)
    found = node(
        """
import { readFile } from "node:fs/promises";
import { readNpz } from "./npz.js";
const arrays = await readNpz(new Uint8Array(await readFile(given)));
const plain = Object.entries(arrays).map(([k, a]) => [k, [a.dtype, a.shape, [...a.data].map(Number)]]);
console.log(JSON.stringify(Object.fromEntries(plain)));
""",
        str(tmp_path / "golden.npz"),
    )
    for name, array in arrays.items():
        dtype, shape, values = found[name]
        assert (dtype, shape) == (array.dtype.name, list(array.shape))
        assert np.array_equal(np.array(values, dtype=array.dtype).reshape(shape), array)


def test_wav_files_are_read_and_written_as_python_does(tmp_path):
    audio = np.random.default_rng(1).normal(0, 0.5, (2, 1001)).astype(np.float32)
    audio[0, :4] = [1.5, -1.5, 0.5 / 32768, 1.5 / 32768]  # beyond full scale, and halves between two integers
    for name in ("PCM_16", "FLOAT"):
        write_wav(tmp_path / f"{name}.wav", audio, 11025, name)
    found = node(
        """
import { readFile } from "node:fs/promises";
import { findSamples, readBlocks, wavFile } from "./wav.js";
const all = {};
const floats = (await readFile(`${given}/FLOAT.wav`)).subarray(44).slice();
for (const name of ["PCM_16", "FLOAT"]) {
  const bytes = await readFile(`${given}/${name}.wav`);
  const file = new Blob([bytes]), form = await findSamples(file, name), rows = [[], []];
  for await (const block of readBlocks(file, form, 300)) block.forEach((part, c) => rows[c].push(...part));
  const written = await wavFile(new Blob([floats]), 2, form.rate, name);
  all[name] = { rows, same: Buffer.from(await written.arrayBuffer()).equals(bytes) };
}
console.log(JSON.stringify(all));
""",
        str(tmp_path),
    )
    assert np.array_equal(np.array(found["FLOAT"]["rows"], dtype=np.float32), audio)
    clipped = np.clip(np.round(audio.astype(np.float64) * 2**15), -(2**15), 2**15 - 1) / 2**15
    assert np.array_equal(found["PCM_16"]["rows"], clipped)
    assert found["PCM_16"]["same"]
    assert found["FLOAT"]["same"]


def test_a_truncated_wav_file_is_refused(tmp_path):
    write_wav(tmp_path / "cut.wav", np.zeros((1, 1000), np.float32), 11025)
    data = (tmp_path / "cut.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[:1000])
    found = node(
        """
import { readFile } from "node:fs/promises";
import { findSamples } from "./wav.js";
const message = await findSamples(new Blob([await readFile(given)]), "cut.wav").catch((e) => e.message);
console.log(JSON.stringify(message));
""",
        str(tmp_path / "cut.wav"),
    )
    assert found == "cut.wav is truncated: its header promises 2000 bytes and 956 are there; copy it again"


def test_boxes_are_cut_at_python_s_pixels():
    from avsep.media.video import _pixels

    edges = [(0.0, 0.5), (0.25, 0.75), (0.125, 0.375), (0.999, 1.0), (0.1, 0.1004), (0.45, 0.55)]
    counts = [10, 11, 100, 224, 1080]
    found = node(
        'import { pixels } from "./frames.js";\n'
        "console.log(JSON.stringify(given.counts.map((c) => given.edges.map(([a, b]) => pixels(a, b, c)))));",
        {"edges": edges, "counts": counts},
    )
    assert found == [[list(_pixels(low, high, count)) for low, high in edges] for count in counts]


def test_boxes_over_time_are_set_and_written_as_python_reads_them(tmp_path):
    from avsep.media.detection import read_boxes

    text = node(
        'import { boxAt, boxesText, setBox, upTo, WHOLE } from "./track.js";\n'
        "const track = [{ time: 0, box: WHOLE }];\n"
        "setBox(track, 2, [0.1, 0, 0.5, 1]);\n"
        "setBox(track, 2, [0.2, 0, 0.5, 1 / 3]);\n"
        "const before = boxAt(track, 0)[0];\n"
        "setBox(track, 1.25, [0, 0, 0.4, 1]);\n"
        "setBox(track, 3, [0.3, 0, 1, 1]);\n"
        "const one = { name: 'a\"_b', track: upTo(track, 2.5) };\n"
        "const other = { name: '__proto__', track: [{ time: 0, box: WHOLE }] };\n"
        "console.log(JSON.stringify([before, boxesText([one, other])]));",
    )
    assert text[0] == 0.2  # one that is alone holds before, too
    (tmp_path / "boxes.json").write_text(text[1])
    track = read_boxes(tmp_path / "boxes.json")
    assert set(track.classes) == {'a"_b', "__proto__"}
    assert [second for second, _ in track.entries['a"_b']] == [1.25, 2]
    assert track.at('a"_b', 9) == (0.2, 0, 0.5, pytest.approx(1 / 3, abs=1e-6))
    assert track.at("__proto__", 9) == (0, 0, 1, 1)


def test_frames_are_sized_by_means_of_areas():
    pytest.importorskip("av")
    from avsep.media.video import cut_frame

    frame = np.random.default_rng(5).integers(0, 255, (3, 90, 133), dtype=np.uint8)
    expected = cut_frame(frame, (0.1, 0.2, 0.9, 1.0), (40, 56)).astype(int)
    cut = cut_frame(frame, (0.1, 0.2, 0.9, 1.0))
    rgba = np.concatenate([cut, np.full((1, *cut.shape[1:]), 255, np.uint8)]).transpose(1, 2, 0)
    found = node(
        'import { sized } from "./frames.js";\n'
        "const { data, w, h } = given;\n"
        "console.log(JSON.stringify([...sized(Uint8ClampedArray.from(data), w, h, 40, 56, null)]));",
        {"data": rgba.reshape(-1).tolist(), "w": cut.shape[2], "h": cut.shape[1]},
    )
    difference = np.abs(np.array(found).reshape(3, 40, 56) - expected)
    assert difference.mean() < 1
    assert difference.max() <= 6
