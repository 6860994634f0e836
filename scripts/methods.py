"""Writes docs/methods.md: every strategy, memory policy, mixer and adapter, from what the registry knows.

python scripts/methods.py            # write it
python scripts/methods.py --check    # exit code 1 where it is not what the registry says
"""

from __future__ import annotations

import sys
from pathlib import Path

from avsep.errors import ConfigError
from avsep.registry import ADAPTERS, MEMORIES, MIXERS, STRATEGIES, ComponentSpec, Registry
from avsep.separator import Separator, build_separator
from avsep.spec import load_preset

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
BASES = {
    "iQuery": "iquery_small",
    "Co-Separation": "coseparation_small",
    "Sound of Pixels": "sound_of_pixels_small",
    "aligned": "aligned_small",
}
HEAD = """# Methods

Every page of the registry: what a method is, where it is from, what it keeps from task to task beside the separator and
its exemplars, on which base separators it runs, and what was changed of the original. `avsep list` shows their
parameters, `avsep leaderboard` sets them side by side, and any of them can be combined with `+`.

This page is written by `scripts/methods.py`.
"""

TAIL = """
## What is not here

- **Active, self-paced choice of what is labelled**: every clip of a store has its class already.
"""


def separators() -> dict[str, Separator]:
    made = {}
    for title, preset in BASES.items():
        parts = load_preset(preset)["separator"]
        made[title] = build_separator(**parts, classes=("a", "b"))
    return made


def runs_on(spec: ComponentSpec, bases: dict[str, Separator]) -> str:
    """The base separators that a strategy takes as their presets have them, or what it asks for."""
    strategy = STRATEGIES.create(spec.name, dict(spec.example))
    taken, reason = [], ""
    for title, separator in bases.items():
        try:
            strategy.check(separator)
            taken.append(title)
        except ConfigError as error:
            reason = str(error)
    if len(taken) == len(bases):
        return "all"
    return ", ".join(taken) or f"none of the presets: {reason}"


def cell(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).replace("|", "\\\\|")


def table(registry: Registry, bases: dict[str, Separator] | None = None) -> list[str]:
    heads = ["name", "what it does", "source", *(["keeps", "runs on"] if bases else []), "differs from its source"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for spec in registry:
        if spec.package != "avsep":
            continue
        keeps = spec.factory.keeps or "nothing"
        if getattr(spec.factory, "needs_memory", False):
            keeps += "; needs a memory"
        row = [f"`{spec.name}`", spec.summary, spec.source]
        row += [keeps, runs_on(spec, bases)] if bases else []
        lines.append("| " + " | ".join(cell(text) for text in [*row, spec.factory.differs]) + " |")
    return lines


def page() -> str:
    parts = [HEAD, "## Strategies\n", *table(STRATEGIES, separators())]
    for title, registry in (("Memory policies", MEMORIES), ("Mixers", MIXERS), ("Adapters", ADAPTERS)):
        parts += [f"\n## {title}\n", *table(registry)]
    return "\n".join(parts) + "\n" + TAIL


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/methods.md is not what the registry says: run python scripts/methods.py", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
