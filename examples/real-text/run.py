"""How much of what `tiny` learned from real text is kept, measured by held-out loss, in two orders.

GSM8K → BoolQ → OpenBookQA → ARC and its reverse are trained into one checkpoint each. The loss of a task is the mean
loss of a completion's tokens over its held-out records, in nats a token (a token of `tiny` is a byte). It is measured
with the base, with all tasks so far on whenever a task has been trained, and at the end also as each task was trained:

    gain    loss of the base − loss when just trained
    kept    (loss of the base − loss at the end with all on) / gain

    python examples/real-text/run.py                               # both orders, one seed
    python examples/real-text/run.py --seeds 0,1,2 --retention off,0.2 --out results.json

A run of `--out` that has finished is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from loraf.delta import Merger
from loraf.errors import LorafError
from loraf.tasksets import TaskSet
from loraf_train.data.task_data import TaskData
from loraf_train.scoring.evaluate import score
from loraf_train.sequence import provenance, runner
from loraf_train.sequence.preflight import PreparedRun, prepare
from loraf_train.set_options import as_trained_or_none
from loraf_train.settings.config import TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
# Task → its data sets below nlu/; GSM8K has a folder of its own.
QUESTIONS = {"boolq": ("boolq",), "obqa": ("openbookqa",), "arc": ("arc_easy", "arc_challenge")}
FORWARD = ("gsm8k", *QUESTIONS)
ORDERS = {"forward": FORWARD, "reverse": FORWARD[::-1]}
# Not searched. 768 bytes hold all but one in a hundred of the questions; a tenth of GSM8K's answers lose their end.
RUN: dict[str, Any] = {
    "model": "tiny",
    "output": "ckpt",
    "adapter": {"rank": 64, "sparsity": 0.8},
    "calibration": {"steps": 8},
    "training": {"learning_rate": 4e-3, "batch_size": 8, "max_length": 768, "dropout": 0.0, "schedule": "cosine"},
}
Loss = dict[str, float]  # task → nats a token


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("LORAF_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help=f"folder with gsm8k/ and nlu/ ({default})")
    parser.add_argument("--steps", type=positive, default=120, help="optimizer steps of a task (120)")
    parser.add_argument("--examples", type=positive, default=200, help="held-out records of a data set (200)")
    parser.add_argument("--orders", type=listed, default=list(ORDERS), help=f"of {','.join(ORDERS)} (both)")
    parser.add_argument("--seeds", type=listed, default=["0"], help="for example 0,1,2 (0)")
    parser.add_argument("--retention", type=listed, help="off, or budgets; each is a run (the default of loraf-train)")
    parser.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    options = parser.parse_args(arguments)
    unknown = [order for order in options.orders if order not in ORDERS]
    if unknown:
        parser.error(f"--orders: {', '.join(unknown)} is not one of {', '.join(ORDERS)}")
    if not all(seed.isdecimal() for seed in options.seeds):
        parser.error("--seeds: give whole numbers, for example 0,1,2")
    if not (options.data / "gsm8k" / "train.jsonl").is_file():
        print(f"run.py: {options.data} has no records: name their folder with --data", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    common = {"steps": options.steps, "examples": options.examples, "settings": RUN}
    finished = finished_runs(options.out, common)
    try:
        for retention in options.retention or [None]:
            for order in options.orders:
                for seed in map(int, options.seeds):
                    key = {"order": order, "seed": seed, "retention": retention}
                    if not any(key.items() <= run.items() for run in finished):
                        console.rule(", ".join(f"{k} {v}" for k, v in key.items() if v is not None))
                        finished.append(key | one_run(options.data, key, options.steps, options.examples, console))
                        if options.out:
                            write(options.out, common | {"runs": finished})
    except LorafError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    for run in finished:
        show(run, console)
    return 0


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


# --- one run ----------------------------------------------------------------------------------------------------------


def one_run(data: Path, key: Mapping[str, Any], steps: int, examples: int, console: Console) -> dict[str, Any]:
    """Trains a sequence into a folder that is deleted afterwards. Returns what is measured, as plain JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tasks.yaml"
        file.write_text(
            yaml.safe_dump(configuration(data.absolute(), ORDERS[key["order"]], key["seed"], steps, examples))
        )
        prepared = prepare(file, retention_setting(key["retention"]))
        loaded = runner.load_model(prepared.config)
        losses = Losses(prepared, loaded[0], console)
        base = losses.of(TaskSet())
        observer = Watcher(losses.of, console)
        began = time.monotonic()
        checkpoint = runner.run(prepared.config, prepared.data, observer, loaded)
        seconds = time.monotonic() - began - losses.seconds
        return {
            "base": base,
            "after": observer.after,
            "as_trained": losses.as_trained(checkpoint),
            "records": {name: len(task.train) for name, task in prepared.data.items()},
            "training_seconds": round(seconds, 1),
            "environment": provenance.environment(loaded[0]),
        }


