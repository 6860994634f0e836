"""Puts the commands together."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

# command -> module with a function `command`, or with a typer group `app`
COMMANDS = (
    "demo",
    "list",
    "data",
    "train",
    "learn",
    "memory",
    "evaluate",
    "compare",
    "report",
    "budget",
    "reproduce",
    "leaderboard",
    "sweep",
    "separate",
    "export",
    "app",
    "bench",
)


# click's, of which newer versions of typer have a copy of their own
_UsageError: Any = typer.BadParameter.__bases__[0]


class Interrupted(BaseException):
    """Ctrl-C, with how to go on, if the command knows. Not a KeyboardInterrupt, which typer ends with ``Aborted!``."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted(*stop.args) from None
        except _UsageError as error:
            from avsep.environment import world_size
            from avsep.errors import ConfigError

            if world_size() == 1:
                raise
            raise ConfigError(error.format_message()) from None


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """The command with its commands; where ``arguments`` begin with the name of one, with that one alone, so that no
    other's module is imported."""
    app = typer.Typer(
        name="avsep",
        cls=_Commands,
        help="Continual audio-visual sound separation: compose, train task after task, evaluate, separate, export.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",  # in rich's own markup a "[default]" in a help text would vanish
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in arguments[:1] if arguments and arguments[0] in COMMANDS else COMMANDS:
        module = importlib.import_module(f"avsep.cli.{name}_command")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(module.command)
    return app


def _version(value: bool) -> None:
    if value:
        from avsep import __version__

        typer.echo(f"avsep {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Continual audio-visual sound separation."""
    from avsep.environment import world_size
    from avsep.errors import ConfigError

    if world_size() > 1 and context.invoked_subcommand != "train":
        raise ConfigError(
            f"{world_size()} processes were started, and only avsep train shares its work between processes: run "
            f"avsep {context.invoked_subcommand} without torchrun"
        )
