"""A form of an answer harms nobody but its sender, and what is admitted is kept to."""

from __future__ import annotations

import asyncio
import json
import random
import re
import string
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraf.errors import LorafError
from loraf_serve.backends.backend import StructuredOutput
from loraf_serve.errors import TryLater
from tests.standins import byte_tokenizer
from tests.tools import needs

xgrammar = pytest.importorskip("xgrammar", reason=needs("vLLM"))

from loraf_serve.vllm.forms import form_checker, keywords, trial  # noqa: E402 - after the check for vLLM
from loraf_serve.vllm.forms.form_checker import FormChecker  # noqa: E402

TOKENIZER = byte_tokenizer()
VOCAB_SIZE = 320
STOP = (TOKENIZER.eos_token_id,)
PLAIN = StructuredOutput("regex", "a+b")
# Far above the service's limit of 64 Ki characters: XGrammar takes many seconds for it.
SLOW = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(20_000)}}
ENDLESS = StructuredOutput("json_schema", json.dumps(SLOW))


async def refusal(checker: FormChecker, form: StructuredOutput) -> str:
    with pytest.raises(LorafError) as error:
        await checker.check(form, STOP)
    (problem,) = error.value.problems
    assert problem.field == f"sampling.structured_output.{form.kind}" and problem.remedy
    return problem.message


@pytest.mark.slow
def test_a_form_that_kills_the_process_that_tries_it_harms_no_other() -> None:
    async def life() -> None:
        checker = FormChecker(TOKENIZER, VOCAB_SIZE)
        try:
            assert await checker.check(PLAIN, STOP) == ("regex", PLAIN.value)
            first = checker._process
            # A known form does not wait for others.
            slow = asyncio.create_task(refusal(checker, ENDLESS))
            await asyncio.sleep(0.1)
            assert await checker.check(PLAIN, STOP) and not slow.done()
            assert "takes more than 2 s" in await slow
            # It is remembered, and the next form waits for no new process.
            assert "takes more than 2 s" in await asyncio.wait_for(refusal(checker, ENDLESS), 0.5)
            assert checker._process is first and first.returncode is None
            choice = StructuredOutput("choice", ("left", "right"))
            assert await checker.check(choice, STOP) == ("ebnf", 'root ::= "left" | "right"')
            assert checker._process is first
            # A cancelled check leaves no answer that the next form would get.
            slow = asyncio.create_task(checker.check(StructuredOutput("json_schema", ENDLESS.value + " "), STOP))
            await asyncio.sleep(1.4)  # the trial has begun, on a busy machine too, and has not reached its 2 s
            slow.cancel()
            began = time.monotonic()
            await asyncio.gather(slow, return_exceptions=True)
            assert slow.cancelled()
            assert "not defined" in await refusal(checker, StructuredOutput("grammar", "root ::= foo"))
            assert time.monotonic() - began < 1 and checker._process is first
            # What is remembered is bounded.
            characters = [len(value) + len(text) for (_, value, _), (_, text) in checker._outcomes.items()]
            assert checker._characters == sum(characters)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(form_checker, "_REMEMBERED", 20)
                await checker.check(StructuredOutput("regex", "c"), STOP)
            assert [value for _, value, _ in checker._outcomes] == ["root ::= foo", "c"]
        finally:
            await checker.stop()
        assert checker._process is None

    asyncio.run(asyncio.wait_for(life(), 300))


def test_new_forms_beyond_a_limit_are_refused_until_others_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> None:
        checker, tried = FormChecker(TOKENIZER, VOCAB_SIZE), asyncio.Event()

        async def outcome(_: FormChecker, kind: str, value: str, stop_token_ids: tuple[int, ...]) -> tuple[str, str]:
            await tried.wait()
            return "", value

        monkeypatch.setattr(FormChecker, "_outcome", outcome)
        new = [StructuredOutput("regex", f"a{i}") for i in range(form_checker._MOST_WAITING + 1)]
        waiting = [asyncio.create_task(checker.check(form, STOP)) for form in new[:-1]]
        await asyncio.sleep(0)
        with pytest.raises(TryLater, match="16 new forms .* wait") as error:
            await checker.check(new[-1], STOP)
        assert error.value.retry_after > 0
        waiting.pop().cancel()  # a client that leaves makes room
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(checker.check(new[-1], STOP)))
        await asyncio.sleep(0)
        tried.set()
        assert await asyncio.gather(*waiting)
        assert await checker.check(PLAIN, STOP) and checker._waiting == 0

    asyncio.run(asyncio.wait_for(life(), 30))


