"""`make demo`: the whole workflow once, on this machine.

1. trains two tasks in sequence on the embedded model (`loraf-train run`)
2. serves the checkpoint on vLLM (`loraf-serve`)
3. asks the same questions of {first}, {second}, {both}, as trained, and base, over gRPC
4. prints each task's accuracy under each set, on held-out examples, and what the first task keeps without retention
5. stops the server; exits 1 unless each task reaches 0.90 as trained and with both tasks on, and stays at or under 0.20
   under base
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make_data
import yaml
from rich.console import Console
from rich.table import Table

from loraf_serve.client import Client
from loraf_serve.launch import launch

HERE = Path(__file__).parent
CONFIG = HERE / "tasks.yaml"
COMPARISON = HERE.parent / "retention" / "results" / "two" / "results.json"
AT_LEAST = 0.90  # as trained, and with both tasks on
BASE_AT_MOST = 0.20
EXAMPLES_SHOWN = 2

# Keyword arguments of Client.generate that select the task set. "{task}" is replaced by the task of the question.
Selection = dict[str, object]


def selections(first: str, second: str) -> dict[str, Selection]:
    return {
        f"{{{first}}}": {"tasks": [first]},
        f"{{{second}}}": {"tasks": [second]},
        f"{{{first}, {second}}}": {"tasks": [first, second]},
        "as trained": {"as_trained": "{task}"},
        "base": {"base": True},
    }


def ask(client: Client, selection: Selection, task: str, prompt: str) -> str:
    keywords = {key: task if value == "{task}" else value for key, value in selection.items()}
    return client.generate(prompt, **keywords, max_tokens=32, temperature=0.0).text


def read_examples(task: str) -> list[dict[str, str]]:
    config = {entry["name"]: entry for entry in yaml.safe_load(CONFIG.read_text())["tasks"]}
    lines = (HERE / config[task]["data"]["eval"]).read_text().splitlines()
    return [json.loads(line) for line in lines]


def side_by_side(client: Client, tasks: list[str], console: Console) -> None:
    for task in tasks:
        sets = selections(*tasks)
        table = Table("question", "expected", *sets, title=f"task «{task}», the same question under each task set")
        for example in read_examples(task)[:EXAMPLES_SHOWN]:
            answers = [ask(client, selection, task, example["prompt"]) for selection in sets.values()]
            table.add_row(example["prompt"].strip(), example["completion"].strip(), *(a.strip() for a in answers))
        console.print(table)


def accuracies(client: Client, tasks: list[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Returns task → set → (right answers, examples), from concurrent requests over gRPC."""
    results: dict[str, dict[str, tuple[int, int]]] = {}
    with ThreadPoolExecutor(32) as pool:
        for task in tasks:
            examples = read_examples(task)
            results[task] = {}
            for label, selection in selections(*tasks).items():
                prompts = [example["prompt"] for example in examples]
                answers = pool.map(lambda p, s=selection, t=task: ask(client, s, t, p), prompts)
                right = sum(a.strip() == e["completion"].strip() for a, e in zip(answers, examples, strict=True))
                results[task][label] = (right, len(examples))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="continue with the checkpoint of the last run")
    parser.add_argument("--backend", default="slots", choices=["slots", "merged"], help="(slots)")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    began = time.monotonic()

    make_data.main(["--out", str(HERE / "data")])
    if not arguments.keep:
        shutil.rmtree(HERE / "ckpt", ignore_errors=True)
    console.rule("1. training: two tasks, one after the other, into one checkpoint")
    subprocess.run([sys.executable, "-m", "loraf_train.cli", "run", str(CONFIG)], check=True)
    trained = time.monotonic()

    console.rule("2. serving it")
    options = ["--backend", arguments.backend, "--dtype", "float32"]
    if arguments.backend == "slots":
        options += ["--enforce-eager", "--max-model-len", "1024"]
    with launch("tiny", str(HERE / "ckpt"), options=tuple(options)) as server:
        (adapter,) = server.client.adapters()
        tasks = [task.name for task in adapter.tasks]
        console.print(f"listening on {server.address}, adapter {adapter.name!r} with tasks {', '.join(tasks)}")
        console.rule("3. one server, one adapter, the task set chosen by each request")
        side_by_side(server.client, tasks, console)
        console.rule("4. accuracy over gRPC, exact match on held-out examples")
        results = accuracies(server.client, tasks)
        status = server.stop()
    show(results, console)
    first, second = tasks
    console.print(
        f"With the masks alone, {first} falls to {masks_alone(first, second):.3f} with {second} on too "
        f"(method loraf-paper in {COMPARISON.relative_to(HERE.parents[1])}, mean over its seeds)."
    )

    seconds = time.monotonic() - began
    console.print(
        f"training took {trained - began:.0f} s, everything {seconds:.0f} s; the server stopped with status {status}"
    )
    failures = verdict(results)
    for failure in failures:
        console.print(f"[bold red]not reached:[/] {failure}")
    return 1 if failures or status != 0 else 0


def show(results: dict[str, dict[str, tuple[int, int]]], console: Console) -> None:
    labels = list(next(iter(results.values())))
    counts = {count for row in results.values() for _, count in row.values()}
    table = Table("task", *labels, title=f"accuracy by task set ({', '.join(map(str, sorted(counts)))} examples each)")
    for task, row in results.items():
        table.add_row(task, *(f"{right / count:.3f}" for right, count in row.values()))
    console.print(table)


def masks_alone(first: str, second: str) -> float:
    """Returns the accuracy of the first task after the second, all on, as the paper trains, from the comparison."""
    runs = [run for run in json.loads(COMPARISON.read_text())["runs"] if run["method"] == "loraf-paper"]
    return statistics.mean(
        score["score"]
        for run in runs
        for score in run["scores"]
        if (score["task"], score["after"], score["acting"]) == (first, second, "so-far")
        and run["order"] == [first, second]
    )


def verdict(results: dict[str, dict[str, tuple[int, int]]]) -> list[str]:
    """Returns the accuracies that miss their thresholds."""
    failures = []
    for task, row in results.items():
        share = {label: right / count for label, (right, count) in row.items()}
        both = f"{{{', '.join(results)}}}"
        for label in ("as trained", both):
            if share[label] < AT_LEAST:
                failures.append(f"{task} under {label}: {share[label]:.3f}, at least {AT_LEAST} expected")
        if share["base"] > BASE_AT_MOST:
            failures.append(f"{task} under base: {share['base']:.3f}, at most {BASE_AT_MOST} expected")
    return failures


if __name__ == "__main__":
    sys.exit(main())
