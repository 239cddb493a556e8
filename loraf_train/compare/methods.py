"""The methods of a comparison. All train through `trainer.loop.fit`, with the same examples in the same order.

    loraf         this project: calibrated positions, K values each (loraf_train.sequence.runner)
    random-mask   the same with positions drawn at random among the free ones: does magnitude choose well?
    frozen-a      the same A, but one dense B that all tasks share
    lora          PEFT's LoRA; an earlier task's adapter is merged into the weights, and a fresh one put on top
    full          all parameters of the model, in the model's own precision

`Method.train` trains tasks one after the other and tells a Listener, which measures at the right moments. When it
returns, the model is the bare base again, bit for bit. What is served is scored: adapters are merged into the weights,
and values are rounded to what is stored, before anything is measured.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraf import projection
from loraf.checkpoint import Checkpoint
from loraf.delta import Merger, OriginalWeights, task_scale
from loraf.manifest import positions
from loraf.tasksets import TaskSet
from loraf_train.adapter.host import Host, find_targets
from loraf_train.adapter.layer import Earlier
from loraf_train.adapter.masks import feasible
from loraf_train.compare.results import MaskShare
from loraf_train.processes import group
from loraf_train.sequence import provenance, runner, train_task
from loraf_train.trainer import loop

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf_train.data.examples import TaskData
    from loraf_train.settings.config import RunConfig, TaskConfig

CALIBRATION, TRAINING = "calibration", "training"


@dataclass(frozen=True)
class Bench:
    """What every method trains on.

    Attributes:
        loaded: the base model, its tokenizer and their folder. The model is shared by all runs.
        scratch: a folder for whatever this run writes, not there yet; the same in all processes.
    """

    loaded: runner.Loaded
    data: Mapping[str, TaskData]
    scratch: Path

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded[0]


@dataclass(frozen=True)
class Made:
    """What the training of one task gave; see `results.Cost`."""

    trainable: int
    steps: int
    file_bytes: int
    masks: tuple[MaskShare, ...] = ()


class Listener:
    """What a method tells while it trains. This one does nothing; only the first process needs another."""

    def started(self, task: TaskConfig) -> None:
        """The task's training begins."""

    def step(self, task: TaskConfig, phase: str, loss: float, step: int, total: int) -> None:
        """A step of CALIBRATION or TRAINING is done; `step` counts from 1."""

    def ended(self, task: TaskConfig) -> None:
        """The task's training is over; nothing is written or merged yet."""

    def trained(self, task: TaskConfig, made: Made) -> None:
        """The model holds all tasks so far. Leave its weights as they are."""

    def as_trained(self, task: TaskConfig) -> None:
        """After the last task: the model holds what it held when `task` had just been trained."""


class Method(ABC):
    """One way to train tasks.

    Attributes:
        keeps_copies: it cannot call `Listener.as_trained`.
    """

    name: str
    keeps_copies = True

    @abstractmethod
    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        """Trains all tasks of `config`, its seed deciding all that depends on chance.

        Raises:
            ConfigError: see `loop.fit`.
        """

    @abstractmethod
    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        """What decides the task's values, as plain JSON: only what has a meaning for the method."""


class Loraf(Method):
    """This project's own sequence, into a checkpoint that is removed afterwards."""

    name = "loraf"
    keeps_copies = False
    choose: runner.Choose = staticmethod(runner.calibrate)

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        config = config.model_copy(update={"output": bench.scratch})
        checkpoint = runner.run(config, bench.data, _Watch(listener), bench.loaded, self.choose)
        if group.is_first():
            merger = Merger(bench.model, checkpoint)
            for task in config.tasks:
                merger.merge(checkpoint.manifest.as_trained(task.name))
                listener.as_trained(task)
            merger.merge(TaskSet())
        group.wait()

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return _adapter_settings(config, task, but=())


class RandomMask(Loraf):
    """Positions drawn at random; there is no calibration."""

    name = "random-mask"

    @staticmethod
    def choose(host: Host, task: TaskConfig, examples, taken, earlier, seed: int, *_: Any) -> dict[str, torch.Tensor]:
        """As `calibrate`: K of the free positions of each module, each set of K as likely as any other."""
        chosen = {}
        for name, base in host.targets.items():
            shape = (base.out_features, host.rank)
            free = feasible(shape, taken[name])
            generator = torch.Generator().manual_seed(loop.derived_seed(seed, name))
            drawn = torch.randperm(len(free), generator=generator)[: positions(task.sparsity, *shape)]
            chosen[name] = free[drawn].sort().values
        return chosen

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return _adapter_settings(config, task, but=("calibration",))


