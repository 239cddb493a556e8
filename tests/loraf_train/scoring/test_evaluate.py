"""Scores against transformers' own answers and losses, one example at a time; and the score table."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from loraf.delta import Merger
from loraf.errors import CorruptCheckpoint
from loraf.manifest import Templates
from loraf.tasksets import TaskSet
from loraf_train.data.examples import EvaluationExample, EvaluationSet, Example
from loraf_train.data.task_data import TaskData
from loraf_train.grading import custom
from loraf_train.grading.builtin import is_right, mean_interval, wilson_interval
from loraf_train.scoring import evaluate
from loraf_train.scoring import table as scores
from loraf_train.scoring.evaluate import Score, batches, completion_loss, generate, score
from loraf_train.scoring.identity import evaluation_digest
from loraf_train.settings.config import TaskConfig
from loraf_train.settings.data import DataConfig
from loraf_train.terminal.tables import interval_text
from tests.standins import make_model, random_checkpoint

PROMPTS = ["a", "Say something long: " + "x" * 70, "2+2=", "b" * 33, "What is true?", "cc"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("mistral", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("ckpt"), folder, tasks=("a", "b", "c"))


def one_by_one(model, tokenizer, prompts, new_tokens, ends) -> list[str]:
    """The reference: transformers alone, without batches or padding."""
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=0)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)[0, len(prompt) :]
        answers.append(tokenizer.decode(out, skip_special_tokens=True))
    return answers


def example(tokenizer, prompt: str, completion: str, expected: str = "") -> EvaluationExample:
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return EvaluationExample(Example([*head, *tail, tokenizer.eos_token_id], len(head)), expected or completion)


def task(name: str, **settings) -> TaskConfig:
    data = DataConfig(train="unused.jsonl")
    return TaskConfig(name=name, alpha=1.0, sparsity=0.5, data=data, **settings)


def task_data(sets: dict[str, EvaluationSet], metric: str = "exact_match") -> TaskData:
    return TaskData(train=[], evaluation=sets, templates=Templates(), records=0, metric=metric)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_batched_answers_equal_single_ones(model, tokenizer, monkeypatch):
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    common = model.generate(torch.tensor([prompts[0]]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, -1].item()
    ends = [tokenizer.eos_token_id, common]  # a token that occurs, so that some answers end early
    expected = one_by_one(model, tokenizer, prompts, 12, ends)
    assert len(set(expected)) > 3
    assert len({len(answer) for answer in expected}) > 1
    monkeypatch.setattr(evaluate, "MAX_BATCH", 4)  # batches of different lengths, the last one partial
    monkeypatch.setattr(model.generation_config, "eos_token_id", [common])
    seen = []
    assert generate(model, tokenizer, prompts, 12, seen.append) == [
        answer.removesuffix(tokenizer.decode([common])) for answer in expected
    ]
    assert seen[-1] == len(prompts) and seen == sorted(seen)


def test_the_models_own_sampling_settings_have_no_effect(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:4]]
    expected = generate(model, tokenizer, prompts, 10)
    before = model.generation_config
    try:
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=5.0, repetition_penalty=9.0, max_new_tokens=1, num_beams=3, eos_token_id=2
        )
        odd = model.generation_config
        assert generate(model, tokenizer, prompts, 10) == expected
        assert model.generation_config is odd  # and is restored
    finally:
        model.generation_config = before


def test_dropout_is_off_while_scoring_and_the_mode_is_restored(model, tokenizer):
    seen = []
    hook = model.register_forward_hook(lambda module, *_: seen.append(module.training))
    try:
        model.train()
        generate(model, tokenizer, [tokenizer("a")["input_ids"]], 2)
        completion_loss(model, [example(tokenizer, "a", "b")])
        assert model.training
    finally:
        model.eval()
        hook.remove()
    assert seen and not any(seen)


def test_batches_hold_every_index_once_within_their_budget(monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_BATCH", 5)
    monkeypatch.setattr(evaluate, "MAX_BATCH_TOKENS", 100)
    lengths = [3, 90, 200, 1, 40, 41, 7, 7, 7, 7, 7, 7, 7]
    split = list(batches(lengths, 10))
    assert sorted(i for batch in split for i in batch) == list(range(len(lengths)))
    for batch in split:
        assert len(batch) <= 5
        assert len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + 10) <= 100
    assert list(batches([], 3)) == []


# --- scores ----------------------------------------------------------------------------------------------------------


def test_loss_equals_transformers_loss_of_single_examples(model, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_BATCH", 3)
    examples = [example(tokenizer, prompt, "yes" * (i % 4)) for i, prompt in enumerate(PROMPTS[:7])]
    total, count = 0.0, 0
    for e in examples:
        ids = torch.tensor([e.example.input_ids])
        labels = ids.clone()
        labels[:, : e.example.prompt_length] = -100
        tokens = len(e.example.input_ids) - e.example.prompt_length
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * tokens
        count += tokens
    assert completion_loss(model, examples) == pytest.approx(total / count, rel=1e-5)


def test_every_example_counts_and_the_mean_is_unweighted(model, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_BATCH", 4)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:6]]
    answers = one_by_one(model, tokenizer, prompts, 5, [tokenizer.eos_token_id])
    right = EvaluationSet("right", [example(tokenizer, p, "", a) for p, a in zip(PROMPTS[:6], answers, strict=True)])
    half = EvaluationSet(
        "half", [replace(e, expected="no such answer") for e in right.examples[:5]] + right.examples[5:]
    )
    seen = []
    measured = score(
        model,
        tokenizer,
        task("t", max_new_tokens=5),
        task_data({"right": right, "half": half}),
        TaskSet((("a", 0.5),)),
        lambda *at: seen.append(at),
    )
    assert [replace(s, digest="") for s in measured] == [
        Score("a:0.5", "t", "right", "exact_match", 1.0, 6),
        Score("a:0.5", "t", "half", "exact_match", 1 / 6, 6),
        Score("a:0.5", "t", "mean", "exact_match", (1 + 1 / 6) / 2, 12),
    ]
    assert seen == [(4, 12), (6, 12), (10, 12), (12, 12)]
    (single,) = score(model, tokenizer, task("t", max_new_tokens=5), task_data({"half": half}), TaskSet())
    assert (single.set, single.score) == ("base", 1 / 6)


def test_choice_and_loss_scores(model, tokenizer):
    letters = tuple("abcdefghijklmnopqrstuvwxyz")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[:6]]
    answers = one_by_one(model, tokenizer, prompts, 32, [tokenizer.eos_token_id])
    examples = [example(tokenizer, text, "m", "m") for text in PROMPTS[:6]]
    choices = task_data({"e": EvaluationSet("e", examples, letters)}, "choice")
    (choice,) = score(model, tokenizer, task("t"), choices, TaskSet())
    assert choice.score == sum(is_right("choice", answer, "m", letters) for answer in answers) / 6
    losses = task_data({"e": EvaluationSet("e", examples)}, "loss")
    (loss,) = score(model, tokenizer, task("t"), losses, TaskSet())
    assert (loss.metric, loss.score) == ("loss", completion_loss(model, examples))


@pytest.fixture
def answering(tokenizer, monkeypatch):
    """Scores an evaluation set, with given token ids in place of what the model generates."""

    def answers(examples, ids, metric="exact_match", choices=(), **settings) -> Score:
        monkeypatch.setattr(evaluate, "generate_ids", lambda *_: ids)
        data = task_data({"e": EvaluationSet("e", examples, choices)}, metric)
        model = SimpleNamespace(generation_config=GenerationConfig())
        (measured,) = score(model, tokenizer, task("t", **settings), data, TaskSet())
        return measured

    return answers


def test_a_right_answer_with_special_tokens_can_be_right(tokenizer, answering):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "</call>"]})
    right = example(tokenizer, "weather?", "<call>rain</call>")
    ids = tokenizer("<call>rain</call>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "rain"  # what was compared before
    without = tokenizer("rain", add_special_tokens=False)["input_ids"]
    assert answering([right] * 2, [ids, without]).score == 0.5
    plain = example(tokenizer, "weather?", "rain")
    assert answering([plain] * 2, [ids, without]).score == 1.0  # elsewhere a stray special token is ignored
    choice = answering([right] * 2, [ids, without], "choice", ("<call>rain</call>", "rain"))
    assert choice.score == 0.5


def test_a_right_answer_that_the_tokenizer_writes_differently_can_be_right(tokenizer, answering, monkeypatch):
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: decode(ids, **options).lower().replace(".", " ."))
    right, wrong = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Yes.", "No."))
    assert answering([example(tokenizer, "a", "Yes.")] * 2, [right, wrong]).score == 0.5


def test_graded_answers_have_a_bootstrapped_interval(tokenizer, answering):
    examples = [replace(example(tokenizer, "a", "b"), record={"grade": i / 9}) for i in range(10)]
    graded = answering(examples, [[]] * 10, "own:grade", grade=lambda answer, record: record["grade"])
    assert graded.interval == mean_interval([i / 9 for i in range(10)])
    low, high = scipy.stats.bootstrap(([i / 9 for i in range(10)],), np.mean, method="percentile").confidence_interval
    assert graded.interval == pytest.approx((low, high), abs=0.02)
    assert wilson_interval(graded.score * 10, 10) != pytest.approx(graded.interval, abs=0.02)
    assert interval_text(graded) == "{:.3f}–{:.3f}".format(*graded.interval)
    assert "interval" not in answering(examples[:1], [[]]).entry()


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tokenizer) -> dict[str, TaskData]:
    """Tasks a and b with evaluation sets (two for b), and c without."""

    def of(*names: str) -> TaskData:
        sets = {n: EvaluationSet(n, [example(tokenizer, f"{n}{i}", "yes") for i in range(3)]) for n in names}
        return task_data(sets, "loss" if names else "exact_match")

    return {"a": of("one"), "b": of("one", "two"), "c": of()}


TASKS = (task("a"), task("b"), task("c"))


def test_the_table_holds_every_task_so_far_under_every_row(checkpoint, data):
    manifest = checkpoint.manifest
    cells = [(str(cell.task_set), cell.task) for cell in scores.score_keys(manifest, data)]
    assert cells == [("a", "a"), ("a+b", "a"), ("a+b", "b"), ("a+b+c", "a"), ("a+b+c", "b")]
    alone = replace(manifest, tasks=tuple(replace(t, trained_with=()) for t in manifest.tasks))  # start: base
    more = [(str(cell.task_set), cell.task) for cell in scores.score_keys(alone, data)]
    assert more == [*cells, ("b", "b")]


def test_complete_measures_the_missing_scores_and_restores_the_model(model, tokenizer, checkpoint, data):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = scores.complete(checkpoint, model, tokenizer, TASKS, data)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(measured) == 1 + 1 + 3 + 1 + 3
    merger = Merger(model, checkpoint)
    for s in measured:
        merger.merge(TaskSet.parse(s.set, checkpoint.manifest.task_names))
        if s.evaluation != "mean":
            assert s.score == pytest.approx(completion_loss(model, data[s.task].evaluation[s.evaluation].examples))
    merger.merge(TaskSet())
    assert len({round(s.score, 6) for s in measured if (s.task, s.evaluation) == ("a", "one")}) == 3  # the sets differ
    stored = checkpoint.manifest
    assert sorted(map(str, scores.stored(stored))) == sorted(map(str, measured))
    assert scores.missing(stored, TASKS, data) == []
    assert scores.complete(checkpoint, model, tokenizer, TASKS, data) == []

    # Some scores are missing, as after a killed run: the next run ends with the same manifest.
    checkpoint.set_scores("a", [entry for entry in stored.task("a").scores if entry["set"] != "a+b"])
    checkpoint.set_scores("b", [])
    assert {(str(c.task_set), c.task) for c in scores.missing(checkpoint.manifest, TASKS, data)} == {
        ("a+b", "a"),
        ("a+b", "b"),
        ("a+b+c", "b"),
    }
    scores.complete(checkpoint, model, tokenizer, TASKS, data)
    assert checkpoint.manifest == stored


def test_scores_of_other_examples_or_metrics_are_measured_again(model, tokenizer, checkpoint, data):
    scores.complete(checkpoint, model, tokenizer, TASKS, data)
    fewer = data | {
        "a": replace(data["a"], evaluation={"one": EvaluationSet("one", data["a"].evaluation["one"].examples[:2])})
    }
    assert {c.task for c in scores.missing(checkpoint.manifest, TASKS, fewer)} == {"a"}
    other = data | {"b": replace(data["b"], metric="exact_match")}
    assert {c.task for c in scores.missing(checkpoint.manifest, TASKS, other)} == {"b"}
    assert scores.outdated(checkpoint.manifest, TASKS, data) == []
    assert scores.outdated(checkpoint.manifest, TASKS, other) == ["b"]


def test_a_score_is_of_its_examples_and_of_how_they_are_scored(tokenizer):
    """Whatever can change a score changes the digest under which it is stored."""
    examples = [example(tokenizer, f"q{i}", "yes") for i in range(3)]
    evaluation = EvaluationSet("e", examples, ("yes", "no"))

    def digest(evaluation=evaluation, metric="choice", **settings) -> str:
        return evaluation_digest(task("t", **settings), metric, evaluation)

    def grade(answer, record) -> bool:
        return True

    other = replace(examples[0], expected="no")
    digests = [
        digest(),
        digest(replace(evaluation, examples=[other, *examples[1:]])),
        digest(replace(evaluation, examples=[example(tokenizer, "q", "yes"), *examples[1:]])),
        digest(replace(evaluation, examples=[replace(examples[0], record={"a": 1}), *examples[1:]])),
        digest(replace(evaluation, examples=examples[::-1])),
        digest(replace(evaluation, choices=("no", "yes", "maybe"))),
        digest(metric="exact_match"),
        digest(max_new_tokens=7),
        digest(grade=grade),
        digest(metric="loss"),
    ]
    assert len(set(digests)) == len(digests)
    moved = replace(evaluation, name="f", examples=[replace(e, source="elsewhere", number=9) for e in examples])
    assert digest(moved) == digest() == digest(max_new_tokens=32)
    assert digest(metric="loss", max_new_tokens=7) == digest(metric="loss")


def test_a_changed_metric_of_the_users_own_is_another_digest(tmp_path, tokenizer):
    evaluation = EvaluationSet("e", [example(tokenizer, "q", "yes")])
    digests = set()
    for value in ("1.0", "0.5"):
        (tmp_path / "own.py").write_text(f"def grade(answer, record):\n    return {value}\n")
        grade = custom.find("own:grade", tmp_path)
        digests.add(evaluation_digest(task("t", grade=grade), "own:grade", evaluation))
    assert len(digests) == 2


def test_scores_of_an_earlier_release_are_measured_again(model, tokenizer, checkpoint, data):
    scores.complete(checkpoint, model, tokenizer, TASKS, data)
    old = [{k: v for k, v in entry.items() if k != "digest"} for entry in checkpoint.manifest.task("a").scores]
    checkpoint.set_scores("a", old)
    assert {c.task for c in scores.missing(checkpoint.manifest, TASKS, data)} == {"a"}
    assert scores.outdated(checkpoint.manifest, TASKS, data) == ["a"]
    assert all(s.digest == "" for s in scores.stored(checkpoint.manifest) if s.task == "a")


def test_the_summary_of_a_sequence(checkpoint):
    manifest = checkpoint.manifest
    r = {
        ("a", "a"): 0.9,
        ("a+b", "a"): 0.95,
        ("a+b", "b"): 0.8,
        ("a+b+c", "a"): 0.7,
        ("a+b+c", "b"): 0.85,
        ("a+b+c", "c"): 0.6,
    }
    table = [Score(s, t, "e", "exact_match", value, 10) for (s, t), value in r.items()]
    summary = scores.summary(manifest, table)
    assert summary.average == pytest.approx((0.7 + 0.85 + 0.6) / 3)
    assert summary.backward_transfer == pytest.approx(((0.7 - 0.9) + (0.85 - 0.8)) / 2)
    assert summary.forgetting == pytest.approx(((0.95 - 0.7) + (0.8 - 0.85)) / 2)
    assert scores.summary(manifest, table[:-1]) is None
    assert scores.summary(manifest, [replace(s, metric="loss") for s in table]) is None


def test_the_mean_stands_for_a_task():
    table = [Score("a", "a", name, "choice", value, 1) for name, value in (("x", 0.0), ("y", 1.0), ("mean", 0.5))]
    assert scores.headlines(table)["a", "a"].score == 0.5
    assert scores.headlines(table[:1])["a", "a"].score == 0.0


def test_malformed_scores_are_refused(checkpoint):
    bad = replace(checkpoint.manifest.tasks[0], scores=({"set": "a", "score": 1.0},))
    with pytest.raises(CorruptCheckpoint, match="tasks.a.scores"):
        scores.stored(replace(checkpoint.manifest, tasks=(bad,)))
