"""What the scripts that write pages of docs/ have in common."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def cell(text: str) -> str:
    """A text in a table's cell."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def prose(docstring: str) -> str:
    """A docstring as Markdown: roles of Sphinx become code, and headings of Google's style begin a line."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring).replace("``", "`")
    return re.sub(r"^(\w+):\n((?:    .+\n?)+)", lambda m: f"{m[1]}: {textwrap.dedent(m[2])}", text, flags=re.MULTILINE)


def main(name: str, text: str) -> int:
    """Write docs/NAME, or with ``--check`` say whether it is ``text``; the exit code."""
    file = DOCS / name
    if "--check" not in sys.argv[1:]:
        file.write_text(text, encoding="utf-8")
    elif not file.is_file() or file.read_text(encoding="utf-8") != text:
        print(f"docs/{name} is not current: run python {sys.argv[0]}", file=sys.stderr)
        return 1
    return 0
