"""Measures what the delta adds to a decoding or prefill step on a GPU, compared with vLLM's own LoRA kernels.

    python benchmarks/gpu.py                  # a few minutes on one H100 or H200; writes results/gpu.json
    python benchmarks/gpu.py --rows 16 --rounds 3 --out -
    python benchmarks/gpu.py --try splits=4 splits=16 expand_warps=8 --rows 16

A step consists of the linear layers of Mistral-7B (32 layers of four fused products, 14 GB of bfloat16) on `rows`
tokens, and what an adapter of rank 64 and sparsity 0.9 adds to each. It is captured in a CUDA graph, as in vLLM, and
its replay is timed. Attention, norms and the head are not included, so an engine's ratio is closer to 1.

    base        only the products
    resident    with this project's kernel: one adapter of `tasks` tasks, `sets` task sets mixed in the batch
    beside      the same, with `shrink` on a second stream, concurrent with the product
    stock       with vLLM's kernels: each set is a dense adapter in its own slot (needs vLLM's Python files)

Before anything is timed, each delta is compared with float64. Systems alternate within each round. Ratios are computed
within a round and reported as the median over rounds with a 95 % bootstrap interval.

Tried and rejected, on one H200 (four tasks; «gate/up» is `expand` of that layer alone with cold caches, including
3.5 µs of an empty launch; everything else is a whole step, 3 rounds):

    a byte with the index of a position's owner, compared for each group of tasks: 240 registers per thread, gate/up of
        16 rows 20 to 22 µs; a bit for each of 16 tasks (chosen): 128 registers, 12 µs for one set, 15 for 16 sets
    products that accumulate into each other's result: Triton gives each warp the work of all, up to 1,138 bytes of
        spilled registers per thread; separate products, added afterwards (chosen): at most 16
    a weight looked up for every position: 32 addresses per thread; gate/up of 16 rows 66 to 88 µs with 16 splits
    16 sets, 16 rows: 5.56 ms without the early start of `expand`, 5.40 with it (chosen)
    terms of z: at 16 rows 1 to 3 cost the same (3 chosen); at 64 rows 6.39 ms with 3, 6.23 with 2 (chosen); at 256 rows
        11.9 with 3, 11.3 with 1 (chosen)
    splits added by every program of `expand`: 256 rows 11.3 ms, 2,048 rows 74 ms; by a separate launch (chosen) 9.6
        and 67
    `shrink` on a second stream: `beside` in the results, 4 to 5 points at up to 32 rows. Rejected, because an engine
        that compiles its graph does not support it yet
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.kernels import RANK, SHAPES, SPARSITY, fused_layers, random_part, rows_of  # noqa: E402
from benchmarks.measuring import commit, interval  # noqa: E402
from loraf_serve.kernels import BatchWeights, Part, triton_kernel  # noqa: E402
from loraf_serve.kernels.device_weights import DeviceWeights  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
SHAPE = "mistral-7b-layer"
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
REPLAYS = 20


class Linears:
    """The model's linear layers, and x and y of a step."""

    def __init__(self, layers: int):
        self.kinds = fused_layers(SHAPE)
        self.outs = [sum(outs) for _, outs in self.kinds]
        self.weights = [
            [torch.randn(out, d_in, dtype=DTYPE, device=DEVICE).mul_(d_in**-0.5) for out, (d_in, _) in self.pairs()]
            for _ in range(layers)
        ]

    def pairs(self):
        return zip(self.outs, self.kinds, strict=True)

    def rows(self, n: int) -> None:
        self.x = [torch.randn(n, d_in, dtype=DTYPE, device=DEVICE) for d_in, _ in self.kinds]
        self.y = [torch.empty(n, out, dtype=DTYPE, device=DEVICE) for out in self.outs]

    def product(self, layer: int, kind: int) -> None:
        torch.mm(self.x[kind], self.weights[layer][kind].T, out=self.y[kind])

    @property
    def layers(self):
        return itertools.product(range(len(self.weights)), range(len(self.kinds)))


