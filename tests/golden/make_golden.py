"""Makes the files of this folder: what one version of LoRAF wrote, and later versions must read.

    python tests/golden/make_golden.py --work FOLDER

Run it with the interpreter of the version to be frozen; it works in a folder of its own and then replaces the files
here. It knows that version by its command line and its files only, so that it outlives moves of modules.

    origin.json              commit, date, versions, and the environment that everything was made in
    checkpoint/              three tasks on `tiny`, with tasks.yaml and data; the output folder is ckpt/
    interrupted/             a run that was killed amid its second task's training; ckpt/.resume/ has its state
    interrupted-finished/    what that run's ckpt/ is in the end, interrupted or not
    peft/                    a set of two tasks of checkpoint/ as a PEFT LoRA
    logits.safetensors       float32 logits of `tiny` under several sets: input_ids.<prompt>, logits.<set>.<prompt>
    answers.json             the sets and prompts, the tokens of greedy decoding, digests

The logits are those of `loraf-train export --format merged`, loaded by transformers. Each exported weight is compared
with W + Σ w·(α/r)·B·A, which is worked out here in float64: B from the tasks' files, A from a PEFT export.

Same bytes on every x86-64 processor. Training adds float32 numbers in an order that depends on threads and on the
processor's instructions, so all is made, and later resumed, under ENVIRONMENT. Seen with torch 2.13.0+cpu on an AMD
processor with AVX-512:

    OMP_NUM_THREADS=1             one thread instead of two changes the bits of some matrix products, also with the rest
    MKL_NUM_THREADS=1             overrides what the caller may have set
    ATEN_CPU_CAPABILITY=default   avx2 and avx512 differ from each other (softmax, attention) and from this
    MKL_CBWR=COMPATIBLE           matrix products differ from MKL's choice for the processor

ONEDNN_MAX_CPU_ISA=SSE41 changed nothing, since oneDNN has no part in float32 here. Nor did it matter under these which
instructions glibc takes (GLIBC_TUNABLES without AVX2, FMA and AVX-512).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
}
MADE = (
    "origin.json",
    "answers.json",
    "logits.safetensors",
    "checkpoint",
    "interrupted",
    "interrupted-finished",
    "peft",
)

WORDS = ("kitten", "river", "stone", "apple", "lemon", "table", "cloud", "green", "music", "paper", "tiger", "wheel")
RECORDS = {
    "first": [{"prompt": f"Shout: {word}\n", "completion": f"{word.upper()}!"} for word in WORDS],
    "second": [{"prompt": f"Twice: {word}\n", "completion": word + word} for word in WORDS],
    "third": [{"prompt": f"Ends: {word}\n", "completion": word[0] + word[-1]} for word in WORDS],
}

CHECKPOINT = """\
model: tiny
output: ckpt
recipe: paper
seed: 7
adapter: {rank: 8, sparsity: 0.7, target_modules: [q_proj, v_proj, down_proj]}
calibration: {steps: 2}
training: {learning_rate: 2e-2, batch_size: 6, max_steps: 8, dropout: 0}
tasks:
  - {name: first, alpha: 16, data: {train: first.jsonl, eval: first.jsonl, eval_limit: 3}, max_new_tokens: 8}
  - {name: second, alpha: 8, data: {train: second.jsonl, eval: second.jsonl, eval_limit: 3}, metric: loss}
  - {name: third, alpha: 24, sparsity: 0.8, data: {train: third.jsonl, eval: third.jsonl, eval_limit: 3}, metric: loss}
"""

# All that a resumed run must take up: moments, the schedule, dropout's seed, the place in an epoch, accumulation.
INTERRUPTED = """\
model: tiny
output: ckpt
recipe: paper
seed: 11
adapter: {rank: 8, sparsity: 0.7, target_modules: [q_proj, down_proj]}
calibration: {steps: 3, batch_size: 4}
training:
  {learning_rate: 1e-2, batch_size: 5, micro_batch_size: 3, epochs: 5, dropout: 0.1, schedule: cosine, warmup_steps: 2,
   weight_decay: 0.1, save_seconds: 0}
tasks:
  - {name: first, alpha: 16, data: {train: first.jsonl}}
  - {name: second, alpha: 8, data: {train: second.jsonl, eval: second.jsonl, eval_limit: 3}, metric: loss}
