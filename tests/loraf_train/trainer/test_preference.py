"""Direct preference optimisation: TRL's loss on our layer, with the model before the task as the reference."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from loraf.checkpoint import Checkpoint
from loraf.errors import ConfigError
from loraf_train.adapter.reference import values_off
from loraf_train.adapter.trainable_base import attached, earlier_tasks
from loraf_train.data.examples import EvaluationExample, EvaluationSet
from loraf_train.data.preferences import Pair
from loraf_train.data.task_data import load_task
from loraf_train.scoring.evaluate import log_probabilities, margins, preference_grades
from loraf_train.sequence import runner
from loraf_train.sequence.base_checks import load_tokenizer
from loraf_train.sequence.preflight import survey
from loraf_train.settings import loading
from loraf_train.settings.parts import RetentionConfig
from loraf_train.trainer import loop, trl_package
from tests.loraf_train import toys
from tests.loraf_train.command_line import run as command
from tests.loraf_train.interruptions import Stopped, Stopper, contents
from tests.standins import make_model

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


def pairs(count: int = 20) -> list[Pair]:
    """The toy task's right answers, and wrong ones with the same prompt."""
    chosen = toys.examples(3, count)
    wrong = [[t + 20 for t in e.input_ids[e.prompt_length : -1]] for e in chosen]
    return [
        Pair(e, dataclasses.replace(e, input_ids=[*e.input_ids[: e.prompt_length], *ids, ids[0], 2]))
        for e, ids in zip(chosen, wrong, strict=True)
    ]


def data(count: int = 20) -> toys.TaskData:
    some = pairs(count)
    sets = {"held": EvaluationSet("held", [EvaluationExample(p.chosen, "", rejected=p.rejected) for p in pairs(6)])}
    rejected = [pair.rejected for pair in some]
    return dataclasses.replace(toys.data(3, count), rejected=rejected, evaluation=sets, metric="preference")


def layers_of(base, checkpoint, dropout=0.0):
    positions = {name: torch.arange(5, 40) for name in base.targets}
    earlier = {name: earlier_tasks(checkpoint, checkpoint.manifest.task_names, name) for name in base.targets}
    return base.layers(positions, 2.0, earlier, dropout)


def losses_of(base, layers, examples, **settings):
    """Losses of each step, and the values at the end."""
    seen = []
    values = {"batch_size": 8, "max_steps": 4, "learning_rate": 2e-2, "dropout": 0.0, "weight_decay": 0.0} | settings
    toy = dataclasses.replace(toys.phase(seed=3, **values), beta=0.3)
    with attached(base.model, layers):
        loop.fit(base.model, examples, toy, base.pad_id, lambda loss, *_: seen.append(loss))
    return seen, {name: layer.values.detach().clone() for name, layer in layers.items()}


def test_losses_and_values_are_those_of_trls_trainer(folder, tmp_path):
    """TRL trains the same layers, given a second model as its reference: the base with the earlier task on."""
    from trl import DPOConfig, DPOTrainer

    base, checkpoint = toys.trainable_base(folder, tmp_path / "ckpt", dtype=torch.float32, old=(16, 0.75))
    examples = pairs(16)
    seen, values = losses_of(base, layers_of(base, checkpoint), examples, batch_size=4, max_grad_norm=1.0)
    order = list(loop.EpochOrder(len(examples), 3))
    rows = [
        {
            "prompt_ids": p.chosen.input_ids[: p.chosen.prompt_length],
            "chosen_ids": p.chosen.input_ids[p.chosen.prompt_length :],
            "rejected_ids": p.rejected.input_ids[p.chosen.prompt_length :],
        }
        for p in (examples[i] for i in order)
    ]

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # tokenized already

    reference = copy.deepcopy(base.model)
    with (
        attached(reference, _on(reference, base, checkpoint)),
        attached(base.model, layers := layers_of(base, checkpoint)),
    ):
        arguments = DPOConfig(
            output_dir=str(tmp_path),
            beta=0.3,
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            disable_tqdm=True,
        )
        theirs = Prepared(
            base.model,
            reference,
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(folder),
        )
        theirs.train()
        del base.model.forward
    logged = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert seen == pytest.approx(logged, abs=2e-4)  # TRL's logs are rounded
    assert seen[0] == pytest.approx(0.693147, abs=1e-4) and seen[-1] < seen[0]
    for name, layer in layers.items():
        torch.testing.assert_close(layer.values.detach(), values[name], atol=2e-5, rtol=1e-3)


