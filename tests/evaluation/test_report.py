"""The report page: rendering from made-up numbers, gathering from a tiny run, and a look at it in a browser."""

from __future__ import annotations

import base64
import builtins
import html
import io
import json
import re
import shutil
import subprocess
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avsep.data.protocol import Protocol, TestMixture
from avsep.errors import AvsepError, MissingExtraError, RunError
from avsep.evaluation import report
from avsep.evaluation.drawing import Drawing, log_spectrogram
from avsep.evaluation.evaluate import evaluate_run
from avsep.evaluation.report import Series, pick_mixtures, render_report, write_report
from avsep.evaluation.yardsticks import rows_of_yardstick, sdr_by_task
from support.pages import Page
from support.reports import RATE, make_context

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def test_page_is_whole_and_needs_no_network():
    text = render_report(make_context())
    page = Page(text)
    assert not re.search(r"""(src|href)=["'](?!data:|\#)""", text)
    assert "@import" not in text
    assert "url(" not in text
    # a mixture, two references and two estimates of each, twice
    assert len(page.all("audio")) == 2 * (1 + 2 + 4)
    for image in page.all("img"):
        assert image["alt"]
        assert image["src"].startswith("data:image/")
    for chart in page.all("svg"):
        assert chart["role"] == "img"
        assert chart["aria-label"]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in page.all("a"):
        assert attrs["href"][1:] in ids
    assert all(attrs["aria-labelledby"] in ids for _, attrs in page.elements if "aria-labelledby" in attrs)


def test_it_opens_with_the_question_one_mixture_and_three_players():
    context = make_context(mixtures=7)
    alike = [replace(s, class_name=name, task=0) for s, name in zip(context.mixtures[1].sources, "ab", strict=True)]
    context = replace(
        context, mixtures=[context.mixtures[0], replace(context.mixtures[1], sources=alike, title="a+b<")]
    )
    for names in (("one",), ("one", "two <b>"), ("one", "two", "three")):
        of_runs = make_context(names, mixtures=7)
        text = render_report(of_runs)
        head, _, rest = text.partition("<nav")
        assert f"<h1>{report.QUESTION}</h1>" in head
        assert report.QUESTION == "Does it still know its first instruments?"
        opened, _, more = head.partition("<details>")
        assert opened.count("<audio") == 3
        assert text.count("<audio") == 7 * (1 + 2 * (1 + len(names)))  # none is there twice
        assert more.count("<audio") == 2 * (1 + len(names)) - 2
        assert "<b>flute</b>" in opened
        assert rest.count('<article aria-labelledby="m') == 6
        assert rest.count('class="folded"') == 3  # four in all are open
        Page(text)
    text = render_report(context)
    assert report.opening_of(context).mixture.title == "a+b<"  # of first instruments alone
    assert "a+b&lt;" in text.partition("<nav")[0]
    for plain in (
        replace(context, runs=[replace(run, finished=1) for run in context.runs]),
        replace(context, mixtures=[replace(m, warning="W.") for m in context.mixtures]),
        replace(context, mixtures=[]),
    ):
        assert report.opening_of(plain) is None
        assert "<h1>contavsep against" in render_report(plain)


def test_text_is_escaped_and_numbers_are_shown():
    text = render_report(make_context())
    assert "finetune &lt;b&gt;" in text
    assert "finetune <b>" not in text
    assert ">5.0 dB<" in text  # forgetting of the second run
    assert "electric bass" in text
    assert ">nan" not in text.lower()


def test_sounds_are_16_bit_at_the_rate_and_share_one_volume():
    context = make_context(mixtures=1)
    page = Page(render_report(context))
    view = context.mixtures[0]
    peak = max(np.abs(s).max() for s in (view.mixture.audio, *(x.reference.audio for x in view.sources)))
    with wave.open(io.BytesIO(base64.b64decode(page.all("audio")[0]["src"].partition(",")[2]))) as file:
        assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (RATE, 2, 1)
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    np.testing.assert_allclose(pcm, view.mixture.audio * 0.9 / peak, atol=1e-4)


def test_a_spectrogram_shows_a_tone_at_its_pitch():
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    level = log_spectrogram(tone, RATE)[:, 5:-5]
    rows_hz = np.geomspace(50, RATE / 2, len(level))
    assert rows_hz[level.mean(axis=1).argmax()] == pytest.approx(1000, rel=0.05)
    assert level.max() == pytest.approx(20 * np.log10(0.5), abs=1.6)


def test_images_stand_with_low_rows_at_the_bottom():
    from PIL import Image

    values = np.zeros((8, 4))
    values[0] = 1
    address = Drawing(RATE).mask(values)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")).astype(int)
    assert pixels.shape == (8, 4, 3)
    assert pixels[-1].sum() > pixels[0].sum()