def test_what_xgrammar_cannot_compile_in_the_engine_is_refused_before_it() -> None:
    """Such a repetition is compiled without XGrammar's cache, which the engine has, and not with it."""

    async def life() -> str:
        checker = FormChecker(TOKENIZER, VOCAB_SIZE)
        try:
            texts = {
                most: {"type": "array", "items": {"type": "string", "pattern": f"^[a-z]{{1,{most}}}$"}}
                for most in (8, 300)
            }
            assert await checker.check(StructuredOutput("json_schema", json.dumps(texts[8])), STOP)
            return await refusal(checker, StructuredOutput("json_schema", json.dumps(texts[300])))
        finally:
            await checker.stop()

    assert asyncio.run(asyncio.wait_for(life(), 150))  # `refusal` has checked the field


def test_nothing_of_the_working_directory_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("re", "regex", "torch", "xgrammar", "loraf_serve"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), ".", *sys.path])

    async def life() -> None:
        checker = FormChecker(TOKENIZER, VOCAB_SIZE)
        try:
            assert await checker.check(PLAIN, STOP) == ("regex", PLAIN.value)
            assert checker._process is not None
            assert Path(f"/proc/{checker._process.pid}/cwd").readlink() == Path("/")
        finally:
            await checker.stop()

    asyncio.run(asyncio.wait_for(life(), 150))
    assert not (tmp_path / "ran").exists()


# What is admitted is kept to

SCHEMAS: list[Any] = [
    {"type": ["integer", "null"]},
    {"type": "integer", "minimum": 5, "maximum": 20},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1.5},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "string", "pattern": "^a+b?$"},
    {"type": "string", "pattern": "^[^x]{1,3}$"},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"enum": [1, "x", None]}}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 2},
    {"type": "object", "propertyNames": {"type": "string", "maxLength": 2}, "additionalProperties": {"type": "null"}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "null"}},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
    {"const": {"a": [1, '[^"\\\r\n]']}},
    {"type": ["string", "integer"], "enum": ["a", 1], "title": "t"},
    {"type": "string", "const": "abc"},
    {
        "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "additionalProperties": False}},
        "$ref": "#/$defs/n",
    },
]
REFUSED: list[tuple[Any, str]] = [
    ({"not": {}}, "'not'"),
    ({"type": "integer", "multipleOf": 3}, "combination|multipleOf"),
    ({"minimum": 5}, "only beside the type 'number'"),
    ({"type": "object", "required": ["a"]}, "required"),
    ({"type": "object", "properties": {"a": {"maxLength": 3}}}, "only beside the type 'string'"),
    ({"type": "string", "enum": ["a", 1]}, "another type"),
    ({"type": "integer", "anyOf": [{"type": "string"}]}, "beside anyOf: 'type'"),
    ({"$ref": "#/$defs/a", "type": "string", "$defs": {"a": {}}}, r"beside \$ref"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"if": {"type": "string"}, "then": {}}, "'if', 'then'"),
    ({"items": {"anyOf": [{"allOf": [{"uniqueItems": True}]}]}}, "uniqueItems"),
    # What XGrammar takes as no limit at all.
    *(({name: []}, f"{name} must be a list") for name in ("anyOf", "oneOf", "allOf", "enum")),
    ({"type": []}, "type must be one or a list of"),
    ({"type": "object", "properties": {"a": {"anyOf": []}}, "required": ["a"]}, "anyOf must be a list"),
    ({"type": "array", "items": {"type": []}}, "type must be"),
    ({"type": "string", "enum": ["abc"], "maxLength": 1}, "beside enum: 'maxLength'"),
    ({"type": "integer", "enum": [5], "minimum": 6}, "beside enum: 'minimum'"),
    ({"type": "string", "enum": ["abc"], "pattern": "^x$"}, "beside enum: 'pattern'"),
    ({"type": "string", "enum": ["abc"], "format": "date"}, "beside enum: 'format'"),
    ({"type": "integer", "const": 5, "maximum": 3}, "beside const: 'maximum'"),
    ({"type": "array", "const": [1], "maxItems": 0}, "beside const: 'maxItems'"),
    ({"type": "object", "const": {"a": 1}, "maxProperties": 0}, "beside const: 'maxProperties'"),
    ({"enum": [1], "const": 2}, "beside enum: 'const'"),
    # What is no schema.
    ({"type": {"x": 1}}, "type must be"),
    ({"type": [{"x": 1}]}, "type must be"),
    ({"type": [["object"]]}, "type must be"),
    ({"type": "text"}, "type must be"),
    ({"type": "object", "properties": {"a": {}}, "required": [{"a": 1}]}, "required must be"),
    ({"type": "object", "properties": {"a": 1}}, "properties must be"),
    ({"type": "string", "format": ["date"]}, "format must be"),
    ({"type": "string", "maxLength": -1}, "maxLength must be"),
    ({"type": "array", "items": [{}]}, "items must be"),
    ({"type": "number", "minimum": "1"}, "minimum must be"),
    ({"type": "number", "minimum": 10**400}, "minimum must be"),
]


