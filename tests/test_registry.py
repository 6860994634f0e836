"""Registries: names, parameters, combinations, third-party packages, and how they are listed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from avsep.errors import ConfigError, UnknownNameError
from avsep.registry import MASK_DECODERS, REGISTRIES, VISUAL_ENCODERS, Component, Registry
from avsep.spec import TrainSpec, load_preset, validated


@pytest.fixture
def registry():
    registry = Registry("gadget", "gadgets", wiring=frozenset({"width"}))

    @registry.register("lamp", source="a paper")
    class Lamp(Component):
        """Lights up.

        And more.
        """

        needs = ("power",)
        provides = ("light",)

        def __init__(self, *, watts: int = 5, colour: str, width: int = 1) -> None:
            if watts < 0:
                raise ValueError(f"watts must not be negative, got {watts}")
            self.watts, self.colour, self.width = watts, colour, width

    return registry


def test_a_component_says_what_it_is(registry):
    spec = registry.get("lamp")
    assert (spec.kind, spec.name, spec.summary, spec.source) == ("gadget", "lamp", "Lights up.", "a paper")
    assert [str(p) for p in spec.settings] == ["watts=5", "colour"]
    assert [p.name for p in spec.parameters if p.wiring] == ["width"]
    assert (spec.needs, spec.provides) == ({"power"}, {"light"})


def test_create_passes_parameters_and_the_wiring_it_takes(registry):
    lamp = registry.create("lamp", {"colour": "red"}, width=7, height=9)
    assert (lamp.watts, lamp.colour, lamp.width) == (5, "red", 7)


@pytest.mark.parametrize(
    ("name", "params", "error", "message"),
    [
        ("lampe", {}, UnknownNameError, r"no gadget named 'lampe': did you mean 'lamp'\? \(see: avsep list gadgets\)"),
        ("xyz", {}, UnknownNameError, "known: lamp"),
        ("lamp", {"colour": "red", "wats": 3}, UnknownNameError, r"no parameter 'wats': did you mean 'watts'\?"),
        ("lamp", {"colour": "red", "width": 3}, UnknownNameError, "no parameter 'width'"),
        ("lamp", {}, ConfigError, "gadget 'lamp' needs the parameter 'colour'"),
        ("lamp", {"colour": "red", "watts": -1}, ConfigError, "gadget 'lamp': watts must not be negative, got -1"),
    ],
)
def test_mistakes_name_the_way_out(registry, name, params, error, message):
    with pytest.raises(error, match=message):
        registry.create(name, params)


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="'lamp' is registered already, by"):
        registry.register("lamp")(registry.get("lamp").factory)


def test_what_cannot_be_listed_is_refused(registry):
    class Silent(Component):
        def __init__(self, *, a=1):
            pass

    class Positional(Component):
        """Does something."""

        def __init__(self, a=1):
            pass

    class Stranger:
        """Does something, but declares nothing."""

    with pytest.raises(ValueError, match="docstring"):
        registry.register("silent")(Silent)
    with pytest.raises(TypeError, match="'a' must be keyword-only"):
        registry.register("positional")(Positional)
    with pytest.raises(
        TypeError, match=r"'stranger' must be a class .*registry\.Component.*'class Stranger\(Component\)"
    ):
        registry.register("stranger")(Stranger)
    with pytest.raises(TypeError, match=r"mask decoder 'gadget' must be .* avsep\.decoders\.base\.MaskDecoder"):
        MASK_DECODERS.register("gadget")(Positional)
    assert "gadget" not in MASK_DECODERS


@pytest.mark.parametrize("key", REGISTRIES)
def test_builtin_components_are_described(key):
    components = list(REGISTRIES[key])
    assert components
    for spec in components:
        assert spec.package == "avsep"
        assert spec.summary.endswith(".") or len(spec.summary) > 10, spec.name
        assert all(p.annotation != "_empty" for p in spec.parameters), spec.name
        folder = sys.modules[spec.factory.__module__.rpartition(".")[0]]
        assert spec.factory.__name__ in getattr(folder, "__all__", [spec.factory.__name__]), spec.name
        assert spec.source or key in {"strategies", "memories"}, spec.name


def test_visual_encoders_say_what_they_give():
    for spec in VISUAL_ENCODERS:
        assert spec.provides
        assert spec.provides <= {"object", "motion"}


def run_python(code, path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result


def make_package(folder, name, code):
    (folder / f"{name}.py").write_text(textwrap.dedent(code))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[avsep.components]\n{name} = {name}\n")


def test_installed_packages_add_components_and_broken_ones_only_warn(tmp_path):
    make_package(
        tmp_path,
        "othershop",
        '''
        from avsep.encoders import VisualEncoder
        from avsep.registry import VISUAL_ENCODERS
        from avsep.types import VisualSource

        @VISUAL_ENCODERS.register("othershop_mean", source="elsewhere")
        class Mean(VisualEncoder):
            """Mean over frames."""

            provides = ("object",)
            dim = 3

            def __init__(self, *, frames: int = 2) -> None:
                super().__init__()
                self.frames = frames

            def source(self):
                return VisualSource(role="object", kind="frames", frames=self.frames)

            def forward(self, frames):
                return frames.float().mean(dim=(1, 3, 4)) / 255
        ''',
    )
    make_package(tmp_path, "brokenshop", "raise RuntimeError('out of order')")
    make_package(
        tmp_path,
        "oldshop",
        '''
        from torch import nn
        from avsep.registry import VISUAL_ENCODERS

        @VISUAL_ENCODERS.register("oldshop_mean")
        class Mean(nn.Module):
            """Mean over frames, without the base."""
        ''',
    )
    result = run_python(
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch, avsep
            parts = {"object_encoder": ("othershop_mean", {"frames": 4})}
            separator = avsep.build_separator("iquery_small", num_classes=2, **parts)
        assert any("brokenshop" in str(w.message) and "out of order" in str(w.message) for w in caught)
        assert separator.visual_sources()[0].frames == 4
        try:
            avsep.build_separator("iquery_small", num_classes=2, object_encoder="oldshop_mean")
        except avsep.errors.UnknownNameError as error:
            assert "oldshop_mean" in str(error) and "write 'class Mean(VisualEncoder):'" in str(error), error
            assert "\\n" not in str(error)
        else:
            raise AssertionError("built")
        spec = [s for s in avsep.list_components("visual_encoders") if s.name == "othershop_mean"][0]
        print(spec.package, spec.source)
        """,
        tmp_path,
    )
    assert result.stdout.split() == ["othershop", "elsewhere"]


