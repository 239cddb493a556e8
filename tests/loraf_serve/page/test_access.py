"""The task mixer without a mouse, without colours, and to assistive technology, by axe-core's rules."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import Page, expect

from tests.loraf_serve.page.door import opened
from tests.source_tree import ROOT
from tests.tools import needs

pytestmark = pytest.mark.slow
AXE = ROOT / ".tools" / "axe-core" / "node_modules" / "axe-core" / "axe.min.js"
CONTROLS = "button, select, input, textarea, summary, a[href], [tabindex='0']"


@pytest.fixture(scope="module")
def door():
    with opened() as (door, address):
        door.address = address
        door.answers = {"trio@math+nlu+code": "one two three", "base": "one 2 three"}
        door.scores = [
            {"task": "math", "evaluation": "a", "metric": "m", "count": 9, "as_trained": 0.5, "all": 0.4, "others": []},
            {"task": "nlu", "evaluation": "b", "metric": "m", "count": 9, "as_trained": 0.5, "all": 0.6, "others": []},
        ]
        yield door


def answered(page: Page, address: str) -> None:
    """Everything that there is to see: answers with differences, scores, the table of the map."""
    page.goto(f"{address}#q=Which&pins=base&pins=math")
    page.get_by_text("As a table").click()
    page.click("#send")
    expect(page.locator("#said")).to_contain_text("3 of 3")


def findings(page: Page) -> list[str]:
    if not AXE.is_file():
        pytest.skip(needs("axe-core"))
    # Not as a script of the page, whose policy forbids it.
    page.evaluate(AXE.read_text(encoding="utf-8") + "; null")
    result = page.evaluate("axe.run({resultTypes: ['violations', 'incomplete']})")
    assert len(result["passes"]) > 20
    return [
        f"{rule['impact']}: {rule['id']}: {json.dumps([node['target'] for node in rule['nodes']])}"
        for rule in result["violations"]
    ]


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("chosen_by", ["system", "control"])
def test_axe_finds_nothing(page, door, colours, chosen_by):
    page.emulate_media(color_scheme=colours if chosen_by == "system" else "no-preference")
    answered(page, door.address)
    if chosen_by == "control":
        page.select_option("#theme", colours)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (colours == "dark")
    assert findings(page) == []


def test_axe_finds_nothing_while_a_token_is_asked_for(page):
    with opened() as (door, address):
        door.token = "token"
        page.goto(address)
        expect(page.get_by_role("dialog")).to_be_visible()
        assert findings(page) == []


def test_axe_finds_nothing_on_a_narrow_screen_and_nothing_is_cut_off(page, door):
    page.set_viewport_size({"width": 360, "height": 740})
    answered(page, door.address)
    assert findings(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_every_control_is_reached_by_tab_and_shows_it(page, door):
    answered(page, door.address)
    page.evaluate("document.querySelector('.skip').focus()")  # the first one
    count = page.evaluate(
        "selector => [...document.querySelectorAll(selector)]"
        ".filter(e => e.checkVisibility() && !e.disabled).map((e, i) => (e.dataset.place = i)).length",
        CONTROLS,
    )
    reached = []
    for _ in range(count):
        place, outline = page.evaluate(
            "[document.activeElement.dataset.place, getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.append(place)
        assert len(reached) == 1 or outline != "none", page.evaluate("document.activeElement.outerHTML")
        page.keyboard.press("Tab")
    assert count > 20 and sorted(map(int, reached)) == list(range(count))


def test_differences_are_marked_not_by_colour_alone(page, door):
    answered(page, door.address)
    assert "underline" in page.locator(".card mark").first.evaluate("e => getComputedStyle(e).textDecorationLine")
    expect(page.locator(".card .state").nth(1)).to_contain_text("1 of 3 words differ")


def test_the_page_asks_no_other_host_and_has_no_inline_code(page, door):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answered(page, door.address)
    assert asked and all(address.startswith(door.address) for address in asked)
    assert page.locator("script:not([src]), style, [style]:not(canvas), [onclick]").count() == 0
