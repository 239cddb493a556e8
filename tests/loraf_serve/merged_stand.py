"""Shared by tests of the merged backend: a small model, two checkpoints, a started backend, expected answers."""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraf.base_model import describe
from loraf.checkpoint import Checkpoint
from loraf.tasksets import TaskSet
from loraf_serve.backends.backend import ChoiceDelta, GenerationRequest, Sampling, ServedAdapter
from loraf_serve.backends.merged import MergedBackend
from loraf_serve.backends.output_queue import joined
from tests.standins import linear_shapes, make_model, random_checkpoint, random_values

SETS = ("math", "nlu", "code", "math+code", "math:0.5+nlu:-1.25", "math+nlu+code", "base")
PROMPTS = ("Hello", "What is 7 times 6?\n", "x", "The quick brown fox jumps over the lazy dog. " * 3, "a b c")
GREEDY = Sampling(temperature=0.0, max_tokens=12)


def served(checkpoint: Checkpoint, name: str = "mine") -> ServedAdapter:
    return ServedAdapter(name, checkpoint.path, checkpoint.manifest, checkpoint)


class Stand:
    """A model, two checkpoints for it, a started backend, and a loop for its coroutines.

    The second checkpoint has another seed and fewer target modules. Until `close`, torch uses one thread, because a
    model this small is slower with several.
    """

    def __init__(self, architecture: str, folder: Path, **options):
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.model_folder = make_model(architecture, folder / "model")
        first = random_checkpoint(folder / "first", self.model_folder)
        shapes = {n: s for n, s in linear_shapes(self.model_folder).items() if n.endswith(("q_proj", "down_proj"))}
        base = describe(str(self.model_folder), self.model_folder)
        second = Checkpoint.create(folder / "second", base, 8, shapes, seed=9)
        second.add_task("math", random_values(shapes, 8, ["math"], 0.5, 4)["math"], alpha=16.0, sparsity=0.5)
        self.adapters = {"first": served(first, "first"), "second": served(second, "second")}
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        self.runner = asyncio.Runner()
        self.backend = MergedBackend(self.model_folder, "float32", **options)
        self.run(self.backend.start())
        for adapter in self.adapters.values():
            self.run(self.backend.add_adapter(adapter))
        self.expected = cache(self._expected)
        self._plain = AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=torch.float32).eval()

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def close(self) -> None:
        self.run(self.backend.stop())
        self.runner.close()
        torch.set_num_threads(self._threads)

    def ids(self, prompt: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(prompt)["input_ids"])

    def request(self, prompt: str, task_set: str, sampling: Sampling, adapter: str = "first") -> GenerationRequest:
        served_adapter = self.adapters[adapter]
        tasks = TaskSet.parse(task_set, served_adapter.tasks)
        return GenerationRequest("r", self.ids(prompt), sampling, served_adapter, tasks)

    async def ask(self, prompt, task_set, sampling=GREEDY, adapter="first") -> list[ChoiceDelta]:
        """The complete answers, by index."""
        deltas = []
        async for output in self.backend.generate(self.request(prompt, task_set, sampling, adapter)):
            deltas += output.choices
        return sorted(joined(deltas), key=lambda delta: delta.index)

    def answers(self, *asked) -> list[list[ChoiceDelta]]:
        """Answers to several concurrent requests."""

        async def all_of_them():
            return await asyncio.gather(*(self.ask(*each) for each in asked))

        return self.run(all_of_them())

    @cache  # noqa: B019 - as long as the module's tests
    def merged(self, task_set: str, adapter: str = "first") -> torch.nn.Module:
        """The model with ΔW(S) added by the formula, one task at a time."""
        checkpoint = self.adapters[adapter].checkpoint
        model = AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=torch.float32).eval()
        modules = dict(model.named_modules())
        with torch.no_grad():
            for task, weight in TaskSet.parse(task_set, self.adapters[adapter].tasks).weights:
                scale = weight * checkpoint.manifest.task(task).alpha / checkpoint.manifest.rank
                for name, b in checkpoint.tasks[task].items():
                    modules[name].weight += scale * b.dense() @ checkpoint.projection_of(name)
        return model

    def _expected(self, prompt: str, task_set: str, tokens: int, adapter: str = "first") -> tuple[int, ...]:
        """The greedy answer of transformers' `generate`."""
        ids = torch.tensor([self.ids(prompt)])
        model = self.merged(task_set, adapter)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return tuple(out[0, ids.shape[1] :].tolist())


def only(answers: list[ChoiceDelta]) -> ChoiceDelta:
    assert len(answers) == 1
    return answers[0]
