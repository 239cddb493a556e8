"""The engines that benchmarks/serving.py compares, behind one interface.

plain               vLLM without LoRA
stock               vLLM's own LoRA, with the task sets exported to PEFT
slots, resident     this project's backends on vLLM
merged              this project's backend without vLLM
"""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from loraf import manifest as manifests
from loraf.checkpoint import Checkpoint
from loraf.peft_export import export_peft
from loraf.tasksets import TaskSet
from loraf_serve.backends.backend import GenerationRequest, Sampling, ServedAdapter

Prompt = Sequence[int]


@dataclass(frozen=True)
class Timing:
    """Seconds of one response: until its first token, between tokens, until its end."""

    first: float
    between: tuple[float, ...]
    total: float


class Engine(ABC):
    """One engine with the checkpoints loaded."""

    def __init__(self, name: str, model: Path, compiled: bool, dtype: str):
        self.name = name
        self.model = model
        self.compiled = compiled
        self.options = ("--dtype", dtype, "--max-model-len", "1024", "--max-num-seqs", "128")
        self.options += ("--kv-cache-memory-bytes", str(512 << 20), *(() if compiled else ("--enforce-eager",)))

    @abstractmethod
    async def start(self, checkpoints: dict[str, Path]) -> None: ...

    @abstractmethod
    async def stop(self) -> None: ...

    @abstractmethod
    def pieces(self, checkpoint: str, task_set: str, prompt: Prompt, tokens: int) -> AsyncIterator[int]:
        """Yields the numbers of new tokens as they arrive."""

    async def ask(self, checkpoint: str, sets: Sequence[str], prompts: Sequence[Prompt], tokens: int) -> list[Timing]:
        """Sends all requests at once."""
        return await asyncio.gather(
            *(self._one(checkpoint, text, prompt, tokens) for text, prompt in zip(sets, prompts, strict=True))
        )

    async def _one(self, checkpoint: str, task_set: str, prompt: Prompt, tokens: int) -> Timing:
        begin = time.perf_counter()
        times, received = [], 0
        async for new in self.pieces(checkpoint, task_set, prompt, tokens):
            if new:
                times.append(time.perf_counter())
            received += new
        if received != tokens:
            raise RuntimeError(f"{self.name}: {received} tokens instead of {tokens}")
        between = tuple(b - a for a, b in itertools.pairwise(times))
        return Timing(times[0] - begin, between, times[-1] - begin)

    def worker_bytes(self) -> int:
        """Returns the memory that the worker process does not share (USS), the largest among the engine's processes."""
        (core,) = self.engine().engine_core.resources.engine_manager.processes
        processes = [psutil.Process(core.pid), *psutil.Process(core.pid).children(recursive=True)]
        return max(process.memory_full_info().uss for process in processes)

    @abstractmethod
    def engine(self): ...


class Plain(Engine):
    async def start(self, checkpoints: dict[str, Path]) -> None:
        await asyncio.to_thread(self._start, self._arguments(checkpoints))

    def _arguments(self, checkpoints: dict[str, Path]) -> tuple[str, ...]:
        return ()

    def _start(self, more: tuple[str, ...]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        arguments = parser.parse_args(["--model", str(self.model), "--disable-log-stats", *self.options, *more])
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(arguments))

    async def stop(self) -> None:
        await asyncio.to_thread(self._engine.shutdown, 30.0)

    def engine(self):
        return self._engine

    def _lora(self, checkpoint: str, task_set: str):
        if task_set != "base":
            raise ValueError(f"{self.name} serves no task sets")

    async def pieces(self, checkpoint: str, task_set: str, prompt: Prompt, tokens: int) -> AsyncIterator[int]:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        lora, request_id = self._lora(checkpoint, task_set), f"r{next(_IDS)}"
        async for part in self._engine.generate(tokens_input(list(prompt)), params, request_id, lora_request=lora):
            yield len(part.outputs[0].token_ids)


class Stock(Plain):
    """vLLM's LoRA with the task sets exported to PEFT.

    Args:
        sets: checkpoint → the task sets that requests will name.
    """

    def __init__(self, *args, sets: dict[str, Sequence[str]], folder: Path):
        super().__init__(*args)
        self.sets, self.folder = sets, folder

    def _arguments(self, checkpoints: dict[str, Path]) -> tuple[str, ...]:
        from vllm.lora.request import LoRARequest

        self._requests = {}
        rank = 1
        for name, texts in self.sets.items():
            checkpoint = Checkpoint.open(checkpoints[name])
            rank = max(rank, checkpoint.manifest.rank)
            for text in texts:
                number = len(self._requests) + 1000
                out = self.folder / f"peft-{number}"
                export_peft(checkpoint, TaskSet.parse(text, checkpoint.manifest.task_names), out)
                self._requests[name, text] = LoRARequest(f"set-{number}", number, str(out))
        slots = str(max(1, len(self._requests)))
        return ("--enable-lora", "--max-lora-rank", str(rank), "--max-loras", slots)

    def _lora(self, checkpoint: str, task_set: str):
        return None if task_set == "base" else self._requests[checkpoint, task_set]


class Ours(Engine):
    """`slots` or `resident`."""

    def __init__(self, *args, kind: str, more: Sequence[str] = ()):
        super().__init__(*args)
        self.kind = kind
        self.options += tuple(more)
        self.adapters: dict[str, ServedAdapter] = {}

    async def start(self, checkpoints: dict[str, Path]) -> None:
        from loraf_serve.vllm.engine.backends import ResidentBackend, SlotsBackend

        rank = max((manifests.read(folder).rank for folder in checkpoints.values()), default=64)
        self.backend = {"slots": SlotsBackend, "resident": ResidentBackend}[self.kind](self.model, self.options, rank)
        await self.backend.start()
        for name, folder in checkpoints.items():
            await self.load(name, folder)

    async def load(self, name: str, folder: Path) -> None:
        adapter = ServedAdapter(name, folder, manifests.read(folder))
        await self.backend.add_adapter(adapter)
        self.adapters[name] = adapter

    async def stop(self) -> None:
        await self.backend.stop()

    def engine(self):
        return self.backend._engine

    async def pieces(self, checkpoint: str, task_set: str, prompt: Prompt, tokens: int) -> AsyncIterator[int]:
        adapter = self.adapters[checkpoint]
        sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        request = GenerationRequest("r", tuple(prompt), sampling, adapter, TaskSet.parse(task_set, adapter.tasks))
        async for output in self.backend.generate(request):
            yield sum(len(choice.token_ids) for choice in output.choices)


class Merged(Ours):
    """`merged`, in this process."""

    async def start(self, checkpoints: dict[str, Path]) -> None:
        from loraf_serve.backends.merged import MergedBackend

        self.backend = MergedBackend(self.model, self.options[1], 1024)
        await self.backend.start()
        for name, folder in checkpoints.items():
            await self.load(name, folder)

    async def load(self, name: str, folder: Path) -> None:
        from loraf_serve.adapters.checkpoint_folder import read_values

        adapter = read_values(ServedAdapter(name, folder, manifests.read(folder)))
        await self.backend.add_adapter(adapter)
        self.adapters[name] = adapter


_IDS = itertools.count()
