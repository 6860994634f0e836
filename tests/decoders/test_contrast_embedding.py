"""What CrossSDC is given of f_a: masks stay as they are, and the contrast's gradient goes where it is said to."""

from __future__ import annotations

import pytest
import torch

from avsep.errors import ConfigError
from avsep.registry import STRATEGIES
from avsep.separator import build_separator
from avsep.spec import load_preset
from support.strategy_steps import make_step, student_and_teacher, with_teacher
from support.tones import TINY_SEPARATOR

KINDS = ("shared", "detached", "projected")


def reached(kind):
    """The parameters with a gradient of CrossSDC's terms, and their sum."""
    settings = {**TINY_SEPARATOR["mask_decoder"]["params"], "contrast_embedding": kind}
    decoder = {**TINY_SEPARATOR["mask_decoder"], "params": settings}
    student, teacher = student_and_teacher(mask_decoder=decoder)
    step = make_step(student)
    terms = STRATEGIES.create("contavsep").loss(with_teacher(step, teacher))
    total = terms["instance"] + terms["class"]
    named = dict(student.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {n for n, g in zip(named, found, strict=True) if g is not None and g.abs().sum() > 0}, step


def test_the_contrast_reaches_what_the_kind_says():
    (shared, one), (detached, two), (projected, three) = (reached(kind) for kind in KINDS)
    hears = {"audio_encoder.down.0.weight", "mask_decoder.norm.weight"}
    assert hears <= shared
    assert not hears & detached
    assert hears <= projected
    assert "mask_decoder.object_proj.weight" in shared & detached & projected  # the visual side learns in each
    assert "mask_decoder.contrast.layers.0.weight" in projected
    torch.testing.assert_close(one.output.logits, two.output.logits)  # the masks are the same
    torch.testing.assert_close(one.output.audio, two.output.audio)
    assert three.output.audio.shape == one.output.audio.shape


@pytest.mark.parametrize("preset", ["iquery_small", "aligned_small"])
def test_a_separator_has_other_parameters_only_where_it_projects(preset):
    parts = load_preset(preset)["separator"]
    names = {}
    for kind in KINDS:
        decoder = {**parts["mask_decoder"], "params": {**parts["mask_decoder"]["params"], "contrast_embedding": kind}}
        torch.manual_seed(0)
        names[kind] = build_separator(**{**parts, "mask_decoder": decoder}, classes=("a", "b")).state_dict()
    plain = build_separator(**parts, classes=("a", "b")).state_dict()
    assert list(plain) == list(names["shared"]) == list(names["detached"])
    assert {n for n in names["projected"] if n not in plain} == {
        f"mask_decoder.contrast.layers.{i}.{what}" for i in (0, 2) for what in ("weight", "bias")
    }
    for name, value in names["shared"].items():
        assert torch.equal(value, names["detached"][name])


def test_another_kind_is_refused():
    parts = load_preset("iquery_small")["separator"]
    decoder = {**parts["mask_decoder"], "params": {"contrast_embedding": "detatched"}}
    with pytest.raises(ConfigError, match="must be one of shared, detached, projected, got 'detatched'"):
        build_separator(**{**parts, "mask_decoder": decoder}, classes=("a", "b"))
