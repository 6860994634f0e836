"""The page of ``avsep separate``: what is in it, how large it becomes, and its players and boxes in a browser."""

from __future__ import annotations

import html
import io
import json
import re

import numpy as np
import pytest
import soundfile

from avsep.evaluation.drawing import PAGE_BYTES, modules
from avsep.inference.page import Boxes, render_separated
from avsep.inference.recordings import Findings, SeparatedSignals
from avsep.media.detection import read_boxes
from support.browsers import SIDEWAYS, browser, opened_page
from support.media_files import tone, write_video
from support.pages import Page

for package in ("jinja2", "matplotlib"):
    pytest.importorskip(package)

RATE = 11025
NAMES = ("electric_bass", "flute")
FILES = ("duet_electric_bass.wav", "duet_flute.wav", "duet_residual.wav")
WHOLE = (0.0, 0.0, 1.0, 1.0)


def signals(seconds=4.0, channels=1, findings=None) -> SeparatedSignals:
    """Two tones and a quiet third, loud enough that what is saved of them differs from what is played."""
    times = np.arange(int(seconds * RATE)) / RATE
    parts = [level * np.sin(2 * np.pi * hz * times) for level, hz in ((0.2, 300), (0.1, 900), (0.01, 2500))]
    parts = [np.float32(part if channels == 1 else np.stack([part, *[0.5 * part] * (channels - 1)])) for part in parts]
    told = Findings(presence={"electric_bass": 0.93, "flute": 0.12}, threshold=0.5) if findings is None else findings
    return SeparatedSignals(sum(parts), np.stack(parts[:2]), parts[2], RATE, told)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    pytest.importorskip("av")
    frames = [np.full((48, 96, 3), 40 + 4 * k, np.uint8) for k in range(40)]
    return write_video(tmp_path_factory.mktemp("video") / "duet.mp4", frames, tone(4.0), fps=10)


def halves(file="duet_boxes.json") -> Boxes:
    return Boxes({"electric_bass": [(0.0, (0.0, 0.0, 0.5, 1.0))], "flute": [(0.0, WHOLE)]}, file)


def test_it_holds_players_presence_downloads_and_the_video(video):
    text = render_separated(
        "duet.mp4", NAMES, signals(), files=FILES, video=video, place=video.parent / "out", boxes=halves()
    )
    page = Page(text)
    assert len(page.all("audio")) == 4
    assert [a["src"][:22] for a in page.all("video")] == ["data:video/mp4;base64,"]
    assert [a["href"] for a in page.all("a")] == list(FILES)
    keys = [attrs["data-key"] for attrs in page.all("button") if "data-key" in attrs]
    assert keys == ["solo", *["muted", "solo"] * 3]
    assert "present (presence 93 %)" in text
    assert '<span class="tag bad">probably not in this recording (presence 12 %)</span>' in text
    assert {attrs["id"] for attrs in page.all("button") if "id" in attrs} >= {"play", "save", "whole", "forget"}
    assert "http" not in text
    untold = render_separated("duet.wav", NAMES, signals(findings=Findings()))
    assert untold.count("presence not told") == 2
    assert 'id="editor"' not in untold
    assert "<video" not in untold
    assert "<a href" not in untold


def test_names_are_text(video):
    bad = '</script><script>alert(1)</script>"'
    boxes = Boxes({bad: [(0.0, WHOLE)], "flute": [(0.0, WHOLE)]}, f"{bad}.json")
    files = (f"{bad}.wav", "javascript:alert(1).wav", "residual.wav")
    findings = Findings(presence={bad: 0.1}, threshold=0.5, alike=((bad, "flute", 1.0),), unseen=(bad,))
    text = render_separated(
        bad, (bad, "flute"), signals(findings=findings), files=files, video=video, place=video.parent, boxes=boxes
    )
    assert text.count("<script") == 2
    assert text.count("</script") == 2
    page = Page(text)
    assert [a["href"] for a in page.all("a")][1] == "javascript%3Aalert%281%29.wav"
    facts = re.search(r'id="facts">(.*?)</script>', text, re.S)
    assert json.loads(html.unescape(facts[1]))["boxes"][0][0] == bad


def test_a_long_recording_makes_no_large_page_and_the_page_says_what_it_leaves_out(video, tmp_path):
    large = tmp_path / "a talk.mp4"
    large.write_bytes(video.read_bytes() + bytes(PAGE_BYTES))
    given = {"files": FILES, "place": tmp_path / "out", "boxes": halves()}
    text = render_separated("a talk.mp4", NAMES, signals(), video=large, **given)
    assert len(text) < 2e6
    assert Page(text).all("video")[0]["src"] == "../a%20talk.mp4"
    assert "The video (24 MB) is not in the page, which plays it from its own file" in text
    assert 'id="editor"' in text
    text = render_separated("a talk.mp4", NAMES, signals(400.0), video=video, **given)
    assert len(text) < PAGE_BYTES
    assert "The page holds the first" in text
    page = Page(text)
    assert not [attrs for attrs in page.all("button") if "data-file" in attrs]  # what is in the page is not all of it
    assert [a["href"] for a in page.all("a")] == list(FILES)
    other = video.rename(tmp_path / "duet.avi")
    try:
        text = render_separated("duet.avi", NAMES, signals(), video=other, **given)
    finally:
        other.rename(video)
    assert "Browsers do not play .avi files, so the video is not shown." in text
    assert 'id="editor"' not in text


