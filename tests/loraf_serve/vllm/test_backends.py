"""The slots and the resident backend on real engines: sampling, cancellation, adapters that differ or are refused."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.errors import BaseMismatch, CheckpointError, ConfigError, CorruptCheckpoint, LorafError, UnknownTask
from loraf_serve.adapters.library import AdapterLibrary
from loraf_serve.adapters.registry import Registry
from loraf_serve.vllm.engine.backends import SlotsBackend
from tests.loraf_serve.harness import counting_opens
from tests.loraf_serve.references import Merged
from tests.loraf_serve.vllm_engines import SLOTS, Engine, Pool, open_adapter, random_prompt, shared
from tests.standins import linear_shapes, make_model, random_checkpoint, random_values

pytestmark = shared("mistral")
PROMPT = [3 + 37 * i % 94 for i in range(12)]  # printable, so that the text begins with a whole character


@pytest.fixture(scope="session", params=["slots", "resident"])
def engine(request: pytest.FixtureRequest, vllm_pool: Pool) -> Engine:
    return vllm_pool.get("mistral", request.param)


@pytest.fixture(scope="session")
def merged(engine: Engine) -> Merged:
    return Merged(engine.folder, engine.adapter.checkpoint)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 10) -> bool:
    deadline = asyncio.get_running_loop().time() + seconds
    while not await condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


# Sampling


def test_deltas_add_up_to_the_text_and_the_last_has_the_finish_reason(engine: Engine) -> None:
    tokenizer = engine.backend.tokenizer
    letters = dict.fromkeys(tokenizer.encode("".join(map(chr, range(32, 127))), add_special_tokens=False), 50.0)
    prompt = tokenizer.encode("Say something:")
    (answer,) = engine.ask(engine.request("all", prompt, max_tokens=20, logit_bias=letters))
    assert answer.finish_reason == "length" and answer.stop_reason == "" and len(answer.token_ids) == 20
    assert answer.text == tokenizer.decode(answer.token_ids) and answer.text.isascii()
    assert answer.logprobs == []
    assert engine.backend.max_model_len == 1024


def test_stop_texts_and_stop_tokens(engine: Engine) -> None:
    (whole,) = engine.ask(engine.request("all", PROMPT, max_tokens=20))
    token = next(t for t in whole.token_ids[2:] if t not in whole.token_ids[:2])
    at = whole.token_ids.index(token)
    (stopped,) = engine.ask(engine.request("all", PROMPT, max_tokens=20, stop_token_ids=(token,), ignore_eos=False))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", str(token))
    assert stopped.token_ids == whole.token_ids[: at + 1]
    (later,) = engine.ask(
        engine.request("all", PROMPT, max_tokens=20, stop_token_ids=(token,), min_tokens=at + 2, ignore_eos=False)
    )
    assert len(later.token_ids) >= at + 2

    bias = {engine.backend.tokenizer.encode(letter, add_special_tokens=False)[0]: 100.0 for letter in "a"}
    (text,) = engine.ask(engine.request("all", PROMPT, max_tokens=9, logit_bias=bias, stop=("aaa",)))
    assert (text.text, text.finish_reason, text.stop_reason) == ("", "stop", "aaa")
    assert len(text.token_ids) == 3


def test_a_prompt_that_ends_within_a_character_is_continued_and_not_repeated(engine: Engine) -> None:
    def ids(text: str) -> list[int]:
        return engine.backend.tokenizer.encode(text, add_special_tokens=False)

    emoji, sign, (letter,) = ids("ab🙂"), ids("ab\ufffd"), ids("x")
    completed, after, other = engine.ask(
        engine.request("all", emoji[:-1], max_tokens=1, logit_bias={emoji[-1]: 100.0}, stop=("ab",)),
        engine.request("base", sign, max_tokens=3, logit_bias={letter: 100.0}, stop=("b\ufffd",)),
        engine.request("all", emoji[:-1], max_tokens=3, logit_bias={letter: 100.0}, stop=("ab",)),
    )
    assert [answer.text for answer in (completed, after, other)] == ["🙂", "xxx", "xxx"]
    assert {answer.finish_reason for answer in (completed, after, other)} == {"length"}


def test_the_end_of_sequence_token_ends_an_answer_unless_it_is_ignored(engine: Engine) -> None:
    bias = {engine.backend.tokenizer.eos_token_id: 100.0}
    ended, ignored = engine.ask(
        engine.request("base", PROMPT, logit_bias=bias, ignore_eos=False),
        engine.request("base", PROMPT, logit_bias=bias, ignore_eos=True, skip_special_tokens=False),
    )
    assert (ended.finish_reason, ended.text) == ("stop", "")
    assert (ignored.finish_reason, ignored.text) == ("length", "</s>" * 8)


def test_logprobs(engine: Engine) -> None:
    """The test engine returns logits as log-probabilities."""
    (answer,) = engine.ask(engine.request("math", PROMPT, max_tokens=5, logprobs=3))
    merged = Merged(engine.folder, engine.adapter.checkpoint)
    logits = merged.logits("math", PROMPT + answer.token_ids[:-1])[-5:]
    for token_id, position, row in zip(answer.token_ids, answer.logprobs, logits, strict=True):
        best = row.topk(3)
        assert [token.token_id for token in position.top] == best.indices.tolist()
        assert [token.logprob for token in position.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert [token.rank for token in position.top] == [1, 2, 3]
        assert position.chosen == position.top[0] and position.chosen.token_id == token_id
    (chosen_only,) = engine.ask(engine.request("math", PROMPT, max_tokens=5, logprobs=0))
    assert [len(position.top) for position in chosen_only.logprobs] == [0] * 5
    letter = engine.backend.tokenizer.encode("g", add_special_tokens=False)[0]
    (forced,) = engine.ask(engine.request("math", PROMPT, max_tokens=1, logprobs=2, logit_bias={letter: 100.0}))
    position = forced.logprobs[0]
    assert (position.chosen.token_id, position.chosen.text) == (letter, "g")
    assert position.chosen.rank == int((logits[0] > logits[0, letter]).sum()) + 1 > 2
    assert [token.token_id for token in position.top] == logits[0].topk(2).indices.tolist()


def test_several_answers_and_seeds(engine: Engine) -> None:
    def several(seed: int) -> list[list[int]]:
        request = engine.request("all", PROMPT, temperature=1.5, n=3, seed=seed, max_tokens=12)
        answers = engine.loop.run(engine.answers(request))
        assert [answer.finish_reason for answer in answers] == ["length"] * 3
        return [answer.token_ids for answer in answers]

    first = several(1)
    assert all(len(token_ids) == 12 for token_ids in first) and len({tuple(t) for t in first}) == 3
    assert several(1) == first and several(2) != first


def test_every_sampling_field_reaches_vllm() -> None:
    from loraf_serve.backends.backend import Sampling, StructuredOutput
    from loraf_serve.vllm.engine.convert import sampling_params

    sampling = Sampling(
        max_tokens=7, min_tokens=3, temperature=0.7, top_p=0.8, top_k=5, min_p=0.1, seed=9, stop=("x", "y"),
        stop_token_ids=(4, 5), repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.3,
        logit_bias={3: -1.0}, logprobs=2, n=2, ignore_eos=True, skip_special_tokens=False,
        structured_output=StructuredOutput("regex", "a+"), prompt_logprobs=3, bad_words=("z",),
    )  # fmt: skip
    assert all(getattr(sampling, f.name) != getattr(Sampling(), f.name) for f in dataclasses.fields(Sampling))
    params = sampling_params(sampling, ("regex", "a+"))
    assert params.structured_outputs is not None and params.structured_outputs.regex == "a+"
    for field in dataclasses.fields(Sampling):
        if field.name == "structured_output":  # has another name and type there
            continue
        value = getattr(sampling, field.name)
        assert getattr(params, field.name) == (list(value) if isinstance(value, tuple) else value), field.name


def test_penalties_and_truncation_change_the_answer(engine: Engine) -> None:
    loop = random_prompt(1, seed=7) * 30
    plain, penalised = engine.ask(
        engine.request("base", loop, max_tokens=20),
        engine.request("base", loop, max_tokens=20, repetition_penalty=1.8, presence_penalty=2, frequency_penalty=2),
    )
    assert len(set(penalised.token_ids)) > len(set(plain.token_ids)) or penalised.token_ids != plain.token_ids
    greedy, narrowed = engine.ask(
        engine.request("nlu", PROMPT), engine.request("nlu", PROMPT, temperature=2.0, top_k=1, seed=1)
    )
    assert narrowed.token_ids == greedy.token_ids


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        (PROMPT, {"top_p": 2.0}, r"^sampling\.top_p: .*2\.0\.?$"),
        (PROMPT, {"logit_bias": {100_000: 1.0}}, r"^sampling\.logit_bias: .*100000"),
        (PROMPT, {"n": 2}, "greedy"),
        ([1, 100_000], {}, "100000"),
        (random_prompt(1030, seed=1), {}, "1024"),
    ],
)
def test_a_request_that_vllm_refuses_is_an_ordinary_error(engine: Engine, prompt, sampling, words: str) -> None:
    for text in ("base", "math"):
        with pytest.raises(LorafError, match=words):
            engine.ask(engine.request(text, prompt, **sampling))
    assert len(engine.ask(engine.request("math", PROMPT))[0].token_ids) == 8
    assert not engine.sets_in_use()


# Cancellation


@pytest.mark.parametrize("text", ["base", "math"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("cancelled", ["task", "iterator"])
def test_a_cancelled_request_leaves_the_engine_at_once(engine: Engine, text: str, n: int, cancelled: str) -> None:
    async def scenario() -> None:
        request = engine.request(text, PROMPT, max_tokens=900, n=n, temperature=1.0)
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in engine.backend.generate(request):
                begun.set()

        if cancelled == "task":
            task = asyncio.ensure_future(read())
            await asyncio.wait_for(begun.wait(), 60)
            assert await engine.busy()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            outputs = engine.backend.generate(request)
            await anext(outputs)
            assert await engine.busy()
            await outputs.aclose()
        assert engine.backend._engine.get_num_unfinished_requests() == 0
        assert await until(lambda: _not(engine.busy()), 5)
        assert not engine.sets_in_use() and not engine.backend._request_ids

    engine.loop.run(scenario())


async def _not(condition: Awaitable[bool]) -> bool:
    return not await condition


def test_cancellation_at_any_moment_leaves_nothing_behind(engine: Engine) -> None:
    """Also before the request is in the engine, and while it waits for a slot."""
    texts = ["math", "nlu", "code", "all", "base", "math:2", "nlu:3"]

    async def scenario() -> None:
        tasks = []
        for i in range(60):
            request = engine.request(texts[i % len(texts)], PROMPT, max_tokens=100)
            tasks.append(asyncio.ensure_future(engine.answers(request)))
            if i % 3:
                asyncio.get_running_loop().call_later(0.003 * (i % 17), tasks[-1].cancel)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for i, outcome in enumerate(outcomes):
            if i % 3:
                assert isinstance(outcome, asyncio.CancelledError | list)
            else:
                assert len(outcome[0].token_ids) == 100
        assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) > 20
        assert await until(lambda: _not(engine.busy()), 5)
        assert not engine.sets_in_use() and not engine.backend._request_ids
        assert not engine.backend._engine.output_processor.parent_requests

    engine.loop.run(scenario())


def test_a_set_that_waits_does_not_starve(engine: Engine, merged: Merged) -> None:
    """Steady streams for as many sets as slots, of different lengths, so that no set is ever without requests.

    vLLM alone would keep starting requests of the running sets and never start one of another set.
    """
    busy = ["math", "nlu", "code"]
    assert len(busy) == SLOTS
    lengths = (23, 29, 37, 51)

    async def scenario() -> list[int]:
        stop = asyncio.Event()
        served = 0

        async def stream(text: str, length: int) -> None:
            nonlocal served
            while not stop.is_set():
                await engine.answers(engine.request(text, PROMPT, max_tokens=length))
                served += 1

        streams = [asyncio.ensure_future(stream(text, length)) for text in busy for length in lengths]
        assert await until(lambda: _true(served > 10), 60)
        before = served
        patient = asyncio.ensure_future(engine.answers(engine.request("math+nlu", PROMPT, max_tokens=4)))
        answered = await until(lambda: _true(patient.done() or served > before + 100), 60)
        stop.set()
        await asyncio.gather(*streams)
        (answer,) = await patient
        # Until one set is done (at most 51 tokens), each of the eleven other streams gets two or three answers.
        assert answered and served - before <= 60
        return answer.token_ids

    assert engine.loop.run(scenario()) == merged.greedy("math+nlu", PROMPT, 4)


async def _true(value: bool) -> bool:
    return value


# Adapters


def test_different_checkpoints_at_once(engine: Engine, merged: Merged, tmp_path: Path) -> None:
    """Another seed, another rank, other target modules (only some parts of fused layers), a subset of the tasks."""
    base = describe("stand-in", engine.folder)
    all_shapes = linear_shapes(engine.folder)
    adapters = [open_adapter("seed", random_checkpoint(tmp_path / "seed", engine.folder, seed=5).path)]
    adapters.append(open_adapter("rank", random_checkpoint(tmp_path / "rank", engine.folder, rank=8, seed=6).path))
    for name, targets in (("few", ("v_proj", "down_proj")), ("up", ("up_proj", "q_proj"))):
        shapes = {module: shape for module, shape in all_shapes.items() if module.endswith(targets)}
        checkpoint = Checkpoint.create(tmp_path / name, base, 16, shapes, 7)
        for task, values in random_values(shapes, 16, ("math", "code"), 0.5, 7).items():
            checkpoint.add_task(task, values, alpha=32.0, sparsity=0.5)
        adapters.append(open_adapter(name, tmp_path / name))
    adapters.append(open_adapter("subset", engine.adapter.path, ["code", "math"]))
    for adapter in adapters:
        engine.loop.run(engine.backend.add_adapter(adapter))

    requests = [engine.request("math:0.5+code", PROMPT, adapter) for adapter in [engine.adapter, *adapters]]
    answers = engine.ask(*requests, *requests)
    first = [answer.token_ids for answer in answers[: len(requests)]]
    assert first == [answer.token_ids for answer in answers[len(requests) :]]
    for adapter, token_ids in zip([engine.adapter, *adapters], first, strict=True):
        assert token_ids == Merged(engine.folder, adapter.checkpoint).greedy("math:0.5+code", PROMPT, 8), adapter.name
    assert first[-1] == first[0] and len({tuple(token_ids) for token_ids in first}) == len(first) - 1


def test_an_adapter_that_is_not_loaded_is_refused(engine: Engine, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "other", engine.folder, seed=9)
    adapter = open_adapter("other", tmp_path / "other")
    with pytest.raises(UnknownTask, match="'other' is not loaded"):
        engine.ask(engine.request("math", PROMPT, adapter))


def answers_still(engine: Engine, merged: Merged) -> bool:
    (answer,) = engine.ask(engine.request("all", PROMPT))
    return answer.token_ids == merged.greedy("all", PROMPT, 8)


def flip_a_bit(folder: Path) -> None:
    file = folder / "tasks" / "nlu.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def remove_a_file(folder: Path) -> None:
    (folder / "tasks" / "code.safetensors").unlink()


def replace_by_another(folder: Path) -> None:
    """Replaces the checkpoint by a valid one with other contents."""
    old = Checkpoint.open(folder)
    shutil.rmtree(folder)
    other = Checkpoint.create(folder, old.manifest.base_model, old.manifest.rank, _shapes(old), seed=77)
    for task, values in old.tasks.items():
        other.add_task(task, values, alpha=1.0, sparsity=old.manifest.task(task).sparsity)


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    return {name: (module.d_out, module.d_in) for name, module in checkpoint.manifest.modules.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_a_bit, "nlu.safetensors.*SHA-256"),
        (remove_a_file, "code.safetensors"),
        (replace_by_another, "changed while"),
    ],
)
def test_a_checkpoint_changed_after_it_was_verified_is_refused(
    engine: Engine, merged: Merged, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "checkpoint"
    random_checkpoint(folder, engine.folder, seed=hash(change.__name__) % 1000)
    adapter = open_adapter("changed", folder)
    change(folder)
    with pytest.raises(CorruptCheckpoint, match=words):
        engine.loop.run(engine.backend.add_adapter(adapter))
    with pytest.raises(CorruptCheckpoint, match=words):  # also when a server starts with it
        engine.loop.run(AdapterLibrary(engine.backend, Registry([adapter])).start())
    assert answers_still(engine, merged)
    with pytest.raises(UnknownTask):
        engine.ask(engine.request("math", PROMPT, adapter))


def test_a_loaded_checkpoint_no_longer_needs_its_files(engine: Engine, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "gone", engine.folder, seed=11)
    adapter = open_adapter("gone", checkpoint.path)
    with counting_opens(checkpoint.path / "tasks") as opens:
        registry = Registry([dataclasses.replace(adapter, checkpoint=None)])
        engine.loop.run(AdapterLibrary(engine.backend, registry).start())
    assert not opens  # only the workers read task files
    shutil.rmtree(checkpoint.path)
    texts = [f"math:{1 + i / 4}" for i in range(4 * SLOTS)]  # more than the engine keeps built
    expected = Merged(engine.folder, adapter.checkpoint)
    for _ in range(2):
        answers = engine.ask(*(engine.request(text, PROMPT, adapter, max_tokens=3) for text in texts))
        for text, answer in zip(texts, answers, strict=True):
            assert answer.token_ids == expected.greedy(text, PROMPT, 3)


def test_a_rank_that_was_not_known_at_start(engine: Engine, merged: Merged, tmp_path: Path) -> None:
    """Slots have a largest rank and refuse a larger one. The resident backend has no limit on the CPU."""
    random_checkpoint(tmp_path / "wide", engine.folder, rank=17)
    adapter = open_adapter("wide", tmp_path / "wide")
    if engine.kind == "slots":
        with pytest.raises(CheckpointError, match="rank 17 is beyond .* 16 .*--max-lora-rank"):
            engine.loop.run(engine.backend.add_adapter(adapter))
    else:
        engine.loop.run(engine.backend.add_adapter(adapter))
        (answer,) = engine.ask(engine.request("all", PROMPT, adapter))
        assert answer.token_ids == Merged(engine.folder, adapter.checkpoint).greedy("all", PROMPT, 8)
    assert answers_still(engine, merged)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lm_head": (320, 128), "model.embed_tokens": (320, 128), "model.layers.9.mlp.up_proj": (192, 128)},
        {"model.layers.0.mlp.up_proj": (193, 128), "model.layers.0.self_attn.k_proj": (64, 64)},
    ],
    ids=["no layers", "other shapes"],
)
def test_another_model_and_layers_without_lora_are_refused_by_name(
    engine: Engine, merged: Merged, tmp_path, wrong: dict[str, tuple[int, int]]
) -> None:
    shapes = linear_shapes(engine.folder)
    checkpoint = Checkpoint.create(tmp_path / "odd", describe("stand-in", engine.folder), 16, shapes | wrong, 3)
    for task, values in random_values(shapes | wrong, 16, ("math",), 0.75, 3).items():
        checkpoint.add_task(task, values, alpha=16.0, sparsity=0.75)
    with pytest.raises(BaseMismatch) as refused:
        engine.loop.run(engine.backend.add_adapter(open_adapter("odd", tmp_path / "odd")))
    assert {problem.field for problem in refused.value.problems} == set(wrong)
    assert all(problem.remedy for problem in refused.value.problems)
    assert answers_still(engine, merged)


def test_options_and_models_that_vllm_refuses_are_reported_before_an_engine_starts(tmp_path: Path) -> None:
    folder = make_model("mistral", tmp_path / "model")
    for options, words in ((["--max-model-len", "100000"], "max_model_len"), (["--quantization", "awq"], "awq")):
        with pytest.raises(ConfigError, match=words) as refused:
            asyncio.run(SlotsBackend(folder, options, 16).start())
        assert "pydantic" not in str(refused.value) and "input_value" not in str(refused.value)
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ConfigError, match="does not support LoRA for GPT2LMHeadModel"):
        asyncio.run(SlotsBackend(folder, [], 16).start())
