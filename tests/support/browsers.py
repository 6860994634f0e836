"""A browser that tests drive, and a plain server of files for it."""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
READY_MS = 120_000  # on a machine that does other things


def chromium() -> str:
    """The path of a Chromium; the test is skipped where there is none, or no playwright."""
    pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("no chromium on the PATH")
    return found


@contextlib.contextmanager
def browser(*arguments: str) -> Iterator[Any]:
    """A running Chromium without a window."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", *arguments]
        opened = playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield opened
        finally:
            opened.close()


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
