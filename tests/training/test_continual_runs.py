"""Every strategy over two tiny tasks: killed and resumed, with and without memory, and what its terms change."""

from __future__ import annotations

import functools

import pytest
import torch

from avsep.errors import ConfigError
from avsep.separator import load_separator
from avsep.strategies.teaching import reestimate_batch_norm
from support.continual_runs import differing, first_task, make_learner, resume_killed, trained, weights
from support.tones import stream_of

MEMORIES = ("none", "random_per_class")
GROWN = ("lwf", {"variant": "grown_teacher"})
WITHOUT_FUSION_LOSS = ("ewf", {"distillation": 0.0})
DERPP = ("derpp", {"per_class": 2, "batch_size": 2})
SPAN = ("slot_span", {"mixtures": 16})
REFERENCE = ("reference", {"mixtures": 16})
TRANSLATED = ("slot_span", {"mixtures": 16, "conditioning": "translated"})
SURGERY = ["gated_distillation", "grad_surgery"]
RELATIONS = ("prototype_relations", {"mixtures": 16})
UNGATED = ("gated_distillation", {"gate": False})
# strategies that are to go on after a kill as if nothing had happened, where they run at all
RESUMED = [
    *((name, memory) for name in ("finetune", "contavsep", "lwf", "query_extension") for memory in MEMORIES),
    (GROWN, "none"),
    (("ewf", {"reestimate_batch_norm": True}), "none"),
    (("contavsep", {"instance": "features", "modality_pairs": "within"}), "random_per_class"),
    ("avcil", "random_per_class"),
    (DERPP, "none"),
    (TRANSLATED, "random_per_class"),
    pytest.param(("l2_anchor", {"weight": 1.0}), "none", marks=pytest.mark.slow),
    (("gated_anchor", {"samples": 2, "weight": 10.0}), "none"),
    pytest.param(("mas", {"samples": 2, "weight": 1e3}), "none", marks=pytest.mark.slow),
    (("si", {"weight": 1e3}), "none"),
    pytest.param("feature_distillation", "none", marks=pytest.mark.slow),
    (("slow_learner", {"factor": 0.1}), "random_per_class"),
    pytest.param(("first_session", {"adapt": "film"}), "none", marks=pytest.mark.slow),
    pytest.param(
        ("weight_average", {"every": 1, "decay": 0.5, "batch_norm_mixtures": 4}), "none", marks=pytest.mark.slow
    ),
    (("perturb_and_merge", {"fisher_samples": 3, "perturbation": 0.5}), "none"),
    (("magmax", {"batch_norm_mixtures": 0}), "none"),
    pytest.param(("low_rank_step", {"rank": 1, "batch_norm_mixtures": 0}), "none", marks=pytest.mark.slow),
    pytest.param("shrink_and_perturb", "none", marks=pytest.mark.slow),
    pytest.param([("magmax", {}), ("perturb_and_merge", {"fisher_samples": 3})], "none", marks=pytest.mark.slow),
    pytest.param([("si", {"weight": 1e3}), ("lwf", {})], "random_per_class", marks=pytest.mark.slow),
    (SURGERY, "random_per_class"),
    (RELATIONS, "none"),
    pytest.param("gated_distillation", "random_per_class", marks=pytest.mark.slow),
    pytest.param(SPAN, "none", marks=pytest.mark.slow),
    pytest.param(REFERENCE, "none", marks=pytest.mark.slow),
    pytest.param("topology", "none", marks=pytest.mark.slow),
]
ON_EVERY_SEPARATOR = [
    pytest.param("lwf", "none", marks=pytest.mark.slow),
    pytest.param("ewf", "random_per_class", marks=pytest.mark.slow),
    pytest.param("avcil", "random_per_class", marks=pytest.mark.slow),
    pytest.param(("l2_anchor", {"weight": 1.0}), "none", marks=pytest.mark.slow),
    pytest.param(("mas", {"samples": 2, "weight": 1e3}), "none", marks=pytest.mark.slow),
    pytest.param(("si", {"weight": 1e3}), "none", marks=pytest.mark.slow),
    pytest.param("feature_distillation", "none", marks=pytest.mark.slow),
    pytest.param("slow_learner", "none", marks=pytest.mark.slow),
    pytest.param(("perturb_and_merge", {"fisher_samples": 3}), "none", marks=pytest.mark.slow),
    pytest.param("magmax", "none", marks=pytest.mark.slow),
    pytest.param(("low_rank_step", {"rank": 1}), "none", marks=pytest.mark.slow),
    pytest.param("shrink_and_perturb", "random_per_class", marks=pytest.mark.slow),
    ("contavsep", "random_per_class"),
    pytest.param("gated_distillation", "random_per_class", marks=pytest.mark.slow),
    pytest.param(DERPP, "random_per_class", marks=pytest.mark.slow),
    pytest.param(SPAN, "none", marks=pytest.mark.slow),
    pytest.param(REFERENCE, "none", marks=pytest.mark.slow),
    pytest.param("topology", "none", marks=pytest.mark.slow),
    pytest.param(RELATIONS, "none", marks=pytest.mark.slow),
    pytest.param(SURGERY, "random_per_class", marks=pytest.mark.slow),
    pytest.param(TRANSLATED, "random_per_class", marks=pytest.mark.slow),
]
# (strategy, without its term, memory): both begin with the same first task
REGULARISERS = [
    ("lwf", "finetune", "none"),
    ("lwf", "finetune", "random_per_class"),
    (GROWN, "finetune", "none"),
    ("ewf", WITHOUT_FUSION_LOSS, "none"),
    (WITHOUT_FUSION_LOSS, "finetune", "random_per_class"),
    ("contavsep", ("contavsep", {"weight_mask": 0.0}), "random_per_class"),
    ("avcil", ("avcil", {"weight_mask": 0.0}), "random_per_class"),
    ("avcil", ("avcil", {"weight_attention": 0.0}), "random_per_class"),
    ("gated_distillation", "finetune", "random_per_class"),
    pytest.param("gated_distillation", UNGATED, "random_per_class", marks=pytest.mark.slow),
    pytest.param(DERPP, (DERPP[0], {**DERPP[1], "alpha": 0.0}), "none", marks=pytest.mark.slow),
    pytest.param(DERPP, (DERPP[0], {**DERPP[1], "beta": 0.0}), "none", marks=pytest.mark.slow),
    (DERPP, "finetune", "none"),
    (SPAN, "finetune", "none"),
    (REFERENCE, SPAN, "none"),
    (TRANSLATED, "finetune", "random_per_class"),
    (SURGERY, "gated_distillation", "random_per_class"),
    ("topology", "finetune", "none"),
    (RELATIONS, "finetune", "none"),
]
# with every weight at 0 these are fine-tuning
SWITCHED_OFF = [
    (("contavsep", {"weight_instance": 0.0, "weight_class": 0.0, "weight_mask": 0.0}), "none"),
    (("lwf", {"weight_mask": 0.0}), "none"),
    *(
        pytest.param(one, memory, marks=pytest.mark.slow)
        for one, memory in (
            (("gated_distillation", {"weight": 0.0}), "random_per_class"),
            ((DERPP[0], {**DERPP[1], "alpha": 0.0, "beta": 0.0}), "none"),
            (("slot_span", {"weight": 0.0}), "none"),
            (("topology", {"weight": 0.0}), "none"),
            (("prototype_relations", {"weight": 0.0}), "none"),
            ("grad_surgery", "none"),  # there is one term alone
        )
    ),
    (
        ("avcil", {"weight_instance": 0.0, "weight_class": 0.0, "weight_mask": 0.0, "weight_attention": 0.0}),
        "random_per_class",
    ),
]


