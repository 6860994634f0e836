"""docs/methods.md is what the registry says."""

from __future__ import annotations

import runpy

from avsep.registry import STRATEGIES
from support.source_tree import ROOT


def test_the_page_of_methods_is_current():
    page = runpy.run_path(str(ROOT / "scripts" / "methods.py"))["page"]()
    assert page == (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), "run python scripts/methods.py"
    for spec in STRATEGIES:
        if spec.package == "avsep":
            assert f"| `{spec.name}` |" in page
            assert spec.source
