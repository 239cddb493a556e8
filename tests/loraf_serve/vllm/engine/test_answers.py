"""The text of a vLLM engine's answers is the merged backend's, token by token, whatever the prompt ends with."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.outputs import LogprobsLists

from loraf.tasksets import TaskSet
from loraf_serve.backends.answer_state import AnswerState, DecodingConfig
from loraf_serve.backends.backend import ChoiceDelta, GenerationRequest, Sampling
from loraf_serve.vllm.engine import answers, convert
from tests.loraf_serve.byte_tokenizers import TOKENIZERS, ids_of
from tests.standins import byte_tokenizer

N = 2  # answers to a request, all of the same tokens: nothing else is probable


def converted(converter: convert.Converter, output: RequestOutput) -> list[ChoiceDelta]:
    async def collect() -> list[ChoiceDelta]:
        return [choice async for part in converter.outputs(output) for choice in part.choices]

    return asyncio.run(collect())


def of_vllm(tokenizer, prompt: list[int], answer: list[int], sampling: Sampling) -> list[tuple[str, str, int]]:
    """(text, stop reason, tokens) of each answer, from the part of an engine that runs in the service's process."""
    processor = engine_of(tokenizer)
    params = convert.sampling_params(sampling)
    assert params.output_kind is RequestOutputKind.DELTA

    def request(name: str) -> EngineCoreRequest:
        return EngineCoreRequest(name, prompt, None, params, None, 0.0, None, None, None, external_req_id="r")

    parent = ParentRequest(request("r"))
    names = [parent.get_child_info(index)[0] for index in range(N)]
    for index, name in enumerate(names):
        processor.add_request(request(name), None, parent, index)
    texts, reasons, counts = [""] * N, [""] * N, [0] * N
    converter = convert.Converter(tokenizer, None)
    for position, token in enumerate(answer, 1):
        last = FinishReason.LENGTH if position == len(answer) else None
        step = [EngineCoreOutput(name, [token], finish_reason=last) for name in names]
        for output in processor.process_outputs(step).request_outputs:
            for choice in converted(converter, output):
                texts[choice.index] += choice.text
                reasons[choice.index] += choice.stop_reason
                counts[choice.index] += len(choice.token_ids)
    return list(zip(texts, reasons, counts, strict=True))


