"""`loraf-train compare`: methods side by side on the tasks of a file, as tables, JSON, Markdown and pictures."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError, Problem
from loraf_train.processes import launcher
from loraf_train.sequence.preflight import ModelFacts, Prepared, capacity, survey
from loraf_train.settings.comparison import HIGHEST_SEED, METHODS
from loraf_train.terminal import tables as report
from loraf_train.terminal.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf_train.compare.general import General
    from loraf_train.compare.protocols import Comparison
    from loraf_train.compare.results import Results, Run
    from loraf_train.settings.config import RunConfig

RESULTS, REPORT = "results.json", "report.md"
MASKED = ("loraf", "random-mask")  # tasks of these take positions from one another
PACKAGES = {"peft": "the method lora", "matplotlib": "the pictures", "scipy": "the intervals"}


def compare(
    path: Path,
    overrides: Sequence[str],
    methods: str,
    protocol: str,
    seeds: str | None,
    out: Path | None,
    eval_limit: int | None,
) -> int:
    """Trains and scores what the output folder does not hold yet, then shows and writes all of it.

    Args:
        methods, seeds: separated by commas; seeds None: those of the file.
        out: None: `<output>-compare/<protocol>`.
        eval_limit: examples of each evaluation set at most.

    Raises:
        LorafError: everything that is wrong with file, options, model, records and installed packages, before anything
            is trained.
    """
    problems: list[Problem] = []
    chosen = _methods(methods, problems)
    numbers = _seeds(seeds, problems)
    problems += _missing_packages(chosen)
    if launcher.sharding() is not None:  # full and lora would train the divided weights
        remedy = "launch without it; processes divide the batch all the same"
        problems.append(Problem("compare does not train a divided base", "fsdp_version", "accelerate launch", remedy))
    prepared, found, warnings = survey(path, overrides, eval_limit, into_checkpoint=False)
    problems += found
    general = None
    if prepared is not None:
        problems += _unscored(prepared.config)
        problems += _shortage(prepared, chosen, protocol)
        general = _general(prepared, problems)
    if problems or prepared is None:
        raise ConfigError([*problems, *(replace(w, message=f"warning: {w.message}") for w in warnings)])

    import torch

    from loraf_train.processes import group

    group.join(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # before any looks what is there
    config, console = prepared.config, report.console()
    console.quiet = not group.is_first()
    seeds_used = numbers or config.compare.seeds
    out = out or config.output.with_name(f"{config.output.name}-compare") / protocol
    listed = ", ".join(map(str, seeds_used))
    console.print(f"{config.file}: protocol {protocol}, methods {', '.join(chosen)}, seeds {listed}, into {out}")
    for warning in prepared.warnings:
        console.print(f"warning: {warning}")
    with Progress(console) as progress:
        comparison = _comparison(prepared, protocol, chosen, seeds_used, general, out, progress, console.print)
        results = _results(comparison, prepared.model, comparison.runs())
    if group.is_first():
        _show(results, out, console)
    group.wait()
    return 0


def _methods(text: str, problems: list[Problem]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in METHODS]
    for name in unknown:
        remedy = f"choose from: {', '.join(METHODS)}"
        problems.append(Problem(f"there is no method {name!r}", "--methods", remedy=remedy))
    return tuple(name for name in names if name not in unknown)


def _seeds(text: str | None, problems: list[Problem]) -> tuple[int, ...]:
    """None given: an empty tuple."""
    if text is None:
        return ()
    found = []
    for part in text.split(","):
        number = part.strip()
        if number.isascii() and number.isdigit() and int(number) <= HIGHEST_SEED:
            found.append(int(number))
        else:
            remedy = f"write whole numbers from 0 to {HIGHEST_SEED}, for example 0,1,2"
            problems.append(Problem(f"{number!r} is no seed", "--seeds", remedy=remedy))
    return tuple(dict.fromkeys(found))


def _missing_packages(methods: Sequence[str]) -> list[Problem]:
    return [
        Problem(
            f"{purpose} needs the package {name!r}, which is not installed", remedy="`pip install 'loraf[compare]'`"
        )
        for name, purpose in PACKAGES.items()
        if (name != "peft" or "lora" in methods) and importlib.util.find_spec(name) is None
    ]


def _unscored(config: RunConfig) -> list[Problem]:
    return [
        Problem(
            f"task {task.name!r} has no evaluation records, so nothing of it could be compared",
            f"tasks[{i}].data.eval",
            str(config.file),
            "name a file of them",
        )
        for i, task in enumerate(config.tasks)
        if not task.data.eval
    ]


def _shortage(prepared: Prepared, methods: Sequence[str], protocol: str) -> list[Problem]:
    """Tasks that do not fit, of each method whose tasks own positions."""
    problems: dict[Problem, None] = {}
    for name in methods:
        if name not in MASKED:
            continue
        config = prepared.config.of_method(name)
        alone = [config.model_copy(update={"tasks": (task,)}) for task in config.tasks]
        for part in alone if protocol == "single" else [config]:
            for problem in capacity(part, prepared.model, None):
                problems[replace(problem, message=f"method {name}: {problem.message}")] = None
    return list(problems)


def _general(prepared: Prepared, problems: list[Problem]) -> General | None:
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
    prepared: Prepared,
    protocol: str,
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    general: General | None,
    out: Path,
    progress: Progress,
    say: Any,
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
        out=out,
        part=progress.part,
        say=say,
    )


def _results(comparison: Comparison, model: ModelFacts, runs: list[Run]) -> Results:
    from loraf_train.compare.methods import ALL
    from loraf_train.compare.results import Results, ScoredTask
    from loraf_train.scoring.evaluate import higher_is_better

    config = comparison.config
    tasks = tuple(
        ScoredTask(
            task.name,
            task.metric,
            higher_is_better(task.metric),
            {name: len(s.examples) for name, s in comparison.data[task.name].evaluation.items()},
        )
        for task in config.tasks
    )
    settings = {}
    for name in comparison.methods:
        seen = comparison.config_of(name, comparison.seeds[0])
        settings[name] = {task.name: ALL[name].settings(seen, task) for task in seen.tasks}
    return Results(
        protocol=comparison.protocol,
        model=config.model,
        parameters=model.parameters,
        tasks=tasks,
        runs=tuple(runs),
        settings=settings,
        surroundings=_surroundings(comparison.loaded[0], comparison.methods),
    )


def _surroundings(model: PreTrainedModel, methods: Sequence[str]) -> dict[str, Any]:
    import torch

    from loraf_train.sequence.runner import surroundings

    found = surroundings(model)
    if "lora" in methods:
        import peft

        found["versions"]["peft"] = peft.__version__
    found["versions"]["python"] = platform.python_version()
    machine = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
    return found | {"machine": machine | {"threads": torch.get_num_threads()}}


def _show(results: Results, out: Path, console: Any) -> None:
    from loraf_train.compare import pictures, tables
    from loraf_train.compare import results as files

    tables.show(results, console)
    files.write(out / RESULTS, results)
    (out / REPORT).write_text(tables.markdown(results), encoding="utf-8")
    drawn = pictures.draw(results, out)
    for file in (out / RESULTS, out / REPORT, *drawn):
        console.print(f"written: {file}")