class Resident:
    """An adapter with the same masks in every layer, each in its own memory."""

    def __init__(self, model: Linears, tasks: int, most_rows: int):
        self.model, self.tasks, self.beside = model, tasks, False
        self.parts = []
        for d_in, outs in model.kinds:
            offsets = [0, *itertools.accumulate(outs)]
            self.parts.append([random_part(d_in, o, tasks, at, DTYPE) for o, at in zip(outs, offsets, strict=False)])
        names = [str(place) for place in model.layers]
        self.of_kind = [
            triton_kernel.Layer([(part.offset, part.d_out) for part in parts], RANK, tasks, DEVICE)
            for parts in self.parts
        ]
        operands = {str((i, k)): triton_kernel.TritonOperand(self.parts[k], self.of_kind[k]) for i, k in model.layers}
        self.nbytes = sum(operand.nbytes for operand in operands.values())
        self.table = triton_kernel.AdapterTable(names, 4, DEVICE)
        self.table.put("adapter", operands)
        width = max(kind.width for kind in self.of_kind)
        self.step = DeviceWeights(DEVICE, most_rows, tasks, width, 4)
        self.changes: dict = {}
        self.second, self.begun, self.ended = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()

    def set(self, rows: BatchWeights) -> None:
        self.step.set([(0, rows)])

    def launch(self, kind: int) -> triton_kernel.Launch:
        launch = triton_kernel.launch_for(*self.model.x[kind].shape, self.of_kind[kind], self.step, DTYPE)
        return dataclasses.replace(launch, **{"early": launch.early and not self.beside} | self.changes)

    def layer(self, layer: int, kind: int) -> None:
        model, of_kind = self.model, self.of_kind[kind]
        records, launch = self.table.of(str((layer, kind))), self.launch(kind)
        if not self.beside:
            model.product(layer, kind)
            triton_kernel.add_deltas(model.y[kind], model.x[kind], self.step, records, of_kind, launch)
            return
        self.begun.record()
        with torch.cuda.stream(self.second):
            self.second.wait_event(self.begun)
            triton_kernel.shrink(model.x[kind], self.step, records, of_kind, launch)
            self.ended.record()
        model.product(layer, kind)
        torch.cuda.current_stream().wait_event(self.ended)
        triton_kernel.expand(model.y[kind], self.step, records, of_kind, launch)


class Stock:
    """vLLM's kernels with `slots` adapters of dense A and B."""

    def __init__(self, model: Linears, slots: int, most_rows: int):
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

        self.expand, self.shrink, self.make_meta = lora_expand, lora_shrink, LoRAKernelMeta.make
        self.model, self.most_rows = model, most_rows
        self.a, self.b = [], []
        for _ in range(len(model.weights)):
            for d_in, outs in model.kinds:
                self.a.append([torch.randn(slots, 1, RANK, d_in, dtype=DTYPE, device=DEVICE) for _ in outs])
                self.b.append([torch.randn(slots, 1, out, RANK, dtype=DTYPE, device=DEVICE).mul_(0.02) for out in outs])

    def set(self, n: int, sets: int) -> None:
        self.sets, self.n = sets, n
        self.meta = self.make_meta(sets, self.most_rows, DEVICE)
        self.meta.prepare_tensors(torch.arange(n, device=DEVICE) % sets)
        self.buffers = [torch.empty(len(outs), n, RANK, device=DEVICE) for _, outs in self.model.kinds]

    def layer(self, layer: int, kind: int) -> None:
        model = self.model
        model.product(layer, kind)
        at = layer * len(model.kinds) + kind
        a, b = ([whole[: self.sets] for whole in of[at]] for of in (self.a, self.b))
        meta = self.meta.meta_args(self.n, False)
        self.shrink(model.x[kind], a, self.buffers[kind], *meta, 1.0)
        self.expand(self.buffers[kind], b, model.y[kind], *meta, offset_start=0, add_inputs=True)

    def expected(self, kind: int) -> torch.Tensor:
        """Returns y of the first layer in float64."""
        x = self.model.x[kind].double()
        delta = []
        for a, b in zip(self.a[kind], self.b[kind], strict=True):
            of_row = torch.arange(len(x), device=DEVICE) % self.sets
            z = torch.einsum("nk,nrk->nr", x, a[of_row, 0].double())
            delta.append(torch.einsum("nr,nor->no", z, b[of_row, 0].double()))
        return x @ self.model.weights[0][kind].double().T + torch.cat(delta, 1)


def expected(model: Linears, parts: list[Part], rows: BatchWeights, kind: int) -> torch.Tensor:
    """Returns y of the first layer in float64, from the coordinates."""
    x = model.x[kind].double()
    y = x @ model.weights[0][kind].double().T
    for part in parts:
        z = x @ part.a.to(DEVICE).double().T
        for t, b in enumerate(part.tasks):
            delta = z @ b.dense(torch.float64).to(DEVICE).T
            y[:, part.offset : part.offset + part.d_out] += rows.weights[:, t : t + 1].to(DEVICE).double() * delta
    return y


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns ‖actual − expected‖ / ‖expected‖. bfloat16 alone causes about 0.002."""
    distance = ((actual.double() - expected).norm() / expected.norm()).item()
    if not distance < 0.01:
        raise SystemExit(f"wrong result: relative error {distance:.3g} compared with float64")
    return distance


def replayed(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(3):
        graph.replay()
    return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Returns the seconds of a replay."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPLAYS


def whole(model: Linears, layer: Callable[[int, int], None]) -> Callable[[], None]:
    def work() -> None:
        for place in model.layers:
            layer(*place)

    return work


def against_base(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, dict]:
    """Returns milliseconds, and the share of the base in them: 1 means that the delta costs nothing."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name in random.sample(list(graphs), len(graphs)):
            times[name].append(seconds(graphs[name]))
    return {
        name: {
            "ms": interval([1e3 * s for s in several]),
            "base / this": interval([b / s for b, s in zip(times["base"], several, strict=True)]),
        }
        for name, several in times.items()
    }


