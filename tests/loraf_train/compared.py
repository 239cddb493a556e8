"""Made-up results of comparisons, generated from a seed, on the modules of a small model."""

from __future__ import annotations

import random

from loraf_train.compare.results import (
    AS_TRAINED,
    BASE,
    SO_FAR,
    Cost,
    Drift,
    MaskShare,
    Results,
    Run,
    RunScore,
    ScoredTask,
)

METHODS = ("loraf", "lora", "full")
TASKS = (
    ScoredTask("maths", "gsm8k", True, {"gsm8k": 200}),
    ScoredTask("nlu", "choice", True, {"boolq": 100, "arc_easy": 80}),
    ScoredTask("code", "exact_match", True, {"code": 50}),
)
PARAMETERS = 1_000_000
MODULES = {f"model.layers.{layer}.self_attn.{name}": 4096 for layer in range(4) for name in ("q_proj", "v_proj")} | {
    f"model.layers.{layer}.mlp.down_proj": 8192 for layer in range(4)
}


def single(seeds: int = 3, methods: tuple[str, ...] = METHODS, tasks: tuple[ScoredTask, ...] = TASKS) -> Results:
    runs = [_single_run(method, seed, tasks) for method in methods for seed in range(seeds)]
    return Results("single", "tiny", PARAMETERS, tasks, tuple(runs))


def sequence(seeds: int = 3, methods: tuple[str, ...] = METHODS, tasks: tuple[ScoredTask, ...] = TASKS) -> Results:
    """Later tasks lower the scores of earlier ones, those of loraf the least."""
    runs = [_sequence_run(method, seed, tasks) for method in methods for seed in range(seeds)]
    of_task = {"rank": 8, "targets": ["q_proj", "v_proj"], "init_std": None, "training": {"learning_rate": 1e-3}}
    settings = {method: {task.name: of_task for task in tasks} for method in methods}
    return Results("sequence", "tiny", PARAMETERS, tasks, tuple(runs), settings, {"device": "cpu"})


def _score(after: str, acting: str, task: ScoredTask, evaluation: str, share: float) -> RunScore:
    """A score of about `share`: a whole number of right answers; of a loss, any number."""
    count = task.evaluations[evaluation]
    value = round(share * count) / count if task.higher_is_better else 4 - 3 * share
    return RunScore(after, acting, task.name, evaluation, value, count)


def _base(tasks: tuple[ScoredTask, ...]) -> list[RunScore]:
    return [_score(BASE, SO_FAR, task, name, 0.1) for task in tasks for name in task.evaluations]


def _single_run(method: str, seed: int, tasks: tuple[ScoredTask, ...]) -> Run:
    chance = random.Random(f"{method} {seed}")
    scores = _base(tasks)
    for task in tasks:
        scores += [_score(task.name, SO_FAR, task, n, chance.uniform(0.6, 0.95)) for n in task.evaluations]
    return Run(method, seed, method != "loraf", tuple(scores), _costs(method, tasks))


def _sequence_run(method: str, seed: int, tasks: tuple[ScoredTask, ...]) -> Run:
    chance = random.Random(f"{method} {seed}")
    keeps = {"loraf": 0.9, "lora": 0.3, "full": 0.1}.get(method, 0.5)
    scores = _base(tasks)
    best = {name: chance.uniform(0.7, 0.95) for task in tasks for name in task.evaluations}
    for i, after in enumerate(tasks):
        for j, task in enumerate(tasks):
            for name in task.evaluations:
                share = best[name] * keeps ** (i - j) if j <= i else chance.uniform(0.05, 0.2)
                scores.append(_score(after.name, SO_FAR, task, name, share))
    scores += [_score(tasks[-1].name, AS_TRAINED, t, name, best[name]) for t in tasks for name in t.evaluations]
    drift = [Drift(BASE, 2.5, 1000)]
    drift += [Drift(task.name, 2.5 + (1 - keeps) * (i + chance.random()), 1000) for i, task in enumerate(tasks)]
    masks = [
        MaskShare(task.name, module, size // 10 - layer * 20, size)
        for task in tasks
        for layer, (module, size) in enumerate(MODULES.items())
    ]
    return Run(
        method,
        seed,
        method != "loraf",
        tuple(scores),
        _costs(method, tasks),
        tuple(drift),
        tuple(masks) if method == "loraf" else (),
    )


def _costs(method: str, tasks: tuple[ScoredTask, ...]) -> tuple[Cost, ...]:
    trainable = {"loraf": 7_000, "lora": 90_000}.get(method, PARAMETERS)
    peak = 5 * trainable + 2_000_000
    return tuple(Cost(t.name, trainable, 120, 30.0 + i, peak, 4 * trainable) for i, t in enumerate(tasks))
