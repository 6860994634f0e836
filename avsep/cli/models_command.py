"""``avsep models``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from avsep.cli._output import Json, Output, Quiet, Verbose, next_command


def command(
    name: Annotated[
        str | None, typer.Argument(help="A model, whose card is shown; all without it.", show_default=False)
    ] = None,
    sample: Annotated[
        Path | None, typer.Option("--sample", help="Write the model's sample, a mixture to try it with, to this file.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the separators that come with avsep: what they know, what they were trained on, what they reach."""
    from rich import box
    from rich.table import Table

    from avsep.models import find_model, models

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if sample is not None:
        _write_sample(find_model(name), sample, output)
        return
    if name is None:
        known = models()
        output.result({"format": "avsep-models", "models": [{"name": m.name, **_head(m.card)} for m in known]})
        table = Table(title="separators that come with avsep")
        for heading in ("model", "classes", "Hz", "what it is"):
            table.add_column(heading, justify="right" if heading == "Hz" else "left", overflow="fold")
        for model in known:
            card = model.card
            table.add_row(model.name, ", ".join(model.classes), str(card["sample_rate_hz"]), card["summary"])
        output.show(table)
        output.say("avsep models NAME shows a model's card; avsep models --sample duet.flac writes a mixture to try")
        return
    model = find_model(name)
    model.check()
    output.result({**model.card, "format": "avsep-model", "name": model.name, "path": model.path})
    card = model.card
    output.say(f"{model.name}: {card['summary']}")
    for title, text in card["about"].items():
        output.say(f"{title}: {text}")
    title = f"SDR improvement in dB on sounds of {card['tested_on']['name']}, which it was not trained with"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("class", "by name", "filter", "difference", "with picture"):
        named = heading == "class"
        table.add_column(heading, justify="left" if named else "right", no_wrap=named)
    for row in card["scores"]:
        difference = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        cells = [f"{row[key]:.2f}" for key in ("unseen", "filter")]
        table.add_row(row["class"], *cells, difference, f"{row['seen']:.2f}")
    output.show(table)
    output.say("by name: no picture is seen; filter: one for each class that never changes")


def _head(card: Any) -> dict[str, Any]:
    return {key: card[key] for key in ("summary", "classes", "sample_rate_hz", "licence")}


def _write_sample(model: Any, target: Path, output: Output) -> None:
    import shutil

    from avsep.errors import ConfigError
    from avsep.files import atomic_path

    if target.suffix.lower() != model.sample.suffix:
        raise ConfigError(f"{target}: the sample is a {model.sample.suffix} file; name it so")
    if target.exists():
        raise ConfigError(f"{target} is there already: choose another name")
    with atomic_path(target) as temporary:
        shutil.copyfile(model.sample, temporary)
    classes = ",".join(model.card["sample_classes"])
    output.result({"format": "avsep-model-sample", "file": target, "classes": model.card["sample_classes"]})
    output.say(f"{target}: {' and '.join(model.card['sample_classes'])}")
    output.say(next_command("separate", target, "--classes", classes))
