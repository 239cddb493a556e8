"""The task mixer in a real browser: mixing, asking, comparing, links, tokens, a busy server."""

from __future__ import annotations

import ast
import json
import re
import subprocess

import pytest
from playwright.sync_api import Page, expect

from loraf_serve import client_cli
from tests.loraf_serve.page.door import Door, opened

pytestmark = pytest.mark.slow
ALL = "trio@math+nlu+code"


@pytest.fixture
def door():
    with opened() as (door, address):
        door.address = address
        yield door


def show(page: Page, door: Door, fragment: str = "") -> None:
    page.goto(door.address + fragment)
    expect(page.locator("#server")).to_have_text(f"tiny, backend {door.backend}")


def ask(page: Page, question: str = "Which?") -> None:
    page.fill("#question", question)
    page.click("#send")
    expect(page.locator("#said")).to_contain_text("complete")


def models(door: Door) -> list[str]:
    return sorted(request["model"] for request in door.requests)


def test_a_question_is_answered_by_the_mix_and_by_every_pinned_set(page, door):
    door.answers = {ALL: "one two three four", "base": "one 2 three four"}
    show(page, door)
    ask(page)
    assert models(door) == ["base", ALL]
    assert all(request["stream"] and request["messages"][0]["content"] == "Which?" for request in door.requests)
    mix, base = page.locator(".card").all()
    expect(mix.locator(".answer")).to_have_text("one two three four")
    expect(base.locator("mark")).to_have_text(["2"])
    expect(base.locator(".state")).to_contain_text("1 of 4 words differ from the mix")
    assert mix.get_attribute("title") == f"answered by digest-{ALL}"


def test_sliders_move_by_keyboard_and_name_the_set(page, door):
    show(page, door)
    page.get_by_label("code", exact=True).focus()
    page.keyboard.press("Home")
    page.get_by_label("math", exact=True).focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#mix-text")).to_have_text("math:0.5+nlu")
    page.get_by_label("Weight of nlu as a number").fill("-1.5")
    expect(page.locator("#mix-text")).to_have_text("math:0.5+nlu:-1.5")
    page.get_by_label("Weight of nlu as a number").fill("99")  # out of range: the last weight stays
    page.get_by_label("Weight of nlu as a number").blur()
    expect(page.locator("#mix-text")).to_have_text("math:0.5+nlu:-1.5")
    page.click("#pin")
    expect(page.locator(".card h3")).to_have_text(["math:0.5+nlu:-1.5", "base", "math:0.5+nlu:-1.5"])
    expect(page.locator("#pin")).to_be_disabled()
    page.get_by_label("Remove base").click()
    ask(page)
    assert models(door) == ["trio@math:0.5+nlu:-1.5"] * 2


@pytest.mark.parametrize(
    ("preset", "text"),
    [("all tasks", "math+nlu+code"), ("base: none", "base"), ("nlu", "math+nlu"), ("support", "math:0.5+nlu")],
)
def test_sliders_are_set_to_what_there_is(page, door, preset, text):
    show(page, door)
    page.select_option("#preset", label=preset)
    expect(page.locator("#mix-text")).to_have_text(text)


def test_an_answer_streams_and_can_be_stopped(page, door):
    door.pause = 0.05
    door.answers = dict.fromkeys((ALL, "base"), "word " * 400)
    show(page, door)
    page.fill("#question", "Tell me")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".card .answer").first).to_contain_text("word word word")
    expect(page.locator(".card").first).to_have_attribute("aria-busy", "true")
    assert door.running == 2
    page.click("#stop")
    expect(page.locator(".card .state")).to_have_text(["stopped", "stopped"])
    expect(page.locator("#said")).to_have_text("Stopped")
    for _ in range(100):
        if door.stopped == 2:
            break
        page.wait_for_timeout(50)
    assert (door.stopped, door.running) == (2, 0)
    expect(page.locator(".card .answer").first).to_contain_text("word word word")


@pytest.mark.parametrize(
    "hostile", ["<img src=x onerror=alert(1)>", "</div><script>alert(1)</script>", "&lt;b&gt; \x1b[2J"]
)
def test_an_answer_is_text_whatever_it_says(page, door, hostile):
    page.on("dialog", lambda dialog: pytest.fail(f"the answer ran: {dialog.message}"))
    door.answers = {ALL: hostile, "base": "x " + hostile}
    show(page, door)
    ask(page, hostile)
    assert page.locator(".answer").first.evaluate("node => node.textContent") == hostile
    assert page.locator(".answer img, .answer script, .answer b, .asked img").count() == 0


