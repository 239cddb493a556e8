"""Forms of answers, log-probabilities of prompts, bad words and priorities on real engines."""

from __future__ import annotations

import asyncio
import json
import re
import string
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from loraf.errors import LorafError
from loraf_serve.backends.backend import StructuredOutput
from loraf_serve.backends.bad_words import token_sequences
from tests.loraf_serve.references import Merged
from tests.loraf_serve.vllm_engines import SLOTS, Engine, Pool, random_prompt, shared

pytestmark = shared("mistral")
PROMPT = random_prompt(20, seed=5)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session", params=["slots", "resident"])
def engine(request: pytest.FixtureRequest, vllm_pool: Pool) -> Engine:
    return vllm_pool.get("mistral", request.param)


@pytest.fixture(scope="session")
def merged(engine: Engine) -> Merged:
    return Merged(engine.folder, engine.adapter.checkpoint)


def answers_of(engine: Engine, kind: str, value: Any, text: str = "all", **sampling: Any) -> list[str]:
    form = StructuredOutput(kind, value if isinstance(value, str | tuple) else json.dumps(value))
    # Tokens that stand for whole characters, since those of this tokenizer are bytes.
    bias = dict.fromkeys(engine.backend.tokenizer.encode(string.printable, add_special_tokens=False), 20.0)
    sampling = {"temperature": 1.0, "seed": 3, "n": 4, "max_tokens": 400, "ignore_eos": False} | sampling
    request = engine.request(text, PROMPT, structured_output=form, **{"logit_bias": bias} | sampling)
    answers = engine.loop.run(engine.answers(request))
    assert all(answer.finish_reason == "stop" for answer in answers)
    return [answer.text for answer in answers]


def refusal(engine: Engine, kind: str, value: Any, **sampling: Any) -> str:
    with pytest.raises(LorafError) as error:
        answers_of(engine, kind, value, **sampling)
    assert engine.alive()
    (problem,) = error.value.problems
    assert problem.field == f"sampling.structured_output.{kind}"
    return problem.message


def test_answers_follow_a_json_schema(engine: Engine) -> None:
    for text in ("all", "nlu", "base"):
        for answer in answers_of(engine, "json_schema", SCHEMA, text):
            jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(answer))


@pytest.mark.parametrize(
    "pattern", [r"[A-Z][a-z]{2,5} \d+\.\d", "(yes|no)( sir)?", r"a{3}|[^\W\d]{2}-\w\s", "^x+y{0,3}$", "é(🙂|ü){2}"]
)
def test_answers_match_a_regular_expression(engine: Engine, pattern: str) -> None:
    for answer in answers_of(engine, "regex", pattern, max_tokens=200):
        assert re.fullmatch(pattern, answer), answer


def test_answers_are_one_of_the_choices(engine: Engine) -> None:
    texts = ("left", "right", 'quote " and\nline', "ü🙂\\")
    found = {answer for seed in range(4) for answer in answers_of(engine, "choice", texts, seed=seed)}
    assert found <= set(texts) and len(found) > 1


@pytest.mark.parametrize("grammar", ['root ::= "(" root ")" | "x"', 'start: "(" start ")" | "x"'])
def test_answers_derive_from_a_grammar(engine: Engine, grammar: str) -> None:
    close = {engine.backend.tokenizer.encode("x", add_special_tokens=False)[0]: 5.0}
    for answer in answers_of(engine, "grammar", grammar, logit_bias=close):
        depth = len(answer) // 2
        assert answer == "(" * depth + "x" + ")" * depth


def test_a_form_in_a_batch_leaves_other_answers_alone(engine: Engine, merged: Merged) -> None:
    form = StructuredOutput("regex", "(ab)+c")
    sets = ("math", "nlu", "base")
    free = [engine.request(text, PROMPT) for text in sets]
    kept = [engine.request(text, PROMPT, structured_output=form, ignore_eos=False, max_tokens=9) for text in sets]
    found = engine.ask(*free, *kept)
    assert [answer.token_ids for answer in found[:3]] == [merged.greedy(text, PROMPT, 8) for text in sets]
    assert all(answer.text.startswith("ab") for answer in found[3:])


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("json_schema", {"$ref": "#"}, "no answer has this form"),
        ("json_schema", {"type": "wibble"}, "type must be one or a list of string"),
        ("json_schema", {"not": {"type": "string"}}, "does not obey 'not'"),
        ("regex", "(?=a)b", "Lookahead is not supported"),
        ("regex", r"[\d\D]^a", "should be at the start"),
        ("grammar", "root ::= foo", "not defined"),
    ],
)
def test_a_form_that_the_engine_cannot_keep_to_is_refused(engine: Engine, kind: str, value: Any, says: str) -> None:
    assert says in refusal(engine, kind, value)


