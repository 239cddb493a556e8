"""The base model's own skills: the text that stands for them, and how they are protected in a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from loraf.checkpoint import Checkpoint
from loraf.delta import Merger
from loraf.errors import ConfigError
from loraf.tasksets import TaskSet
from loraf_train.adapter.layer import EarlierTasks, LorafLinear
from loraf_train.commands.run_progress import RunProgress
from loraf_train.compare.general import General
from loraf_train.data import records
from loraf_train.data.examples import EvaluationExample
from loraf_train.retention import base_text, of_base
from loraf_train.retention.measured import completion_logits, root_mean_square_change
from loraf_train.retention.protection import PRICE, ProtectedTask, Protection
from loraf_train.retention.statistics import ModuleStatistics, mean_square_change
from loraf_train.sequence import preflight, runner
from loraf_train.settings import loading
from loraf_train.settings.data import RecordSource
from loraf_train.settings.parts import RetentionConfig
from tests.loraf_train import toys
from tests.loraf_train.command_line import TASKS, run, write_data
from tests.loraf_train.interruptions import Stopped, Stopper, contents
from tests.standins import make_model

MOVES = {"one": 3, "two": 50}
DATA = {name: toys.data(move, 24) for name, move in MOVES.items()}
BUDGET = 0.3
TEXTS = [{"text": f"the {word} is {other}"} for word in ("sky", "tree", "fire", "sea") for other in ("blue", "old")]


class Listener(Stopper):
    def __init__(self, *at: str):
        super().__init__(*at)
        self.spent: dict[str, dict[str, float]] = {}

    def retained(self, task, spent, budget):
        self.spent[task.name] = dict(spent)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return lines(tmp_path_factory.mktemp("text") / "text.jsonl", TEXTS)


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config(model_folder, output, base, names=tuple(MOVES), **training):
    settings = {"max_steps": 80, "schedule": "cosine"} | training
    retention = None if base is None else RetentionConfig(budget=BUDGET, base=base)
    return toys.run_config(model_folder, output, *(toys.task(n, training=settings) for n in names), retention=retention)


@pytest.fixture(scope="module")
def runs(model_folder, text_file, tmp_path_factory):
    """What protects the base → (checkpoint, listener)."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, base in {"none": None, "self": "self", "file": RecordSource(file=text_file)}.items():
        listener = Listener()
        found[name] = runner.run(config(model_folder, folder / name, base), DATA, listener), listener
    return found


def loss(model, examples) -> float:
    return General([EvaluationExample(example, "") for example in examples], 0).loss(model)


def merged(model_folder, checkpoint: Checkpoint, task_set: TaskSet):
    model = toys.load(model_folder)
    Merger(model, checkpoint).merge(task_set)
    return model


# --- in a run --------------------------------------------------------------------------------------------------------