def test_more_channels_than_two_are_not_offered_as_what_they_are_not():
    text = render_separated("song.wav", NAMES, signals(channels=3), files=FILES)
    assert "data-file" not in text.partition('id="facts"')[0]
    assert "3 channels, of which the page plays the mean" in text


def test_the_modules_of_the_site_are_one_script():
    text = modules("track", "boxes", "wav", "player", "mixer")
    assert not re.search(r"^\s*(import|export)\b", text, re.M)
    assert "</script" not in text
    found = re.findall(r"^(?:async )?(?:class|function\*?|const|let) (\w+)", text, re.M)
    assert len(found) == len(set(found)) > 20
    assert {"boxAt", "BoxEditor", "wavFile", "Player", "Mixer"} <= set(found)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chrome():
    with browser() as opened:
        yield opened


@pytest.fixture
def place(video, tmp_path):
    """A folder with the page of a stereo duet."""
    text = render_separated(
        "duet.mp4", NAMES, signals(channels=2), files=FILES, video=video, place=tmp_path, boxes=halves()
    )
    (tmp_path / "duet_separated.html").write_text(text, encoding="utf-8")
    return tmp_path


LISTEN = """() => {
  window.contexts = [];
  const make = AudioContext.prototype.createGain;
  AudioContext.prototype.createGain = function () {
    if (!contexts.includes(this)) contexts.push(this);
    const gain = make.call(this);
    const meter = this.createAnalyser();
    meter.fftSize = 256;
    gain.connect(meter);
    (window.meters ??= []).push(meter);
    return gain;
  };
  const start = AudioBufferSourceNode.prototype.start;
  window.starts = [];
  AudioBufferSourceNode.prototype.start = function (when) { starts.push(when); return start.call(this, when); };
}"""
LEVELS = """() => meters.map((meter) => {
  const samples = new Float32Array(meter.fftSize);
  meter.getFloatTimeDomainData(samples);
  return Math.max(...samples.map(Math.abs));
})"""


def wait_for_sound(page, *heard: bool) -> None:
    """Until of the recording, the two sources and the residual these sound, and the others do not."""
    page.wait_for_function(
        f"(heard) => {{ const levels = ({LEVELS})(); return heard.every((one, n) => levels[n] > 1e-3 === one); }}",
        arg=list(heard),
        timeout=20_000,
    )


def open_editor(page) -> None:
    """Open the boxes' part. A browser tells the page of it a moment later, and only then are there boxes to focus."""
    page.click("#editor summary")
    page.locator(".box").first.wait_for()


def test_tracks_play_in_step_and_can_be_muted_and_heard_alone(chrome, place):
    with opened_page(chrome, (place / "duet_separated.html").as_uri(), ready=False) as page:
        page.wait_for_selector("#transport:not([hidden])")
        page.evaluate(LISTEN)
        page.keyboard.press("Space")
        page.wait_for_selector('#play:has-text("Pause")')
        wait_for_sound(page, False, True, True, True)
        page.click('button[aria-label="Mute: electric bass"]')
        wait_for_sound(page, False, False, True, True)
        solo = page.locator('button[aria-label="Solo: electric bass"]')
        solo.press("Enter")
        assert solo.get_attribute("aria-pressed") == "true"
        wait_for_sound(page, False, True, False, False)
        assert page.locator(".track.off").count() == 2
        solo.press("Enter")
        page.click('button[aria-label="Hear it: The recording"]')
        wait_for_sound(page, True, False, False, False)
        starts = page.evaluate("starts")
        assert all(len(set(starts[k : k + 4])) == 1 for k in range(0, len(starts), 4))  # to the sample
        page.evaluate("document.querySelector('#seek').value = '1'")
        page.locator("#seek").dispatch_event("input")
        page.wait_for_function("document.querySelector('#seek').value > 1.1")
        time, video = page.evaluate(
            "[+document.querySelector('#seek').value, document.querySelector('video').currentTime]"
        )
        assert time > 1.1
        assert video == pytest.approx(time, abs=0.25)
        assert page.evaluate("document.querySelector('video').muted")
        page.wait_for_selector('#play:has-text("Play")', timeout=20_000)  # to the end
        assert page.inner_text("#clock") == "0:04 / 0:04"
        page.locator(".track .view").nth(1).click(position={"x": 5, "y": 5})
        assert page.inner_text("#clock") == "0:00 / 0:04"
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        names = page.locator("button, input, a, video, audio, summary").evaluate_all(
            "all => all.filter(n => n.checkVisibility()).map(n => n.ariaLabel || n.innerText)"
        )
        assert all(name.strip() for name in names), names


