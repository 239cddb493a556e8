"""Compares task sets on vLLM with transformers, for tiny random models of all architectures that vLLM starts on a CPU.

    python benchmarks/architectures.py                    # half an hour on two cores; writes results/architectures.json
    python benchmarks/architectures.py llama4 deepseek_v3 --backends slots --out -
    python benchmarks/architectures.py --page             # only writes the results as docs/reference/architectures.md

For each architecture and backend an engine is started and asked what is proven about the model's linear layers. Then

proven    a checkpoint that adapts all modules that are proven answers like transformers with ΔW added
refused   a checkpoint for each kind of module that is refused is served all the same (benchmarks/unguarded.py); its
          error shows whether the refusal was needed

Errors are the largest difference of a logit, relative to the largest logit, both in float32; effects are the adapter's
own, in the same unit.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit, machine  # noqa: E402
from benchmarks.unguarded import FOLDER  # noqa: E402
from tests.loraf_serve import architectures  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "architectures.md"
RESULT = ROOT / "benchmarks" / "results" / "architectures.json"
BACKENDS = ("resident", "slots")
SETS = ("a", "a+b", "a:0.5+b:-1")
STEPS = 3
NO_LAYER = "vLLM applies no LoRA to this layer"
LIMIT = 1e-4  # errors below it are rounding
BFLOAT16 = 2**-8  # rounding of a bfloat16 number, relative


def try_one(name: str, backend: str, root: Path) -> dict[str, Any]:
    """Runs an engine. Returns what it has shown."""
    model_folder = root / name
    if not model_folder.exists():
        _in_transformers(architectures.build, name, model_folder)
    shapes: architectures.Shapes = _in_transformers(architectures.linear_layers, model_folder)
    shown = asyncio.run(_try_engine(model_folder, backend, shapes, Path(tempfile.mkdtemp(dir=root))))
    return {"linear layers": architectures.last_names(shapes)} | shown


@functools.cache
def _transformers() -> ProcessPoolExecutor:
    """A process without vLLM, which changes classes of transformers."""
    return _new_process()


def _in_transformers(function: Callable[..., Any], *arguments: Any) -> Any:
    return _transformers().submit(function, *arguments).result()


async def _try_engine(folder: Path, backend: str, shapes: architectures.Shapes, scratch: Path) -> dict[str, Any]:
    from loraf_serve.vllm.engine.support import can_serve, can_serve_resident

    obstacle = can_serve(folder) or (can_serve_resident(folder) if backend == "resident" else None)
    if obstacle:
        return {"does not start": obstacle}
    began = time.monotonic()
    try:
        engine = EngineHere(folder, backend)
        await engine.prove()
    except Exception as error:  # whatever vLLM raises for a model that it cannot run here
        traceback.print_exc()
        return {"does not start": _short(error)}
    result: dict[str, Any] = {"seconds to start": round(time.monotonic() - began, 1)}
    try:
        problems = await engine.problems(list(shapes))
        proven = {module: shape for module, shape in shapes.items() if module not in problems}
        result |= {"proven": architectures.last_names(proven), "refused": {}}
        groups = {("", "proven"): proven} if proven else {}
        for module, reason in problems.items():
            groups.setdefault((module.rpartition(".")[2], reason), {})[module] = shapes[module]
        for (last, reason), modules in groups.items():
            checkpoint = scratch / (f"{FOLDER}-{last}" if last else "proven")
            found = await _compare(engine, folder, architectures.make_checkpoint(checkpoint, folder, modules))
            if last:
                result["refused"][last] = {"reason": reason, "modules": len(modules)} | found
            else:
                result |= found
    finally:
        engine.stop()
    return result


class EngineHere:
    """An engine of vLLM in this process, so that vLLM is imported once. Configured as the backend configures it, but
    serves unguarded checkpoints, too."""

    def __init__(self, folder: Path, backend: str):
        from vllm.v1.engine.llm_engine import LLMEngine

        from loraf_serve.vllm.engine.backends import ResidentBackend, SlotsBackend
        from tests.loraf_serve.vllm_engines import COMMON

        options = ("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8")
        self._backend: Any = {"resident": ResidentBackend, "slots": SlotsBackend}[backend](
            folder, (*COMMON, *options), 8
        )
        arguments = self._backend._engine_args()
        arguments.worker_extension_cls = f"benchmarks.unguarded.{backend}"
        arguments.kv_cache_memory_bytes = 64 << 20
        config = arguments.create_engine_config()
        self._backend._configured(config)
        self._engine: Any = LLMEngine.from_vllm_config(config)
        self._ids = itertools.count()
        self._outputs: dict[str, list[Any]] = {}

    async def call(self, method: str, *arguments: object) -> list[Any]:
        results: list[Any] = self._engine.collective_rpc(method, args=arguments)
        return results

    async def prove(self) -> None:
        from vllm.sampling_params import SamplingParams

        from loraf_serve.vllm.worker import probe

        def generate(prompt: list[int], tokens: int) -> AsyncIterator[Any]:
            return self.generate(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))

        await probe.prove_layers(self.call, generate, 1, 512, probe.AT_ONCE)

    async def problems(self, modules: list[str]) -> dict[str, str]:
        """Returns module → why nothing is proven of it."""
        (problems,), (layers,) = await self.call("loraf_problems"), await self.call("loraf_layers")
        (names,) = await self.call("vllm_names", modules)
        found = {module: problems.get(name, "") if name in layers else NO_LAYER for module, name in names.items()}
        return {module: reason for module, reason in found.items() if reason}

    async def generate(self, prompt: Sequence[int], params: Any, lora_request: Any = None) -> AsyncIterator[Any]:
        from vllm.inputs import tokens_input

        request = f"r{next(self._ids)}"
        mine = self._outputs[request] = []
        self._engine.add_request(request, tokens_input(list(prompt)), params, lora_request=lora_request)
        finished = False
        while not finished:
            if not mine:
                for output in self._engine.step():
                    self._outputs[output.request_id].append(output)
            while mine:
                finished = mine[0].finished
                yield mine.pop(0)
            await asyncio.sleep(0)

    async def load(self, adapter: Any) -> None:
        from loraf_serve.vllm.worker import remote

        await remote.load(self.call, str(adapter.path), adapter.tasks, adapter.digest)

    async def logits(self, adapter: Any, text: str, prompt: Sequence[int]) -> tuple[list[int], list[Any]]:
        """Returns the tokens of a greedy answer and the logits (vocabulary,) of each."""
        import torch
        from vllm.sampling_params import SamplingParams

        from loraf.tasksets import TaskSet
        from loraf_serve.vllm.naming import lora_path

        request = None
        if text != "base":
            key = lora_path(adapter.digest, str(TaskSet.parse(text, adapter.tasks)))
            request = self._backend._lora_requests.get(key, ())
        params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True, logprobs=-1)
        async for output in self.generate(prompt, params, request):
            choice = output.outputs[0]
        logits = [torch.tensor([position[i].logprob for i in range(len(position))]) for position in choice.logprobs]
        return list(choice.token_ids), logits

    def stop(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        del self._engine
        cleanup_dist_env_and_memory()


async def _compare(engine: EngineHere, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Loads a checkpoint and compares its answers with transformers."""
    import torch

    from loraf.errors import LorafError
    from tests.loraf_serve.vllm_engines import open_adapter, random_prompt

    adapter, prompt = open_adapter("x", checkpoint), random_prompt(40, seed=7)
    try:
        await engine.load(adapter)
    except (LorafError, RuntimeError) as error:
        return {"not loaded": _short(error)}
    base = _right_logits(folder, checkpoint, "base", prompt)[-1]
    errors, effect = {}, 0.0
    for text in ("base", *SETS):
        tokens, logits = await engine.logits(adapter, text, prompt)
        right = _right_logits(folder, checkpoint, text, prompt + tokens[:-1])[-STEPS:]
        errors[text] = float((torch.stack(logits) - right).abs().max() / right.abs().max())
        effect = max(effect, float((right[0] - base).abs().max() / base.abs().max()))
    return {"base error": errors.pop("base"), "error": max(errors.values()), "effect": effect}


