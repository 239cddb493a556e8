"""A form of an answer harms nobody but its sender, and what is admitted is kept to."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import string
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from loraf.errors import LorafError
from loraf_serve.backends.backend import StructuredOutput
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
def test_a_form_that_kills_its_process_harms_no_other() -> None:
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
            assert first.returncode == -signal.SIGPROF and checker._process is None
            # No other process dies of it.
            assert "takes more than 2 s" in await refusal(checker, ENDLESS)
            assert checker._process is None
            choice = StructuredOutput("choice", ("left", "right"))
            assert await checker.check(choice, STOP) == ("ebnf", 'root ::= "left" | "right"')
            # A cancelled check leaves no answer that the next form would get.
            slow = asyncio.create_task(checker.check(StructuredOutput("json_schema", ENDLESS.value + " "), STOP))
            await asyncio.sleep(0.1)
            slow.cancel()
            await asyncio.gather(slow, return_exceptions=True)
            assert "not defined" in await refusal(checker, StructuredOutput("grammar", "root ::= foo"))
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
