"""A stock `vllm serve` with loraf installed, with requests from the `openai` client: task sets are models."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from loraf.checkpoint import Checkpoint
from loraf.peft_export import export_peft
from loraf.tasksets import TaskSet
from tests.loraf_serve.references import Merged
from tests.loraf_serve.stock_server import SLOTS, StockServer
from tests.loraf_serve.vllm_engines import BLOCK, random_prompt
from tests.standins import make_model, random_checkpoint

EXAMPLE = Path(__file__).parents[4] / "examples" / "stock-vllm" / "ask.py"
# Model → its task set of ./ckpt.
MODELS = {
    "base": "base",
    "math": "math",
    "trained": "math+nlu",
    "ckpt": "all",
    "ckpt@all": "all",
    "ckpt@base": "base",
    "ckpt@nlu": "nlu",
    "ckpt@math+nlu": "math+nlu",
    "ckpt@math:0.5+nlu": "math:0.5+nlu",
    "ckpt@code:-2+nlu:0.25": "nlu:0.25+code:-2",
    "ckpt@as_trained=code": "all",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockServer]:
    running = StockServer(tmp_path_factory.mktemp("stock"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def merged(server: StockServer) -> Merged:
    return Merged(server.root / "model", Checkpoint.open(server.root / "ckpt"))


@pytest.fixture
def still_answers(server: StockServer) -> Iterator[None]:
    yield
    assert server.alive()


def merged_of(server: StockServer, name: str) -> Merged:
    return Merged(server.root / "model", Checkpoint.open(server.root / name))


def test_every_model_answers_like_the_merged_weights(server: StockServer, merged: Merged) -> None:
    prompt = random_prompt(40, seed=1)
    answers = server.ask(*((model, prompt) for model in MODELS))
    expected = {text: merged.greedy(text, prompt, 8) for text in set(MODELS.values())}
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)  # otherwise the test shows nothing
    for (model, text), answer in zip(MODELS.items(), answers, strict=True):
        assert (model, answer.model, answer.token_ids) == (model, model, expected[text])


def test_sets_and_base_rows_of_one_batch_do_not_affect_each_other(server: StockServer, merged: Merged) -> None:
    """As many sets as slots, with base rows between them, which get another set's delta in vLLM's own CPU path."""
    models = ["base", "math", "base", "ckpt@math:0.5+nlu", "base", "ckpt@nlu", "base", "ckpt"]
    assert len(set(models) - {"base"}) == SLOTS
    prompts = [random_prompt(length, seed=100 + length) for length in (1, 3, 17, 60, 61, 80, 5, 130)]
    for _ in range(2):  # the second time with filled slots
        answers = server.ask(*zip(models, prompts, strict=True), max_tokens=24)
        for model, prompt, answer in zip(models, prompts, answers, strict=True):
            assert answer.token_ids == merged.greedy(MODELS[model], prompt, 24), model


def test_the_prefix_cache_does_not_mix_sets(server: StockServer, merged: Merged) -> None:
    prompt = random_prompt(2 * BLOCK + 50, seed=2)
    for model in ("math", "base", "ckpt@nlu", "ckpt@math:0.5+nlu"):
        for cached in (0, 2 * BLOCK):
            (answer,) = server.ask((model, prompt))
            assert (model, answer.cached) == (model, cached)
            assert answer.token_ids == merged.greedy(MODELS[model], prompt, 8)


def test_equivalent_spellings_of_a_set_are_one_set(server: StockServer, merged: Merged) -> None:
    prompt = random_prompt(20, seed=3)
    spellings = ("ckpt@nlu+math", "ckpt@math:1+nlu:1.0", "ckpt@code:0+math+nlu", "ckpt@as_trained=nlu")
    for answer in server.ask(*((model, prompt) for model in spellings)):
        assert answer.token_ids == merged.greedy("math+nlu", prompt, 8)
    roots = {model.id: model.model_extra["root"] for model in server.client.models.list().data}
    digest = Checkpoint.open(server.root / "ckpt").manifest.adapter_digest
    assert {roots[model] for model in spellings} == {f"loraf:{digest}:math+nlu"} == {roots["trained"]}


def test_chat_uses_the_task_set(server: StockServer) -> None:
    def ask(model: str) -> str:
        messages = [{"role": "user", "content": "What is 2 + 2?"}]
        completion = server.client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
        assert completion.model == model
        return completion.choices[0].message.content

    assert ask("ckpt@math") == ask("math") != ask("base")


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("ckpt@maths", openai.NotFoundError, ["there is no task 'maths'", "choose from: math, nlu, code"]),
        ("ckpt@math+nope", openai.NotFoundError, ["there is no task 'nope'"]),
        ("ckpt@as_trained=nope", openai.NotFoundError, ["there is no task 'nope'"]),
        ("nope@math", openai.NotFoundError, ["there is no checkpoint 'nope'", "choose from: ckpt, moving"]),
        ("math@nlu", openai.NotFoundError, ["there is no checkpoint 'math'"]),  # it is one set
        ("nope", openai.NotFoundError, ["The model `nope` does not exist"]),
        ("ckpt@math:17", openai.BadRequestError, ["weight 17.0 is out of range"]),
        ("ckpt@math:nan", openai.BadRequestError, ["weight nan is out of range"]),
        ("ckpt@math:x", openai.BadRequestError, ["weight 'x' is not a number", "math:0.5"]),
        ("ckpt@math+math", openai.BadRequestError, ["task 'math' is named twice"]),
        ("ckpt@", openai.NotFoundError, ["there is no task ''"]),
    ],
)
@pytest.mark.usefixtures("still_answers")
def test_an_unknown_name_is_refused_with_the_reason(
    server: StockServer, model: str, kind: type, words: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        server.ask((model, [1, 5]))
    for word in words:
        assert word in caught.value.message


@pytest.mark.usefixtures("still_answers")
def test_a_changed_folder_is_refused_and_earlier_names_stay(server: StockServer) -> None:
    prompt = random_prompt(30, seed=4)
    before = merged_of(server, "moving").greedy("math", prompt, 8)
    assert server.ask(("moving@math", prompt))[0].token_ids == before
    folder = server.root / "moving"
    folder.rename(server.root / "moved")
    random_checkpoint(folder, server.root / "model", seed=9)
    assert merged_of(server, "moving").greedy("math", prompt, 8) != before

    assert server.ask(("moving@math", prompt))[0].token_ids == before
    with pytest.raises(openai.BadRequestError, match="was changed since this server read it"):
        server.ask(("moving@nlu", prompt))
    status, text = server.post("/v1/load_lora_adapter", lora_name="again", lora_path="./moving@math")
    assert (status, "was changed since this server read it" in text) == (400, True)

    shutil.rmtree(folder)
    (server.root / "moved").rename(folder)
    expected = merged_of(server, "moving").greedy("nlu", prompt, 8)
    assert server.ask(("moving@nlu", prompt))[0].token_ids == expected


@pytest.mark.usefixtures("still_answers")
def test_a_checkpoint_loaded_while_serving(server: StockServer) -> None:
    prompt = random_prompt(30, seed=5)
    expected = merged_of(server, "spare")
    load = {"lora_name": "late", "lora_path": "./spare"}
    assert server.post("/v1/load_lora_adapter", **load)[0] == 200
    for model, text in (("late", "all"), ("late@code", "code")):
        assert server.ask((model, prompt))[0].token_ids == expected.greedy(text, prompt, 8)

    status, text = server.post("/v1/load_lora_adapter", **load)
    assert (status, "already been loaded" in text) == (400, True)
    assert server.post("/v1/load_lora_adapter", **load, load_inplace=True)[0] == 200  # the same content

    assert server.post("/v1/unload_lora_adapter", lora_name="late")[0] == 200
    with pytest.raises(openai.NotFoundError):
        server.ask(("late", prompt))
    with pytest.raises(openai.NotFoundError, match="there is no checkpoint 'late'"):
        server.ask(("late@math", prompt))
    status, text = server.post("/v1/load_lora_adapter", lora_name="late", lora_path="./ckpt")
    assert (status, "'late' already stands for" in text) == (400, True)
    assert server.post("/v1/load_lora_adapter", **load)[0] == 200
    assert server.ask(("late", prompt))[0].token_ids == expected.greedy("all", prompt, 8)


@pytest.mark.usefixtures("still_answers")
def test_a_checkpoint_that_cannot_be_served_is_refused(server: StockServer, tmp_path: Path) -> None:
    root = server.root
    other = make_model("mistral", tmp_path / "other-model", seed=1)
    random_checkpoint(tmp_path / "other", other)
    random_checkpoint(tmp_path / "large", root / "model", rank=32)
    shutil.copytree(root / "ckpt", tmp_path / "copy")
    shutil.copytree(root / "spare", tmp_path / "damaged")
    random_checkpoint(tmp_path / "new", root / "model", seed=7)  # contents that the workers do not hold
    damaged = [tmp_path / name / "tasks" / "nlu.safetensors" for name in ("copy", "damaged", "new")]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    (tmp_path / "empty").mkdir()
    refused = {
        f"{tmp_path}/other": (400, "other weights", "LORAF_ALLOW_OTHER_BASE=1"),
        f"{tmp_path}/large": (400, "rank 32 is beyond the engine's largest, 16", "--max-lora-rank"),
        f"{tmp_path}/damaged": (400, "is not the file that the manifest lists"),
        f"{tmp_path}/damaged@math": (400, "is not the file that the manifest lists"),
        f"{tmp_path}/copy@math": (400, "is not the file that the manifest lists"),
        f"{tmp_path}/new@math": (400, "is not the file that the manifest lists"),
        f"{tmp_path}/empty@math": (400, "there is no loraf.json"),
        "./nowhere@math": (400, "there is no checkpoint './nowhere'"),
        "./spare@maths": (404, "there is no task 'maths'"),
        "@math": (400, "names no checkpoint"),
        "loraf:0123:math": (400, "is reserved for the server itself"),
    }
    for path, (expected, *words) in refused.items():
        status, text = server.post("/v1/load_lora_adapter", lora_name="refused", lora_path=path)
        assert (path, status) == (path, expected), text
        assert [word for word in words if word not in text] == [], text
    for file in damaged:  # vLLM removes paths from its responses
        assert str(file) in server.log
    assert "refused" not in {model.id for model in server.client.models.list().data}
    assert server.post("/v1/load_lora_adapter", lora_name="math", lora_path="./ckpt@nlu", load_inplace=True)[0] == 400


@pytest.mark.usefixtures("still_answers")
def test_peft_adapters_are_served_too(server: StockServer, merged: Merged) -> None:
    checkpoint = Checkpoint.open(server.root / "ckpt")
    export_peft(checkpoint, TaskSet.parse("nlu:-1+code", checkpoint.manifest.task_names), server.root / "peft")
    assert server.post("/v1/load_lora_adapter", lora_name="plain", lora_path="./peft")[0] == 200
    prompt = random_prompt(30, seed=6)
    models = {"plain": "nlu:-1+code", "base": "base", "math": "math"}
    for (model, text), answer in zip(models.items(), server.ask(*((m, prompt) for m in models)), strict=True):
        assert (model, answer.token_ids) == (model, merged.greedy(text, prompt, 8))
    # A name stands for one content, LoRAF's or vLLM's.
    for name, path in (("plain", "./ckpt@math"), ("math", "./peft")):
        again = server.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, load_inplace=True)
        assert (again[0], "already stands for" in again[1]) == (400, True)


def test_the_example(server: StockServer) -> None:
    command = [sys.executable, str(EXAMPLE), "Reverse: kitten", "ckpt@math", "base", "ckpt@nope", "--url", server.url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = run.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ckpt@math", "base", "ckpt@nope"], run.stderr
    assert lines[0].removeprefix("ckpt@math") != lines[1].removeprefix("base")
    assert "refused" in lines[2] and "there is no task 'nope'" in lines[2]