"""
STEPS = 15  # of the second task: 5 epochs of 3
KILLED_AT = range(7, 13)  # the last whole state must be of one of these steps

SETS = {  # as `--tasks` takes them
    "base": "base",
    "first": "first",
    "first-half-second": "first,second:0.5",
    "as-trained-second": "first,second",
    "all": "all",
}
PEFT_SET = "first-half-second"
PROMPTS = {
    "shout": "Shout: garden\n",
    "twice": "Twice: planet\n",
    "ends": "Ends: winter\n",
    "plain": "Reverse: mayes\n",
}
NEW_TOKENS = 10
LEAST_MARGIN = 0.002  # between the best token and the next: a hundred times what processors differ by


def command(*arguments: str | Path) -> str:
    """What `loraf-train` prints. Raises CalledProcessError."""
    ran = subprocess.run(
        [sys.executable, "-m", "loraf_train.cli", *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return ran.stdout


def prepare(folder: Path, settings: str, tasks: tuple[str, ...]) -> Path:
    """A folder with tasks.yaml and data. Returns the tasks.yaml."""
    folder.mkdir(parents=True)
    for task in tasks:
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[task]))
    (folder / "tasks.yaml").write_text(settings)
    return folder / "tasks.yaml"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def step_of(output: Path) -> int:
    """The training step of the second task of which the newest state is; 0: none yet."""
    numbers = [int(path.stem.split("-")[1]) for path in (output / ".resume").glob("state-*.json")]
    if not numbers:
        return 0
    try:
        state = json.loads((output / ".resume" / f"state-{max(numbers)}.json").read_text())
    except FileNotFoundError:  # it has just been replaced
        return 0
    return state["step"] if state["task"] == "second" and state["steps"] == STEPS else 0


def interrupt(folder: Path) -> int:
    """Runs what is in `folder` and kills it amid the second task. Returns the step that its state is of."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        file = prepare(folder, INTERRUPTED, ("first", "second"))
        run = subprocess.Popen(
            [sys.executable, "-m", "loraf_train.cli", "run", str(file)], stdout=subprocess.DEVNULL, text=True
        )
        while run.poll() is None and step_of(folder / "ckpt") < KILLED_AT.start:
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        run.wait()
        step = step_of(folder / "ckpt")
        if step in KILLED_AT and not list(folder.rglob("*.tmp")):
            return step
    raise SystemExit("the run was never killed where it should be")


def make_interrupted(work: Path) -> int:
    """`interrupted` and `interrupted-finished`. Returns the step that the state is of."""
    whole = work / "whole"
    command("run", prepare(whole, INTERRUPTED, ("first", "second")))
    step = interrupt(work / "interrupted")
    resumed = work / "resumed"
    shutil.copytree(work / "interrupted", resumed)
    told = command("run", resumed / "tasks.yaml")
    assert f"second: resumes after training step {step} of {STEPS}" in told, told
    assert digests(resumed) == digests(whole), "a resumed run ends with other bytes"
    shutil.copytree(whole / "ckpt", work / "interrupted-finished")
    return step


def require_definition(checkpoint: Path, peft: Path, merged: Path, base: Path, weights: dict[str, float]) -> None:
    """The merged weights are W + Σ w·(α/r)·B·A, up to rounding to float32."""
    manifest = json.loads((checkpoint / "loraf.json").read_text())
    tasks = {task["name"]: task for task in manifest["tasks"]}
    found, originals = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    projections = load_file(peft / "adapter_model.safetensors")
    assert found.keys() == originals.keys()
    expected = {name: weight.double() for name, weight in originals.items()}
    for name, weight in weights.items():
        stored = load_file(checkpoint / tasks[name]["file"]["path"])
        for module, spec in manifest["modules"].items():
            b = torch.zeros(spec["d_out"], manifest["rank"], dtype=torch.float64)
            rows, columns = (stored[f"{module}.{part}"].long() for part in ("rows", "cols"))
            b[rows, columns] = stored[f"{module}.values"].double()
            a = projections[f"base_model.model.{module}.lora_A.weight"].double()
            expected[f"{module}.weight"] += weight * tasks[name]["alpha"] / manifest["rank"] * (b @ a)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-5, atol=1e-6, msg=name)


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int]) -> list[int]:
    """The tokens of the highest logits, one after the other, each from the whole text before it."""
    ids = list(ids)
    for _ in range(NEW_TOKENS):
        best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        margin = float(best.values[0] - best.values[1])
        assert margin > LEAST_MARGIN, f"a margin of {margin}: choose other prompts or data"
        ids.append(int(best.indices[0]))
    return ids[-NEW_TOKENS:]


