"""The merged backend's answers: task sets and sampling. In float32 its tokens are those of transformers' `generate`."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from loraf.tasksets import TaskSet
from loraf_serve.backends import model_runner
from loraf_serve.backends.backend import GenerationRequest, Sampling, StructuredOutput, UnsupportedField
from loraf_serve.backends.bad_words import token_sequences
from loraf_serve.backends.merged import MergedBackend
from loraf_serve.backends.model_runner import Forward
from loraf_serve.backends.output_queue import joined
from tests.loraf_serve.merged_stand import GREEDY, PROMPTS, SETS, Stand, only
from tests.standins import ARCHITECTURES, linear_shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("merged")


@pytest.fixture(scope="module")
def stand(folder):
    stand = Stand("mistral", folder / "one", turn_steps=5)
    yield stand
    stand.close()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_stand(request, folder):
    stand = Stand(request.param, folder / request.param, turn_steps=3)
    yield stand
    stand.close()


# Answers


def test_every_set_gets_its_own_answer_while_turns_interleave(any_stand):
    asked = list(zip(itertools.cycle(PROMPTS), SETS * 2, strict=False))
    answers = any_stand.answers(*asked)
    expected = [any_stand.expected(prompt, task_set, 12) for prompt, task_set in asked]
    assert [only(each).token_ids for each in answers] == expected
    assert len({any_stand.expected("Hello", task_set, 12) for task_set in SETS}) == len(SETS), "the sets must differ"


@given(
    arrivals=st.lists(
        st.tuples(st.sampled_from(SETS), st.sampled_from(PROMPTS[:3]), st.sampled_from([1, 4, 12]), st.integers(0, 12)),
        min_size=2,
        max_size=7,
    )
)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_order_of_arrivals_changes_an_answer(stand, arrivals):
    async def late(task_set, prompt, tokens, delay):
        await asyncio.sleep(delay / 100)
        return await stand.ask(prompt, task_set, dataclasses.replace(GREEDY, max_tokens=tokens))

    async def all_of_them():
        return await asyncio.gather(*(late(*arrival) for arrival in arrivals))

    for answer, (task_set, prompt, tokens, _) in zip(stand.run(all_of_them()), arrivals, strict=True):
        assert only(answer).token_ids == stand.expected(prompt, task_set, 12)[:tokens]


def test_adapters_that_change_different_modules_do_not_interfere(stand):
    asked = [(PROMPTS[i % 3], s, GREEDY, a) for i, (s, a) in enumerate([("math", "first"), ("math", "second")] * 3)]
    asked += [("Hello", "base", GREEDY, "second")]
    answers = stand.answers(*asked)
    expected = [stand.expected(prompt, task_set, 12, adapter) for prompt, task_set, _, adapter in asked]
    assert [only(each).token_ids for each in answers] == expected


def test_the_base_set_restores_the_original_bits_and_originals_are_kept_once(stand):
    stand.answers(("Hello", "math", GREEDY, "second"), ("Hello", "math+nlu", GREEDY, "first"))
    stand.answers(("Hello", "base"))
    now = stand.backend._weights._model.state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(stand.model_folder).state_dict().items():
        assert torch.equal(now[name], weight), name
    adapted = sum(4 * d_out * d_in for d_out, d_in in linear_shapes(stand.model_folder).values())
    assert stand.backend._weights._originals.resident_bytes == adapted


def test_a_long_prompt_takes_several_chunks_and_the_context_ends_the_answer(stand):
    prompt = "lorem ipsum " * 84  # 1,009 tokens of 1,024
    answer = only(stand.answers((prompt, "nlu", Sampling(temperature=0.0, max_tokens=500, ignore_eos=True)))[0])
    assert (len(answer.token_ids), answer.finish_reason) == (15, "length")
    assert answer.token_ids[:12] == stand.expected(prompt, "nlu", 12)


def test_bfloat16_answers_equal_those_of_the_model_in_bfloat16(stand):
    async def ask():
        backend = MergedBackend(stand.model_folder, "bfloat16")
        await backend.start()
        await backend.add_adapter(stand.adapters["first"])
        outputs = [o async for o in backend.generate(stand.request("Hello", "math+nlu", GREEDY))]
        await backend.stop()
        return [token for output in outputs for token in output.choices[0].token_ids]

    # ΔW is added in float32 to the rounded weights and rounded once.
    model = AutoModelForCausalLM.from_pretrained(stand.model_folder, dtype=torch.bfloat16).eval()
    base = dict(stand._plain.named_parameters())
    with torch.no_grad():
        for (name, weight), merged in zip(model.named_parameters(), stand.merged("math+nlu").parameters(), strict=True):
            weight.copy_((weight.float() + (merged - base[name])).to(torch.bfloat16))
    ids = torch.tensor([stand.ids("Hello")])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert asyncio.run(ask()) == out[0, ids.shape[1] :].tolist()


# Sampling fields


def full_logprobs(stand, prompt: str, token_ids: tuple[int, ...], task_set: str) -> torch.Tensor:
    """(answer's length, vocab), from one pass over prompt and answer."""
    ids = stand.ids(prompt)
    with torch.no_grad():
        logits = stand.merged(task_set)(torch.tensor([[*ids, *token_ids]])).logits[0]
    return logits[len(ids) - 1 : -1].log_softmax(-1)


def check_max_tokens(stand):
    answer = only(stand.answers(("Hello", "math", dataclasses.replace(GREEDY, max_tokens=3)))[0])
    assert (len(answer.token_ids), answer.finish_reason, answer.stop_reason) == (3, "length", "")


def check_min_tokens(stand):
    end = {2: 100.0}
    ends = dataclasses.replace(GREEDY, logit_bias=end)
    held = dataclasses.replace(ends, min_tokens=5)
    first, second = (only(each) for each in stand.answers(("Hello", "math", ends), ("Hello", "math", held)))
    assert (first.token_ids, first.finish_reason, first.stop_reason, first.text) == ((2,), "stop", "", "")
    assert len(second.token_ids) == 6 and second.token_ids[5] == 2 and 2 not in second.token_ids[:5]


def check_temperature(stand):
    hot = [dataclasses.replace(GREEDY, temperature=2.0, seed=seed) for seed in range(3)]
    greedy, *rest = (only(each).token_ids for each in stand.answers(*(("Hello", "math", s) for s in (GREEDY, *hot))))
    assert len({greedy, *rest}) == 4


def check_only_the_likeliest(stand, **fields):
    """A filter that leaves one token makes the hottest answer the greedy one."""
    sampling = Sampling(temperature=2.0, max_tokens=12, seed=1, **fields)
    assert only(stand.answers(("Hello", "math", sampling))[0]).token_ids == stand.expected("Hello", "math", 12)


def check_seed(stand):
    hot = Sampling(max_tokens=12, seed=11, temperature=1.5)
    alone = only(stand.answers(("Hello", "nlu", hot))[0]).token_ids
    company = [("x", "nlu", dataclasses.replace(hot, seed=None)), ("a b c", "nlu", hot), ("x", "math", hot)]
    together = stand.answers(*company, ("Hello", "nlu", hot), *company)
    assert only(together[3]).token_ids == alone
    other = only(stand.answers(("Hello", "nlu", dataclasses.replace(hot, seed=12)))[0])
    assert other.token_ids != alone


def check_stop(stand):
    greedy = only(stand.answers(("Hello", "code", dataclasses.replace(GREEDY, max_tokens=24)))[0])
    stop = next(c for c in greedy.text[3:] if c != "\ufffd")
    sampling = dataclasses.replace(GREEDY, max_tokens=24, stop=("never in it", stop))
    answer = only(stand.answers(("Hello", "code", sampling))[0])
    assert answer.text == greedy.text[: greedy.text.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.token_ids == greedy.token_ids[: len(answer.token_ids)]


def check_stop_token_ids(stand):
    greedy = stand.expected("Hello", "code", 12)
    sampling = dataclasses.replace(GREEDY, stop_token_ids=(greedy[4],))
    answer = only(stand.answers(("Hello", "code", sampling))[0])
    assert answer.token_ids == greedy[: greedy.index(greedy[4]) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", str(greedy[4]))


def check_repetition_penalty(stand):
    ids = torch.tensor([stand.ids("x")])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    out = stand.merged("base").generate(ids, repetition_penalty=1.8, **options)[0, ids.shape[1] :].tolist()
    answer = only(stand.answers(("x", "base", dataclasses.replace(GREEDY, repetition_penalty=1.8)))[0])
    assert list(answer.token_ids) == out != list(stand.expected("x", "base", 12))


def check_penalty(stand, field: str):
    """At -2 a token that came once comes again; at 2 the answer varies more."""
    low, high = (dataclasses.replace(GREEDY, max_tokens=24, ignore_eos=True, **{field: v}) for v in (-2.0, 2.0))
    low, high = (only(each) for each in stand.answers(("Hello", "base", low), ("Hello", "base", high)))
    assert len(set(low.token_ids)) < len(set(high.token_ids))


def check_logit_bias(stand):
    answer = only(stand.answers(("Hello", "math", dataclasses.replace(GREEDY, logit_bias={77: 100.0})))[0])
    assert answer.token_ids == (77,) * 12


def check_logprobs(stand):
    sampling = Sampling(max_tokens=8, temperature=0.7, repetition_penalty=1.5, seed=3, logprobs=4, ignore_eos=True)
    answer = only(stand.answers(("Hello", "math+nlu+code", sampling))[0])
    expected = full_logprobs(stand, "Hello", answer.token_ids, "math+nlu+code")
    assert len(answer.logprobs) == 8
    for position, token, row in zip(answer.logprobs, answer.token_ids, expected, strict=True):
        assert position.chosen.token_id == token
        assert position.chosen.rank == 1 + int((row > row[token]).sum())
        values, ids = row.topk(4)
        assert [t.token_id for t in position.top] == ids.tolist()
        assert [t.rank for t in position.top] == [1, 2, 3, 4]
        got = torch.tensor([position.chosen.logprob, *(t.logprob for t in position.top)])
        torch.testing.assert_close(got, torch.cat([row[token : token + 1], values]), rtol=1e-4, atol=1e-4)
    none, zero = stand.answers(("Hello", "math", GREEDY), ("Hello", "math", dataclasses.replace(GREEDY, logprobs=0)))
    assert only(none).logprobs == () and all(p.top == () for p in only(zero).logprobs)


def check_n(stand):
    sampling = Sampling(max_tokens=6, temperature=1.5, seed=20, n=3)
    answers = stand.answers(("Hello", "math", sampling))[0]
    assert [answer.index for answer in answers] == [0, 1, 2]
    for i, answer in enumerate(answers):
        alone = dataclasses.replace(sampling, n=1, seed=20 + i)
        assert only(stand.answers(("Hello", "math", alone))[0]).token_ids == answer.token_ids


def check_ignore_eos(stand):
    sampling = dataclasses.replace(GREEDY, logit_bias={2: 100.0}, ignore_eos=True)
    answer = only(stand.answers(("Hello", "math", sampling))[0])
    assert (answer.token_ids, answer.finish_reason) == ((2,) * 12, "length")


def check_skip_special_tokens(stand):
    shown = dataclasses.replace(GREEDY, logit_bias={2: 100.0}, ignore_eos=True, max_tokens=2, skip_special_tokens=False)
    hidden = dataclasses.replace(shown, skip_special_tokens=True)
    texts = [only(each).text for each in stand.answers(("Hello", "math", shown), ("Hello", "math", hidden))]
    assert texts == ["</s></s>", ""]


def check_structured_output(stand):
    form = StructuredOutput("regex", "a+")
    with pytest.raises(UnsupportedField, match="structured_output is not supported by the merged backend"):
        stand.answers(("Hello", "math", dataclasses.replace(GREEDY, structured_output=form)))
    assert stand.backend.unsupported_fields == ("sampling.structured_output",)


def check_prompt_logprobs(stand):
    """Against transformers' log-softmax, over several chunks of the prompt."""
    prompt = PROMPTS[3] * 2
    ids = torch.tensor([stand.ids(prompt)])
    assert ids.shape[1] > 2 * model_runner.CHUNK_WITH_LOGITS
    expected = stand.merged("math+code")(ids).logits[0].float().log_softmax(-1)
    request = stand.request(prompt, "math+code", dataclasses.replace(GREEDY, prompt_logprobs=2, n=1))

    async def outputs():
        return [output async for output in stand.backend.generate(request)]

    first, *others = stand.run(outputs())
    assert not any(output.prompt_logprobs for output in others)
    assert first.prompt_logprobs[0] is None and len(first.prompt_logprobs) == ids.shape[1]
    for place, found in enumerate(first.prompt_logprobs[1:]):
        token = int(ids[0, place + 1])
        assert (found.chosen.token_id, len(found.top)) == (token, 2)
        assert found.chosen.logprob == pytest.approx(float(expected[place, token]), abs=1e-4)
        assert [top.logprob for top in found.top] == pytest.approx(expected[place].topk(2).values.tolist(), abs=1e-4)
    answer = only(stand.answers((prompt, "math+code", GREEDY))[0])
    assert joined([d for output in (first, *others) for d in output.choices])[0].token_ids == answer.token_ids


def check_bad_words(stand):
    """Against transformers, which has the same rule for sequences of tokens."""
    prompt, task_set = "Hello", "math"
    for _ in range(3):
        usual = only(stand.answers((prompt, task_set, GREEDY))[0])
        texts = [stand.tokenizer.decode([token]) for token in usual.token_ids]
        i = next(i for i, text in enumerate(texts) if text.isascii() and text.strip() == text and text.isprintable())
        pair = "".join(texts[i : i + 2])
        words = (texts[i] if "\ufffd" in pair or not pair.isprintable() else pair, "no")
        sequences = [ids for each in words for ids in token_sequences(stand.tokenizer, each)]
        answer = only(stand.answers((prompt, task_set, dataclasses.replace(GREEDY, bad_words=words)))[0])
        ids = torch.tensor([stand.ids(prompt)])
        theirs = stand.merged(task_set).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            bad_words_ids=sequences,
        )
        assert answer.token_ids == tuple(theirs[0, ids.shape[1] :].tolist())
        assert answer.token_ids != usual.token_ids
        task_set, prompt = "nlu", prompt + "!"


FIELD_CHECKS = {
    "max_tokens": check_max_tokens,
    "min_tokens": check_min_tokens,
    "temperature": check_temperature,
    "top_p": lambda stand: check_only_the_likeliest(stand, top_p=1e-6),
    "top_k": lambda stand: check_only_the_likeliest(stand, top_k=1),
    "min_p": lambda stand: check_only_the_likeliest(stand, min_p=1.0),
    "seed": check_seed,
    "stop": check_stop,
    "stop_token_ids": check_stop_token_ids,
    "repetition_penalty": check_repetition_penalty,
    "presence_penalty": lambda stand: check_penalty(stand, "presence_penalty"),
    "frequency_penalty": lambda stand: check_penalty(stand, "frequency_penalty"),
    "logit_bias": check_logit_bias,
    "logprobs": check_logprobs,
    "n": check_n,
    "ignore_eos": check_ignore_eos,
    "skip_special_tokens": check_skip_special_tokens,
    "structured_output": check_structured_output,
    "prompt_logprobs": check_prompt_logprobs,
    "bad_words": check_bad_words,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Sampling)])