def _on(model, base, checkpoint):
    """Layers for a copy of the model."""
    copied = dataclasses.replace(base, model=model, targets={n: model.get_submodule(n) for n in base.targets})
    return layers_of(copied, checkpoint)


def test_a_step_does_not_depend_on_micro_batches(folder, tmp_path):
    base, checkpoint = toys.trainable_base(folder, tmp_path / "ckpt", old=(16, 0.75))
    examples = pairs(18)  # the third step of an epoch has 2
    settings = {"dropout": 0.3, "max_steps": 6}
    one, values = losses_of(base, layers_of(base, checkpoint, 0.3), examples, **settings)
    other, same = losses_of(base, layers_of(base, checkpoint, 0.3), examples, micro_batch_size=2, **settings)
    assert one == pytest.approx(other, rel=1e-4)  # the Trainer rounds what it logs
    for name in values:
        torch.testing.assert_close(values[name], same[name], rtol=1e-5, atol=1e-8)
    assert "forward" not in vars(base.model) and base.model.generation_config.pad_token_id != -1


def test_the_reference_is_the_model_without_the_values_in_training(folder, tmp_path):
    base, checkpoint = toys.trainable_base(folder, tmp_path / "ckpt", old=(16, 0.75))
    some = [pair.chosen for pair in pairs(5)]
    with attached(base.model, layers := layers_of(base, checkpoint, 0.4)):
        before = log_probabilities(base.model, some)
        for layer in layers.values():
            layer.values.data.normal_()
        changed = log_probabilities(base.model, some)
        base.model.train()
        with values_off(base.model):
            assert log_probabilities(base.model, some) == before
        assert base.model.training
        base.model.train(False)
        assert log_probabilities(base.model, some) == changed != before


# --- whole runs ------------------------------------------------------------------------------------------------------


def config(folder, output, names=("one", "two"), **training):
    settings = {
        "max_steps": None,
        "epochs": 2.0,
        "dropout": 0.2,
        "micro_batch_size": 4,
        "save_seconds": 0.0,
        "beta": 0.5,
    }
    tasks = [toys.task(name, objective="dpo", training=settings | training) for name in names]
    return toys.run_config(folder, output, *tasks, retention=RetentionConfig(budget=0.05))


@pytest.mark.parametrize("at", [("one", "calibration 1"), ("one", "step 4"), ("two", "trained")], ids="-".join)
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(folder, tmp_path, at):
    whole, again = (config(folder, tmp_path / name) for name in ("whole", "again"))
    loaded, both = runner.load_model(whole), {"one": data(), "two": data(12)}
    runner.run(whole, both, None, loaded)
    with pytest.raises(Stopped):
        runner.run(again, both, Stopper(*at), loaded)
    runner.run(again, both, Stopper(), loaded)
    assert contents(again.output) == contents(whole.output)
    tasks = Checkpoint.open(whole.output).manifest.tasks
    assert [task.training["settings"]["objective"] for task in tasks] == ["dpo", "dpo"]
    assert all(task.statistics is not None for task in tasks)


def test_the_model_learns_to_prefer(folder, tmp_path):
    run = config(folder, tmp_path / "ckpt", ("one",), max_steps=25, early_stopping={"patience": 20, "every": 5})

    class Grades(runner.Observer):
        losses: list[float] = []

        def trained(self, task, model):
            self.after = margins(model, data().evaluation["held"].examples)

        def evaluated(self, task, loss, step, best):
            self.losses.append(loss)

    loaded, observer = runner.load_model(run), Grades()
    before = margins(loaded[0], data().evaluation["held"].examples)
    runner.run(run, {"one": data()}, observer, loaded)
    assert sum(observer.after) > sum(before)
    assert observer.losses[0] < 0.694 and min(observer.losses) == observer.losses[-1]