def configuration(data: Path, order: Sequence[str], seed: int, steps: int, examples: int) -> dict[str, Any]:
    """Returns the content of a tasks.yaml."""

    def task(name: str) -> dict[str, Any]:
        if name == "gsm8k":
            folders, suffix, templates = [data / "gsm8k"], "jsonl", ("{question}\n", "{answer}")
        else:
            folders = [data / "nlu" / part for part in QUESTIONS[name]]
            suffix, templates = "json", ("{instruction}\n", "{output}")
        records = {
            "train": [f"{folder}/train.{suffix}" for folder in folders],
            "eval": {folder.name: f"{folder}/test.{suffix}" for folder in folders},
            "eval_limit": examples,
        }
        return {
            "name": name,
            "data": records | dict(zip(("prompt", "completion"), templates, strict=True)),
            "metric": "loss",
        }

    phases = {
        "calibration": {"steps": min(steps, RUN["calibration"]["steps"])},
        "training": RUN["training"] | {"max_steps": steps},
    }
    return RUN | phases | {"seed": seed, "tasks": [task(name) for name in order]}


def retention_setting(retention: str | None) -> list[str]:
    """Returns the setting of `loraf-train` in the form of `--set`; None leaves it alone."""
    if retention is None:
        return []
    return ["retention=off"] if retention == "off" else [f"retention.budget={retention}"]


class Losses:
    """Measures the tasks' held-out losses. The model holds its own weights before and after.

    Attributes:
        seconds: spent on it so far, once a checkpoint was there to measure.
    """

    def __init__(self, prepared: PreparedRun, model: PreTrainedModel, console: Console):
        self._prepared = prepared
        self._model = model
        self._console = console
        self.seconds = 0.0

    def of(self, task_set: TaskSet, checkpoint: Checkpoint | None = None) -> Loss:
        """Returns the losses of the tasks of a set; of the base set those of all tasks."""
        began = time.monotonic()
        merger = None if checkpoint is None else Merger(self._model, checkpoint)
        if merger is not None:
            merger.merge(task_set)
        try:
            tasks = [task for task in self._prepared.config.tasks if task_set.is_base or task.name in task_set.names]
            losses = {task.name: self._loss(task, self._prepared.data[task.name], task_set) for task in tasks}
        finally:
            if merger is not None:
                merger.merge(TaskSet())
                self.seconds += time.monotonic() - began
        self._console.print(f"{task_set}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        return losses

    def as_trained(self, checkpoint: Checkpoint) -> Loss:
        """Returns each task's loss under the set that it was trained in."""
        losses = {}
        for name in checkpoint.manifest.task_names:
            task_set = as_trained_or_none(checkpoint.manifest, name)
            if task_set is not None:
                losses[name] = self.of(task_set, checkpoint)[name]
        return losses

    def _loss(self, task: TaskConfig, data: TaskData, task_set: TaskSet) -> float:
        *_, last = score(self._model, self._prepared.tokenizer, task, data, task_set)
        return last.score  # of several data sets their mean comes last


class Watcher(runner.Observer):
    """Measures all tasks so far when a task has been trained.

    Attributes:
        after: task just trained → losses of all tasks so far, all of them on.
    """

    def __init__(self, losses_of: Callable[[TaskSet, Checkpoint], Loss], console: Console):
        self._losses_of = losses_of
        self._console = console
        self.after: dict[str, Loss] = {}

    def step(self, loss: float, lr: float, step: int, total: int) -> None:
        if step % 20 == 0 or step == total:
            self._console.print(f"step {step} of {total}: loss {loss:.4f}", highlight=False)

    def task_finished(self, checkpoint: Checkpoint, task: TaskConfig, model: PreTrainedModel) -> None:
        names = checkpoint.manifest.task_names
        self.after[task.name] = self._losses_of(TaskSet.parse("all", names), checkpoint)


# --- the table --------------------------------------------------------------------------------------------------------


def rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each task in the order of training; `kept` is None where nothing was gained."""
    end = run["after"][list(run["after"])[-1]]
    result = []
    for name, so_far in run["after"].items():
        base, just = run["base"][name], so_far[name]
        gain = base - just
        result.append(
            {
                "task": name,
                "base": base,
                "just trained": just,
                "end, all on": end[name],
                "end, as trained": run["as_trained"][name],
                "gain": gain,
                "kept": (base - end[name]) / gain if gain > 0 else None,
            }
        )
    return result


def show(run: Mapping[str, Any], console: Console) -> None:
    retention = "default" if run["retention"] is None else run["retention"]
    title = f"nats a token: {run['order']}, seed {run['seed']}, retention {retention}"
    table = Table("task", "base", "just trained", "end, all on", "end, as trained", "gain", "kept", title=title)
    for row in rows(run):
        *losses, kept = list(row.values())[1:]
        share = "nothing gained" if kept is None else f"{kept:.1%}"
        table.add_row(row["task"], *(f"{loss:.4f}" for loss in losses), share)
    console.print(table)


# --- the file of results ----------------------------------------------------------------------------------------------


def finished_runs(file: Path | None, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the runs that a file of results has, if they were made with the same settings."""
    if file is None or not file.exists():
        return []
    content = json.loads(file.read_text(encoding="utf-8"))
    if {name: content.get(name) for name in common} != dict(common):
        raise SystemExit(f"run.py: {file} has runs with other settings: give another --out")
    return list(content["runs"])


def write(file: Path, content: Mapping[str, Any]) -> None:
    runs = [run | {"table": rows(run)} for run in content["runs"]]
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps({**content, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


if __name__ == "__main__":
    sys.exit(main())
