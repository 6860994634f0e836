"""Names of classes: lists of them, files named after them, and how they are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from avsep.errors import ConfigError, UnknownNameError
from avsep.export.runtime.recordings import ids_of_classes, names_in, output_paths

AVE = ("Male speech, man speaking", "Church bell", "a, b, c", "a, b", "violin")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("violin,Church bell", ["violin", "Church bell"]),
        (" violin , , Church bell,", ["violin", "Church bell"]),
        ("Male speech, man speaking", ["Male speech, man speaking"]),
        ("violin,Male speech,man speaking,Church bell", ["violin", "Male speech, man speaking", "Church bell"]),
        ('"Male speech, man speaking",violin', ["Male speech, man speaking", "violin"]),
        ("a,b,c,violin", ["a, b, c", "violin"]),
        ("a,b,violin", ["a, b", "violin"]),
        ("Male speech", ["Male speech"]),
        ("", []),
    ],
)
def test_a_name_with_commas_can_be_named(text, names):
    assert names_in(text, AVE) == names


def test_a_quote_serves_where_the_names_are_not_known():
    assert names_in('"a, b",c') == ["a, b", "c"]
    assert names_in("a, b,c") == ["a", "b", "c"]
    for text in ('"a, b', 'a\nb"'):
        with pytest.raises(ConfigError, match="no list of names"):
            names_in(text)


def test_an_umlaut_is_found_however_it_was_written():
    one, two = "fl\u00f6te", "flo\u0308te"
    assert ids_of_classes(["x", one], [two]) == ids_of_classes(["x", two], [one]) == [1]
    with pytest.raises(ConfigError, match="given twice"):
        ids_of_classes([one], [one, two])
    with pytest.raises(UnknownNameError, match="has not learned class 'flote'"):
        ids_of_classes([one], ["flote"])


def test_two_names_never_become_one_file():
    names = [p.name for p in output_paths(Path("r.wav"), ["a:b", "a b", "A/B", "residual", ".."], Path())]
    assert names == ["r_a-b.wav", "r_a-b-2.wav", "r_A-B-3.wav", "r_residual.wav", "r_class.wav", "r_residual-2.wav"]
    assert len({n.casefold() for n in names}) == len(names)