def test_the_base_drifts_less_at_a_similar_loss_of_the_task(runs, model_folder, tmp_path):
    """Than where training without protection stops early, and learns as much.

    Drift is measured on new text that the base writes: nothing beats its loss there, so every change shows.
    """
    model = toys.load(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    held_out = base_text.write(model, tokenizer, toys.PAD, seed=1000)
    stopped = runner.run(config(model_folder, tmp_path / "ckpt", None, names=("one",), max_steps=40), DATA)
    of_base, of_task = {"bare": loss(model, held_out)}, {}
    for name, checkpoint in (("stopped", stopped), *((name, found[0]) for name, found in runs.items())):
        with_one = merged(model_folder, checkpoint, checkpoint.manifest.as_trained("one"))
        of_base[name], of_task[name] = loss(with_one, held_out), loss(with_one, DATA["one"].train)
    drift = {name: value - of_base["bare"] for name, value in of_base.items()}
    assert of_task["self"] < of_task["stopped"] + 0.1, of_task
    assert drift["self"] < 0.75 * drift["stopped"] < 0.75 * drift["none"], drift


def test_the_base_is_protected_from_the_first_task_on(runs):
    for name in ("self", "file"):
        checkpoint, listener = runs[name]
        assert {task: set(spent) for task, spent in listener.spent.items()} == {"one": {"base"}, "two": {"base", "one"}}
        assert all(0 < change < 2 * BUDGET for spent in listener.spent.values() for change in spent.values())
        for task in MOVES:
            recorded = checkpoint.manifest.task(task).training["retention"]
            assert recorded == {"budget": BUDGET, "spent": listener.spent[task]}


def test_answers_on_the_file_s_text_change_less(runs, model_folder, text_file):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    examples = base_text.read(RecordSource(file=text_file), tokenizer, 1024, 320)
    before = completion_logits(toys.load(model_folder), examples, toys.PAD)
    change = {}
    for name in ("none", "file"):
        model = merged(model_folder, runs[name][0], runs[name][0].manifest.all_tasks())
        change[name] = root_mean_square_change(before, completion_logits(model, examples, toys.PAD))
    assert change["file"] < 0.85 * change["none"], change


def test_all_tasks_together_are_held_against_the_budget(runs, model_folder, tmp_path):
    """What was spent at the end follows from the stored values of both tasks, and statistics gathered anew."""
    checkpoint, listener = runs["self"]
    model = toys.load(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    targets = runner.find_targets(model, ("q_proj", "v_proj", "down_proj"))
    base = runner.TrainableBase(model, targets, runner.projections(checkpoint, targets), toys.PAD)
    protected = of_base.protected_base(base, tokenizer, config(model_folder, tmp_path, "self"))
    change = {}
    for name in ("self", "none"):
        deltas = {}
        for module, later in protected.as_task(runs[name][0]).later.items():
            d = torch.zeros(checkpoint.manifest.modules[module].d_out * checkpoint.manifest.rank)
            d[later.positions.long()] = later.values
            deltas[module] = d.view(-1, checkpoint.manifest.rank)
        change[name] = mean_square_change(protected.statistics, deltas) ** 0.5
    assert change["self"] == pytest.approx(listener.spent["two"]["base"], rel=1e-3)
    assert change["self"] < 0.7 * change["none"], change


def test_its_price_is_its_own():
    """The smallest strength once the budget is in force, for each protected task by itself."""
    linear = torch.nn.Linear(2, 3)
    layer = LorafLinear(linear, torch.ones(2, 2), torch.arange(6), 1.0)
    statistics = {"a": ModuleStatistics(torch.ones(3, 1), torch.ones(3), torch.eye(2))}
    later = {"a": EarlierTasks.of(())}
    tasks = [ProtectedTask("one", statistics, later), ProtectedTask("base", statistics, later, price=of_base.PRICE)]
    protection = Protection({"a": layer}, tasks, budget=1e3)
    for step in range(10):
        protection.add_gradient(step, 10)
    assert protection.state()["log_strength"].exp().tolist() == pytest.approx([PRICE, of_base.PRICE])
    assert of_base.PRICE < PRICE


def test_nothing_of_the_base_is_stored(runs):
    files = {path for path in contents(runs["self"][0].path) if path.startswith("statistics/")}
    assert files == {"statistics/one.safetensors", "statistics/two.safetensors"}


def test_messages_name_the_base_model():
    printed = []
    progress = RunProgress(None, type("Out", (), {"print": staticmethod(printed.append)}), None, False)
    progress.retained(toys.task("two"), {"base": 0.04, "one": 0.05}, 0.2)
    assert "predicted change of logits, of a budget of 0.2: the base model 0.040, one 0.050" in printed[0]
    progress.retained(toys.task("two"), {"one": 4e-5, "base": 0.0}, 1e-5)
    assert "of a budget of 1e-05: one 4e-05 (over), the base model 0.000" in printed[1]


# --- interrupted runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [("one", "step 30"), ("two", "calibration 2"), ("two", "step 50")])
def test_a_stopped_run_ends_with_the_same_bytes(runs, model_folder, tmp_path, at):
    on = config(model_folder, tmp_path / "ckpt", "self", save_seconds=0.0)
    with pytest.raises(Stopped):
        runner.run(on, DATA, Stopper(*at))
    observer = Stopper()
    runner.run(on, DATA, observer)
    assert observer.events[0][1].startswith("resumes after") and not observer.remarks
    whole = contents(runs["self"][0].path)
    assert contents(on.output) == whole


@pytest.mark.parametrize("now", ["file", "off", None])
def test_a_state_that_was_protected_with_another_text_is_not_used(model_folder, text_file, tmp_path, now):
    begun = config(model_folder, tmp_path / "ckpt", "self", names=("one",), max_steps=6, save_seconds=0.0)
    with pytest.raises(Stopped):
        runner.run(begun, DATA, Stopper("one", "step 4"))
    base = {"file": RecordSource(file=text_file), "off": None}.get(now)
    retention = None if now is None else RetentionConfig(budget=BUDGET, base=base)
    observer = Stopper()
    runner.run(begun.model_copy(update={"retention": retention}), DATA, observer)
    assert observer.events[0] == ("one", "calibration 1")
    (remark,) = observer.remarks
    assert "the general text that protects the base model changed" in remark


def test_a_state_without_a_protected_base_is_not_used_with_one(model_folder, tmp_path):
    begun = config(model_folder, tmp_path / "ckpt", None, names=("one",), max_steps=6, save_seconds=0.0)
    with pytest.raises(Stopped):
        runner.run(begun, DATA, Stopper("one", "step 4"))
    observer = Listener()
    retention = RetentionConfig(budget=BUDGET, base="self")
    runner.run(begun.model_copy(update={"retention": retention}), DATA, observer)
    assert observer.events[0] == ("one", "calibration 1") and observer.spent["one"]
    assert "the general text that protects the base model changed" in observer.remarks[0]


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_that_the_model_writes_is_decided_by_the_seed(model_folder):
    model, tokenizer = toys.load(model_folder), AutoTokenizer.from_pretrained(model_folder)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = model.generation_config
    first, again, other = (base_text.write(model, tokenizer, toys.PAD, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(3), expected) and model.generation_config is before
    assert first == again != other
    assert len(first) == base_text.SEQUENCES and len({tuple(e.input_ids) for e in first}) == len(first)
    for example in first:
        ids = example.input_ids
        assert ids[0] == tokenizer.bos_token_id and example.prompt_length == 1
        assert tokenizer.eos_token_id not in ids[:-1]
        assert len(ids) == 1 + base_text.NEW_TOKENS or ids[-1] == tokenizer.eos_token_id


def test_text_is_drawn_as_the_model_predicts_it(model_folder):
    """The frequencies of first tokens are the model's probabilities; cutting off rare ones would show."""
    model, tokenizer = toys.load(model_folder), AutoTokenizer.from_pretrained(model_folder)
    with torch.no_grad():
        expected = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].double().softmax(-1)
    drawn = [e.input_ids[1] for seed in range(8) for e in base_text.write(model, tokenizer, toys.PAD, seed)]
    found = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double() / len(drawn)
    distance = 0.5 * float((found - expected).abs().sum())
    again = torch.multinomial(expected, len(drawn), True, generator=torch.Generator().manual_seed(0))
    chance = torch.bincount(again, minlength=len(expected)).double() / len(drawn)
    assert distance < 1.3 * 0.5 * float((chance - expected).abs().sum())


def test_text_keeps_within_the_context(model_folder):
    model, tokenizer = toys.load(model_folder), AutoTokenizer.from_pretrained(model_folder)
    model.config.max_position_embeddings = 10
    assert max(len(e.input_ids) for e in base_text.write(model, tokenizer, toys.PAD, 0)) == 10


def test_without_a_beginning_token_text_begins_after_an_end(model_folder):
    model, tokenizer = toys.load(model_folder), AutoTokenizer.from_pretrained(model_folder)
    tokenizer.bos_token = None
    written = base_text.write(model, tokenizer, toys.PAD, 0)
    assert all(e.input_ids[0] == tokenizer.eos_token_id and len(e.input_ids) > 1 for e in written)


def test_of_a_text_every_token_but_the_first_counts_and_of_an_answer_its_own(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for rows, lengths in (([{"text": "ab"}], (3, 1)), ([{"prompt": "ab", "completion": "c"}], (5, 3))):
        source = RecordSource(file=lines(tmp_path / "x.jsonl", rows))
        (example,) = base_text.read(source, tokenizer, 1024, 320)
        assert (len(example.input_ids), example.prompt_length) == lengths


# --- settings, and mistakes in them ----------------------------------------------------------------------------------


@pytest.fixture
def folder(model_folder, tmp_path, monkeypatch):
    """A tasks.yaml with a base model and data."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "base")
    write_data(tmp_path)
    lines(tmp_path / "text.jsonl", TEXTS)
    (tmp_path / "tasks.yaml").write_text(TASKS)
    return tmp_path


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("off", None),
        ("false", None),
        ("self", "self"),
        ("text.jsonl", "text.jsonl"),
        ("{file: text.jsonl}", "text.jsonl"),
    ],
)
def test_what_may_be_written(folder, written, expected):
    base = loading.load("tasks.yaml", [f"retention={{base: {written}}}"]).retention.base
    assert (base.file.name if isinstance(base, RecordSource) else base) == expected


def test_off_is_recorded_as_before_there_was_the_setting():
    assert RetentionConfig(budget=0.1).model_dump(mode="json") == {"budget": 0.1}
    assert RetentionConfig(budget=0.1, base="self").model_dump(mode="json") == {"budget": 0.1, "base": "self"}


@pytest.mark.parametrize(
    ("base", "rows", "message"),
    [
        ("on", None, "--set: retention: base: does not say which text → use off, self, or a data file"),
        ("none.jsonl", None, "retention.base: there is no file .*none.jsonl"),
        ("{fil: text.jsonl}", None, "retention.base.fil: is not a known key → did you mean 'file'?"),
        ("7", None, "retention.base: 7 is not a mapping → use off, self, or a data file"),
        ("new.jsonl", [], "new.jsonl: has no records → name a file with records"),
        ("new.jsonl", [{"text": ""}], "new.jsonl: no text is two tokens or longer → name a file with longer texts"),
        ("new.jsonl", [{"text": "a"}, {"txt": "b"}], "new.jsonl: record 2: field 'text' is missing"),
        ("new.jsonl", [{"words": "a"}], "new.jsonl: record 1: has none of the known forms"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(folder, capsys, base, rows, message):
    if rows is not None:
        lines(folder / "new.jsonl", rows)
    overrides = ("--set", f"retention={{base: {base}}}", "--set", "training.batch_size=0")
    status, _, err = run(capsys, "run", "tasks.yaml", *overrides)
    err = " ".join(err.split())
    assert status == 2 and "batch_size" in err and not (folder / "ckpt").exists()
    plain = message.replace("retention: base:", "retention.base:")
    assert all(part in err for part in plain.split(".*")), err


def test_a_token_beyond_the_embedding_is_refused(model_folder, text_file):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with pytest.raises(ConfigError, match="text.jsonl: has the token .* but the model's embedding has 50 rows"):
        base_text.read(RecordSource(file=text_file), tokenizer, 1024, 50)


def test_a_sharded_model_is_asked_for_a_file(folder, monkeypatch):
    for variable, value in (("ACCELERATE_USE_FSDP", "true"), ("WORLD_SIZE", "2"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(variable, value)
    problems = preflight.survey("tasks.yaml", ["retention={base: self}"])[1]
    (problem,) = [p for p in problems if p.field == "retention.base"]
    assert "FSDP" in problem.message and problem.remedy == "name a file of general text"
    assert not [p for p in preflight.survey("tasks.yaml", ["retention={base: text.jsonl}"])[1] if "base" in p.field]


def test_check_says_what_is_read(folder, capsys):
    for base, expected in (
        ("self", "the base model is protected on 128 texts of up to 64 tokens that it writes itself"),
        ("text.jsonl", f"the base model is protected on {len(TEXTS)} of {len(TEXTS)} examples of 15 to 17"),
    ):
        status, out, err = run(capsys, "check", "tasks.yaml", "--set", f"retention={{base: {base}}}")
        assert status == 0, err
        assert expected in " ".join(out.split())


def test_a_run_reads_the_text_once(folder, capsys, monkeypatch):
    read, count = records._READERS[".jsonl"], []

    def counted(file, faults):
        count.append(file.name)
        return read(file, faults)

    monkeypatch.setitem(records._READERS, ".jsonl", counted)
    overrides = ("--set", "retention={base: text.jsonl}", "--set", "training.max_steps=1")
    status, out, err = run(capsys, "run", "tasks.yaml", "--no-eval", *overrides)
    assert status == 0, err
    assert count.count("text.jsonl") == 1 and "the base model" in out


def test_digests_of_general_text_are_those_of_before(model_folder, text_file):
    """Stored runs of a comparison are found again by them."""
    from loraf_train.compare.general import general_text

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    examples = general_text(RecordSource(file=text_file), tokenizer, 1024).examples
    read = base_text.read(RecordSource(file=text_file), tokenizer, 1024, 320)
    assert [e.example for e in examples] == [replace(e, prompt_length=0) for e in read]


@pytest.mark.parametrize(
    ("base", "fails", "says"),
    [("self", "write", "no text can be written with"), ("text.jsonl", "gather", "no statistics can be gathered of")],
)
def test_what_torch_cannot_do_is_said_of_the_base(folder, capsys, monkeypatch, base, fails, says):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(base_text if fails == "write" else of_base, fails, fail)
    status, _, err = run(capsys, "run", "tasks.yaml", "--no-eval", "--set", f"retention={{base: {base}}}")
    assert status == 2 and f"retention.base: {says} the base model (out of memory)" in " ".join(err.split())
