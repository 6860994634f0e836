"""The pages of the documentation, wherever they lie, and what stands in them."""

from __future__ import annotations

import re

from support.source_tree import ROOT

FOLDERS = ("docs", "export", "kernels", "benchmarks")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(found for folder in FOLDERS for found in (ROOT / folder).rglob("*.md")))
    if path.name != "device_readme.md"  # a template
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), flags=re.MULTILINE | re.DOTALL)


def command_lines(page: str, program: str = "avsep") -> list[str]:
    """The lines of the blocks for a shell that call ``program``: joined where they go on, and parted at ``&&``."""
    found = []
    for block in blocks(page, "bash"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in re.split(r"\s&&\s", re.sub(r"\s#\s.*", "", line)):
                words = re.sub(r"^\s*(?:[A-Z_]+=\S+\s+)*", "", part)
                if words.startswith(f"{program} "):
                    found.append(words)
    return found