@pytest.fixture(autouse=True)
def _few_mixtures_for_batch_norm(monkeypatch):
    few = functools.partial(reestimate_batch_norm, mixtures=16)
    monkeypatch.setattr("avsep.strategies.weight_fusion.reestimate_batch_norm", few)


@pytest.mark.parametrize(("strategy", "memory"), RESUMED)
def test_a_killed_run_goes_on_to_the_same_weights(strategy, memory, tone_store):
    run = trained(tone_store, strategy, memory)
    resumed = resume_killed(tone_store, run, strategy, memory)
    assert differing(weights(run), weights(resumed)) == []


@pytest.mark.parametrize("separator", ["coseparation", "sound_of_pixels"])
@pytest.mark.parametrize(("strategy", "memory"), ON_EVERY_SEPARATOR)
def test_it_acts_and_resumes_on_every_base_separator(strategy, memory, separator, tone_store):
    run = trained(tone_store, strategy, memory, separator=separator)
    resumed = resume_killed(tone_store, run, strategy, memory, separator=separator)
    assert differing(weights(run), weights(resumed)) == []
    plain = trained(tone_store, "finetune", memory, separator=separator)
    changed = differing(weights(run), weights(plain))
    assert any(name.startswith("audio_encoder") for name in changed)
    assert any(name.startswith("mask_decoder") for name in changed)