@pytest.mark.parametrize("bare", ["no evaluation", "no logs", "no mixtures", "no pictures"])
def test_what_is_missing_is_said_or_left_out(bare):
    context = make_context()
    if bare == "no evaluation":
        context = replace(context, runs=[replace(r, evaluation=None) for r in context.runs])
        assert "avsep evaluate run-0" in render_report(context)
    if bare == "no logs":
        context = replace(context, runs=[replace(r, losses=(), validation=None) for r in context.runs])
        assert "no training logs" in render_report(context)
    if bare == "no mixtures":
        assert ">Listen<" not in render_report(replace(context, mixtures=[]))
    if bare == "no pictures":
        view = context.mixtures[0]
        sources = [replace(s, pictures=None, ideal_mask=None, mixture_sdr=None) for s in view.sources]
        text = render_report(replace(context, mixtures=[replace(view, sources=sources, warning="W.")]))
        assert 'class="pictures"' not in text
    Page(render_report(context))


def test_line_chart_places_points_and_survives_flat_or_empty_curves():
    chart = report.line_chart([Series("a<", [0, 1, 2], [1.0, float("nan"), 3.0])], title="t", x_label="x", y_label="y")
    points = re.search(r'points="([^"]*)"', chart)[1].split()
    assert len(points) == 2
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points)
    assert x0 < x1
    assert y0 > y1  # downwards is less
    assert "a&lt;" in chart
    assert report.line_chart([Series("a", [], [])], title="t", x_label="x", y_label="y") == ""
    assert "polyline" in report.line_chart([Series("a", [1], [5.0])], title="t", x_label="x", y_label="y")


def test_mixtures_are_picked_evenly_by_place_and_never_degenerate():
    def mixture(name, k, degenerate=""):
        return TestMixture((f"{name}{k}", "z"), ("a", "b"), (0, 0), 0, name, degenerate)

    lists = [mixture("one", k) for k in range(9)] + [mixture("two", k) for k in range(2)]
    lists += [mixture("one", 99, "self")]
    picked = pick_mixtures(lists, 7)
    assert [m.clips[0] for m in picked] == ["one0", "one2", "one4", "one6", "one8", "two0", "two1"]
    assert pick_mixtures(lists, 3) == pick_mixtures(lists, 3)
    assert len(pick_mixtures(lists, 100)) == 11
    assert pick_mixtures([], 5) == []


def test_pages_stay_small():
    assert report._fitting(65535, 2, 1) >= 12
    assert report._fitting(65535, 2, 2) >= 12
    assert 5 <= report._fitting(32767, 2, 2, 6 * 10**6) <= 8  # the demo's
    for runs in (1, 2, 3, 6):
        count = report._fitting(65535, 2, runs)
        sounds = count * (1 + 2 * (1 + runs)) * 2 * 65280 * 4 / 3
        assert sounds < 24e6


def test_a_page_is_no_larger_than_it_may_be(scored_run, tmp_path, monkeypatch):
    whole = write_report(scored_run, tmp_path / "page.html", mixtures=3)
    assert "left out" not in whole.read_text("utf-8")
    monkeypatch.setattr(report, "_fitting", lambda *_: 3)  # an estimate that is too low
    most = whole.stat().st_size - 1000
    small = write_report(scored_run, tmp_path / "small.html", mixtures=3, most_bytes=most)
    assert small.stat().st_size <= most
    assert "1 more mixtures were left out" in small.read_text("utf-8")


def test_curves_of_several_tasks_follow_one_another(tmp_path):
    (tmp_path / "train.csv").write_text(
        "task,epoch,step,loss,separation,cross,lr,seconds\n0,0,1,3,3,,0.1,1\n0,0,2,2,2,,0.1,2\n1,0,1,5,4,1,0.1,3\n1,0,"
    )
    (tmp_path / "validation.csv").write_text("task,epoch,step,sdr_db\n0,1,2,4.5\n1,1,1,3.5\n")
    losses, validation, boundaries = report._curves(tmp_path)
    assert boundaries == [2, 3]
    assert {s.name: (s.x, s.y) for s in losses} == {
        "loss": ([1, 2, 3], [3, 2, 5]),
        "separation": ([1, 2, 3], [3, 2, 4]),
        "cross": ([3], [1]),
    }
    assert (validation.x, validation.y) == ([2, 3], [4.5, 3.5])
    assert report._curves(tmp_path / "nothing") == ([], None, [])


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_names_the_extra(monkeypatch, package):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtraError, match=r"avsep\[report\]"):
        write_report("anywhere")


