"""Import paths of earlier versions."""

from __future__ import annotations

import importlib
import sys

import pytest

import avsep
from avsep._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_gives_the_module_that_took_its_place(old):
    new = importlib.import_module(MOVED[old])
    sys.modules.pop(old, None)
    parent, _, name = old.rpartition(".")
    vars(sys.modules[parent]).pop(name, None)
    with pytest.warns(FutureWarning, match=rf"{old} is now {MOVED[old]}: import that") as caught:
        assert importlib.import_module(old) is new
    assert new.__spec__.name == MOVED[old]
    assert len(caught) == 1


def test_the_warning_names_the_line_that_imports(tmp_path, monkeypatch):
    (tmp_path / "somebodys_script.py").write_text("\n\nimport avsep.seeding\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("avsep.seeding", None)
    with pytest.warns(FutureWarning) as caught:
        importlib.import_module("somebodys_script")
    assert (caught[0].filename, caught[0].lineno) == (str(tmp_path / "somebodys_script.py"), 3)


def test_a_path_whose_name_is_a_function_now_says_so():
    """To load it would set ``avsep.separate`` to a module."""
    with pytest.raises(ModuleNotFoundError, match=r"a function now, .*: import avsep\.inference\.recordings"):
        importlib.import_module("avsep.separate")
    assert callable(avsep.separate)


def test_no_old_path_hides_a_public_name():
    assert not {f"avsep.{name}" for name in avsep.__all__} & set(MOVED)


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"avsep\.never"):
        importlib.import_module("avsep.never")
