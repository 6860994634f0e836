"""``avsep app``."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose

if TYPE_CHECKING:
    from avsep.export import Bundle


def command(
    separator: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN|BUNDLE|MODEL]",
            help="Run folder, bundle, site of avsep export --target web, or a separator that comes with avsep (avsep "
            "models) [default: instruments].",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        int | None, typer.Option("--task", min=0, help="Of a run: this task's separator [default: the last finished].")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of the server [default: a free one].")] = 0,
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no window; the address is printed.")] = False,
    provider: Annotated[
        str,
        typer.Option(
            "--provider",
            help="What runs in Python: auto, cpu, cuda, onnxruntime-tensorrt, openvino, tensorrt, tensorrt-rtx.",
        ),
    ] = "auto",
    ort_web: Annotated[
        Path | None,
        typer.Option(
            "--ort-web", help="Folder of the unpacked npm package onnxruntime-web [default: the cache, or a download]."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Open a page that separates videos and sounds: in the browser, or in Python where the browser cannot.

    The server listens on this computer alone; recordings stay on it and are deleted when it ends (Ctrl-C). With
    --json its address is printed in one line when it is up.
    """
    from avsep.app.server import App, find_detector, serve
    from avsep.errors import ConfigError, ExportError
    from avsep.export.runtime.separator import BundleSeparator
    from avsep.export.targets.website import check_for_browsers, write_page, write_site

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if task is not None and (separator is None or not _is_run(separator)):
        named = "none is named" if separator is None else f"{separator} is none"
        raise ConfigError(f"--task {task} is of a run, and {named}: leave it out")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avsep-app-")))
        bundle = stack.enter_context(_bundle(separator, task, folder, output))
        engine = stack.enter_context(BundleSeparator.load(bundle, provider))
        for reason in engine.unused_engines:
            output.note(f"note: {reason}")
        in_browser, site = True, folder / "site"
        try:
            check_for_browsers(bundle)
            write_site(bundle, site, ort_web=ort_web, pack=False, tell=output.note)
        except ExportError as error:
            if ort_web is not None:
                raise
            in_browser = False
            output.note(f"everything runs in Python: {error}")
            write_page(bundle, site)
        (folder / "recordings").mkdir()
        app = App(site, engine, folder / "recordings", browser=in_browser, detector=find_detector())
        address = stack.enter_context(serve(app, port))
        output.detail(f"Python would run it on {engine.provider}; the browser {'can' if in_browser else 'cannot'}")
        output.result({"format": "avsep-app", "address": address, "in_browser": in_browser}, in_a_line=True)
        output.say(f"avsep app: {address} (Ctrl-C ends it)")
        if not no_open:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    output.say("ended; the recordings are deleted")


def _is_run(path: Path) -> bool:
    from avsep.runs.folder import RunFolder

    return RunFolder(path).is_run


def _bundle(separator: Path | None, task: int | None, folder: Path, output: Output) -> Bundle:
    """The bundle that is meant: itself, a site's, or one that is exported of a run, or of a separator that comes with
    avsep, for as long as the app is open."""
    from avsep.errors import ConfigError
    from avsep.export import ExportPlan, export_model, export_run, open_bundle
    from avsep.models import model_at
    from avsep.runs.folder import RunFolder

    plan = ExportPlan(channels=2)
    if (model := model_at(separator)) is not None:
        with _progress(output) as progress:
            return export_model(model, folder / "bundle", plan=plan, progress=progress)
    assert separator is not None
    if (separator / "site.json").is_file():
        return open_bundle(separator / "bundle")
    if not _is_run(separator):
        if not (separator / "manifest.json").is_file() and separator.is_dir():
            raise ConfigError(
                f"{separator} is no run, bundle or site: name one (avsep app RUN), made by avsep train or avsep "
                "export, or none for the separator that comes with avsep"
            )
        return open_bundle(separator)
    last = RunFolder(separator).finished_tasks()[-1] if task is None else task
    with _progress(output) as progress:
        export_run(separator, folder / "bundle", tasks=last, plan=plan, progress=progress, tell=output.note)
    return open_bundle(folder / "bundle")


@contextlib.contextmanager
def _progress(output: Output) -> Iterator[Callable[[str, int, int], None]]:
    with output.bars() as bars:
        bar = bars.add("exporting", None)

        def progress(label: str, done: int, total: int) -> None:
            bars.advance(bar, 0, note=label)
            bars.update(bar, done, total)

        yield progress
