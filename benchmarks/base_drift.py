"""How much `retention.base` keeps of the base model's own skills, and what it costs the task.

    python benchmarks/base_drift.py                 # 40 minutes or more; writes results/base-drift.json
    python benchmarks/base_drift.py --seeds 1 --steps 20 --budgets 0.2 --out -

The embedded model learns Pig Latin with the settings of examples/compare (its method loraf): unprotected, protected on
text that the model writes itself, and protected on general text of a file, each with several budgets. The drift is the
increase of the loss on examples/compare's general text, in nats a token; the file for protection is drawn with another
seed, and what both have in common is left out of it. Runs that are in the file already are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import commit, machine  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "base-drift.json"
EXAMPLE = ROOT / "examples" / "compare"
TASK = "pig-latin"
PROTECTED = ("self", "file")


def make_data(folder: Path) -> None:
    """Writes the example's data, and general text for protection that shares nothing with the one for the drift."""
    spec = importlib.util.spec_from_file_location("_compare_data", EXAMPLE / "make_data.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.main(["--out", str(folder)])
    held_out = {record["prompt"] for record in maker.general(1)}
    maker.write(folder / "protect.jsonl", [r for r in maker.general(2) if r["prompt"] not in held_out])


def write_settings(folder: Path, steps: int | None) -> Path:
    """The example's tasks.yaml with one task and the learning rate of the method loraf."""
    import yaml

    settings = yaml.safe_load((EXAMPLE / "tasks.yaml").read_text(encoding="utf-8"))
    compare = settings.pop("compare")
    settings["training"] |= compare["methods"]["loraf"]["training"] | {"save_seconds": 1e9}
    settings["training"] |= {} if steps is None else {"max_steps": steps}
    settings["tasks"] = [task for task in settings["tasks"] if task["name"] == TASK]
    file = folder / "tasks.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


class Bench:
    """The loaded model, and the loss of the base on the general text."""

    def __init__(self, file: Path):
        from loraf_train.compare.general import general_text
        from loraf_train.sequence import runner
        from loraf_train.sequence.preflight import prepare
        from loraf_train.settings.data import RecordSource

        self.file = file
        prepared = prepare(file)
        self.loaded = runner.load_model(prepared.config)
        source = RecordSource(file=file.parent / "data" / "general.jsonl")
        self.general = general_text(source, prepared.tokenizer, prepared.model.context)
        self.loss_of_base = self.general.loss(self.loaded[0])

    def measure(self, seed: int, protected: str, budget: float) -> dict[str, object]:
        """Trains the task. `protected`: none, or one of PROTECTED."""
        from loraf.delta import Merger
        from loraf.tasksets import TaskSet
        from loraf_train.scoring.evaluate import score
        from loraf_train.sequence import runner
        from loraf_train.sequence.preflight import prepare

        base = "self" if protected == "self" else "data/protect.jsonl"
        retention = "off" if protected == "none" else f"{{budget: {budget!r}, base: {base}}}"
        with tempfile.TemporaryDirectory() as output:
            overrides = [f"seed={seed}", f"retention={retention}", f"output={json.dumps(output + '/ckpt')}"]
            prepared = prepare(self.file, overrides)
            model, tokenizer, _ = self.loaded
            with contextlib.redirect_stdout(sys.stderr):
                checkpoint = runner.run(
                    prepared.config, prepared.data, loaded=self.loaded, base_text=prepared.base_text
                )
            task, data = prepared.config.tasks[0], prepared.data[TASK]
            training = checkpoint.manifest.task(TASK).training
            merger = Merger(model, checkpoint)
            merger.merge(checkpoint.manifest.all_tasks())
            scores = score(model, tokenizer, task, data, TASK)
            drift = self.general.loss(model) - self.loss_of_base
            merger.merge(TaskSet())
        return {
            "seed": seed,
            "protected on": protected,
            "budget": budget,
            "score": scores[0].score,
            "drift": drift,
            "last loss": training["loss"]["last"],
            "predicted change of a logit": training.get("retention", {}).get("spent", {}).get("base"),
        }


def summary(runs: list[dict]) -> list[dict[str, object]]:
    """Means over the seeds; the share of the drift that is left is taken within a seed."""
    plain = {run["seed"]: run for run in runs if run["protected on"] == "none"}
    rows = []
    for key in dict.fromkeys((run["protected on"], run["budget"]) for run in runs):
        of_key = [run for run in runs if (run["protected on"], run["budget"]) == key and run["seed"] in plain]
        if of_key:
            left = [run["drift"] / plain[run["seed"]]["drift"] for run in of_key]
            rows.append(
                {
                    "protected on": key[0],
                    "budget": key[1],
                    "seeds": len(of_key),
                    "score": statistics.mean(run["score"] for run in of_key),
                    "score less the unprotected one": statistics.mean(
                        run["score"] - plain[run["seed"]]["score"] for run in of_key
                    ),
                    "drift": statistics.mean(run["drift"] for run in of_key),
                    "share of the drift left": statistics.mean(left),
                    "largest share": max(left),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.6])
    parser.add_argument("--protect", nargs="+", choices=PROTECTED, default=list(PROTECTED))
    parser.add_argument("--steps", type=int, help="steps of the task; default: those of the example")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=str(RESULT))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    out = None if options.out == "-" else Path(options.out)
    result = {"commit": commit(), "machine": machine(), "task": TASK, "steps": options.steps, "runs": []}
    if out is not None and out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        result["runs"] = before["runs"] if before["steps"] == options.steps else []
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder) / "data")
        bench = Bench(write_settings(Path(folder), options.steps))
        result["loss of the base"] = bench.loss_of_base
        variants = [("none", None)] + [(p, b) for p in options.protect for b in options.budgets]
        for seed in range(options.seeds):
            for protected, budget in variants:
                known = {(run["seed"], run["protected on"], run["budget"]) for run in result["runs"]}
                if (seed, protected, budget) in known:
                    continue
                run = bench.measure(seed, protected, budget)
                print(json.dumps(run), file=sys.stderr, flush=True)
                result["runs"].append(run)
                result["summary"] = summary(result["runs"])
                if out is not None:
                    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if out is None:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