def test_the_score_is_the_share_of_pairs_in_the_right_order(folder):
    """Of a pair and the same the other way round, one is right; a pair of the same answers is half right."""
    model = toys.load(folder)
    (pair,) = pairs(1)
    both = [
        EvaluationExample(pair.chosen, "", rejected=pair.rejected),
        EvaluationExample(pair.rejected, "", rejected=pair.chosen),
        EvaluationExample(pair.chosen, "", rejected=pair.chosen),
    ]
    assert sorted(preference_grades(model, both)) == [0, 0.5, 1]
    ids = torch.tensor([pair.chosen.input_ids])
    logs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    chosen = logs.gather(1, ids[0, 1:, None])[pair.chosen.prompt_length - 1 :].sum()
    assert log_probabilities(model, [pair.chosen]) == [pytest.approx(chosen.item(), rel=1e-4)]


def test_other_rejected_answers_are_other_training_data(folder, tmp_path):
    run = config(folder, tmp_path / "ckpt", ("one",))
    loaded = runner.load_model(run)
    with pytest.raises(Stopped):
        runner.run(run, {"one": data()}, Stopper("one", "step 2"), loaded)
    observer = Stopper()
    runner.run(run, {"one": dataclasses.replace(data(), rejected=data().rejected[::-1])}, observer, loaded)
    assert "the training data changed" in observer.remarks[0]


# --- records and settings --------------------------------------------------------------------------------------------

RECORDS = [{"prompt": f"{a}=", "chosen": a.upper(), "rejected": a} for a in ("ab", "ba", "ca", "ac", "cc")]
FILE = """
model: {model}
output: ckpt
objective: dpo
adapter: {{rank: 8, sparsity: 0.6, target_modules: [q_proj, down_proj]}}
calibration: {{steps: 1}}
training: {{learning_rate: 2e-2, batch_size: 4, max_steps: 3{training}}}
tasks: [{{name: a, data: {{train: a.jsonl, eval: a.jsonl{data}}}{task}}}]
"""


def write(folder, model, records=RECORDS, training="", data="", task=""):
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = FILE.format(model=model, training=training, data=data, task=task)
    (folder / "tasks.yaml").write_text(text)
    return folder / "tasks.yaml"


def test_run_check_and_eval(folder, tmp_path, monkeypatch, capsys):
    write(tmp_path, folder)
    monkeypatch.chdir(tmp_path)
    status, out, err = command(capsys, "check", "tasks.yaml")
    assert status == 0 and "evaluation a: 5 examples, preference" in out and "ab=⟦ab" in out, err
    status, out, err = command(capsys, "run", "tasks.yaml")
    assert status == 0 and "a (preference)" in out, err
    status, out, err = command(capsys, "eval", "tasks.yaml", "--base", "--json", "scores.json")
    assert status == 0, err
    (score,) = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert (score["metric"], score["count"]) == ("preference", 5) and 0 <= score["score"] <= 1


