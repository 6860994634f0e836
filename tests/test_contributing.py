"""The examples of CONTRIBUTING.md, all in one training."""

from __future__ import annotations

import csv
import re

import pytest
import torch

from avsep.registry import REGISTRIES, load_components
from support.source_tree import ROOT
from support.tones import TINY_SEPARATOR, TINY_TASKS, TINY_TRAIN, stream_of

GUIDE = ROOT / "CONTRIBUTING.md"
pytestmark = pytest.mark.skipif(not GUIDE.is_file(), reason="needs the source tree")

# section -> the registry that its example adds to
ADDS = {
    "An audio encoder": "audio_encoders",
    "A mask decoder": "mask_decoders",
    "An adapter": "adapters",
    "A strategy": "strategies",
    "A mixer": "mixers",
    "A memory policy": "memories",
}


def examples():
    """The Python of every section, by its heading."""
    sections = re.split(r"^#+ (.+)$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for heading, text in zip(sections[::2], sections[1::2], strict=True):
        if code := "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)):
            found[heading] = code
    return found


@pytest.fixture
def registered(monkeypatch):
    """The names that the examples register, by registry; they are gone afterwards."""
    load_components()
    before = {key: set(registry._components) for key, registry in REGISTRIES.items()}
    for registry in REGISTRIES.values():
        monkeypatch.setattr(registry, "_components", dict(registry._components))
    for heading, code in examples().items():
        exec(compile(code, f"CONTRIBUTING.md, {heading}", "exec"), {"__name__": "somebodys_package"})
    return {key: sorted(set(r._components) - before[key]) for key, r in REGISTRIES.items()}


def test_every_section_has_an_example_that_adds_one_component(registered):
    assert set(examples()) == {*ADDS, "A kernel"}
    assert {key: len(names) for key, names in registered.items() if names} == dict.fromkeys(ADDS.values(), 1)
    for key, (name,) in ((key, names) for key, names in registered.items() if names):
        assert REGISTRIES[key].get(name).summary.endswith(".")


def test_the_examples_learn_two_tasks_together(registered, tone_store, tmp_path):
    from avsep.memory.base import read_exemplars
    from avsep.spec import RunSpec, validated
    from avsep.training.learner import ContinualLearner

    name = {key: names[0] for key, names in registered.items() if names}
    separator = {
        "audio_encoder": name["audio_encoders"],
        "mask_decoder": name["mask_decoders"],
        "front_end": TINY_SEPARATOR["front_end"],
    }
    spec = validated(
        RunSpec,
        {
            "separator": separator,
            "strategy": name["strategies"],
            "memory": name["memories"],
            "train": {**TINY_TRAIN, "mixer": name["mixers"]},
            "tasks": TINY_TASKS,
        },
        "test",
    )
    stream = stream_of(tone_store)
    ContinualLearner.from_spec(spec, accelerator="cpu").fit(stream, tmp_path / "run", progress=False)
    with open(tmp_path / "run" / "logs" / "train.csv", newline="") as file:
        second = [row for row in csv.DictReader(file) if row["task"] == "1"]
    assert second
    assert any(float(row["same_masks"] or 0) > 0 for row in second)  # sources of the first task were drawn
    assert sorted(read_exemplars(tmp_path / "run", 1)) == sorted(TINY_TASKS[0])


def test_the_adapter_changes_what_sources_of_its_task_get(registered):
    from dataclasses import replace

    from avsep.separator import build_separator
    from support.components import random_batch

    separator = build_separator(**TINY_SEPARATOR, adapter=registered["adapters"][0], classes=("a", "b"), seed=1).eval()
    separator.grow(3, ("a", "b", "c"))
    batch = replace(random_batch(separator), class_ids=torch.tensor([[0, 2], [2, 1]]))
    found = []
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for parameter in separator.adapters()[0].newest():
                parameter.fill_(factor)
            found.append(separator.predict(batch).output.logits)
    changed = (found[0] != found[1]).flatten(2).any(dim=2)
    assert changed.tolist() == [[False, True], [True, False]]
