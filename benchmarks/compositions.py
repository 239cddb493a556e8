"""Compares ways to compose LoRAs per request: exactness, throughput of mixed batches, memory of a composition.

    python benchmarks/compositions.py                 # five minutes on two cores; writes results/compositions.json
    python benchmarks/compositions.py --rounds 0      # only exactness and memory

`loraf` (resident) and PEFT (`add_weighted_adapter`) are run. LoRAX and llama.cpp are not: their formulas are worked out
here as their sources state them (SOURCES), so that the table shows what they would add to the weights, not how fast.

Ratios are taken within a round, between batches of the same system: 16 requests with 16 mixes to 16 requests with one.
Systems are not compared with each other in speed, since one runs on vLLM and the other on transformers.

The model is the one of benchmarks/serving.py, in float32; the tasks have rank 64. `one A`: the tasks of a checkpoint of
LoRAF, exported. `own A`: plain LoRAs, which LoRAF cannot compose.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.engines import Ours  # noqa: E402
from benchmarks.measuring import commit, interval, machine  # noqa: E402
from benchmarks.serving import PROMPT, TOKENS, make_model  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "compositions.json"
SOURCES = {
    "peft": "add_weighted_adapter of the installed version",
    "lorax": "predibase/lorax a7394ba386ec, server/lorax_server/utils/merges/strategies.py, adapters/lora.py",
    "llama.cpp": "as shipped in llama-cpp-python 0.3.36: src/llama-graph.cpp (build_lora_mm), src/llama-adapter.h "
    "(get_scale), tools/server/server-context.cpp (can_batch_with)",
}
NAMES = ("t0", "t1", "t2", "t3")
RANK, ALPHA, BATCH = 64, 64.0, 16
MIX = {"t0": 0.5, "t1": 1.0, "t2": -0.75, "t3": 1.25}
Lora = tuple[torch.Tensor, torch.Tensor, float]  # A (rank, d_in), B (d_out, rank), α/r


# --- what is added to a weight matrix ---------------------------------------------------------------------------------


def exact(loras: Sequence[Lora], weights: Sequence[float]) -> torch.Tensor:
    """Returns Σ w·(α/r)·B·A in float64, (d_out, d_in)."""
    return sum(w * s * (b.double() @ a.double()) for (a, b, s), w in zip(loras, weights, strict=True))


def llama_cpp(loras: Sequence[Lora], weights: Sequence[float]) -> torch.Tensor:
    """Returns what llama.cpp's graph adds for a list of adapters and scales: each product scaled, then summed."""
    return sum((b @ a) * (w * s) for (a, b, s), w in zip(loras, weights, strict=True))


def lorax_linear(loras: Sequence[Lora], weights: Sequence[float]) -> torch.Tensor:
    """Returns what LoRAX adds for a merge by `linear`: (Σ w·B)·(Σ w·A), scaled by the first adapter's α/r."""
    a = sum(w * a for (a, _, _), w in zip(loras, weights, strict=True))
    b = sum(w * b for (_, b, _), w in zip(loras, weights, strict=True))
    return (b * loras[0][2]) @ a


