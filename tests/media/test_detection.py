"""Finding objects: which rule applies, OWLv2 on small random weights, and boxes over time."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from avsep.errors import CheckpointError, DataError, MissingWeightsError
from avsep.media.detection import (
    HELD,
    PROMPTS,
    WHOLE_FRAME,
    BoxTrack,
    Found,
    OWLv2Detector,
    find_objects,
    find_several,
    follow,
    keep_apart,
    prepare_square,
    propose_classes,
    read_boxes,
)
from support.small_weights import write_owlv2

LEFT, RIGHT, MIDDLE = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.2, 0.2, 0.8, 0.8)
PICTURE = np.zeros((3, 20, 30), np.uint8)


class Knows:
    """Finds what its table says, by frame number; everything else scores 0.01."""

    def __init__(self, *tables):
        self.tables = tables
        self.asked = []

    def best(self, frames, prompts):
        self.asked.append(list(prompts))
        rows = [[t.get(p, (0.01, MIDDLE)) for p in prompts] for t in self.tables[: len(frames)]]
        return np.array([[s for s, _ in row] for row in rows]), np.array([[b for _, b in row] for row in rows])


def test_the_class_is_asked_first_then_the_player_then_anything_then_the_whole_frame():
    detector = Knows(
        {"a violin": (0.9, LEFT), "a person playing the violin": (0.95, RIGHT), "a musical instrument": (0.99, MIDDLE)},
        {"a violin": (0.09, LEFT), "a person playing the violin": (0.1, RIGHT), "a musical instrument": (0.99, MIDDLE)},
        {"a violin": (0.09, LEFT), "a person playing the violin": (0.0, RIGHT), "a musical instrument": (0.2, MIDDLE)},
        {},
    )
    found = [f["violin"] for f in find_objects(detector, [PICTURE] * 4, ["violin"])]
    assert [f.rule for f in found] == ["a violin", "a person playing the violin", "a musical instrument", WHOLE_FRAME]
    assert [f.box for f in found] == [LEFT, RIGHT, MIDDLE, (0, 0, 1, 1)]
    assert [f.score for f in found] == [0.9, 0.1, 0.2, 0.0]
    assert detector.asked[0] == [p.format(**{"class": "violin"}) for p in PROMPTS]


def test_several_classes_at_once_each_by_its_own_prompts():
    table = {"a violin": (0.3, LEFT), "a person playing the electric bass": (0.2, RIGHT)}
    (found,) = find_objects(Knows(table), [PICTURE], ["violin", "electric_bass", "drum"])
    assert list(found) == ["violin", "electric_bass", "drum"]
    assert (found["violin"].box, found["electric_bass"].box) == (LEFT, RIGHT)
    assert found["electric_bass"].rule == "a person playing the electric bass"
    assert found["drum"].rule == WHOLE_FRAME


def test_a_general_prompt_takes_no_object_that_has_a_name():
    instrument = {"a violin": (0.3, LEFT), "a musical instrument": (0.9, (0.0, 0.0, 0.52, 1.0))}
    (found,) = find_objects(Knows(instrument), [PICTURE], ["flute", "violin"])
    assert (found["violin"].box, found["flute"].rule) == (LEFT, WHOLE_FRAME)
    elsewhere = {"a violin": (0.3, LEFT), "a musical instrument": (0.9, RIGHT)}
    (found,) = find_objects(Knows(elsewhere), [PICTURE], ["flute", "violin"])
    assert (found["flute"].box, found["flute"].rule) == (RIGHT, "a musical instrument")


def test_thresholds_and_nothing_to_look_at():
    table = {"a violin": (0.3, LEFT)}
    (found,) = find_objects(Knows(table), [PICTURE], ["violin"], threshold=0.31)
    assert found["violin"].rule == WHOLE_FRAME
    assert find_objects(Knows(), [], ["violin"]) == []
    with pytest.raises(ValueError, match=r"0\.\.1, got 2"):
        find_objects(Knows(table), [PICTURE], ["violin"], threshold=2)


def test_proposed_classes_are_those_seen_often_enough_at_places_of_their_own():
    one = {"a violin": (0.8, LEFT), "a cello": (0.7, (0.0, 0.0, 0.5, 0.9)), "a flute": (0.3, RIGHT)}
    none = {"a tuba": (0.9, LEFT)}
    detector = Knows(one, one, none, {})
    known = ["tuba", "flute", "cello", "violin", "drum"]
    assert propose_classes(detector, [PICTURE] * 4, known) == ["violin", "flute"]
    assert propose_classes(Knows({}), [PICTURE], known) == []


# --- several of one class ---------------------------------------------------------------------------------------------


class Sees(Knows):
    """Finds several boxes of a prompt, by frame number."""

    def several(self, frames, prompts, most, threshold):
        self.asked.append(list(prompts))
        found = []
        for table in self.tables[: len(frames)]:
            ranked = [sorted((o for o in table.get(p, ()) if o[0] >= threshold), reverse=True) for p in prompts]
            found.append([keep_apart(of, most) for of in ranked])
        return found


def test_boxes_of_one_object_are_not_two():
    left, part, near = (0.0, 0.0, 0.4, 1.0), (0.1, 0.2, 0.3, 0.5), (0.15, 0.0, 0.55, 1.0)
    ranked = [(0.9, left), (0.8, part), (0.7, near), (0.6, (0.35, 0.0, 0.8, 1.0)), (0.5, (0.8, 0.0, 1.0, 1.0))]
    assert keep_apart(ranked, 9) == [ranked[0], *ranked[3:]]
    assert keep_apart(ranked, 2) == [ranked[0], ranked[3]]
    assert keep_apart([], 2) == []


def test_the_surest_objects_of_a_class_by_the_first_prompt_that_shows_them_all():
    both = {"a violin": [(0.9, LEFT)], "a person playing the violin": [(0.3, RIGHT), (0.2, LEFT)]}
    three = {"a violin": [(0.3, (0.0, 0.0, 0.3, 1.0)), (0.9, (0.4, 0.0, 0.6, 1.0)), (0.5, (0.7, 0.0, 1.0, 1.0))]}
    one = {"a violin": [(0.9, LEFT), (0.05, RIGHT)]}
    detector = Sees(both, three, one, {})
    found = [f["violin"] for f in find_several(detector, [PICTURE] * 4, {"violin": 2})]
    assert [[o.box[0] for o in objects] for objects in found] == [[0.5, 0.0], [0.4, 0.7], [0.0], []]
    assert [o.rule for o in found[0]] == ["a person playing the violin"] * 2
    assert detector.asked == [["a violin", "a person playing the violin"]]


def test_an_object_is_of_the_class_that_scores_highest_there():
    table = {"a violin": [(0.9, LEFT), (0.3, RIGHT)], "a cello": [(0.6, RIGHT), (0.2, LEFT)]}
    (found,) = find_several(Sees(table), [PICTURE], {"violin": 2, "cello": 2})
    assert [[o.box for o in found[name]] for name in ("violin", "cello")] == [[LEFT], [RIGHT]]
    others = [{"flute": Found(RIGHT, 0.7, "a flute"), "drum": Found((0, 0, 0.5, 1), 0.0, WHOLE_FRAME)}]
    (found,) = find_several(Sees(table), [PICTURE], {"violin": 2}, others=others)
    assert [o.box for o in found["violin"]] == [LEFT]


def at(*lefts):
    return [Found((x, 0.0, x + 0.2, 1.0), 0.5, "a violin") for x in lefts]


def test_names_go_from_left_to_right_and_follow_the_nearest():
    frames = [(0.0, at(0.7)), (1.0, at(0.7, 0.1)), (2.0, at(0.2, 0.6)), (3.0, at(0.5)), (4.0, at(0.3, 0.55))]
    places = follow(frames, ["one", "two"])
    assert [found.box[0] for _, found in places["one"]] == [0.1, 0.1, 0.2, 0.2, 0.3]
    assert [found.box[0] for _, found in places["two"]] == [0.7, 0.7, 0.6, 0.5, 0.55]
    assert [second for second, _ in places["one"]] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert BoxTrack(places).rules("one") == {HELD: 2, "a violin": 3}
    crossing = [(0.0, at(0.1, 0.7)), (1.0, at(0.3, 0.5)), (2.0, at(0.45, 0.35)), (3.0, at(0.2, 0.6))]
    assert [found.box[0] for _, found in follow(crossing, ["one", "two"])["one"]] == [0.1, 0.3, 0.35, 0.2]


def test_those_who_are_hardly_ever_seen_together_are_not_told_apart():
    assert follow([(0.0, at(0.1, 0.7)), *[(float(t), at(0.1)) for t in range(1, 4)]], ["one", "two"]) is None
    assert follow([(0.0, at(0.1, 0.7)), *[(float(t), at(0.1)) for t in range(1, 3)]], ["one", "two"]) is not None
    assert follow([], ["one", "two"]) is None


# --- OWLv2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small random weights, and a tokenizer that knows letters."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("weights") / "owlv2-base-patch16-ensemble"
    write_owlv2(path)
    return path


def _scene(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 6, 8)).astype(np.uint8)
    return np.kron(coarse, np.ones((1, height // 6, width // 8), np.uint8))[:, :height, :width]


def test_the_top_box_of_each_prompt_is_that_of_transformers_own_processor(folder):
    pytest.importorskip("scipy")  # transformers needs it to prepare frames
    transformers = pytest.importorskip("transformers")
    detector = OWLv2Detector(weights=folder, batch=2)
    frames = [_scene(48, 96), _scene(90, 48, 1), _scene(60, 64, 2)]
    prompts = ["a violin", "a flute", "a person playing the violin"]
    scores, boxes = detector.best(frames, prompts)
    assert scores.shape == (3, 3)
    assert boxes.shape == (3, 3, 4)
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert len(np.unique(scores.round(5))) > 3
    model = transformers.Owlv2ForObjectDetection.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    text = tokenizer(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    processor = transformers.Owlv2ImageProcessorPil(size={"height": 64, "width": 64})
    for frame, score, box in zip(frames, scores, boxes, strict=True):
        ready = prepare_square(torch.from_numpy(frame), 64)[None]
        with torch.no_grad():
            output = model(**text, pixel_values=ready)
        height, width = frame.shape[1:]
        for k in range(len(prompts)):
            output_k = type(output)(logits=output.logits[..., k : k + 1], pred_boxes=output.pred_boxes)
            (all_,) = processor.post_process_object_detection(
                output_k, threshold=0.0, target_sizes=torch.tensor([[height, width]])
            )
            corners = all_["boxes"] / torch.tensor([width, height, width, height])
            inside = corners.clamp(0, 1)
            sides = (inside[:, 2:] - inside[:, :2]) * torch.tensor([width, height])
            chance = torch.where((sides >= 1).all(dim=1), all_["scores"], 0.0)
            best = int(chance.argmax())
            assert score[k] == pytest.approx(float(chance[best]), abs=1e-5)
            np.testing.assert_allclose(box[k], inside[best].numpy(), atol=1e-4)


@pytest.mark.parametrize("shape", [(300, 200), (64, 64), (50, 33), (97, 240)])
def test_frames_are_prepared_as_transformers_does_but_filled_up_with_grey(shape):
    pytest.importorskip("scipy")
    transformers = pytest.importorskip("transformers")
    processor = transformers.Owlv2ImageProcessorPil(size={"height": 64, "width": 64})
    from PIL import Image

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    frame = np.asarray(Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC)).copy()
    want = np.asarray(processor(frame, return_tensors="np")["pixel_values"])[0]
    channels = torch.from_numpy(frame.transpose(2, 0, 1).copy())
    got = prepare_square(channels, 64, fill=0.0).numpy()
    edge = 1 if max(shape) < 64 else 0  # enlarged, its outermost row is mirrored there and held here
    inner = slice(edge, 64 - edge)
    assert np.abs(got - want)[:, inner, inner].max() < 0.02
    grey = prepare_square(channels, 64).numpy()
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    if shape[0] > shape[1]:
        np.testing.assert_allclose(grey[:, 32, -1], (0.5 - mean) / std, atol=1e-5)


def test_frames_do_not_depend_on_those_beside_them(folder):
    frames = [_scene(48, 96), _scene(90, 48, 1), _scene(60, 64, 2)]
    one = OWLv2Detector(weights=folder, batch=1).best(frames, ["a violin", "a flute"])
    alone = OWLv2Detector(weights=folder, batch=3).best(frames, ["a flute"])
    np.testing.assert_allclose(one[0][:, 1], alone[0][:, 0], atol=1e-5)
    np.testing.assert_allclose(one[1][:, 1], alone[1][:, 0], atol=1e-4)


def test_several_boxes_of_a_prompt_are_apart_and_the_first_is_the_best(folder):
    detector = OWLv2Detector(weights=folder, batch=2)
    frames, prompts = [_scene(48, 96), _scene(90, 48, 1), _scene(60, 64, 2)], ["a violin", "a flute"]
    scores, boxes = detector.best(frames, prompts)
    found = detector.several(frames, prompts, 3, 0.0)
    for n in range(len(frames)):
        for k in range(len(prompts)):
            several = found[n][k]
            assert 1 <= len(several) <= 3
            assert several[0][0] == pytest.approx(scores[n, k])
            np.testing.assert_allclose(several[0][1], boxes[n, k], atol=1e-6)
            assert several == keep_apart(several, 3)
            assert [s for s, _ in several] == sorted((s for s, _ in several), reverse=True)
    assert max(len(of) for frame in found for of in frame) > 1
    assert detector.several(frames[:1], prompts, 3, 1.0) == [[[], []]]


def test_weights_that_are_not_there_or_are_of_something_else(folder, nowhere, tmp_path, monkeypatch):
    with pytest.raises(MissingWeightsError, match=r"hf download google/owlv2-base-patch16-ensemble .*AVSEP_WEIGHTS"):
        OWLv2Detector()
    monkeypatch.setenv("AVSEP_WEIGHTS", str(folder.parent))
    assert OWLv2Detector().size == 64
    bare = shutil.copytree(folder, tmp_path / "bare")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(CheckpointError, match=r"bare has no readable tokenizer .*hf download"):
        OWLv2Detector(weights=bare)
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        OWLv2Detector(weights=broken)
    with pytest.raises(ValueError, match="batch"):
        OWLv2Detector(weights=folder, batch=0)


# --- boxes over time --------------------------------------------------------------------------------------------------


def test_a_box_holds_until_the_next_of_its_class(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"1": {"a": LEFT, "b": RIGHT}, "2.5": {"a": RIGHT}, "0.5": {"b": [-0.01, 0, 1.02, 1]}}))
    track = read_boxes(path)
    assert set(track.classes) == {"a", "b"}
    assert [track.at("a", t) for t in (0.0, 1.0, 2.49, 2.5, 99.0)] == [LEFT, LEFT, LEFT, RIGHT, RIGHT]
    assert [track.at("b", t) for t in (0.0, 0.7, 1.0)] == [(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0), RIGHT]
    assert track.rules("a") == {"given": 2}
    path.write_text(track.as_json())
    again = read_boxes(path)
    assert [again.at(c, t) for c in "ab" for t in (0, 1, 3)] == [track.at(c, t) for c in "ab" for t in (0, 1, 3)]


def test_what_does_not_change_is_written_once():
    found = [(float(t), Found(LEFT if t < 3 else RIGHT, 0.5, "a violin")) for t in range(5)]
    assert json.loads(BoxTrack({"violin": found}).as_json()) == {
        "0": {"violin": list(LEFT)},
        "3": {"violin": list(RIGHT)},
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not valid JSON"),
        ("[]", "holds no boxes"),
        ("{}", "holds no boxes"),
        ('{"0": {}}', "holds no boxes"),
        ('{"first": {"a": [0, 0, 1, 1]}}', "'first' is not a second"),
        ('{"-1": {"a": [0, 0, 1, 1]}}', "'-1' is not a second"),
        ('{"0": [0, 0, 1, 1]}', "'0' is not a second with its boxes"),
        ('{"0": {"a": [0, 0, 1]}}', r"box of 'a' at 0 s is \[0, 0, 1\]"),
        ('{"0": {"a": "left"}}', "write .left, top"),
        ('{"0": {"a": [10, 20, 300, 200]}}', "lies outside the frame: give fractions"),
        ('{"0": {"a": [0.5, 0, 0.5, 1]}}', "is empty"),
        ('{"0": {"a": [0, NaN, 1, 1]}}', "is not valid JSON"),
    ],
)
def test_boxes_that_are_none(text, told, tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(DataError, match=told) as caught:
        read_boxes(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read_boxes(tmp_path / "no.json")