class _Watch(runner.Observer):
    """From what a sequence tells to what a Listener hears."""

    def __init__(self, listener: Listener):
        self._listener = listener

    def task_started(self, task: TaskConfig) -> None:
        self._task, self._steps = task, 0
        self._listener.started(task)

    def calibration_step(self, loss: float, step: int, total: int) -> None:
        self._steps += 1
        self._listener.step(self._task, CALIBRATION, loss, step, total)

    def step(self, loss: float, lr: float, step: int, total: int) -> None:
        self._steps += 1
        self._listener.step(self._task, TRAINING, loss, step, total)

    def adapted(self, task: TaskConfig, model: PreTrainedModel) -> None:
        self._listener.ended(task)

    def task_finished(self, checkpoint: Checkpoint, task: TaskConfig, model: PreTrainedModel) -> None:
        manifest = checkpoint.manifest
        stored = manifest.task(task.name)
        masks = tuple(
            MaskShare(task.name, module, count, manifest.modules[module].d_out * manifest.rank)
            for module, count in stored.k.items()
        )
        merger = Merger(model, checkpoint)
        merger.merge(manifest.all_tasks())
        self._listener.trained(task, Made(stored.parameters, self._steps, stored.file.bytes, masks))
        merger.merge(TaskSet())


class FrozenA(Method):
    """The project's seeded A with a dense B, which goes on from where the earlier task left it.

    B of a task with another α is rescaled at its start, so that the product stays. B is rounded to `adapter.dtype` when
    a task ends, as loraf's values are.
    """

    name = "frozen-a"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        model, rank = bench.model, config.adapter.rank
        targets = find_targets(model, config.adapter.target_modules, str(config.file))
        a = {name: _a(config, name, base).to(base.weight.dtype) for name, base in targets.items()}
        host = Host(model, targets, a, runner.pad_id(bench.loaded[1]))
        everywhere = {name: torch.arange(base.out_features * rank) for name, base in targets.items()}
        nothing = dict.fromkeys(targets, Earlier.of(()))
        scaled: dict[str, torch.Tensor] = {}  # α/r · B, flat
        for task in config.tasks:
            scale = task_scale(task.alpha, rank)
            listener.started(task)
            values, outcome = train_task.adapt(
                host,
                task,
                bench.data[task.name].train,
                everywhere,
                nothing,
                _seed(config, task),
                getattr(torch, config.adapter.dtype),
                _on_step(listener, task),
                lambda task=task: listener.ended(task),
                start={name: b / scale for name, b in scaled.items()},
            )
            dense = {name: b.values.view(b.shape) for name, b in values.items()}  # positions are all of them, in order
            size = _written(bench, lambda folder, dense=dense: _save_tensors(dense, folder))
            scaled = {name: b.float().view(-1) * scale for name, b in dense.items()}
            if group.is_first():
                with _merged(config, targets, scaled):
                    listener.trained(task, Made(sum(map(len, everywhere.values())), outcome.steps, size))
            group.wait()

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return _adapter_settings(config, task, but=("calibration", "sparsity", "start"))


def _a(config: RunConfig, name: str, base: torch.nn.Linear) -> torch.Tensor:
    """A of a module, (rank, d_in) float32, on the device of its weight."""
    adapter = config.adapter
    made, _ = projection.made(config.seed, name, adapter.rank, base.in_features, adapter.init_std)
    return made.to(base.weight.device)