def measure(model: Linears, adapters: dict[int, Resident], stock: Stock | None, n: int, options, changes) -> list[dict]:
    model.rows(n)
    graphs = {"base": replayed(whole(model, model.product))}
    errors: dict[str, float] = {}
    kept = []  # graphs hold addresses
    for tasks, adapter in adapters.items():
        for sets in options.sets:
            if sets > n or (changes and sets != options.sets[0]):
                continue
            rows = rows_of(n, sets, tasks)
            beside = [(" beside", {})] if n <= 64 and tasks == options.tasks[0] else []
            variants = [("", {}), *(changes or beside)]
            for label, change in variants:
                adapter.changes, adapter.beside = change, label == " beside"
                adapter.set(rows)
                name = f"resident{label}, T={tasks}, {sets} sets"
                for kind in range(len(model.kinds)):
                    model.y[kind].fill_(torch.nan)
                    adapter.layer(0, kind)
                    errors[name] = max(
                        errors.get(name, 0.0),
                        relative_error(model.y[kind], expected(model, adapter.parts[kind], rows, kind)),
                    )
                # Every system writes its rows before it is timed, so one buffer is enough.
                graphs[name] = replayed(whole(model, adapter.layer))
                graphs[name].rows = (adapter, rows)
    if stock is not None and not changes:
        for sets in options.sets:
            if sets > n:
                continue
            stock.set(n, sets)
            name = f"stock, {sets} sets"
            if n * RANK * model.outs[2] < 1 << 28:  # the memory that float64 needs
                errors[name] = 0.0
                for kind in range(len(model.kinds)):
                    model.y[kind].fill_(torch.nan)
                    stock.layer(0, kind)
                    errors[name] = max(errors[name], relative_error(model.y[kind], stock.expected(kind)))
            graphs[name] = replayed(whole(model, stock.layer))
            kept.append((stock.meta, stock.buffers))
    timed = against_base(_Setting(graphs), options.rounds)
    return [{"rows": n, "what": name, **values, "far from float64": errors.get(name)} for name, values in timed.items()]


class _Setting(dict):
    """Graphs. Looking up one with an adapter writes the adapter's rows first."""

    def __getitem__(self, name):
        graph = super().__getitem__(name)
        if hasattr(graph, "rows"):
            adapter, rows = graph.rows
            adapter.set(rows)
        return graph


def machine() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    a = torch.empty(1 << 32, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    graph = replayed(lambda: b.copy_(a))
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "copy, TB/s read and written": round(2 * len(a) / seconds(graph) / 1e12, 2),
        "torch": torch.__version__,
        "triton": triton_kernel.triton.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 32, 64, 256, 2048])
    parser.add_argument("--sets", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--tasks", nargs="+", type=int, default=[4, 10])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--try", nargs="+", default=[], dest="tried", help="launches to compare: field=number,…")
    parser.add_argument("--out", default=str(RESULT), help="- writes no file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no GPU")
    torch.manual_seed(0)
    random.seed(0)
    changes = [
        (f" {text}", {k: int(v) for k, v in (pair.split("=") for pair in text.split(","))}) for text in options.tried
    ]
    record = {
        "commit": commit(),
        "machine": machine(),
        "rank": RANK,
        "sparsity": SPARSITY,
        "shape": {"layers": options.layers, "linear": fused_layers(SHAPE), "of": SHAPES[SHAPE][:4]},
    }
    print(record["machine"], flush=True)
    model = Linears(options.layers)
    record["bytes of the model"] = sum(w.nbytes for of_layer in model.weights for w in of_layer)
    most = max(options.rows)
    with torch.no_grad():
        adapters = {tasks: Resident(model, tasks, most) for tasks in options.tasks}
        record["bytes of an adapter"] = {tasks: adapter.nbytes for tasks, adapter in adapters.items()}
        try:
            stock = None if changes else Stock(model, max(options.sets), most)
        except ImportError as error:
            stock = None
            record["stock"] = f"not measured: {error}"
            print(record["stock"], file=sys.stderr)
        record["runs"] = []
        for n in options.rows:
            for run in measure(model, adapters, stock, n, options, changes):
                record["runs"].append(run)
                ms, share = run["ms"], run["base / this"]
                print(
                    f"{n:5} rows  {run['what']:40} {ms['median']:8.3f} ms   {share['median']:.3f}"
                    f" ({share['low']:.3f}-{share['high']:.3f})   {run['far from float64'] or 0:.1e}",
                    flush=True,
                )
            if options.out != "-":  # after each, so that an interrupted run leaves results
                Path(options.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
