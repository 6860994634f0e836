"""Names of classes: lists of them, files named after them, and how they are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from avsep.errors import ConfigError, UnknownNameError
from avsep.export.runtime.names import names_in
from avsep.export.runtime.recordings import (
    PresenceOfChunks,
    Source,
    by_name,
    check_moves,
    check_told_apart,
    ids_of_classes,
    nothing_of,
    output_paths,
    sources_of,
)
from avsep.export.runtime.timeline import VisualSource, VisualTimeline

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
        ("left=violin, right = violin", ["left=violin", "right=violin"]),
        ("she=Male speech, man speaking,he = Male speech,man speaking,violin",
         ["she=Male speech, man speaking", "he=Male speech, man speaking", "violin"]),
        ('"she=Male speech, man speaking",x=a,b', ["she=Male speech, man speaking", "x=a, b"]),
        ("", []),
    ],
)  # fmt: skip
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


# --- sources of one class ---------------------------------------------------------------------------------------------

KNOWN = ("violin", "flute", "a=b", "residual")
LOOKS = (VisualSource("object", "frames", frames=1), VisualSource("motion", "frames"))


def test_sources_have_names_of_their_own_or_their_class_s():
    asked = sources_of(KNOWN, ["left=violin", "flute", " right = violin ", "violin"])
    assert asked == [
        Source("left", "violin", 0),
        ("flute", "flute", 1),
        ("right", "violin", 0),
        ("violin", "violin", 0),
    ]
    assert [source.text for source in asked] == ["left=violin", "flute", "right=violin", "violin"]
    assert [source.label for source in asked[:2]] == ["'left' (violin)", "class 'flute'"]
    assert sources_of(KNOWN, [source.text for source in asked]) == asked
    assert ids_of_classes(KNOWN, ["left=violin", "right=violin"]) == [0, 0]


def test_a_class_may_hold_the_sign_itself():
    assert sources_of(KNOWN, ["a=b", "x=a=b"]) == [("a=b", "a=b", 2), ("x", "a=b", 2)]


def test_the_classes_name_is_no_name_of_its_own():
    (source,) = sources_of(["fl\u00f6te"], ["flo\u0308te=fl\u00f6te"])
    assert not source.is_named
    assert sources_of(["fl\u00f6te"], ["l\u00e4rm=flo\u0308te"]) == [("l\u00e4rm", "fl\u00f6te", 0)]


@pytest.mark.parametrize(
    ("classes", "error", "told"),
    [
        (["violin", "violin"], ConfigError, "class 'violin' is given twice: name each of the two, such as "
         "left=violin,right=violin, with boxes or features of left and of right"),
        (["left=violin", "left=flute"], ConfigError, r"two sources are named 'left' \(left=violin, left=flute\)"),
        (["violin", "violin=flute"], ConfigError, "two sources are named 'violin'"),
        (["l\u00e4rm=violin", "la\u0308rm=violin"], ConfigError, "two sources are named"),
        (["left="], ConfigError, "'left=' is not a name and its class: write it as left=violin"),
        (["=violin"], ConfigError, "'=violin' is not a name and its class"),
        (["left=violn"], UnknownNameError, "has not learned class 'violn': did you mean 'violin'"),
        (["residual=violin"], ConfigError, "cannot be named 'residual', as results have one"),
        (["mixture=violin"], ConfigError, "cannot be named 'mixture'"),
    ],
)  # fmt: skip
def test_names_that_are_none(classes, error, told):
    with pytest.raises(error, match=told) as caught:
        sources_of(KNOWN, classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "given", "found"),
    [
        (["left=violin", "flute"], "left violin flute", {"left": "left", "flute": "flute"}),
        (["left=violin", "flute"], "violin flute", {"left": "violin", "flute": "flute"}),
        (["left=violin", "right=violin"], "violin left", {"left": "left"}),
        (["left=violin", "violin"], "violin", {"violin": "violin"}),
        (["violin=flute", "x=violin"], "violin", {"violin": "violin"}),
        (["violin"], "tuba", {}),
    ],
)
def test_what_is_given_is_found_by_name_then_by_class(classes, given, found):
    assert by_name({name: name for name in given.split()}, sources_of(KNOWN, classes)) == found


def test_what_is_given_is_found_however_its_umlaut_was_written():
    (source,) = sources_of(["violin"], ["l\u00e4rm=violin"])
    assert by_name({"la\u0308rm": 1}, [source]) == {"l\u00e4rm": 1}


def test_of_whom_nothing_is_given():
    left, _ = asked = sources_of(KNOWN, ["left=violin", "right=violin"])
    assert nothing_of(left, ["violin", "tuba"]) == (
        "there are no frames or features of 'left' (violin): there are those of tuba, violin, and violin does not say "
        "of which it is: write left instead"
    )
    assert nothing_of(asked[1], [], "boxes") == "there are no boxes of 'right' (violin): there are those of none"


def test_two_of_one_class_need_a_separator_that_looks_at_movement():
    asked = sources_of(KNOWN, ["left=violin", "right=violin"])
    check_moves(asked, LOOKS)
    check_moves(asked[:1], ())
    for looks_at, how in ((LOOKS[:1], "looks at no movement"), ((), "looks at nothing")):
        with pytest.raises(ConfigError, match=f"left and right are both violin, and this separator {how}.*same sound"):
            check_moves(asked, looks_at)


def test_two_of_one_class_are_seen_apart():
    asked = sources_of(KNOWN, ["left=violin", "middle=violin", "right=violin", "flute"])

    def moving(value, **more):
        return VisualTimeline(motion=np.full((9, 1, 4, 4), value, np.uint8), **more)

    held = moving(0, moves=False)
    check_told_apart(asked, {"left": moving(1), "middle": moving(2), "right": held, "flute": held})
    check_told_apart(asked, {"left": moving(1), "middle": moving(2), "flute": moving(2)})
    with pytest.raises(ConfigError, match="middle and right are both violin, and no movement is seen of them"):
        check_told_apart(asked, {"left": moving(1), "right": held})
    with pytest.raises(ConfigError, match="left, middle and right are all violin, and no movement"):
        check_told_apart(asked, {})
    with pytest.raises(ConfigError, match="left and middle are both violin, and both are shown the same"):
        check_told_apart(asked, {"left": moving(1), "middle": moving(1), "right": moving(2)})
    one, other = {"motion": np.ones(3), "object": len}, {"motion": np.ones(3), "object": len}
    with pytest.raises(ConfigError, match="shown the same"):
        check_told_apart(asked[:2], {"left": one, "middle": other})
    check_told_apart(asked[:2], {"left": one, "middle": {**other, "object": max}})
    check_told_apart(asked[:2], {"left": one, "middle": moving(1)})


def test_presence_is_what_one_chunk_in_twenty_reaches():
    told = PresenceOfChunks()
    assert told.value is None
    told.add(None)
    assert told.value is None
    rows = np.linspace(0.01, 0.2, 20, dtype=np.float32)
    told.add(np.stack([rows[:5], 1 - rows[:5]], axis=1))
    told.add(np.stack([rows[5:], 1 - rows[5:]], axis=1))
    np.testing.assert_allclose(told.value, [0.2, 0.99], rtol=1e-6)  # of twenty the largest
    told.add(np.float32([[0.9, 0.0]]))
    np.testing.assert_allclose(told.value, [0.2, 0.98], rtol=1e-6)  # one of twenty-one does not count