def _right_logits(*arguments: Any) -> Any:
    import torch

    return torch.tensor(_in_transformers(_listed_logits, *arguments))


def _listed_logits(*arguments: Any) -> list[list[float]]:
    return architectures.right_logits(*arguments).tolist()


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def verdict(result: dict[str, Any]) -> str:
    """Says in a word what a result shows. `wrong` must not occur."""
    if "error" not in result:
        return "nothing is served"
    right = result["error"] <= LIMIT < result["effect"]
    if right:
        return "exact"
    if result["base error"] <= LIMIT:
        return "wrong"
    return "exact to bfloat16" if result["error"] <= BFLOAT16 < result["effect"] else "base is inexact"


def page(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Returns the results as a page."""
    rows = []
    for name, backends in sorted(results.items()):
        for backend, result in backends.items():
            refused: dict[str, list[str]] = {}
            for last, found in result.get("refused", {}).items():
                needed = f" ({found['error']:.2g})" if found.get("error", 0) > LIMIT else ""
                reason = next(
                    (short for start, short in SHORT.items() if found["reason"].startswith(start)), "see JSON"
                )
                refused.setdefault(reason, []).append(f"`{last}`{needed}")
            reasons = [f"{', '.join(modules)}: {reason}" for reason, modules in refused.items()]
            error = f"{result['error']:.0e}" if "error" in result else ""
            started = "does not start" not in result and "not tried" not in result
            inexact = " answers " in result.get("does not start", "")
            shown = "; ".join(reasons) if started else ("the base model" if inexact else "does not start")
            rows.append(f"| {name} | `{backend}` | {result['verdict']} | {error} | {shown.replace('|', '/')} |\n")
    return PAGE_TEXT + "".join(rows)


SHORT = {  # beginning of a reason → in the table
    "vLLM's layer holds other rows": "rows in another order",
    "vLLM does not call it": "not always called",
    "vLLM uses a copy": "used twice",
    "vLLM applies no LoRA": "no LoRA",
}
PAGE_TEXT = """# Architectures on vLLM

Tiny random models in float32 on a CPU, compared with transformers with ΔW added
(`benchmarks/results/architectures.json`; `python benchmarks/architectures.py` repeats it). The error is the largest
difference of a logit, relative to the largest logit, over three sets of a checkpoint that adapts every module that is
proven. [How a set is served](../explanation/serving.md) says what is proven.

What is refused is named by the last part of its name, with the error of a checkpoint that adapts it nevertheless, and
the reason. vLLM 0.32 computes mixtures of experts with Triton if LoRA is on, and so not on a CPU; `auto` then
takes `merged`. An architecture that is not listed has not been tried; the server proves the same of it at its start.

vLLM 0.32 answers wrongly for some base models, without any adapter. `resident` and `slots` refuse them, and `auto`
takes `merged`:

- Cohere models with an output head of their own (an error of 1.4). By default their head is the embedding.
- On CPUs, latent attention whose rotary embeddings are not scaled by YaRN (0.43). Those of DeepSeek V2 and V3 are.

Cohere 2 is served, and right within its sliding window. vLLM's window is one token wider than transformers', so that
answers to longer prompts differ (by 0.21 with a window of 16 tokens); vLLM says that the models were trained so.

For Gemma 2 vLLM's attention kernel for CPUs computes soft-capping less exactly than float32: the base model's error is
3e-4, and 3e-7 without soft-capping. bfloat16 weights change the same logits by 6e-3. It is served.

| model | backend | task sets | error | refused |
| --- | --- | --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures (default: all)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--out", default=str(RESULT), help="file for the results, - for none")
    parser.add_argument("--page", action="store_true", help=f"write the results as {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(page(json.loads(RESULT.read_text())["results"]))
        return
    names = arguments.names or list(architectures.ARCHITECTURES)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    results: dict[str, dict[str, Any]] = {}
    if arguments.names and arguments.out != "-" and Path(arguments.out).exists():  # keep the others
        results = json.loads(Path(arguments.out).read_text())["results"]
    with tempfile.TemporaryDirectory() as scratch:
        for backend in arguments.backends:
            pool = _new_process()
            for name in names:
                try:
                    result = pool.submit(try_one, name, backend, Path(scratch)).result()
                except BrokenProcessPool:
                    result, pool = {"does not start": "vLLM's process died"}, _new_process()
                except Exception as error:
                    traceback.print_exc()
                    result, pool = {"does not start": _short(error)}, _new_process()
                result["verdict"] = verdict(result)
                results.setdefault(name, {})[backend] = result
                print(name, backend, json.dumps(result), flush=True)
                if arguments.out != "-":
                    everything = {"machine": machine(), "commit": commit(), "results": results}
                    Path(arguments.out).write_text(json.dumps(everything, indent=1) + "\n")
            pool.shutdown()


def _new_process() -> ProcessPoolExecutor:
    """A process in which one backend is installed."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


if __name__ == "__main__":
    main()