def test_templates_and_conversations_give_the_same_texts(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    task = loading.load(write(tmp_path, folder)).tasks[0]
    plain = load_task(task, tokenizer, 0)
    renamed = [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in RECORDS]
    named = loading.load(write(tmp_path, folder, renamed, data=', prompt: "{q}", chosen: "{good}", rejected: "{bad}"'))
    other = load_task(named.tasks[0], tokenizer, 0)
    assert (other.train, other.rejected) == (plain.train, plain.rejected)
    assert (other.templates.prompt, other.templates.completion) == ("{q}", "{good}")


def test_doubtful_pairs_are_warned_of(folder, tmp_path):
    records = [*RECORDS, {**RECORDS[0], "rejected": "AB"}, {**RECORDS[1], "chosen": "ba", "rejected": "BA"}]
    _, problems, warnings = survey(write(tmp_path, folder, records))
    assert problems == []
    texts = " ".join(str(warning) for warning in warnings)
    assert "record 6" in texts and "are the same" in texts and "record 7" in texts and "prefers the answer" in texts


def test_pairs_that_prefer_nothing_are_counted_and_left_out(folder, tmp_path):
    same = [{**record, "rejected": record["chosen"]} for record in RECORDS[:2]]
    prepared, _, warnings = survey(write(tmp_path, folder, [*RECORDS, *same]))
    assert len(prepared.data["a"].units) == 5 == len(prepared.data["a"].rejected)
    (of_train, of_eval) = [str(warning) for warning in warnings]
    assert "record 6" in of_train and "and 1 more" in of_train and "it is not trained on" in of_train
    assert "it counts half" in of_eval
    assert all(pair.chosen != pair.rejected for pair in prepared.data["a"].units)


def test_pairs_that_max_length_makes_the_same_are_left_out_and_the_remedy_keeps_them(folder, tmp_path):
    long = [{"prompt": "ab=", "chosen": "AAAAAA" + end, "rejected": "AAAAAA" + end + "B"} for end in ("", "CC")]
    records = [*RECORDS, *long]
    prepared, problems, warnings = survey(write(tmp_path, folder, records, training=", max_length: 8"))
    assert problems == [] and len(prepared.data["a"].units) == 5
    (found,) = [warning for warning in warnings if "answers that are the same" in warning.message]
    assert "max_length 8 cuts 2 pairs" in found.message and found.field == "record 6"
    needed = int(re.search(r"max_length to (\d+)", found.remedy)[1])
    for length, kept in ((needed, 7), (needed - 1, 6)):
        prepared, _, _ = survey(write(tmp_path, folder, records, training=f", max_length: {length}"))
        assert len(prepared.data["a"].units) == kept


@pytest.mark.parametrize(
    ("chosen", "rejected", "training", "message"),
    [
        ("AB", "AB", "", "the same, in all 3"),
        ("A" * 20, "A" * 21, ", max_length: 8", "3 are cut to the same answers by max_length 8"),
    ],
)
def test_a_task_without_a_pair_that_can_teach_is_refused(folder, tmp_path, chosen, rejected, training, message):
    records = [{"prompt": f"{n}=", "chosen": chosen, "rejected": rejected} for n in range(3)]
    _, problems, _ = survey(write(tmp_path, folder, records, training=training))
    assert any(message in problem.message and problem.remedy for problem in problems)


@pytest.mark.parametrize(
    ("record", "data", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, "", "null in field 'rejected'"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "", "null in field 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ', prompt: "{prompt}", rejected: "{c}"', "data.rejected"),
        ({"chosen": [{"role": "user"}], "rejected": []}, "", "both answers follow into a field prompt"),
    ],
)
def test_a_mistake_names_the_answer_that_has_it(folder, tmp_path, record, data, message):
    _, problems, _ = survey(write(tmp_path, folder, [record], data=data))
    assert message in str(problems[0]) and "completion" not in str(problems[0])


def test_an_empty_rejected_answer_does_not_teach_to_answer_nothing(folder, tmp_path):
    _, _, warnings = survey(write(tmp_path, folder, [*RECORDS, {**RECORDS[0], "rejected": ""}]))
    text = " ".join(map(str, warnings))
    assert "its rejected answer is empty" in text and "learns to answer nothing" not in text
    _, _, warnings = survey(write(tmp_path, folder, [*RECORDS, {**RECORDS[0], "chosen": ""}]))
    assert "learns to answer nothing" in " ".join(map(str, warnings))


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "0.9.6", "1.160.0"])
def test_another_release_of_trl_is_refused(folder, tmp_path, monkeypatch, version):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    (problem,) = trl_package.missing("objective", "tasks.yaml")
    assert version in problem.message and "loraf[trl]" in problem.remedy
    requirement = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'"trl>={trl_package.RELEASE},<' in requirement


def test_records_without_two_answers_are_a_mistake(folder, tmp_path):
    _, problems, _ = survey(write(tmp_path, folder, [{"prompt": "a", "completion": "b"}]))
    assert any("has no field 'chosen', 'rejected'" in str(problem) for problem in problems)


@pytest.mark.parametrize(
    ("replaced", "field"),
    [
        ({"task": ", objective: sft", "training": ", beta: 0.1"}, "training.beta"),
        ({"task": ", objective: sft", "data": ', chosen: "{a}"'}, "tasks[0].data.chosen"),
        ({"task": ", objective: sft, metric: preference"}, "tasks[0].metric"),
        ({"task": ", metric: loss"}, "tasks[0].metric"),
        ({"data": ', prompt: "{a}", completion: "{b}"'}, "tasks[0].data.completion"),
        ({"data": ", streaming: true"}, "tasks[0].data.streaming"),
        ({"training": ", packing: true"}, "training.packing"),
        ({"training": ", beta: 0"}, "training.beta"),
    ],
)
def test_what_contradicts_is_refused(tmp_path, replaced, field):
    with pytest.raises(ConfigError) as caught:
        loading.load(write(tmp_path, "tiny", **replaced))
    (problem,) = caught.value.problems
    assert problem.field == field and problem.remedy