@pytest.fixture(scope="module")
def compiler() -> Any:
    info = xgrammar.TokenizerInfo.from_huggingface(TOKENIZER, vocab_size=VOCAB_SIZE)
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def derived(compiler: Any, grammar: str, count: int) -> Iterator[str]:
    """Answers that a grammar derives by chance, those that end."""
    compiled = compiler.compile_grammar(grammar)
    source = random.Random(1)
    closing = set(TOKENIZER.encode('"}]', add_special_tokens=False))
    plain = set(TOKENIZER.encode(string.printable, add_special_tokens=False)) | set(STOP)
    for _ in range(count):
        matcher, tokens = xgrammar.GrammarMatcher(compiled), []
        mask = xgrammar.allocate_token_bitmask(1, VOCAB_SIZE)
        while len(tokens) < 200:
            matcher.fill_next_token_bitmask(mask, 0)
            words = mask[0].tolist()
            allowed = [t for t in range(VOCAB_SIZE) if words[t // 32] >> t % 32 & 1]
            soon = [t for t in allowed if t in closing or t in STOP] if source.random() < 0.3 else []
            token = source.choice(soon or [t for t in allowed if t in plain] or allowed)
            assert matcher.accept_token(token)
            if token in STOP:
                yield TOKENIZER.decode(tokens)
                break
            tokens.append(token)


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_every_answer_follows_its_schema(compiler: Any, schema: Any) -> None:
    assert keywords.problem_with(schema) == ""
    grammar = trial.try_form(compiler, VOCAB_SIZE, "json_schema", json.dumps(schema), list(STOP), True)
    answers = list(derived(compiler, grammar, 25))
    assert len(answers) > 5
    for answer in answers:
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer))


@pytest.mark.parametrize(("schema", "says"), REFUSED)
def test_a_schema_that_xgrammar_would_obey_in_part_is_refused(schema: Any, says: str) -> None:
    assert re.search(says, keywords.problem_with(schema))


NAMES = st.sampled_from(sorted(keywords._OBEYED))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | NAMES | st.just("object")
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=2), inner, max_size=4)
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, ANYTHING, max_size=4) | ANYTHING)
def test_any_json_is_admitted_only_if_it_is_a_schema(schema: Any) -> None:
    if keywords.problem_with(schema) == "":
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "(" * 2000 + ")" * 2000])
def test_what_python_does_not_read_as_an_expression_is_refused(compiler: Any, pattern: str) -> None:
    with pytest.raises(trial.InvalidFormError, match="is not a regular expression"):
        trial.try_form(compiler, VOCAB_SIZE, "regex", pattern, list(STOP), True)


@pytest.mark.parametrize(
    "pattern", [r"\d+(\.\d{2})?", r"[^a-y\n]{2}", r"(?:ab|c)*d", r"\w\s?\S", r"^(a|b)+?c$", r"\.\*\\"]
)
def test_every_answer_matches_its_expression_as_python_reads_it(compiler: Any, pattern: str) -> None:
    trial.try_form(compiler, VOCAB_SIZE, "regex", pattern, list(STOP), True)
    grammar = str(xgrammar.Grammar.from_regex(pattern))
    for answer in derived(compiler, grammar, 25):
        assert re.fullmatch(pattern, answer), answer


@pytest.mark.parametrize(
    "pattern", [r"(?=a)b", r"(a)\1", r"\bfoo", r"a^b", r"a$|b", r"\p{L}", r"(?i)a", r"\Z", r"[^\s\S]"]
)
def test_an_expression_that_xgrammar_reads_otherwise_is_refused(compiler: Any, pattern: str) -> None:
    with pytest.raises(trial.InvalidFormError):
        trial.try_form(compiler, VOCAB_SIZE, "regex", pattern, list(STOP), True)
