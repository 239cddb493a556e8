"""The model card of a checkpoint (README.md of a hub repository), generated from its manifest alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from loraf import manifest as manifests
from loraf.hub import HUB_ID
from loraf.manifest import Manifest, Task
from loraf.units import size_text
from loraf_train.set_options import as_trained_or_none
from loraf_train.terminal import tables

FILE_NAME = "README.md"
GENERATED = (
    "<!-- Written by save_pretrained, which writes it again, as `loraf-train push` does. "
    "Take this line out to keep what you change. -->"
)
REVEALED = (
    "hold moments of the activations and gradients of the tasks' training data: averages over examples, and no text. "
    "Something of what the data is about can be told from them"
)


def card(manifest: Manifest, name: str) -> str:
    """Returns Markdown with the header that the hub reads.

    The user fills in what the manifest does not know: the licence, and what the tasks are for.

    Args:
        name: what users give as CKPT: a hub id, or a folder.
    """
    base, local = base_name(manifest)
    parts = [
        _header(manifest),
        f"# {name.rstrip('/').rsplit('/', 1)[-1]}",
        _summary(manifest, base, local),
        "## Tasks",
        _tasks(manifest),
        "## Scores",
        _scores(manifest),
        "## Use",
        _use(manifest, name, base),
        *_statistics(manifest),
        "## Training",
        _training(manifest),
        "## Identity",
        _identity(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def is_generated(path: Path) -> bool:
    """Whether a card is there that nobody has made their own, and that may be written again."""
    try:
        return GENERATED in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def base_name(manifest: Manifest) -> tuple[str, bool]:
    """(name, whether it is a local folder). Of a local folder's path only the last part is kept."""
    name = manifest.base_model.name
    if name == "tiny" or HUB_ID.fullmatch(name):
        return name, False
    return name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1], True


def _header(manifest: Manifest) -> str:
    base, local = base_name(manifest)
    entries: dict[str, Any] = {"library_name": "loraf", "pipeline_tag": "text-generation"}
    if not local and base != "tiny":
        entries |= {"base_model": base, "base_model_relation": "adapter"}
    entries["tags"] = ["loraf", "lora", "continual-learning", *manifest.task_names]
    datasets = list(dict.fromkeys(_datasets(manifest.tasks)))
    if datasets:
        entries["datasets"] = datasets
    text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    return f"---\n{text}# license: fill in, it depends on the base model and the data\n---"


def _datasets(tasks: Iterable[Task]) -> Iterator[str]:
    """Hub ids of the data sets that tasks were trained on."""
    for task in tasks:
        for source in task.training.get("settings", {}).get("data", {}).get("train", []):
            name = source.get("dataset", "") if isinstance(source, dict) else ""
            if HUB_ID.fullmatch(name):
                yield name


def _summary(manifest: Manifest, base: str, local: bool) -> str:
    count = len(manifest.tasks)
    base_text = f"`{base}`" + (f" at `{manifest.base_model.revision}`" if manifest.base_model.revision else "")
    note = " (a local folder when it was trained)" if local else ""
    tasks = {0: "no task yet", 1: "one task"}.get(count, f"{count} tasks")
    parameters = sum(task.parameters for task in manifest.tasks)
    size = size_text(sum(task.file.bytes for task in manifest.tasks))
    return (
        f"A LoRAF adapter («LoRA without Forgetting») with {tasks} for {base_text}{note}: of LoRA's two matrices A is "
        "frozen and rebuilt from a seed, B is sparse, and the tasks own disjoint positions of it. Each request can "
        f"select any weighted subset of them. {parameters:,} trained values in all ({size}), rank {manifest.rank}, "
        f"{len(manifest.modules)} modules."
    )


def _tasks(manifest: Manifest) -> str:
    if not manifest.tasks:
        return "None yet."
    rows = []
    for task in manifest.tasks:
        trained_on = ", ".join(task.trained_with) or "the base model"
        size = size_text(task.file.bytes)
        rows.append(
            [task.name, trained_on, f"{task.alpha:g}", f"{task.sparsity:g}", f"{task.parameters:,}", task.dtype, size]
        )
    table = tables.markdown_table(
        ["task", "trained on top of", "alpha", "sparsity", "values (K)", "stored as", "size"], rows
    )
    free = sum(manifest.free_positions(name) for name in manifest.modules)
    total = sum(module.d_out for module in manifest.modules.values()) * manifest.rank
    return f"{table}\n\n{free:,} of {total:,} positions of B are free for new tasks."