def test_a_form_that_takes_too_much_time_ends_its_own_request_alone(engine: Engine) -> None:
    """XGrammar needs time for each token that grows with the square of the answer."""
    grammar = 'root ::= a a a\na ::= a a | a a a | "a" | ""'
    letter = {engine.backend.tokenizer.encode("a", add_special_tokens=False)[0]: 100.0}
    (before,) = engine.ask(engine.request("math", PROMPT))
    message = refusal(engine, "grammar", grammar, temperature=0.0, n=1, logit_bias=letter, max_tokens=900)
    assert "takes too much time" in message
    (after,) = engine.ask(engine.request("math", PROMPT))
    assert after.token_ids == before.token_ids


def test_a_form_of_which_nothing_is_left_ends_its_own_request_alone(engine: Engine) -> None:
    message = refusal(engine, "choice", ("a",), temperature=0.0, n=1, bad_words=("a",))
    assert "cannot keep to it with these sampling fields" in message


def test_prompt_logprobs_are_those_of_transformers(engine: Engine, merged: Merged) -> None:
    prompt = random_prompt(150, seed=6)
    for text in ("math+code", "base"):
        request = engine.request(text, prompt, prompt_logprobs=-1, max_tokens=2, n=2, temperature=1.0)

        async def outputs(request=request):
            return [output async for output in engine.backend.generate(request)]

        given = [output.prompt_logprobs for output in engine.loop.run(outputs()) if output.prompt_logprobs]
        assert len(given) == 1 and len(given[0]) == len(prompt) and given[0][0] is None
        expected = merged.logits(text, prompt).log_softmax(-1)
        for place, position in enumerate(given[0][1:]):
            assert position.chosen.token_id == prompt[place + 1]
            found = torch.full_like(expected[place], torch.nan)
            for token in position.top:
                found[token.token_id] = token.logprob
            # This engine returns logits in place of log-probabilities.
            assert (found.log_softmax(-1) - expected[place]).abs().max() < 1e-4
            assert position.chosen.rank == int((expected[place] >= expected[place][prompt[place + 1]]).sum())


def test_prompt_logprobs_that_need_too_much_memory_are_refused(engine: Engine, monkeypatch) -> None:
    from loraf_serve.vllm.engine import convert

    monkeypatch.setattr(convert, "_PROMPT_LOGITS", 10 * engine.backend.vocab_size)
    with pytest.raises(LorafError, match="--max-num-batched-tokens 10 or fewer") as error:
        engine.ask(engine.request("base", random_prompt(11, seed=7), prompt_logprobs=1))
    assert error.value.problems[0].field == "sampling.prompt_logprobs"
    engine.ask(engine.request("base", random_prompt(10, seed=7), prompt_logprobs=1))


def test_bad_words_are_left_out_as_by_transformers(engine: Engine, merged: Merged) -> None:
    tokenizer = engine.backend.tokenizer
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abc"]
    bias = dict(zip(letters, (300.0, 200.0, 100.0), strict=True))
    (usual,) = engine.ask(engine.request("math", PROMPT, logit_bias=bias, max_tokens=4))
    assert usual.text == "aaaa"
    (answer,) = engine.ask(engine.request("math", PROMPT, logit_bias=bias, max_tokens=4, bad_words=("aa", "ba")))
    assert answer.text == "abbb"
    assert token_sequences(tokenizer, "aa") == [[letters[0], letters[0]]]


def test_a_lower_priority_number_goes_first(engine: Engine) -> None:
    """Of requests that wait while others run, for all sequences of the engine or for all slots."""
    config = engine.backend._engine.vllm_config
    assert config.scheduler_config.policy == "priority" and engine.backend.unsupported_fields == ()
    order: list[str] = []

    async def ask(name: str, text: str, priority: int, tokens: int) -> None:
        request = replace(engine.request(text, PROMPT, max_tokens=tokens), priority=priority)
        async for _ in engine.backend.generate(request):
            if name not in order:
                order.append(name)

    async def all_of_them() -> None:
        limit = config.scheduler_config.max_num_seqs if engine.kind == "resident" else SLOTS
        sets = [f"math:{1 + i / limit}" for i in range(limit)]
        running = [asyncio.create_task(ask(text, text, 0, 900)) for text in sets]
        while len(order) < limit:
            await asyncio.sleep(0.01)
        waiting = []
        for name, priority in (("last", 5), ("normal", 0), ("first", -5)):
            waiting.append(asyncio.create_task(ask(name, f"nlu:{1 + priority / 10}", priority, 2)))
            await asyncio.sleep(0.05)
        running[0].cancel()  # one place for three
        await asyncio.gather(*waiting)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    engine.loop.run(all_of_them())
    assert [name for name in order if name in ("first", "normal", "last")] == ["first", "normal", "last"]
