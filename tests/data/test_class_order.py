"""Orders of classes."""

from __future__ import annotations

import numpy as np
import pytest

from avsep.cli.train_command import command
from avsep.data.class_order import chain, class_order, class_vectors, cosine_distances
from avsep.data.store import Store, StoreWriter
from avsep.data.tasks import task_stream
from avsep.errors import ConfigError
from support.tones import RATE, TINY_FRONT_END, TINY_TASKS

DISTANCES = [[0, 0.1, 0.9, 0.8], [0.1, 0, 0.7, 0.9], [0.9, 0.7, 0, 0.2], [0.8, 0.9, 0.2, 0]]


def test_chains_begin_in_the_middle():
    assert chain(DISTANCES, "near") == [1, 0, 2, 3]
    assert chain(DISTANCES, "far") == [1, 3, 0, 2]  # 0 and 2 are as far from 1 and 3: the first
    assert chain([[0.0]], "far") == [0]
    assert chain(np.zeros((3, 3)), "near") == [0, 1, 2]
    with pytest.raises(ValueError, match="square"):
        chain([[0.0, 1.0]], "near")


def test_distances_are_one_less_the_cosine():
    found = cosine_distances([[3.0, 4.0], [4.0, 3.0], [-6.0, -8.0], [0.0, 0.0]])
    np.testing.assert_allclose(found, [[0, 0.04, 2, 1], [0.04, 0, 1.96, 1], [2, 1.96, 0, 1], [1, 1, 1, 0]], atol=1e-12)


@pytest.fixture(scope="module")
def featured(tmp_path_factory):
    """Classes in one order by their features and in another by their sounds."""
    pitches, angles = {"a": 2000, "b": 500, "c": 250, "d": 1000}, {"a": 0.0, "b": 0.5, "c": 1.0, "d": 1.6}
    path = tmp_path_factory.mktemp("featured") / "store"
    with StoreWriter(path, classes=list(pitches), sample_rate_hz=RATE, origin={}) as writer:
        order = []
        for name in pitches:
            for split, far in (("train", 0.0), ("val", 3.0), ("test", 3.0)):
                rng = np.random.default_rng([ord(name), len(split)])
                band = np.fft.rfft(rng.standard_normal(RATE))
                hz = np.fft.rfftfreq(RATE, 1 / RATE)
                band *= np.exp(-(np.log2(np.maximum(hz, 1) / pitches[name]) ** 2))
                angle = angles[name] + far  # what is not trained on is no matter
                writer.write_clip(
                    f"{name}-{split}",
                    name,
                    split,
                    (0.003 * np.fft.irfft(band)).astype(np.float32),
                    object_frames=np.zeros((1, 3, 32, 32), np.uint8),
                    features={"clip": np.array([[np.cos(angle), np.sin(angle)]] * 2, np.float32)},
                )
                order.append(f"{name}-{split}")
        writer.finish(order, roles={"clip": "object"})
    return Store.open(path)


def test_classes_are_compared_by_what_the_store_has(featured, store):
    np.testing.assert_allclose(class_vectors(featured, "clip")[1], [np.cos(0.5), np.sin(0.5)], atol=1e-6)
    # 1 - cos of the angles' differences: c is in the middle (.757 in all, b .791); a is .29 from c and b, d .36
    assert class_order(featured, "near") == class_order(featured, "near:clip") == ("c", "b", "a", "d")
    assert class_order(featured, "far") == ("c", "a", "d", "b")
    octave = {"c": 0, "b": 1, "d": 2, "a": 3}  # by sound
    for kind, apart in (("near", 1), ("far", 2)):
        first, second, *_ = (octave[name] for name in class_order(featured, f"{kind}:spectrum"))
        assert (first in (1, 2), abs(first - second)) == (True, apart)
    assert store.features == {}
    assert class_order(store, "near") == class_order(store, "near:spectrum")
    assert sorted(class_order(store, "far")) == sorted(store.classes)


def test_random_orders_go_by_their_seed(store):
    orders = {class_order(store, f"random:{seed}") for seed in range(8)}
    assert len(orders) > 4
    assert class_order(store, "random:3") == class_order(store, "random:3")
    assert all(sorted(order) == sorted(store.classes) for order in orders)
    assert class_order(store) == class_order(store, "store") == store.classes


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("nearest", "no order of classes 'nearest': did you mean 'near'"),
        ("store:1", "no order of classes 'store:1'"),
        ("random", "'random' has no seed: write it as random:1"),
        ("random:x", "has no seed"),
        ("far:clip", "has no object features 'clip' to compare its classes by: it has spectrum"),
    ],
)
def test_other_orders_are_refused(store, order, reason):
    with pytest.raises(ConfigError, match=reason):
        class_order(store, order)


def test_tasks_are_cut_from_the_order(store):
    length = TINY_FRONT_END["clip_samples"]
    stream = task_stream(store, 2, order="random:1", clip_samples=length)
    assert stream.tasks[1].seen == class_order(store, "random:1")
    with pytest.raises(ConfigError, match="order 'near' applies only where tasks are given as a number"):
        task_stream(store, TINY_TASKS, order="near", clip_samples=length)


def test_the_command_takes_an_order_for_a_new_run_alone(store, tone_run, tmp_path, monkeypatch):
    class Context:
        obj = ()

    asked = []
    monkeypatch.setattr("avsep.data.tasks.task_stream", lambda *a, **k: asked.append(k["order"]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(Context, store.path, out=tmp_path / "run", order="far", classes_per_task=2)
    assert asked == ["far"]
    with pytest.raises(ConfigError, match="leave --order out"):
        command(Context, store.path, out=tmp_path / "run", order="far", tasks="ding,hum;peep,whirr")
    with pytest.raises(ConfigError, match="leave --order out to resume"):
        command(Context, store.path, out=tone_run, order="far", resume=True)