@pytest.mark.parametrize("separator", ["iquery_causal", pytest.param("iquery_self", marks=pytest.mark.slow)])
def test_a_run_with_hidden_queries_goes_on_after_a_kill(separator, tone_store):
    run = trained(tone_store, "lwf", "none", separator=separator)
    resumed = resume_killed(tone_store, run, "lwf", "none", separator=separator)
    assert differing(weights(run), weights(resumed)) == []
    sizes = (2, 2) if separator == "iquery_causal" else ()
    assert load_separator(run).spec.task_sizes == load_separator(resumed).spec.task_sizes == sizes


def test_query_extension_is_refused_where_classes_have_no_queries(tone_store, tmp_path):
    stream = stream_of(tone_store)
    for separator, decoder in (("coseparation", "conditioned_unet"), ("sound_of_pixels", "channel_synthesizer")):
        with pytest.raises(ConfigError, match=f"mask decoder '{decoder}' has none: use query_transformer, or"):
            make_learner("query_extension", separator=separator).fit(stream, tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("strategy", "without", "memory"), REGULARISERS)
def test_a_regulariser_changes_the_weights(strategy, without, memory, tone_store):
    acts, idle = weights(trained(tone_store, strategy, memory)), weights(trained(tone_store, without, memory))
    changed = differing(acts, idle)
    for part in ("audio_encoder", "object_encoder", "mask_decoder"):
        assert any(name.startswith(part) for name in changed), part


@pytest.mark.parametrize("weight", ["weight_instance", "weight_class"])
@pytest.mark.parametrize(("strategy", "more"), [("contavsep", {}), ("avcil", {"contrast_first": True})])
def test_a_contrastive_term_changes_the_first_task_already(strategy, more, weight, tone_store):
    acts, idle = (weights(first_task(tone_store, (strategy, s)), 0) for s in (more, {**more, weight: 0.0}))
    assert "mask_decoder.object_proj.weight" in differing(acts, idle)


@pytest.mark.parametrize(("strategy", "memory"), SWITCHED_OFF)
def test_with_every_term_off_it_is_fine_tuning(strategy, memory, tone_store):
    run, plain = trained(tone_store, strategy, memory), trained(tone_store, "finetune", memory)
    assert differing(weights(run), weights(plain)) == []


def test_fine_tuning_and_fusion_is_the_mean_of_the_two_endpoints(tone_store):
    """Two tasks of two classes: a = sqrt(1/2)."""
    plain = trained(tone_store, "finetune")
    old, new = weights(first_task(tone_store, "finetune"), 0), weights(plain)
    factor = 0.5**0.5
    for name, value in weights(trained(tone_store, WITHOUT_FUSION_LOSS)).items():
        if not value.is_floating_point():
            assert torch.equal(value, new[name])
        elif name == "mask_decoder.class_queries":
            torch.testing.assert_close(value[:2], (1 - factor) * old[name] + factor * new[name][:2])
            assert torch.equal(value[2:], new[name][2:])
        else:
            torch.testing.assert_close(value, (1 - factor) * old[name] + factor * new[name])
