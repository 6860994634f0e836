"""Every page on a wide and a narrow screen: nothing is cut at the side, light and dark."""

from __future__ import annotations

import pytest

from avsep.evaluation.comparison import compare
from avsep.evaluation.comparison_page import render_page
from avsep.evaluation.memory_page import render_memory
from avsep.evaluation.report import QUESTION, render_report
from support.browsers import SIDEWAYS, browser, opened_page
from support.evaluations import cells
from support.reports import make_context

for package in ("jinja2", "matplotlib"):
    pytest.importorskip(package)

LONG = "lwf + herding (weight_mask 0.3, weight_of_something_else 0.25, and_a_name_without_any_space_in_it)"


@pytest.fixture(scope="module")
def pages(tone_store, tmp_path_factory):
    from avsep.data.store import Store

    store = Store.open(tone_store)
    ids = {name: [clip.id for clip in store.select(classes=[name])[:2]] for name in store.classes}
    methods = [*cells("finetune", [0, 1]), *cells(LONG, [0, 1], level=1.0)]
    texts = {
        "report": render_report(make_context(("finetune", LONG), mixtures=6)),
        "one run": render_report(make_context(("finetune",), mixtures=1)),
        "comparison": render_page(compare(methods, baseline="finetune", resamples=50)),
        "memory": render_memory("a_run", store, ids),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def chrome():
    with browser() as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["report", "one run", "comparison", "memory"])
def test_nothing_is_cut_at_the_side(chrome, pages, name, width):
    options = {"viewport": {"width": width, "height": 844}}
    with opened_page(chrome, (pages / f"{name}.html").as_uri(), ready=False, **options) as page:
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert page.evaluate(SIDEWAYS) == []


@pytest.mark.parametrize("name", ["report", "comparison", "memory"])
def test_a_dark_screen_has_a_dark_page(chrome, pages, name):
    grounds = []
    for scheme in ("light", "dark"):
        with opened_page(chrome, (pages / f"{name}.html").as_uri(), ready=False, color_scheme=scheme) as page:
            found = page.evaluate(
                """() => [...document.querySelectorAll("body, .card, article, details, picture img")].map((n) =>
                  getComputedStyle(n).backgroundColor.match(/[\\d.]+/g).map(Number))
                  .filter(([r, g, b, a = 1]) => a).map(([r, g, b]) => (r + g + b) / 3)"""
            )
            grounds.append(found)
            if name == "comparison":
                drawn = page.evaluate("document.querySelector('picture img').currentSrc")
                grounds[-1].append(250 if drawn == page.evaluate("document.querySelector('picture img').src") else 20)
    assert min(grounds[0]) > 200
    assert max(grounds[1]) < 60


def test_four_mixtures_are_open_and_the_others_can_be_opened(chrome, pages):
    with opened_page(chrome, (pages / "report.html").as_uri(), ready=False) as page:
        assert page.inner_text("h1") == QUESTION
        mixtures = page.locator("#listen .player.mix")
        assert mixtures.count() == 5
        shown = [mixtures.nth(k).is_visible() for k in range(5)]
        assert shown == [True, True, True, False, False]  # and the one at the top
        visible = page.locator(".opening audio").evaluate_all(
            "all => all.filter((one) => one.checkVisibility()).length"
        )
        assert visible == 3
        assert page.locator(".opening audio").nth(2).bounding_box()["y"] < 720  # without scrolling
        page.locator("#listen .folded summary").first.press("Enter")
        assert mixtures.nth(3).is_visible()