# --- from runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored_run(tone_run, tmp_path_factory) -> Path:
    run = shutil.copytree(tone_run, tmp_path_factory.mktemp("report") / "first")
    evaluate_run(run)
    return run


def test_a_run_and_its_comparison_on_one_page(scored_run, tmp_path):
    other = shutil.copytree(scored_run, tmp_path / "second")
    (other / "evaluation.json").unlink()
    steps = []
    page = write_report(
        scored_run, tmp_path / "page.html", mixtures=3, compare=[other], progress=lambda *s: steps.append(s)
    )
    assert steps[-1] == (6, 6)
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert len(parsed.all("audio")) == 3 * (1 + 2 + 4)
    assert "contavsep + random per class (first)" in text
    assert "avsep evaluate second" in text
    assert any("shown to the separator" in image["alt"] for image in parsed.all("img"))
    assert "polyline" in text
    assert write_report(scored_run, mixtures=1) == scored_run / "report.html"


def test_settings_say_what_the_training_was_and_tasks_count_from_0(scored_run, tmp_path):
    import yaml

    run = shutil.copytree(scored_run, tmp_path / "run")
    spec = yaml.safe_load((run / "run.yaml").read_text())
    spec["train"] |= {
        "steps_per_epoch": 77,
        "precision": "16-mixed",
        "gradient_clip": 2.5,
        "partner": "different_class",
    }
    spec["train"]["audio"] = {"name": "adam", "lr": 3e-4, "schedule": "step", "milestones": [31, 51], "gamma": 0.1}
    spec["train"]["decoder"] |= {"weight_decay": 1e-4}
    (run / "run.yaml").write_text(yaml.safe_dump(spec))
    text = html.unescape(write_report(run, tmp_path / "page.html", mixtures=1).read_text(encoding="utf-8"))
    for part in (
        "2 epochs a task of at most 77 batches of 2 mixtures, seed 1234",
        "partner different_class, crop any, gain 0.5 to 1.5",
        "current clips ×4, exemplars ×8",
        "0.0003, adam, step (×0.1 at epoch 31, 51)",
        "0.001, adamw, one cycle, weight decay 0.0001",
        "clipped to a norm of 2.5",
        "16-mixed",
        f"fixed version 1 ({Protocol.load(run / 'protocol.json').hash[:12]})",
        "Tasks count from 0",
        "learned in task 0",
        ">on task 0<",
        ">after task 1<",
    ):
        assert part in text, part
    assert "task 2" not in text


def test_yardsticks_and_other_pictures_are_on_the_page(scored_run, tmp_path):
    run = shutil.copytree(scored_run, tmp_path / "run")
    evaluation = evaluate_run(run, dependence=2)
    text = html.unescape(write_report(run, tmp_path / "page.html", mixtures=2).read_text(encoding="utf-8"))
    shown = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r'data:[^"]*', "", text)))
    lines = {name: " ".join(f"{v:.1f}" for v in line) for name, line in sdr_by_task(evaluation).items()}
    for name, numbers in lines.items():
        assert f"{name} {numbers}" in shown
    row = next(r for r in rows_of_yardstick(evaluation, "static filter") if (r["mixture"], r["source"]) == (0, 0))
    assert f"static filter: {row['sdr']:+.1f} dB".replace("-", "−") in shown
    assert "better than a fixed filter by" in shown
    assert "Does it look?" in shown
    plain = json.loads((run / "evaluation.json").read_text())
    del plain["yardsticks"], plain["visual_dependence"]  # as version 0.1 wrote it
    (run / "evaluation.json").write_text(json.dumps(plain))
    text = write_report(run, tmp_path / "page.html", mixtures=1).read_text(encoding="utf-8")
    assert "Does it look?" not in text
    assert "better than a fixed filter by" not in text


def test_mixtures_with_roles_can_be_heard(tone_store, tone_run, tmp_path, monkeypatch):
    from avsep.data.tasks import task_stream
    from avsep.separator import Separator
    from support.tones import TINY_FRONT_END, TINY_TASKS

    run = shutil.copytree(tone_run, tmp_path / "run")
    stream = task_stream(tone_store, TINY_TASKS, protocol="audiovisual", clip_samples=TINY_FRONT_END["clip_samples"])
    stream.protocol.save(run / "protocol.json")
    text = write_report(run, tmp_path / "page.html", mixtures=12).read_text(encoding="utf-8")
    assert "not in the mixture, seen playing" in text
    assert "not in the mixture, seen at rest" in text
    assert "no picture" in text  # it keeps a mean picture of each class
    monkeypatch.setattr(Separator, "can_go_unseen", False)
    assert "no picture" not in write_report(run, tmp_path / "page.html", mixtures=12).read_text(encoding="utf-8")
    assert "ding + ding" in text
    assert ">nan" not in text.lower()


