"""Runs lm-evaluation-harness, in an interpreter that has it (tools/lm_eval.sh). lm_eval_stand.py starts it.

    python lm_eval_runs.py FOLDER    # the runs come from the standard input, as JSON; FOLDER/lm-eval holds the tasks

Writes FOLDER/answers.json: the scores and samples of each run, or its error. A run is what `lm-eval run` does, without
reading the thousands of tasks that come with the harness.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def answer(run: dict, tasks: TaskManager) -> dict:
    try:
        result = simple_evaluate(**run, task_manager=tasks, bootstrap_iters=0, verbosity="ERROR")
    except Exception as error:  # told to the test
        return {"error": f"{type(error).__name__}: {error}"}
    (task,) = run["tasks"]
    samples = [{"target": s["target"], "answers": s["filtered_resps"]} for s in result["samples"][task]]
    return {"scores": result["results"][task], "samples": samples}


def main() -> None:
    tasks = TaskManager(include_path=f"{sys.argv[1]}/lm-eval", include_defaults=False)
    answers = [answer(run, tasks) for run in json.load(sys.stdin)]
    Path(sys.argv[1], "answers.json").write_text(json.dumps(answers, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
