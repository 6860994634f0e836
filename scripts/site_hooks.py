"""What MkDocs is told when it builds the site (mkdocs.yml): pages that lie elsewhere in the tree, and their links.

A page that lies outside of docs/ stays where it is and is read from there. Links are written for the tree; in the site
those to pages lead to pages, those to pictures and tables to copies, and what is left, such as source code, loses its
link and keeps its text.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from as_installed import lay_out
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# file in the tree -> page of the site
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "export/README.md": "export.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/presets/README.md": "benchmarks_presets.md",
    "kernels/README.md": "kernels.md",
    "kernels/mask_head/README.md": "kernels/mask_head.md",
    "kernels/similarity_distillation/README.md": "kernels/similarity_distillation.md",
    "kernels/stft_masking/README.md": "kernels/stft_masking.md",
}
COPIED = (".png", ".svg", ".csv")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    """The API is read from a copy of the tree that is laid out as it is installed."""
    folder = tempfile.mkdtemp(prefix="avsep-site-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    lay_out(Path(folder))
    config.plugins["mkdocstrings"].config.handlers.setdefault("python", {})["paths"] = [folder]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere, and the notebook as a page."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    notebook = ROOT / "docs" / "first_hour.ipynb"
    if notebook.is_file():
        files.append(File.generated(config, "first_hour.md", content=as_markdown(notebook)))
    return files


def as_markdown(notebook: Path) -> str:
    """The cells of a notebook, without what they print."""
    lines = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        lines.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*lines, f"This page is a notebook: [{notebook.name}]({notebook.name}).\n"])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page, which hold in the tree, into those of the site."""
    source = next((ROOT / s for s, p in ELSEWHERE.items() if p == page.file.src_uri), ROOT / "docs" / page.file.src_uri)
    pages = {ROOT / s: p for s, p in ELSEWHERE.items()} | {ROOT / "docs" / "first_hour.ipynb": "first_hour.md"}

    def turn(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        address, sign, anchor = link.partition("#")
        target = (source.parent / address).resolve()
        if not address or re.match(r"[a-z]+:", link) or source.stem == "first_hour":
            return match[0]
        uri = pages.get(target) or (str(target.relative_to(ROOT / "docs")) if ROOT / "docs" in target.parents else "")
        if not uri and target.suffix in COPIED and target.is_file():
            uri = f"files/{target.relative_to(ROOT)}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
        if not uri:
            return text
        relative = os.path.relpath(uri, os.path.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({relative}{sign}{anchor})"

    blocks = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(block if block.startswith("```") else LINK.sub(turn, block) for block in blocks)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Docstrings are written with Sphinx's roles, of which the code in them stays."""
    return re.sub(r":(?:func|class|meth|mod|data|attr|exc):<code>~?", "<code>", html)