def test_every_sampling_field_is_supported(stand, name):
    FIELD_CHECKS[name](stand)


def test_further_end_tokens_of_the_generation_config_end_an_answer(stand, folder):
    shutil.copytree(stand.model_folder, folder / "two-ends")
    (folder / "two-ends/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))

    async def ask():
        backend = MergedBackend(folder / "two-ends", "float32")
        await backend.start()
        found = []
        for ignore in (False, True):
            sampling = dataclasses.replace(GREEDY, logit_bias={5: 100.0}, ignore_eos=ignore)
            request = GenerationRequest("r", (1, 9), sampling, None, TaskSet())
            found += joined([d async for output in backend.generate(request) for d in output.choices])
        await backend.stop()
        return found

    ended, ignored = asyncio.run(ask())
    # As in vLLM: only the tokenizer's own end-of-sequence leaves no stop reason.
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ((5,), "stop", "5")
    assert (ignored.token_ids, ignored.finish_reason) == ((5,) * 12, "length")


def test_answers_of_one_request_share_the_prefill(stand, monkeypatch):
    lengths = []
    forward = Forward.__call__

    def counting(self, tokens, *rest):
        lengths.append(sum(map(len, tokens)))
        return forward(self, tokens, *rest)

    monkeypatch.setattr(Forward, "__call__", counting)
    stand.answers(("Hello", "math", Sampling(max_tokens=3, seed=1, n=4, ignore_eos=True)))
    assert lengths == [len(stand.ids("Hello")), 4, 4]