def invoke(*arguments, capsys=None):
    from avsep.cli.list_command import command

    command(*arguments)
    return capsys.readouterr().out


def test_list_shows_every_component_and_preset(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = invoke(capsys=capsys)
    for key, registry in REGISTRIES.items():
        assert key in text
        assert all(name in text for name in registry.names())
    assert "iquery_small" in text
    assert "base_channels=64" in text
    assert "features (required)" in text
    assert "num_classes" not in text
    only = invoke("mask_decoders", capsys=capsys)
    assert "query_transformer" in only
    assert "unet7" not in only
    with pytest.raises(UnknownNameError, match="did you mean 'presets'"):
        invoke("preset", capsys=capsys)


def test_a_preset_takes_no_unknown_key(tmp_path):
    # a strategy in a preset would otherwise be left out in silence
    path = tmp_path / "mine.yaml"
    path.write_text("separator: {audio_encoder: unet7, mask_decoder: query_transformer}\nstrategy: finetune\n")
    with pytest.raises(
        UnknownNameError, match=r"mine\.yaml: unknown key 'strategy'.*separator, source, summary, train"
    ):
        load_preset(str(path))


def test_a_seed_below_zero_is_refused():
    with pytest.raises(ConfigError, match=r"seed = -1: .*greater than or equal to 0"):
        validated(TrainSpec, {"seed": -1}, "train")