def test_a_link_reproduces_the_view_and_sends_nothing(page, door):
    show(page, door)
    page.select_option("#preset", label="support")
    page.click("#pin")
    page.get_by_label("code", exact=True).fill("1.25")
    page.fill("#question", "a & b = c#d?\n«ß» +1")
    page.fill("#max-tokens", "7")
    page.fill("#temperature", "0.5")
    page.select_option("#form", "plain")
    link, before = (
        page.url,
        page.evaluate("[...document.querySelectorAll('input, textarea, select')].map(e => e.value)"),
    )
    page.goto("about:blank")
    page.goto(link)
    expect(page.locator(".card h3")).to_have_text(["math:0.5+nlu+code:1.25", "base", "math:0.5+nlu"])
    assert before == page.evaluate("[...document.querySelectorAll('input, textarea, select')].map(e => e.value)")
    assert page.url == link and not door.requests
    page.click("#send")
    expect(page.locator("#said")).to_contain_text("3 of 3")
    request = door.requests[0]
    assert request["prompt"] == "a & b = c#d?\n«ß» +1" and "apply_task_template" not in request
    assert (request["max_tokens"], request["temperature"]) == (7, 0.5)


def test_a_link_that_makes_no_sense_shows_what_it_can(page, door):
    show(page, door, "#mix=nothing:x&max=-3&t=hot&as=poem&adapter=gone&pins=as_trained%3Dnlu&q=%3Cb%3Ehi")
    expect(page.locator("#mix-text")).to_have_text("math+nlu+code")
    expect(page.locator("#question")).to_have_value("<b>hi")
    page.click("#send")
    expect(page.locator("#said")).to_contain_text("2 of 2")
    assert models(door) == [f"trio@{name}" for name in ("as_trained=nlu", "math+nlu+code")]


def test_a_token_is_asked_for_and_stays_out_of_the_link(page, door):
    door.token = "secret-token-of-this-test"
    page.goto(door.address)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This server asks for a token")
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("The token was refused.")
    page.fill("#token", door.token)
    page.keyboard.press("Enter")
    expect(page.locator("#server")).to_have_text("tiny, backend resident")
    ask(page)
    assert set(door.tokens) == {f"Bearer {door.token}"}
    assert door.token not in page.url and door.token not in page.content()
    expect(page.locator("#calls")).to_contain_text("$LORAF_TOKEN")
    page.reload()  # of this tab
    expect(page.locator("#server")).to_have_text("tiny, backend resident")
    door.token = "another-token-of-this-test"
    page.click("#send")
    expect(dialog).to_contain_text("The token was refused.")
    page.fill("#token", door.token)
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("2 of 2")
    page.click("#forget-token")
    expect(dialog).to_be_visible()


def test_cancelling_the_token_says_what_is_missing(page, door):
    door.token = "secret-token-of-this-test"
    page.goto(door.address)
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_contain_text("no token")
    page.click("#retry")
    expect(page.get_by_role("dialog")).to_be_visible()


def test_a_busy_server_is_waited_for(page, door):
    door.busy = 3
    show(page, door)
    ask(page)
    assert models(door) == ["base", ALL]


def test_a_server_that_stays_busy_is_named(page, door):
    door.busy = 1000
    show(page, door)
    page.fill("#question", "Which?")
    page.click("#send")
    expect(page.locator(".card .state").first).to_contain_text("the server is busy; trying again in")
    expect(page.locator("#said")).to_have_text("0 of 2 answers are complete")
    expect(page.locator(".card .state").first).to_have_text(re.compile("^the server is busy: 8 requests are in flight"))


def test_a_merged_server_is_asked_one_set_at_a_time(page, door):
    door.backend, door.pause = "merged", 0.02
    show(page, door)
    expect(page.locator("#honest")).to_contain_text("one after the other")
    ask(page)
    assert door.most_running == 1 and models(door) == ["base", ALL]