@torch.no_grad()
def make_answers(work: Path) -> dict:
    """`peft` and `logits.safetensors`. Returns what goes into answers.json."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = work / "checkpoint" / "ckpt"
    command("export", checkpoint, "--tasks", SETS[PEFT_SET], "--format", "peft", "--out", work / "peft")
    described = json.loads((checkpoint / "loraf.json").read_text())
    tensors, tokens, chosen, input_ids = {}, {}, {}, {}
    for name, text in SETS.items():
        merged = work / "merged" / name
        command("export", checkpoint, "--tasks", text, "--format", "merged", "--dtype", "float32", "--out", merged)
        names = {"base": [], "all": [task["name"] for task in described["tasks"]]}.get(text, text.split(","))
        weights = {part.partition(":")[0]: float(part.partition(":")[2] or 1) for part in names}
        require_definition(checkpoint, work / "peft", merged, work / "merged" / "base", weights)
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(merged)
        chosen[name], tokens[name] = weights, {}
        for prompt, words in PROMPTS.items():
            ids = tokenizer(words)["input_ids"]
            assert input_ids.setdefault(prompt, ids) == ids
            tensors[f"input_ids.{prompt}"] = torch.tensor(ids)
            tensors[f"logits.{name}.{prompt}"] = model(input_ids=torch.tensor([ids])).logits[0].clone()
            tokens[name][prompt] = greedy(model, ids)
    for name in SETS:  # so that agreement with one says something
        for other in SETS:
            for prompt in PROMPTS:
                apart = (tensors[f"logits.{name}.{prompt}"] - tensors[f"logits.{other}.{prompt}"]).abs().max()
                assert name == other or apart > 0.1, (name, other, prompt, apart)
    save_file(tensors, work / "logits.safetensors")
    return {
        "adapter_digest": json.loads(command("inspect", checkpoint, "--json"))["adapter_digest"],
        "sets": chosen,
        "prompts": PROMPTS,
        "greedy": tokens,
        "peft_set": PEFT_SET,
        "imported_sha256": import_again(work),
    }


def import_again(work: Path) -> str:
    """SHA-256 of the task's file that `loraf-train import` makes of `peft`, where its positions are free again."""
    copy = work / "imported"
    shutil.copytree(work / "checkpoint" / "ckpt", copy)
    for task in ("second", "first"):
        command("remove", copy, task)
    command("import", work / "peft", "--into", copy, "--name", "both")
    return digests(copy)["tasks/both.safetensors"]


def origin(step: int) -> dict:
    package = Path(importlib.util.find_spec("loraf").origin).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=package, stdout=subprocess.PIPE, text=True, check=True).stdout

    assert not git("status", "--porcelain", "--untracked-files=no"), "what is frozen must be a commit"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "peft")}
    return {
        "commit": git("rev-parse", "HEAD").strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"loraf": importlib.import_module("loraf").__version__, **versions},
        "python": platform.python_version(),
        "environment": ENVIRONMENT,
        "interrupted": {"task": "second", "step": step, "steps": STEPS},
    }


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def make(work: Path) -> None:
    command("run", prepare(work / "checkpoint", CHECKPOINT, ("first", "second", "third")))
    write_json(work / "origin.json", origin(make_interrupted(work)))
    write_json(work / "answers.json", make_answers(work))
    put_here(work)


def put_here(work: Path) -> None:
    for path in (path for name in MADE for path in [work / name, *(work / name).rglob("*")] if path.is_file()):
        assert str(work).encode() not in path.read_bytes(), f"{path} names a folder of this machine"
    for name in MADE:
        target = HERE / name
        if target.is_dir():
            shutil.rmtree(target)
        (shutil.copytree if (work / name).is_dir() else shutil.copyfile)(work / name, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a new folder to work in, which stays")
    work = parser.parse_args().work.absolute()
    if os.environ.items() >= ENVIRONMENT.items():
        work.mkdir(parents=True)
        make(work)
    else:  # torch reads it when it is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)


if __name__ == "__main__":
    main()
