"""The task mixer served by the HTTP door itself, on the service with the fake backend."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess

import pytest
from playwright.sync_api import Page, expect

from loraf_serve import client_cli
from loraf_serve.adapters.registry import Registry
from tests.loraf_serve.fake_backend import FakeBackend, expected_text
from tests.loraf_serve.harness import eventually, two_adapters
from tests.loraf_serve.http.stand import Both, both_doors
from tests.tools import needs

pytestmark = pytest.mark.slow
TOKEN = "token-of-the-page-for-everything"


def asked(page: Page, both: Both, fragment: str = "", question: str = "Which?") -> None:
    page.goto(f"{both.url}/{fragment}")
    page.fill("#question", question)
    page.click("#send")


def shown(page: Page) -> dict[str, str]:
    """Set → the text of its answer."""
    return {
        card.locator("h3").inner_text(): card.locator(".answer").text_content() for card in page.locator(".card").all()
    }


def sent(both: Both) -> dict[str, str]:
    """Set → the prompt that the backend got, as text."""
    backend = both.grpc.backend
    return {str(r.task_set): backend.tokenizer.decode(list(r.prompt_token_ids)) for r in backend.requests}


def test_each_set_gives_its_own_answer(page):
    with both_doors() as both:
        asked(page, both, "#mix=math:0.5%2Bnlu&pins=base&pins=as_trained%3Dnlu&max=9")
        expect(page.locator("#said")).to_contain_text("3 of 3")
        requests = {str(request.task_set): request for request in both.grpc.backend.requests}
        assert list(sent(both).values()) == ["<s>user: Which?\nassistant: "] * 3
        names = {"math:0.5+nlu": "math:0.5+nlu", "base": "base", "as_trained=nlu": "math+nlu"}
        assert shown(page) == {name: expected_text(requests[task_set]) for name, task_set in names.items()}
        title = page.locator(".card").first.get_attribute("title")
        assert requests["math+nlu"].adapter.digest in title and title.endswith("math:0.5+nlu")
        expect(page.locator("#forgetting")).to_contain_text("stores no scores")
        expect(page.get_by_role("img", name="Map of the masks of math, nlu, code")).to_be_visible()


def test_without_a_chat_template(page):
    backend = FakeBackend()
    backend.tokenizer.chat_template = None
    with both_doors(backend) as both:
        asked(page, both, "#mix=math&pins=base&pins=nlu&max=3")
        expect(page.locator("#said")).to_contain_text("3 of 3")
        # nlu's template has two fields.
        assert sent(both) == {"math": "<s>Q: Which?\nA:", "base": "<s>Which?", "nlu": "<s>Which?"}
        for place, how in enumerate(["in the task template of math", "as a plain prompt", "as a plain prompt"]):
            expect(page.locator(".card .state").nth(place)).to_contain_text(how)


def test_a_full_queue_is_waited_for(page):
    with both_doors(FakeBackend(seconds_per_token=0.05), max_queue=1) as both:
        asked(page, both, "#pins=base&max=4")
        expect(page.locator("#said")).to_contain_text("2 of 2")
        assert len(both.grpc.backend.requests) == 2


def test_stopping_stops_the_engine(page):
    with both_doors(FakeBackend(seconds_per_token=0.05)) as both:
        asked(page, both, "#pins=base&max=200")
        expect(page.locator(".answer").first).to_have_text(re.compile("[a-p]{3}"))
        page.click("#stop")
        assert eventually(lambda: len(both.grpc.backend.closed_early) == 2)


def test_a_token_shows_what_it_allows(page, tmp_path):
    (tmp_path / "tokens").write_text(f"{TOKEN} tasks=nlu\n")
    with both_doors(token_file=tmp_path / "tokens") as both:
        page.goto(both.url)
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#mix-text")).to_have_text("nlu")
        page.fill("#question", "Which?")
        page.click("#send")
        expect(page.locator("#said")).to_contain_text("2 of 2")
        assert set(sent(both)) == {"nlu", "base"}
        assert "math" not in page.content() and TOKEN not in page.url


def test_the_calls_give_the_answer_that_the_page_shows(page, capsys):
    with both_doors() as both:
        asked(page, both, "#mix=math:0.5%2Bnlu&pins=&max=9", question='it\'s "7"\ntimes 6?')
        expect(page.locator("#said")).to_contain_text("1 of 1")
        answer = shown(page)["math:0.5+nlu"]
        curl, python, grpc = page.locator("#calls pre").all_text_contents()
        exec(compile(python, "<the page>", "exec"), {})
        assert capsys.readouterr().out == f"{answer}\n"
        arguments = shlex.split(grpc.replace("\\\n", " "))
        assert client_cli.main([*arguments[1:-1], "--server", both.grpc.address, arguments[-1]]) == 0
        assert capsys.readouterr().out == f"{answer}\n"
        if shutil.which("curl") is None:
            pytest.skip(needs("curl"))
        run = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=30)
        assert json.loads(run.stdout)["choices"][0]["message"]["content"] == answer


def test_it_begins_with_what_the_token_may_use(page, tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN} tasks=math")
    trio, pair = two_adapters()
    with both_doors(adapters=Registry([pair, trio]), token_file=file) as both:
        page.goto(both.url)
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#mix-text")).to_have_text("math")
        expect(page.locator("#adapter")).to_have_value("trio")
        page.fill("#question", "Which?")
        page.click("#send")
        expect(page.locator("#said")).to_contain_text("2 of 2")
        assert set(sent(both)) == {"math", "base"}
        page.select_option("#adapter", "pair")
        expect(page.locator("#sliders")).to_contain_text("This token may use no task of the adapter")
        expect(page.locator("#mix-text")).to_have_text("base")