@pytest.mark.parametrize("what", ["weights", "tasks", "mixtures"])
def test_scores_of_something_else_are_not_shown(scored_run, tmp_path, what):
    run = shutil.copytree(scored_run, tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    if what == "weights":  # trained again since
        evaluation["after"][-1]["separator"] = "0" * 64
    elif what == "tasks":  # trained further since
        evaluation["after"].pop()
    else:
        evaluation["protocol_hash"] = "0" * 64
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = write_report(run, tmp_path / "page.html", mixtures=0).read_text(encoding="utf-8")
    assert "avsep evaluate run" in text
    assert "mean SDR over tasks" not in text
    assert "mean SDR over tasks" in write_report(scored_run, tmp_path / "page.html", mixtures=0).read_text("utf-8")


def test_a_protocol_without_mixtures_has_a_page(scored_run, tmp_path):
    run = shutil.copytree(scored_run, tmp_path / "run")
    protocol = Protocol.load(run / "protocol.json")
    Protocol(**{**vars(protocol), "mixtures": ()}).save(run / "protocol.json")
    assert ">Listen<" not in write_report(run, tmp_path / "page.html").read_text(encoding="utf-8")


def test_runs_tested_on_different_mixtures_are_not_compared(scored_run, tmp_path):
    other = shutil.copytree(scored_run, tmp_path / "second")
    protocol = Protocol.load(other / "protocol.json")
    Protocol(**{**vars(protocol), "mixtures": protocol.mixtures[1:]}).save(other / "protocol.json")
    with pytest.raises(RunError, match="cannot be compared"):
        write_report(scored_run, tmp_path / "page.html", compare=[other])
    assert not (tmp_path / "page.html").exists()


def test_mistakes_are_named(scored_run, tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        write_report(tmp_path)
    with pytest.raises(AvsepError, match="is a folder"):
        write_report(scored_run, tmp_path)


def test_command_writes_the_page(scored_run, tmp_path, capsys):
    from avsep.cli.report_command import command

    command(scored_run, compare=None, out=tmp_path / "p.html", mixtures=1, store=None, device="cpu")
    assert "report written to" in capsys.readouterr().out
    assert (tmp_path / "p.html").is_file()


# --- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message || "not loaded: " + event.target.tagName), true);
addEventListener("load", async () => {
  const sounds = [...document.querySelectorAll("audio")];
  for (const sound of sounds) {
    for (let i = 0; i < 100 && !(sound.duration > 0) && !sound.error; i++) {
      await new Promise((next) => setTimeout(next, 20));
    }
  }
  const view = document.querySelector(".player .view"), sound = document.querySelector("audio");
  const box = view.getBoundingClientRect();
  sound.play = () => Promise.resolve();
  view.dispatchEvent(new MouseEvent("click", {clientX: box.left + box.width / 2, bubbles: true}));
  const found = {
    errors,
    durations: sounds.map((s) => s.duration),
    seek: sound.currentTime / sound.duration,
    pictures: [...document.images].filter((i) => !i.naturalWidth).length,
    wider: document.documentElement.scrollWidth - innerWidth,
    bars: [...document.querySelectorAll(".bars .track")].map((b) => b.clientWidth / b.closest(".card").clientWidth),
  };
  const note = document.createElement("pre");
  note.id = "probe";
  note.textContent = JSON.stringify(found);
  document.body.append(note);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
@pytest.mark.parametrize("width", [1280, 500])
def test_page_in_chromium(tmp_path, width):
    text = render_report(make_context(mixtures=1)).replace("<head>", "<head>" + PROBE)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--enable-logging=stderr"]
    arguments += ["--virtual-time-budget=8000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    try:
        done = subprocess.run([CHROMIUM, *arguments], capture_output=True, timeout=90, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("Chromium does not answer on this machine")
    dom = done.stdout.decode("utf-8", "replace")
    if "<html" not in dom:
        pytest.skip("Chromium does not start on this machine")
    assert "CONSOLE" not in done.stderr.decode("utf-8", "replace")
    probe = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)
    assert probe is not None
    found = json.loads(html.unescape(probe[1]))
    assert found["errors"] == []
    assert found["pictures"] == 0
    assert found["durations"] == pytest.approx([4096 / RATE] * 7, abs=0.01)
    assert found["seek"] == pytest.approx(0.5, abs=0.02)
    assert found["wider"] <= 0
    assert len(found["bars"]) == 4
    assert min(found["bars"]) > 0.4  # long enough to compare, also on a narrow screen