def of_merged(tokenizer, prompt: list[int], answer: list[int], sampling: Sampling) -> tuple[str, str, int]:
    config = DecodingConfig(tokenizer, None, frozenset(), 1024)
    state = AnswerState(GenerationRequest("r", tuple(prompt), sampling, None, TaskSet()), 0, config)
    text, reason = "", ""
    for token in answer:
        delta = state.accept(torch.nn.functional.one_hot(torch.tensor(token), len(tokenizer)) * 1e4)
        assert delta.token_ids == (token,)
        text, reason = text + delta.text, delta.stop_reason
        if state.finished:
            break
    return text, reason, len(state.token_ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    text=st.text("ab é🙂日\ufffd", min_size=1, max_size=16),
    place=st.floats(0, 0.99),
    stops=st.lists(st.sampled_from(["a", "b🙂", "é", "🙂", "\ufffd", "日a", " "]), max_size=2, unique=True),
    special=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_the_text_is_that_of_merged(kind, text, place, stops, special):
    tokenizer, ids = TOKENIZERS[kind](), ids_of(kind, text + "b")
    end = max(1, int(place * len(ids)))
    answer = [*ids[end:], tokenizer.eos_token_id, *ids[:3]]
    sampling = Sampling(max_tokens=len(answer), n=N, stop=tuple(stops), ignore_eos=True, skip_special_tokens=special)
    assert of_vllm(tokenizer, ids[:end], answer, sampling) == [of_merged(tokenizer, ids[:end], answer, sampling)] * N


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_prompt_is_neither_repeated_nor_searched_for_stop_texts(kind):
    emoji = ids_of(kind, "ab🙂")
    cases = [(ids_of(kind, "ab\ufffd"), ids_of(kind, "xc"), "xc"), (emoji[:-1], [emoji[-1], *ids_of(kind, "x")], "🙂x")]
    for prompt, answer, text in cases:
        sampling = Sampling(max_tokens=len(answer), n=N, stop=("ab",), ignore_eos=True)
        assert of_vllm(TOKENIZERS[kind](), prompt, answer, sampling) == [(text, "", len(answer))] * N


# --- faults of one answer -----------------------------------------------------------------------------------------


def engine_of(tokenizer) -> OutputProcessor:
    processor = OutputProcessor(tokenizer, log_stats=False)
    answers.install(SimpleNamespace(output_processor=processor, get_tokenizer=lambda: tokenizer))
    return processor


def add(processor: OutputProcessor, name: str, sampling: Sampling) -> RequestOutputCollector:
    queue = RequestOutputCollector(RequestOutputKind.DELTA, name)
    params = convert.sampling_params(sampling)
    request = EngineCoreRequest(name, [1], None, params, None, 0.0, None, None, None, external_req_id=name)
    processor.add_request(request, None, queue=queue)
    return queue


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_log_probabilities_of_tokens_that_only_the_model_has(kind):
    """vLLM's own function raises for them, which ended the engine."""
    tokenizer = TOKENIZERS[kind]()
    processor, beyond, known = engine_of(tokenizer), len(tokenizer) + 3, ids_of(kind, "a")[0]
    queue = add(processor, "r", Sampling(max_tokens=9, logprobs=2))
    lists = LogprobsLists(np.array([[beyond, known, beyond]]), np.array([[-1.0, -0.5, -1.0]]), np.array([2]))
    processor.process_outputs([EngineCoreOutput("r", [beyond], new_logprobs=lists)])
    (choice,) = converted(convert.Converter(tokenizer, 2), queue.get_nowait())
    (position,) = choice.logprobs
    assert (position.chosen.token_id, position.chosen.text, position.chosen.rank) == (beyond, "", 2)
    assert [(token.token_id, token.text) for token in position.top] == [(known, "a"), (beyond, "")]
    assert choice.text == ""


def test_texts_of_tokens_are_those_of_merged_across_steps():
    """A character's last token has its text, also where its first tokens came in an earlier output."""
    tokenizer, emoji = TOKENIZERS["bytes"](), ids_of("bytes", "🙂")
    processor, converter, texts = engine_of(tokenizer), convert.Converter(tokenizer, 0), []
    queue = add(processor, "r", Sampling(max_tokens=9, logprobs=0))
    for token in [*ids_of("bytes", "a"), *emoji]:
        lists = LogprobsLists(np.array([[token]]), np.array([[-1.0]]), np.array([1]))
        processor.process_outputs([EngineCoreOutput("r", [token], new_logprobs=lists)])
        (choice,) = converted(converter, queue.get_nowait())
        texts += [position.chosen.text for position in choice.logprobs]
    assert texts == ["a", "", "", "", "🙂"]


@pytest.mark.parametrize("place", ["text", "log-probabilities"])
def test_a_fault_ends_its_own_answer_alone(monkeypatch, place):
    tokenizer, (letter,) = TOKENIZERS["bytes"](), ids_of("bytes", "a")
    processor = engine_of(tokenizer)
    queues = {name: add(processor, name, Sampling(max_tokens=9, logprobs=0)) for name in ("bad", "good")}
    state = processor.request_states["bad"]
    if place == "text":
        monkeypatch.setattr(state.detokenizer.stream._text, "add", lambda token: 1 // 0)
    else:
        state.logprobs_processor.cumulative_logprob = None
    for _ in range(2):
        lists = LogprobsLists(np.array([[letter]]), np.array([[-1.0]]), np.array([1]))
        processor.process_outputs([EngineCoreOutput(name, [letter], new_logprobs=lists) for name in queues])
    with pytest.raises((ZeroDivisionError, AssertionError)):
        queues["bad"].get_nowait()
    (choice,) = converted(convert.Converter(tokenizer, 0), queues["good"].get_nowait())
    assert choice.text == "aa" and len(choice.logprobs) == 2


def test_many_log_probabilities_leave_the_loop_to_others():
    """A late reader finds many tokens at once: their conversion must not hold up everybody."""
    tokenizer = byte_tokenizer()
    letter = tokenizer.convert_tokens_to_ids("a")
    entries = {letter: Logprob(-0.5, 1, "a")}
    completions = [CompletionOutput(i, "a" * 900, [letter] * 900, None, [entries] * 900) for i in range(3)]
    output = RequestOutput("r", None, [letter], None, completions, finished=False)

    async def scenario() -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        parts = [part async for part in convert.Converter(tokenizer, 1).outputs(output)]
        task.cancel()
        assert [[choice.index for choice in part.choices] for part in parts] == [[0], [1], [2]]
        assert all(len(choice.logprobs) == 900 for part in parts for choice in part.choices)
        assert turns >= 3 * 900 // 64

    asyncio.run(scenario())
