"""A browser that tests drive, and a plain server of files for it."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import avsep.export.targets.website
from avsep.errors import ExportError
from avsep.export.targets.website import ort_web_files
from support.causal import causal_separator
from support.tones import TINY_FRONT_END

PAGE = Path(avsep.export.targets.website.__file__).parent / "web"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CLASSES = ("ding", "hum", "peep")
READY_MS = 120_000  # on a machine that does other things


def chromium() -> str:
    """The path of a Chromium; the test is skipped where there is none, or no playwright."""
    pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("no chromium on the PATH")
    return found


@contextlib.contextmanager
def browser(*arguments: str, beside: Any = None) -> Iterator[Any]:
    """A running Chromium without a window; ``beside`` another that runs, which playwright wants to know."""
    options = {
        "executable_path": chromium(),
        "args": ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", *arguments],
    }
    from playwright.sync_api import sync_playwright

    with contextlib.ExitStack() as stack:
        kind = stack.enter_context(sync_playwright()).chromium if beside is None else beside.browser_type
        opened = kind.launch(**options)
        stack.callback(opened.close)
        yield opened


class _Quiet(SimpleHTTPRequestHandler):
    extensions_map: ClassVar[dict[str, str]] = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


SIDEWAYS = """() => [document.documentElement, ...document.querySelectorAll("body *")]
  .filter((node) => node.checkVisibility() && node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 40
    && (node === document.documentElement || getComputedStyle(node).overflowX !== "visible"))
  .map((node) => `${node.tagName}.${node.className} ${node.scrollWidth} > ${node.clientWidth}`)"""
"""What is wider than its place, so that it is cut or must be scrolled."""


@contextlib.contextmanager
def opened_page(chrome: Any, address: str, *, ready: bool = True, before: str = "", **options: Any) -> Iterator[Any]:
    """A page of its own, without what others keep; its errors are the test's. ``before``: a script that runs first."""
    context = chrome.new_context(accept_downloads=True, **options)
    errors: list[str] = []
    try:
        page = context.new_page()
        page.add_init_script(before)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        if ready:
            page.wait_for_selector("#file:not([disabled]), #alert:not([hidden])", timeout=READY_MS, state="attached")
            assert page.locator("#alert").is_hidden(), page.inner_text("#alert")
        yield page
    finally:
        context.close()
    assert not errors


def separate_in_page(
    page: Any,
    file: Path,
    classes: list[str],
    into: Path,
    boxes: dict[str, list[float]] | None = None,
    format_name: str = "FLOAT",
    timeout_ms: int = 600_000,
) -> list[Path]:
    """Give a file to a loaded page, choose classes (in this order) and boxes, separate, and download all results."""
    page.set_input_files("#file", str(file))
    page.wait_for_selector("#setup:not([hidden])", timeout=timeout_ms)
    for number, name in enumerate(classes):
        page.locator("#sources select").nth(number).select_option(label=name)
    if boxes:
        page.evaluate("window.scrollTo(0, 0)")
        for number, name in enumerate(classes):
            draw_box(page, number, boxes[name])
    page.click("#go")
    page.wait_for_selector("#result:not([hidden]), #alert:not([hidden])", timeout=timeout_ms)
    assert page.locator("#alert").is_hidden(), page.inner_text("#alert")
    page.select_option("#format", format_name)
    found = []
    for name in (*classes, "residual"):
        with page.expect_download() as download:
            page.click(f'button[aria-label="Download {name} as WAV"]')
        target = into / download.value.suggested_filename
        download.value.save_as(target)
        found.append(target)
    return found


def draw_box(page: Any, number: int, box: list[float]) -> None:
    """Draw a source's box over the picture with the mouse."""
    page.locator("#stage .box").nth(number).focus()
    frame = page.locator("#stage").bounding_box()
    left, top, right, bottom = (
        frame[k] + share * frame[side] for k, side, share in zip("xyxy", ("width", "height") * 2, box, strict=True)
    )
    page.mouse.move(left + 0.5, top + 0.5)
    page.mouse.down()
    page.mouse.move((left + right) / 2, (top + bottom) / 2, steps=3)
    page.mouse.move(right - 0.5, bottom - 0.5)
    page.mouse.up()