@contextmanager
def _merged(
    config: RunConfig, targets: Mapping[str, torch.nn.Linear], scaled: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Within, the weights hold ΔW of `scaled` (module → α/r · B, flat)."""
    originals = OriginalWeights()
    for name, base in targets.items():
        originals.keep(name, base.weight)
        b = scaled[name].view(base.out_features, -1).to(base.weight.device)
        originals.add(name, b @ _a(config, name, base))
    yield
    originals.restore()


class Lora(Method):
    """PEFT's LoRA on the same modules, as PEFT sets it up: A is random and trained too, B begins at zero.

    In a sequence an earlier task's adapter is merged into the weights, and a fresh one is put on top. So the adapters
    of all tasks up to it are needed to serve a later one; `file_bytes` is that of its own.
    """

    name = "lora"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        import peft

        model = bench.model
        find_targets(model, config.adapter.target_modules, str(config.file))
        for task in config.tasks:
            listener.started(task)
            shape = peft.LoraConfig(
                r=config.adapter.rank,
                lora_alpha=task.alpha,
                lora_dropout=task.training.dropout,
                target_modules=list(config.adapter.target_modules),
                bias="none",
                task_type="CAUSAL_LM",
            )
            with torch.random.fork_rng():
                torch.manual_seed(loop.derived_seed(config.seed, task.name, "lora"))
                adapted = peft.get_peft_model(model, shape)
            outcome, trainable = _fit(bench, config, task, listener)
            listener.ended(task)
            size = _written(bench, lambda folder, a=adapted: a.save_pretrained(folder, save_embedding_layers=False))
            adapted.merge_and_unload()
            if group.is_first():
                listener.trained(task, Made(trainable, outcome.steps, size))
            group.wait()
        _put_back(bench, config)

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        but = ("calibration", "sparsity", "start", "dtype", "init_std")
        return _adapter_settings(config, task, but) | {"dtype": "float32"}


class Full(Method):
    """All parameters of the model, in the precision that it is loaded in (`precision:`)."""

    name = "full"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        model = bench.model
        for task in config.tasks:
            listener.started(task)
            model.requires_grad_(True)
            outcome, trainable = _fit(bench, config, task, listener)
            model.requires_grad_(False)
            listener.ended(task)
            size = _written(bench, model.save_pretrained)
            if group.is_first():
                listener.trained(task, Made(trainable, outcome.steps, size))
            group.wait()
        _put_back(bench, config)

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        training = dict(provenance.settings(config, task)["training"])
        training.pop("dropout")
        return {"training": training}


ALL: Mapping[str, Method] = {made.name: made for made in (Loraf(), RandomMask(), FrozenA(), Lora(), Full())}


def _adapter_settings(config: RunConfig, task: TaskConfig, but: tuple[str, ...]) -> dict[str, Any]:
    adapter = config.adapter.model_dump(mode="json", include={"rank", "target_modules", "init_std"})
    found = {**provenance.settings(config, task), **adapter}
    return {key: value for key, value in found.items() if key not in ("data", *but)}


def _seed(config: RunConfig, task: TaskConfig) -> int:
    """The one that a sequence gives the task: the same order of examples for all methods."""
    return loop.derived_seed(config.seed, task.name, "adaptation")


def _on_step(listener: Listener, task: TaskConfig) -> loop.OnStep:
    return lambda loss, rate, step, total: listener.step(task, TRAINING, loss, step, total)


def _fit(bench: Bench, config: RunConfig, task: TaskConfig, listener: Listener) -> tuple[loop.Outcome, int]:
    """Trains whatever of the model is to be trained, and counts it."""
    trainable = sum(p.numel() for p in bench.model.parameters() if p.requires_grad)
    outcome = loop.fit(
        bench.model,
        bench.data[task.name].train,
        train_task.phase_of(task, _seed(config, task)),
        runner.pad_id(bench.loaded[1]),
        _on_step(listener, task),
    )
    return outcome, trainable


def _written(bench: Bench, save: Callable[[Path], Any]) -> int:
    """Bytes of the safetensors files that `save` writes into the folder it is given; they are removed again."""

    def measure() -> int:
        bench.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
            save(Path(folder))
            return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))

    return group.first_writes(measure, lambda: 0)


def _save_tensors(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(dict(tensors), folder / "b.safetensors")


@torch.no_grad()
def _put_back(bench: Bench, config: RunConfig) -> None:
    """The base's own weights, read again: a copy kept in memory meanwhile would count as the method's."""
    fresh = dict(runner.load_model(config)[0].named_parameters())
    mine = dict(bench.model.named_parameters())
    if mine.keys() != fresh.keys():
        raise RuntimeError(f"a method left other parameters in the model: {sorted(mine.keys() ^ fresh.keys())[:3]}")
    for name, parameter in mine.items():
        parameter.copy_(fresh[name])