def _scores(manifest: Manifest) -> str:
    rows = []
    for task in manifest.tasks:
        for entry in task.scores:
            metric = str(entry["metric"])
            score = tables.score_text(float(entry["score"]), metric)
            rows.append([entry["set"], task.name, entry["evaluation"], metric, score, entry["count"]])
    if not rows:
        return "No scores were measured."
    table = tables.markdown_table(["task set", "task", "evaluation", "metric", "score", "examples"], rows)
    return f"Each score belongs to the task set that was on when it was measured.\n\n{table}"


def _use(manifest: Manifest, name: str, base: str) -> str:
    example = manifest.task_names[-1] if manifest.tasks else "TASK"
    as_trained = {task: as_trained_or_none(manifest, task) for task in manifest.task_names}
    sets = "\n".join(
        f"- `{task}`: `--as-trained {task}` is the set `{task_set}`"
        for task, task_set in as_trained.items()
        if task_set is not None and str(task_set) != task
    )
    serve = (
        "```sh\n"
        f"loraf-serve --model {base} --adapter {name}\n"
        f'loraf-client generate "…" --tasks {example} --task-template\n'
        f"loraf-train export {name} --tasks {example} --format peft --out ./peft   # for PEFT\n"
        "```"
    )
    literal = f"\n\nTask sets are literal; a task as it was when it had just been trained:\n\n{sets}" if sets else ""
    if manifest.sets:
        named = "\n".join(f"- `{label}`: the set `{manifest.named_set(label)}`" for label in manifest.sets)
        literal += f"\n\nNamed sets:\n\n{named}"
    return (
        f"{serve}{literal}\n\nA new task needs only this checkpoint and its own data: copy the checkpoint to a folder, "
        "name that folder as `output` in a `tasks.yaml`, and run `loraf-train run tasks.yaml`."
    )


def _statistics(manifest: Manifest) -> list[str]:
    """The section on statistics; nothing if no task has any."""
    stored = [task.statistics for task in manifest.tasks if task.statistics is not None]
    if not stored:
        return []
    size = size_text(sum(file.bytes for file in stored))
    return [
        "## Statistics",
        f"`statistics/` ({size}) protects the tasks while new ones are trained on top of them; serving does not read "
        f"it. Its files {REVEALED}.",
    ]


def _training(manifest: Manifest) -> str:
    parts = []
    for task in manifest.tasks:
        lines = [f"### {task.name}", ""]
        training = task.training
        if "examples" in training:
            lines.append(f"- {training['examples']:,} examples, {training.get('steps', 0):,} steps")
        if "imported" in training:
            origin = training["imported"]
            fit = "value by value" if origin["taken_over"] else f"approximated, relative error {origin['error']:.3g}"
            kind = {"peft": "a PEFT LoRA", "loraf": "another LoRAF checkpoint"}[origin["from"]]
            lines.append(f"- imported from {kind}, {_code(origin['source'])} ({fit})")
        for phase in ("calibration", "training"):
            settings = training.get("settings", {}).get(phase)
            if settings:
                text = ", ".join(f"{key} {_value(value)}" for key, value in settings.items() if value is not None)
                lines.append(f"- {phase}: {text}")
        lines.append(f"- prompt: {_code(json.dumps(task.templates.prompt, ensure_ascii=False))}")
        lines.append(f"- completion: {_code(json.dumps(task.templates.completion, ensure_ascii=False))}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Nothing has been trained."


def _identity(manifest: Manifest) -> str:
    std = manifest.projection.init_std
    rows = [
        ["adapter digest", manifest.adapter_digest],
        ["fingerprint of the base", manifest.base_model.fingerprint],
        [
            "A",
            f"{manifest.projection.generator}, seed {manifest.projection.seed}, standard deviation "
            f"{'1/√(3·d_in)' if std is None else f'{std:g}'}",
        ],
        ["format", f"{manifests.FORMAT} {manifest.format_version}"],
    ]
    return tables.markdown_table(["", ""], rows)


def _code(text: str) -> str:
    """A code span, whose fence is longer than any run of backticks in the text."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