def test_errors_are_shown_where_they_belong(page, door):
    door.refusals = {"/v1/chat/completions": (400, "max_tokens 128 is out of range")}
    show(page, door)
    page.fill("#question", "Which?")
    page.click("#send")
    expect(page.locator(".card .state.error")).to_have_text(["max_tokens 128 is out of range"] * 2)
    door.refusals = {"/loraf/v1/server": (503, "the server is loading")}
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("the server is loading")
    door.refusals = {}
    page.click("#retry")
    expect(page.locator("#server")).to_have_text("tiny, backend resident")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_without_a_chat_template_each_set_goes_its_own_way(page, door):
    door.has_chat_template = False
    show(page, door, "#mix=math")
    ask(page)
    assert all(request["apply_task_template"] is True for request in door.requests)
    expect(page.locator(".card .state").nth(0)).to_contain_text("in the task template of math")
    expect(page.locator(".card .state").nth(1)).to_contain_text("as a plain prompt")
    expect(page.locator("#form")).to_have_value("template")
    expect(page.locator("#calls pre").nth(1)).to_contain_text('extra_body={"apply_task_template": True}')
    expect(page.locator("#calls pre").nth(2)).to_contain_text("--task-template")


def test_a_template_that_takes_no_question_leads_to_the_plain_prompt(page, door):
    show(page, door, "#mix=nlu&as=template&pins=")
    message = "messages[0].content: the task's template has 2 fields (instruction, input) instead of one"
    door.refusals = {"/v1/chat/completions": (400, message)}
    ask(page)
    assert [(request["prompt"], "messages" in request) for request in door.requests] == [("Which?", False)]
    expect(page.locator(".card .state")).to_contain_text("as a plain prompt")


def test_scores_and_masks_of_the_checkpoint_are_shown(page, door):
    door.scores = [
        {
            "task": "math",
            "evaluation": "gsm8k",
            "metric": "gsm8k",
            "count": 99,
            "as_trained": 0.5,
            "all": 0.25,
            "others": [],
        },
        {
            "task": "nlu",
            "evaluation": "text",
            "metric": "loss",
            "count": 99,
            "as_trained": 2.0,
            "all": 1.5,
            "others": [],
        },
        {"task": "code", "evaluation": "tests", "metric": "match", "count": 9, "as_trained": 1, "all": 1, "others": []},
    ]
    show(page, door)
    rows = page.locator("#forgetting tbody tr")
    expect(rows).to_have_text(
        [
            re.compile(r"math: gsm8k.*0\.500\s*0\.250\s*▼ −0\.250"),
            re.compile(r"nlu: text.*2\.0000\s*1\.5000\s*▲ −0\.5000"),
            re.compile(r"code: tests.*last task"),
        ]
    )
    expect(page.get_by_role("img", name="Map of the masks of math, nlu, code in 2 layers")).to_be_visible()
    page.get_by_text("As a table").click()
    expect(page.locator("#map tbody tr")).to_have_count(7)
    painted = "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"
    assert page.locator("canvas").evaluate(painted) > 20


def test_the_calls_are_quoted_so_that_they_can_be_pasted(page, door, monkeypatch):
    question = 'it\'s "$HOME" `id` \\ \n-- ü!'
    show(page, door, "#mix=math:0.5%2Bnlu")
    page.fill("#question", question)
    curl, python, grpc = page.locator("#calls pre").all_text_contents()
    print_arguments = "curl() { printf '%s\\0' \"$@\"; }; loraf-client() { printf '%s\\0' \"$@\"; }; "

    def arguments(command: str) -> list[str]:
        run = subprocess.run(["bash", "-c", print_arguments + command], capture_output=True, text=True, check=True)
        return run.stdout.split("\0")[:-1]

    address, *_, body = arguments(curl)
    assert address == f"{door.address}v1/chat/completions"
    assert json.loads(body) == {
        "model": "trio@math:0.5+nlu",
        "max_tokens": 128,
        "temperature": 0,
        "messages": [{"role": "user", "content": question}],
    }
    parsed = client_cli.parser().parse_args(arguments(grpc))
    assert (parsed.prompt, str(parsed.tasks), parsed.adapter, parsed.chat) == (question, "math:0.5+nlu", "trio", True)
    calls = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    (create,) = [call for call in calls if ast.unparse(call.func) == "client.chat.completions.create"]
    assert {word.arg: ast.literal_eval(word.value) for word in create.keywords} == json.loads(body)