def test_what_is_downloaded_is_what_was_written(chrome, place):
    with opened_page(chrome, (place / "duet_separated.html").as_uri(), ready=False) as page:
        page.wait_for_selector("#transport:not([hidden])")
        for name, part, file in zip(
            ("electric bass", "flute", "residual"), (*signals(channels=2).sources, signals(channels=2).residual), FILES,
            strict=True,
        ):  # fmt: skip
            with page.expect_download() as download:
                page.click(f'button[aria-label="Download {name} as WAV"]')
            assert download.value.suggested_filename == file
            sound, rate = soundfile.read(io.BytesIO(download.value.path().read_bytes()))
            assert rate == RATE
            np.testing.assert_allclose(sound.T, part, atol=1.1 / 32768)


def _at_rest(page, selector):
    """Where an element is, once the page has stopped scrolling to what has the focus."""
    before = None
    while (found := page.locator(selector).bounding_box()) != before:
        before = found
        page.wait_for_timeout(150)
    return found


def test_boxes_are_corrected_and_saved_as_avsep_reads_them(chrome, place):
    with opened_page(chrome, (place / "duet_separated.html").as_uri(), ready=False) as page:
        page.wait_for_selector("#transport:not([hidden])")
        assert not page.locator(".box").first.is_visible()
        open_editor(page)
        box = page.locator(".box").first
        box.focus()
        page.keyboard.press("Shift+ArrowLeft")  # at the beginning
        page.locator("#seek").focus()
        page.evaluate("document.querySelector('#seek').value = '2'")
        page.locator("#seek").dispatch_event("input")
        box.focus()
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        assert "left 10 %, top 0 %, right 58 %, bottom 100 %" in box.get_attribute("aria-label")
        page.locator(".box").nth(1).focus()
        frame = _at_rest(page, "#stage")
        x, y, width, height = (frame[key] for key in ("x", "y", "width", "height"))
        page.mouse.move(x + 0.62 * width, y + 0.2 * height)  # a whole frame is drawn anew
        page.mouse.down()
        page.mouse.move(x + 0.8 * width, y + 0.6 * height, steps=3)
        page.mouse.move(x + 0.9 * width, y + 0.8 * height)
        page.mouse.up()
        assert page.locator("#at li").all_inner_texts() == [
            "electric bass: 2 boxes; another one from 2 s",
            "flute: one box, all the time",
        ]
        with page.expect_download() as download:
            page.click("#save")
        assert download.value.suggested_filename == "duet_boxes.json"
        track = read_boxes(download.value.path())
        assert "Saved as duet_boxes.json" in page.inner_text("#saved")
        page.click("#undo")
        assert "left 0 %, top 0 %, right 50 %, bottom 100 %" in box.get_attribute("aria-label")
    assert track.classes == NAMES
    assert track.at("electric_bass", 1.99) == pytest.approx((0, 0, 0.48, 1))
    assert track.at("electric_bass", 2.0) == pytest.approx((0.1, 0, 0.58, 1))
    assert track.at("flute", 0.0) == pytest.approx((0.62, 0.2, 0.9, 0.8), abs=0.02)
    assert len(track.entries["flute"]) == 1  # the first that is drawn holds before, too


def test_a_video_that_is_gone_is_told_and_the_sounds_stay(chrome, video, tmp_path):
    large = tmp_path / "duet.mp4"
    large.write_bytes(bytes(PAGE_BYTES))
    given = {"files": FILES, "place": tmp_path, "boxes": halves()}
    (tmp_path / "page.html").write_text(render_separated("duet.mp4", NAMES, signals(), video=large, **given))
    large.unlink()
    with opened_page(chrome, (tmp_path / "page.html").as_uri(), ready=False) as page:
        page.wait_for_selector("#alert:not([hidden])")
        assert "cannot show the video" in page.inner_text("#alert")
        assert not page.locator("#editor").is_visible()
        page.click("#play")
        page.wait_for_selector('#play:has-text("Pause")')


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_at_the_side(chrome, place, scheme):
    for width in (1280, 390):
        options = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
        with opened_page(chrome, (place / "duet_separated.html").as_uri(), ready=False, **options) as page:
            page.wait_for_selector("#transport:not([hidden])")
            open_editor(page)
            assert page.evaluate(SIDEWAYS) == []


def test_without_scripts_there_are_players(chrome, place):
    with opened_page(chrome, (place / "duet_separated.html").as_uri(), ready=False, java_script_enabled=False) as page:
        assert page.locator("audio").first.is_visible()
        assert page.locator("audio").count() == 4
        assert not page.locator("#transport").is_visible()