def node(script: str, given: object = None) -> Any:
    """What a script of the page's modules prints as JSON; it finds ``given`` under that name."""
    path = shutil.which("node")
    if path is None:
        pytest.skip("no node on the PATH")
    text = f"const given = {json.dumps(given)};\n{script}"
    text = text.replace('from "./', f'from "{PAGE.as_uri()}/').replace("PAGE +", f'"{PAGE.as_uri()}/" +')
    done = subprocess.run(
        [path, "--input-type=module", "-"], input=text, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ort_web() -> Path:
    """ONNX Runtime's builds for browsers; the test is skipped where they are neither in the cache nor to be had."""
    try:
        return next(iter(ort_web_files().values())).parent
    except ExportError as error:
        pytest.skip(str(error))


def browser_bundle(place: Path, *, channels: int = 2, **plan: Any) -> Path:
    """A small bundle of random weights that looks at frames, tells presence, and needs no pictures."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from avsep.export import ExportPlan, export
    from avsep.separator import build_separator

    torch.manual_seed(0)
    separator = build_separator(
        audio_encoder=("unet7", {"base_channels": 4, "mask_channels": 4}),
        object_encoder=("frame_cnn", {"dim": 16, "frames": 1}),
        motion_encoder=("motion_cnn", {"dim": 16, "rate_hz": 16, "steps": 12}),
        mask_decoder=("aligned_query", {"dim": 16, "layers": 1}),
        classes=CLASSES,
        front_end={**TINY_FRONT_END, "level_db": -20, "limit_mask_sum": True},
    )
    return export(separator.eval(), ExportPlan(channels=channels, **plan), place, made_from="a test").path


def causal_bundle(place: Path, **plan: Any) -> Path:
    """A small causal bundle of random weights, at 8 kHz, that looks at frames and needs no pictures."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from avsep.export import ExportPlan, export

    separator = causal_separator(object_encoder=("frame_cnn", {"dim": 8, "frames": 1}))
    return export(separator, ExportPlan(**plan), place, made_from="a test").path


# Goes before the page's processor of live sound: tells the page all that goes in and comes out, and where in time.
_TAP = """
const own = globalThis.registerProcessor;
globalThis.registerProcessor = (name, Processor) => own(name, class extends Processor {
  process(inputs, outputs) {
    const goes_on = super.process(inputs, outputs);
    const copy = (rows) => rows.map((row) => row.slice());
    const at = globalThis.currentFrame - this.begin;
    if (at >= 0) this.port.postMessage({ tapped: { at, input: copy(inputs[0]), outputs: outputs.map(copy) } });
    return goes_on;
  }
});
"""
LISTEN = """
window.tapped = [];
const Own = window.AudioWorkletNode;
window.AudioWorkletNode = class extends Own {
  constructor(context, name, options) {
    super(context, name, options);
    window.options = { ...options.processorOptions, rate: context.sampleRate };
    this.port.addEventListener("message", (event) => {
      if (!event.data.tapped) return;
      event.stopImmediatePropagation();
      window.tapped.push(event.data.tapped);
    });
  }
};
"""


def tap(site: Path) -> Path:
    """Let the pages of a site record what goes through their audio thread; see :func:`tapped_sound`."""
    processor = site / "live_processor.js"
    processor.write_text(_TAP + processor.read_text())
    return site


_TAPPED = """() => {
  const text = (floats) => {
    const bytes = new Uint8Array(floats.buffer);
    let out = "";
    for (let k = 0; k < bytes.length; k += 8190) out += btoa(String.fromCharCode(...bytes.subarray(k, k + 8190)));
    return out;
  };
  const flat = (calls) => {
    const rows = Math.max(...calls.map((call) => call.length)), out = new Float32Array(calls.length * rows * 128);
    calls.forEach((call, k) => call.forEach((row, n) => out.set(row, (k * rows + n) * 128)));
    return text(out);
  };
  const input = flat(tapped.map((call) => call.input)), outputs = flat(tapped.map((call) => call.outputs.flat()));
  return { input, outputs, starts: tapped.map((call) => call.at), sources: tapped[0].outputs.length, options };
}"""


def tapped_sound(page: Any) -> tuple[Any, Any, dict[str, float]]:
    """What went through the audio thread of a page of :func:`tap`, opened with ``before=LISTEN``, from the stream's
    first sample on: the input [C, L], the outputs [N, C, L], and the processor's options with the ``rate``."""
    found = page.evaluate(_TAPPED)
    starts = found["starts"]
    assert starts == list(range(starts[0], starts[0] + 128 * len(starts), 128))

    def rows(text: str) -> Any:  # [rows, L], with silence before the first call
        calls = np.frombuffer(base64.b64decode(text), dtype=np.float32).reshape(len(starts), -1, 128)
        return np.pad(np.concatenate(list(calls), axis=-1), ((0, 0), (int(starts[0]), 0)))

    sound, outputs = rows(found["input"]), rows(found["outputs"])
    return sound, outputs.reshape(found["sources"], -1, outputs.shape[-1]), found["options"]
