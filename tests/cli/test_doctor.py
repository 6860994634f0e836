"""``avsep doctor`` on a machine that is in order, and on broken ones."""

from __future__ import annotations

import json

import pytest

import avsep
from avsep.cli import doctor_command
from support.commands import run
from support.source_tree import ROOT

PROBED = {"torch": {"found": {"cuda": [], "mps": False, "notes": []}}, "soundfile": {"found": {}}}


@pytest.fixture
def quick(monkeypatch):
    """Nothing is loaded: that takes seconds, and is tested once."""
    monkeypatch.setattr(doctor_command, "_probe", lambda modules: dict(PROBED))


def told(capsys) -> dict:
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def test_what_is_here(capsys):
    assert run("doctor", "--json") == 0
    found = told(capsys)
    assert found["avsep"]["version"] == avsep.__version__
    assert found["packages"]["torch"]["version"]
    assert found["packages"]["torch"]["problem"] is None
    assert found["works"][0]["works"]
    assert {w["for"] for w in found["weights"]} >= {"the encoder clip_vit_b32"}
    assert all(place["free_gb"] > 0 for place in found["disk"] if place["what"] == "this folder")


def test_it_knows_what_every_extra_is_for(quick, capsys):
    tomllib = pytest.importorskip("tomllib")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs the source tree")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor_command.ALLOWS) == set(extras)
    assert run("doctor", "--json") == 0
    assert {e["for"] for e in told(capsys)["extras"].values()} == set(doctor_command.ALLOWS.values())


def test_as_text(quick, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert run("doctor") == 0
    shown = capsys.readouterr()
    assert "PyTorch" in shown.out
    assert doctor_command.ALLOWS["media"] in shown.out
    assert shown.err == ""


def _without(package: str, monkeypatch) -> None:
    version = doctor_command.metadata.version

    def masked(name: str) -> str:
        if name == package:
            raise doctor_command.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor_command.metadata, "version", masked)


def test_an_extra_that_is_missing(quick, capsys, monkeypatch):
    _without("av", monkeypatch)
    assert run("doctor", "--json") == 0
    found = told(capsys)
    assert found["extras"]["media"]["missing"] == ["av>=14"]
    (row,) = [row for row in found["works"] if row["what"] == doctor_command.ALLOWS["media"]]
    assert (row["works"], row["do"]) == (False, 'pip install "avsep[media]"')
    assert found["problems"] == []  # nobody has to have it
    assert found["works"][0]["works"]


def test_what_everything_needs_is_missing(quick, capsys, monkeypatch):
    _without("soxr", monkeypatch)
    assert run("doctor", "--json") == 0
    found = told(capsys)
    assert found["problems"] == ['soxr is missing: pip install "avsep"']
    assert (found["works"][0]["works"], found["works"][0]["do"]) == (False, "repair soxr")


def test_a_version_that_does_not_fit(quick, capsys, monkeypatch):
    version = doctor_command.metadata.version
    monkeypatch.setattr(doctor_command.metadata, "version", lambda n: "1.2" if n == "torch" else version(n))
    assert run("doctor", "--quiet") == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("avsep: torch is of version 1.2, and avsep needs ")


def test_what_is_installed_and_does_not_load(tmp_path, monkeypatch):
    """A module that raises, and one that takes the process with it."""
    (tmp_path / "raises_here.py").write_text("raise OSError('libsndfile.so.1:\\n no such file')")
    (tmp_path / "ends_here.py").write_text("import os; print('a message', flush=True); os._exit(9)")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor_command._probe(["raises_here", "ends_here", "json"])
    assert found == {
        "raises_here": {"problem": "OSError: libsndfile.so.1: no such file"},
        "ends_here": {"problem": "the process ended with code 9"},
        "json": {"found": {}},
    }


def test_a_library_that_does_not_load(capsys, monkeypatch):
    broken = {**PROBED, "torch": {"problem": "OSError: libcudart.so.13"}}
    monkeypatch.setattr(doctor_command, "_probe", lambda modules: broken)
    assert run("doctor", "--json") == 0
    found = told(capsys)
    assert found["problems"] == ["torch is installed and does not load: OSError: libcudart.so.13"]
    assert not found["works"][0]["works"]


@pytest.mark.parametrize("broken", ["_avsep", "_requirements", "_packages", "_probe", "_cpu", "_caches", "_disk"])
def test_whatever_fails_is_told_and_the_rest_goes_on(broken, quick, capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("a\nbroken machine")

    monkeypatch.setattr(doctor_command, broken, fails)
    assert run("doctor", "--json") == 0
    found = told(capsys)
    assert any("RuntimeError: a broken machine" in line for line in found["problems"])
    assert found["python"]["version"]
    assert run("doctor") == 0


def test_opposite_wishes(quick, capsys):
    assert run("doctor", "--quiet", "--verbose") == 2
    assert "leave one out" in capsys.readouterr().err