def error(delta: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns ‖delta − reference‖ / ‖reference‖ (Frobenius)."""
    return float((delta.double() - reference).norm() / reference.norm())


# --- PEFT -------------------------------------------------------------------------------------------------------------


class Peft:
    """The model with four LoRAs in PEFT.

    Args:
        folders: task → an exported LoRA; None: LoRAs with random A and B of their own.
    """

    def __init__(self, model: Path, folders: dict[str, Path] | None):
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        ).eval()
        if folders is None:
            torch.manual_seed(0)
            config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False)
            self.model = get_peft_model(base, config, adapter_name=NAMES[0])
            for name in NAMES[1:]:
                self.model.add_adapter(name, config)
        else:
            self.model = PeftModel.from_pretrained(
                base, folders[NAMES[0]], NAMES[0], trust_remote_code=False, use_safetensors=True
            )
            for name in NAMES[1:]:
                self.model.load_adapter(folders[name], adapter_name=name)
        self.model.eval()
        self.layers = {n: m for n, m in self.model.named_modules() if hasattr(m, "lora_A")}

    def loras(self, layer: str) -> list[Lora]:
        module = self.layers[layer]
        return [(module.lora_A[n].weight.detach(), module.lora_B[n].weight.detach(), module.scaling[n]) for n in NAMES]

    def compose(self, weights: Sequence[float], name: str, how: str = "cat") -> float:
        """Makes the adapter `name`. Returns the seconds that it took."""
        begin = time.perf_counter()
        self.model.add_weighted_adapter(list(NAMES), list(weights), name, combination_type=how)
        return time.perf_counter() - begin

    def delta(self, layer: str, name: str) -> torch.Tensor:
        return self.layers[layer].get_delta_weight(name).detach()

    def bytes_of(self, name: str) -> int:
        tensors = [w for m in self.layers.values() for w in (m.lora_A[name].weight, m.lora_B[name].weight)]
        return sum(tensor.nbytes for tensor in tensors)

    @torch.inference_mode()
    def generate(self, prompts: torch.Tensor, names: Sequence[str]) -> float:
        """Greedy answers in one batch, each with its own adapter. Returns tokens a second."""
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        mixed = {"adapter_names": list(names)} if len(set(names)) > 1 else {}
        if not mixed:
            self.model.set_adapter(names[0])
        begin = time.perf_counter()
        answers = self.model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options, **mixed)
        seconds = time.perf_counter() - begin
        return (answers.shape[1] - prompts.shape[1]) * len(names) / seconds


# --- the three questions ----------------------------------------------------------------------------------------------


def exactness(shared: Peft, own: Peft, checkpoint: Any) -> dict[str, dict[str, float | None]]:
    """The largest relative error of ΔW over the modules of the first layer, by system, for `one A` and `own A`."""
    from loraf.delta import delta_weight
    from loraf.tasksets import TaskSet

    weights = list(MIX.values())
    task_set = TaskSet.parse("+".join(f"{n}:{w}" for n, w in MIX.items()), checkpoint.manifest.task_names)
    for peft in (shared, own):
        for how in ("cat", "linear"):
            peft.compose(weights, how, how)
    errors: dict[str, dict[str, list[float]]] = {}

    def note(system: str, kind: str, delta: torch.Tensor, reference: torch.Tensor) -> None:
        errors.setdefault(system, {}).setdefault(kind, []).append(error(delta, reference))

    for kind, peft in (("one A", shared), ("own A", own)):
        for layer in (name for name in peft.layers if ".layers.0." in name):
            loras = peft.loras(layer)
            reference = exact(loras, weights)
            if kind == "one A":
                module = layer.removeprefix("base_model.model.")
                note("loraf", kind, delta_weight(checkpoint, module, task_set), reference)
            note("peft cat", kind, peft.delta(layer, "cat"), reference)
            note("peft linear", kind, peft.delta(layer, "linear"), reference)
            note("llama.cpp, computed", kind, llama_cpp(loras, weights), reference)
            note("lorax linear, computed", kind, lorax_linear(loras, weights), reference)
    for peft in (shared, own):
        for how in ("cat", "linear"):
            peft.model.delete_adapter(how)
    return {s: {k: max(kinds[k]) if k in kinds else None for k in ("one A", "own A")} for s, kinds in errors.items()}


def memory(shared: Peft) -> dict[str, dict[str, object]]:
    """Bytes that one more composition of the four tasks takes while it is in use."""
    shared.compose(list(MIX.values()), "cat")
    cat, one = shared.bytes_of("cat"), shared.bytes_of(NAMES[0])
    shared.model.delete_adapter("cat")
    return {
        "loraf": {"bytes": 4 * len(NAMES), "is": "a row of float32 weights"},
        "peft cat": {"bytes": cat, "is": f"an adapter of rank {len(NAMES) * RANK}, float32, counted"},
        "lorax linear": {"bytes": one, "is": f"an adapter of rank {RANK}, float32, computed"},
        "llama.cpp": {"bytes": 0, "is": "no tensor: a list of adapters and scales"},
    }


def mixes(count: int) -> list[list[float]]:
    drawn = random.Random(count)
    return [[round(drawn.uniform(0.1, 2), 6) for _ in NAMES] for _ in range(count)]


class Throughput:
    """Tokens a second of batches of 16 requests, all kinds once a round, in random order."""

    def __init__(self, engine: Ours, peft: Peft):
        self.engine, self.peft, self.rng = engine, peft, random.Random(1)
        self.kinds: dict[str, Callable[[], Any]] = {
            "loraf: base": lambda: self.ours(["base"] * BATCH),
            "loraf: one mix": lambda: self.ours([self.text(mixes(BATCH)[0])] * BATCH),
            "loraf: 16 mixes": lambda: self.ours([self.text(mix) for mix in mixes(BATCH)]),
            "peft: one mix": lambda: self.theirs(["mix0"] * BATCH),
            "peft: 16 mixes in one batch": lambda: self.theirs([f"mix{i}" for i in range(BATCH)]),
            "peft: 16 mixes one by one": self.one_by_one,
        }
        self.rounds: dict[str, list[float]] = {kind: [] for kind in self.kinds}

    @staticmethod
    def text(mix: Sequence[float]) -> str:
        return "+".join(f"{name}:{weight}" for name, weight in zip(NAMES, mix, strict=True))

    def prompts(self) -> list[list[int]]:
        return [[self.rng.randrange(3, 259) for _ in range(PROMPT)] for _ in range(BATCH)]

    async def ours(self, sets: Sequence[str]) -> float:
        timings = await self.engine.ask("tasks", sets, self.prompts(), TOKENS)
        return BATCH * TOKENS / max(timing.total for timing in timings)

    async def theirs(self, names: Sequence[str]) -> float:
        return await asyncio.to_thread(self.peft.generate, torch.tensor(self.prompts()), names)

    async def one_by_one(self) -> float:
        seconds = 0.0
        for i, prompt in enumerate(self.prompts()):
            speed = await asyncio.to_thread(self.peft.generate, torch.tensor([prompt]), [f"mix{i}"])
            seconds += TOKENS / speed
        return BATCH * TOKENS / seconds

    async def round(self) -> None:
        for kind in self.rng.sample(list(self.kinds), len(self.kinds)):
            await asyncio.sleep(1.2)  # vLLM's processes busy-wait for a second after their last work
            self.rounds[kind].append(await self.kinds[kind]())

    def summary(self) -> dict[str, object]:
        def ratio(a: str, b: str) -> dict[str, float]:
            return interval([x / y for x, y in zip(self.rounds[a], self.rounds[b], strict=True)])

        return {
            "tokens_per_second": {kind: interval(values) for kind, values in self.rounds.items()},
            "ratios": {
                "loraf: 16 mixes to one": ratio("loraf: 16 mixes", "loraf: one mix"),
                "loraf: 16 mixes to base": ratio("loraf: 16 mixes", "loraf: base"),
                "peft: 16 mixes in one batch to one mix": ratio("peft: 16 mixes in one batch", "peft: one mix"),
                "peft: 16 mixes one by one to one mix": ratio("peft: 16 mixes one by one", "peft: one mix"),
            },
        }


async def main(rounds: int) -> dict[str, object]:
    import peft as peft_package
    import transformers

    from loraf.checkpoint import Checkpoint
    from loraf.peft_export import export_peft
    from loraf.tasksets import TaskSet
    from tests.standins import random_checkpoint

    result: dict[str, object] = {
        "question": "what does a composition of LoRAs per request add, cost and take, by system?",
        "machine": machine(),
        "commit": commit(),
        "versions": {"peft": peft_package.__version__, "transformers": transformers.__version__},
        "sources": SOURCES,
        "dtype": "float32",
        "mix": MIX,
    }
    with tempfile.TemporaryDirectory(prefix="loraf-compositions-") as folder:
        root = Path(folder)
        model = make_model(root / "model")
        random_checkpoint(root / "tasks", model, NAMES, RANK, 0.75, seed=0, alphas=(ALPHA,), std=0.02)
        checkpoint = Checkpoint.open(root / "tasks")
        folders = {name: root / f"peft-{name}" for name in NAMES}
        for name, out in folders.items():
            export_peft(checkpoint, TaskSet.parse(name, checkpoint.manifest.task_names), out)
        shared = Peft(model, folders)
        result["largest relative error of ΔW"] = exactness(shared, Peft(model, None), checkpoint)
        result["memory of a composition"] = memory(shared)
        if rounds:
            import vllm

            result["versions"]["vllm"] = vllm.__version__  # type: ignore[index]  # a dict among other values
            seconds = [shared.compose(mix, f"mix{i}") for i, mix in enumerate(mixes(BATCH))]
            result["peft: seconds to make a mix"] = statistics.median(seconds)
            engine = Ours("resident", model, False, "float32", kind="resident")
            await engine.start({"tasks": root / "tasks"})
            try:
                throughput = Throughput(engine, shared)
                await throughput.round()  # warm-up, not kept
                throughput.rounds = {kind: [] for kind in throughput.kinds}
                for number in range(rounds):
                    await throughput.round()
                    print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
                result["throughput"] = {"batch": BATCH, "new tokens": TOKENS, "rounds": rounds, **throughput.summary()}
            finally:
                await engine.stop()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="0: only exactness and memory")
    parser.add_argument("--out", default=str(RESULT), help="- writes no file")
    options = parser.parse_args()
    measured = asyncio.run(main(options.rounds))
    if options.out != "-":
        Path(options.out).write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1, ensure_ascii=False))
