"""`loraf-train compare`: compares methods on the tasks of a file, as tables, JSON, Markdown and pictures."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError, Problem
from loraf_train.processes import launcher
from loraf_train.sequence.base_checks import BaseModelShape
from loraf_train.sequence.conflicts import capacity
from loraf_train.sequence.preflight import PreparedRun, survey
from loraf_train.settings.comparison import HIGHEST_SEED, MASKED, METHODS, ONE_ALPHA, WITH_PEFT
from loraf_train.terminal.progress import Progress
from loraf_train.terminal.tables import console

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from loraf_train.compare.general import General
    from loraf_train.compare.protocols import Comparison
    from loraf_train.compare.results import Results, Run
    from loraf_train.settings.config import RunConfig

RESULTS, REPORT = "results.json", "report.md"
PACKAGES = {"matplotlib": "the pictures", "scipy": "the intervals"}  # name → needed for


def compare(
    path: Path,
    overrides: Sequence[str],
    methods: str,
    protocol: str,
    seeds: str | None,
    folder: Path | None,
    eval_limit: int | None,
    stored_only: bool = False,
) -> int:
    """Trains and scores what the folder of results does not hold yet, then prints and writes all results.

    Args:
        methods, seeds: separated by commas; seeds None: those of the file.
        folder: of the results; None: `<output>-compare/<protocol>`.
        eval_limit: maximum number of examples of each evaluation set; None: all.
        stored_only: show the runs that the folder holds, and train nothing.

    Raises:
        LorafError: everything that is wrong with file, options, model, records and installed packages, before anything
            is trained.
    """
    problems: list[Problem] = []
    method_names = _parse_methods(methods, problems)
    seed_numbers = _parse_seeds(seeds, problems)
    problems += _missing_packages(method_names)
    if launcher.sharding() is not None:  # full and lora would train the sharded weights
        remedy = "launch without FSDP; the processes still divide each batch"
        problems.append(Problem("compare does not train a sharded model", "fsdp_version", "accelerate launch", remedy))
    prepared, file_problems, warnings = survey(path, overrides, eval_limit, into_checkpoint=False)
    problems += file_problems
    general = None
    if prepared is not None:
        problems += _unscored(prepared.config)
        problems += _unsupported(prepared.config)
        problems += _shortage(prepared, method_names, protocol)
        problems += _dropout_in_parameters(prepared, method_names)
        problems += _several_alphas(prepared.config, method_names, protocol)
        general = _general(prepared, problems)
    if problems or prepared is None:
        raise ConfigError([*problems, *(replace(w, message=f"warning: {w.message}") for w in warnings)])

    import torch

    from loraf_train.processes import group

    group.join(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # before any process looks for runs
    config, out = prepared.config, console(quiet=not group.is_first())
    seed_numbers = seed_numbers or config.compare.seeds
    folder = folder or config.output.with_name(f"{config.output.name}-compare") / protocol
    listed = ", ".join(map(str, seed_numbers))
    out.print(f"{config.file}: protocol {protocol}, methods {', '.join(method_names)}, seeds {listed}, into {folder}")
    for warning in prepared.warnings:
        out.print(f"warning: {warning}")
    with Progress(out) as progress:
        comparison = _comparison(prepared, protocol, method_names, seed_numbers, general, folder, progress, out.print)
        comparison = replace(comparison, stored_only=stored_only)
        runs = comparison.runs()
    if not runs:
        remedy = "name methods and seeds that were run, with the settings that they had, or leave out --stored"
        raise ConfigError(Problem("holds none of these runs", file=str(folder), remedy=remedy))
    comparison = replace(comparison, methods=tuple(dict.fromkeys(run.method for run in runs)))
    results = _results(comparison, prepared.model, runs)
    if group.is_first():
        _show(results, folder, out)
    group.wait()
    return 0


def _unsupported(config: RunConfig) -> list[Problem]:
    """Settings that only `run` keeps to: the other methods train all steps of completions that are in memory."""
    file, problems = str(config.file), []
    if config.quantization is not None:
        message = "compare trains full weights, and a base in four bits has none"
        problems.append(Problem(message, "quantization", file, "leave it out"))
    for i, task in enumerate(config.tasks):
        for setting, given, remedy in (
            ("training.early_stopping", task.training.early_stopping is not None, "set it to off, and give max_steps"),
            ("data.streaming", task.data.streaming, "set it to false"),
            ("objective", task.objective != "sft", "compare tasks with objective: sft"),
        ):
            if given:
                message = f"compare does not keep to it (task {task.name!r})"
                problems.append(Problem(message, f"tasks[{i}].{setting}", file, remedy))
    return problems


def _parse_methods(text: str, problems: list[Problem]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in METHODS]
    for name in unknown:
        remedy = f"choose from: {', '.join(METHODS)}"
        problems.append(Problem(f"there is no method {name!r}", "--methods", remedy=remedy))
    return tuple(name for name in names if name not in unknown)


def _parse_seeds(text: str | None, problems: list[Problem]) -> tuple[int, ...]:
    """Returns an empty tuple for None."""
    if text is None:
        return ()
    seeds = []
    for part in text.split(","):
        number = part.strip()
        if number.isascii() and number.isdigit() and int(number) <= HIGHEST_SEED:
            seeds.append(int(number))
        else:
            remedy = f"write whole numbers from 0 to {HIGHEST_SEED}, for example 0,1,2"
            problems.append(Problem(f"{number!r} is not a seed", "--seeds", remedy=remedy))
    return tuple(dict.fromkeys(seeds))


def _missing_packages(methods: Sequence[str]) -> list[Problem]:
    with_peft = [name for name in methods if name in WITH_PEFT]
    needed = ({"peft": f"the method {with_peft[0]}"} if with_peft else {}) | PACKAGES
    return [
        Problem(
            f"the package {name!r}, needed for {purpose}, is not installed", remedy="`pip install 'loraf[compare]'`"
        )
        for name, purpose in needed.items()
        if importlib.util.find_spec(name) is None
    ]


def _unscored(config: RunConfig) -> list[Problem]:
    return [
        Problem(
            f"task {task.name!r} has no evaluation records, so it cannot be compared",
            f"tasks[{i}].data.eval",
            str(config.file),
            "name a file with evaluation records",
        )
        for i, task in enumerate(config.tasks)
        if not task.data.eval
    ]


def _shortage(prepared: PreparedRun, methods: Sequence[str], protocol: str) -> list[Problem]:
    """Tasks that do not fit, for each method whose tasks own positions."""
    problems: dict[Problem, None] = {}
    for name in methods:
        if name not in MASKED:
            continue
        config = prepared.config.of_method(name)
        alone = [config.model_copy(update={"tasks": (task,)}) for task in config.tasks]
        for part in alone if protocol == "single" else [config]:
            for problem in capacity(part, prepared.model.modules):
                problems[replace(problem, message=f"method {name}: {problem.message}")] = None
    return list(problems)


def _dropout_in_parameters(prepared: PreparedRun, methods: Sequence[str]) -> list[Problem]:
    """Tasks with dropout, where PEFT must be told some layers by their parameters, which get no dropout."""
    from loraf_train.adapter.peft_targets import peft_targets

    _, parameters = peft_targets(prepared.model.model_type, prepared.model.modules)
    with_peft = ", ".join(name for name in methods if name in WITH_PEFT)
    if not with_peft or not parameters:
        return []
    message = f"method {with_peft}: PEFT has no dropout for {parameters[0]} of this model"
    remedy = f"set it to 0, or leave out {with_peft}"
    return [
        Problem(message, f"tasks[{i}].training.dropout", str(prepared.config.file), remedy)
        for i, task in enumerate(prepared.config.tasks)
        if task.training.dropout
    ]


def _several_alphas(config: RunConfig, methods: Sequence[str], protocol: str) -> list[Problem]:
    """Methods that would train one LoRA with tasks of different α."""
    return [
        Problem(
            f"method {name}: one LoRA serves all tasks, but their alpha differs",
            f"compare.methods.{name}.alpha",
            str(config.file),
            "set one alpha for this method",
        )
        for name in methods
        if name in ONE_ALPHA and protocol == "sequence" and len({t.alpha for t in config.of_method(name).tasks}) > 1
    ]


def _general(prepared: PreparedRun, problems: list[Problem]) -> General | None:
    source = prepared.config.compare.general
    if source is None:
        return None
    from loraf_train.compare.general import general_text

    try:
        return general_text(source, prepared.tokenizer, prepared.model.context)
    except ConfigError as error:
        problems += error.problems
        return None


def _comparison(
    prepared: PreparedRun,
    protocol: str,
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    general: General | None,
    folder: Path,
    progress: Progress,
    say: Callable[[str], None],
) -> Comparison:
    from loraf import base_model
    from loraf_train.compare.protocols import Comparison
    from loraf_train.sequence import runner

    return Comparison(
        config=prepared.config,
        protocol=protocol,
        methods=methods,
        seeds=seeds,
        data=prepared.data,
        general=general,
        loaded=runner.load_model(prepared.config),
        base=base_model.fingerprint(prepared.model.folder),
        folder=folder,
        part=progress.part,
        say=say,
        base_text=prepared.base_text,
    )


def _results(comparison: Comparison, model: BaseModelShape, runs: list[Run]) -> Results:
    from loraf_train.compare.methods import ALL
    from loraf_train.compare.report.numbers import numbers
    from loraf_train.compare.results import Results, ScoredTask
    from loraf_train.scoring.evaluate import higher_is_better

    config = comparison.config
    data = [(task.name, comparison.data[task.name]) for task in config.tasks]
    tasks = tuple(
        ScoredTask(
            name, d.metric, higher_is_better(d.metric), {key: len(s.examples) for key, s in d.evaluation.items()}
        )
        for name, d in data
    )
    settings = {}
    for name in comparison.methods:
        of_method = comparison.config_of(name, comparison.seeds[0])
        settings[name] = {task.name: ALL[name].settings(of_method, task) for task in of_method.tasks}
    results = Results(
        protocol=comparison.protocol,
        model=config.model,
        parameters=model.parameters,
        tasks=tasks,
        runs=tuple(runs),
        settings=settings,
        surroundings=_environment(comparison.loaded[0], comparison.methods),
    )
    return replace(results, numbers=numbers(results))


def _environment(model: PreTrainedModel, methods: Sequence[str]) -> dict[str, Any]:
    import torch

    from loraf_train.sequence.provenance import environment

    entries = environment(model)
    if any(name in WITH_PEFT for name in methods):
        import peft

        entries["versions"]["peft"] = peft.__version__
    entries["versions"]["python"] = platform.python_version()
    machine = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
    return entries | {"machine": machine | {"threads": torch.get_num_threads()}}


def _show(results: Results, folder: Path, out: Console) -> None:
    from loraf_train.compare.report.pictures import draw
    from loraf_train.compare.report.tables import markdown, show
    from loraf_train.compare.results import write

    show(results, out)
    write(folder / RESULTS, results)
    (folder / REPORT).write_text(markdown(results), encoding="utf-8")
    pictures = draw(results, folder)
    for file in (folder / RESULTS, folder / REPORT, *pictures):
        out.print(f"written: {file}")
