"""The methods of a comparison. All train through `trainer.loop.fit`, with the same examples in the same order.

    loraf         this project: calibrated positions, K values each (loraf_train.sequence.runner)
    random-mask   the same with positions drawn at random among the free ones: is magnitude a good criterion?
    frozen-a      the same A, but one dense B that all tasks share
    lora          PEFT's LoRA; an earlier task's adapter is merged into the weights, and a fresh one put on top
    full          all parameters of the model, bfloat16 ones as float32 copies

`Method.train` trains tasks one after the other and calls a Listener, which measures at the right moments. When it
returns, the model is the bare base again, bit for bit. Everything is measured in the form that would be served: with
adapters merged into the weights, and values rounded to the stored dtype.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraf import projection
from loraf.checkpoint import Checkpoint
from loraf.delta import Merger, OriginalWeights, task_scale
from loraf.manifest import positions_per_matrix
from loraf.tasksets import TaskSet
from loraf_train.adapter import model_limits
from loraf_train.adapter.dropout import draw_peft_by_token
from loraf_train.adapter.layer import EarlierTasks
from loraf_train.adapter.masks import feasible
from loraf_train.adapter.peft_targets import peft_targets
from loraf_train.adapter.trainable_base import TrainableBase, find_targets, own_weights
from loraf_train.compare.results import MaskShare
from loraf_train.processes import group
from loraf_train.sequence import phases, provenance, runner
from loraf_train.sequence.calibrate import calibrate
from loraf_train.sequence.train_task import train_task
from loraf_train.trainer import loop
from loraf_train.trainer.order import derived_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraf.sparse import SparseB
    from loraf_train.data.examples import Example
    from loraf_train.data.task_data import TaskData
    from loraf_train.settings.config import RunConfig, TaskConfig

CALIBRATION, TRAINING = "calibration", "training"


@dataclass(frozen=True)
class Bench:
    """What every method trains on.

    Attributes:
        loaded: the base model, its tokenizer and their folder. All runs share the model.
        scratch: a folder for what this run writes, which does not exist yet; the same in all processes.
    """

    loaded: runner.Loaded
    data: Mapping[str, TaskData]
    scratch: Path

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded[0]


@dataclass(frozen=True)
class TrainedTask:
    """The result of training one task; see `results.Cost`."""

    trainable: int
    steps: int
    file_bytes: int
    masks: tuple[MaskShare, ...] = ()


class Listener:
    """Events of a method's training. All methods here are no-ops; only the first process needs others."""

    def started(self, task: TaskConfig) -> None:
        """The task's training begins."""

    def step(self, task: TaskConfig, phase: str, loss: float, step: int, total: int) -> None:
        """A step of CALIBRATION or TRAINING is done; `step` counts from 1."""

    def ended(self, task: TaskConfig) -> None:
        """The task's training has ended; nothing is written or merged yet."""

    def trained(self, task: TaskConfig, outcome: TrainedTask) -> None:
        """The model holds all tasks so far. Leave its weights as they are."""

    def as_trained(self, task: TaskConfig) -> None:
        """After the last task: the model holds what it held when `task` had just been trained."""


class Method(ABC):
    """One way to train tasks.

    Attributes:
        name: in --methods, in files and in tables.
        keeps_copies: as-trained scores need a copy kept after each task, so `Listener.as_trained` is never called.
    """

    name: str
    keeps_copies = True

    @abstractmethod
    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        """Trains all tasks of `config`, whose seed determines everything random.

        Raises:
            ConfigError: see `loop.fit`.
        """

    @abstractmethod
    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        """Returns the settings that determine the task's values, as plain JSON: those that the method uses."""


class Loraf(Method):
    """This project's own sequence, into a checkpoint that is deleted afterwards."""

    name = "loraf"
    keeps_copies = False
    select_positions: runner.SelectPositions = staticmethod(calibrate)

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        config = config.model_copy(update={"output": bench.scratch})
        checkpoint = runner.run(config, bench.data, _ObserverForListener(listener), bench.loaded, self.select_positions)
        if group.is_first():
            merger = Merger(bench.model, checkpoint)
            for task in config.tasks:
                merger.merge(checkpoint.manifest.as_trained(task.name))
                listener.as_trained(task)
            merger.merge(TaskSet())
        group.wait()

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return _adapter_settings(config, task, without=())


class RandomMask(Loraf):
    """Draws positions at random; there is no calibration."""

    name = "random-mask"

    @staticmethod
    def select_positions(
        base: TrainableBase,
        task: TaskConfig,
        examples: Sequence[Example],
        taken: Mapping[str, Sequence[SparseB]],
        earlier: Mapping[str, EarlierTasks],
        seed: int,
        *_: Any,
    ) -> dict[str, torch.Tensor]:
        """As `calibrate`: K free positions of each module, every set of K with the same probability."""
        positions = {}
        for name, linear in base.targets.items():
            shape = (linear.out_features, base.rank)
            free = feasible(shape, taken[name])
            generator = torch.Generator().manual_seed(derived_seed(seed, name))
            drawn = torch.randperm(len(free), generator=generator)[: positions_per_matrix(task.sparsity, *shape)]
            positions[name] = free[drawn].sort().values
        return positions

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return _adapter_settings(config, task, without=("calibration",))


class _ObserverForListener(runner.Observer):
    """Passes a sequence's progress on to a Listener."""

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

    def trained(self, task: TaskConfig, model: PreTrainedModel) -> None:
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
        self._listener.trained(task, TrainedTask(stored.parameters, self._steps, stored.file.bytes, masks))
        merger.merge(TaskSet())


class FrozenA(Method):
    """The project's seeded A with one dense B: each task continues training the B of the task before.

    At the start of a task with another α, B is rescaled so that α/r · B stays the same. When a task ends, B is rounded
    to `adapter.dtype`, as loraf's values are.
    """

    name = "frozen-a"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        model, rank = bench.model, config.adapter.rank
        targets = find_targets(model, config.adapter.target_modules, str(config.file))
        a = {name: _a(config, name, linear).to(linear.weight.dtype) for name, linear in targets.items()}
        base = TrainableBase(
            model, targets, a, model_limits.padding_id(bench.loaded[1], model_limits.vocabulary(model))
        )
        all_positions = {name: torch.arange(linear.out_features * rank) for name, linear in targets.items()}
        earlier = dict.fromkeys(targets, EarlierTasks.of(()))
        scaled: dict[str, torch.Tensor] = {}  # module → α/r · B of the last task, (d_out · rank,)
        for task in config.tasks:
            scale = task_scale(task.alpha, rank)
            listener.started(task)
            values, outcome = train_task(
                base,
                task,
                bench.data[task.name].train,
                all_positions,
                earlier,
                _seed(config, task),
                getattr(torch, config.adapter.dtype),
                _on_step(listener, task),
                partial(listener.ended, task),
                start={name: b / scale for name, b in scaled.items()},
            )
            dense = {name: b.values.view(b.shape) for name, b in values.items()}  # all positions, in order
            size = _written_bytes(bench, partial(_save_tensors, dense))
            scaled = {name: b.float().view(-1) * scale for name, b in dense.items()}
            if group.is_first():
                with _merged(model, config, targets, scaled):
                    trainable = sum(map(len, all_positions.values()))
                    listener.trained(task, TrainedTask(trainable, outcome.steps, size))
            group.wait()

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        return _adapter_settings(config, task, without=("calibration", "sparsity", "start"))


def _a(config: RunConfig, module: str, linear: torch.nn.Linear) -> torch.Tensor:
    """A of a module, (rank, d_in) float32, on the device of its weight."""
    adapter = config.adapter
    a, _ = projection.projection_and_digest(config.seed, module, adapter.rank, linear.in_features, adapter.init_std)
    return a.to(linear.weight.device)


@contextmanager
def _merged(
    model: PreTrainedModel,
    config: RunConfig,
    targets: Mapping[str, torch.nn.Linear],
    scaled: Mapping[str, torch.Tensor],
) -> Iterator[None]:
    """A context in which the weights include ΔW. `scaled`: module → α/r · B, (d_out · rank,)."""
    originals = OriginalWeights(model)
    for name, linear in targets.items():
        originals.keep(name, linear)
        b = scaled[name].view(linear.out_features, -1).to(linear.weight.device)
        originals.add(name, b @ _a(config, name, linear))
    yield
    originals.restore()


class Lora(Method):
    """PEFT's LoRA on the same modules, as PEFT initialises it: A is random and trained too, B starts at zero.

    In a sequence an earlier task's adapter is merged into the weights, and a fresh one is put on top. Serving a task
    therefore takes the adapters of all tasks up to it; `file_bytes` counts its own alone.
    """

    name = "lora"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        import peft

        model = bench.model
        targets = find_targets(model, config.adapter.target_modules, str(config.file))
        modules, parameters = peft_targets(model.config.model_type, targets)
        with own_weights(model, targets):  # PEFT merges in place
            for task in config.tasks:
                listener.started(task)
                lora = peft.LoraConfig(
                    r=config.adapter.rank,
                    lora_alpha=task.alpha,  # type: ignore[arg-type]  # annotated as int, but any number works
                    lora_dropout=task.training.dropout,
                    target_modules=modules,
                    target_parameters=parameters,
                    bias="none",
                    task_type="CAUSAL_LM",
                )
                with torch.random.fork_rng():
                    torch.manual_seed(derived_seed(config.seed, task.name, "lora"))
                    adapted = peft.get_peft_model(model, lora)
                draw_peft_by_token(adapted)
                outcome, trainable = _fit(bench, config, task, listener)
                listener.ended(task)
                size = _written_bytes(bench, partial(adapted.save_pretrained, save_embedding_layers=False))
                adapted.merge_and_unload()
                if group.is_first():
                    listener.trained(task, TrainedTask(trainable, outcome.steps, size))
                group.wait()
        _restore_base(bench, config)

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        without = ("calibration", "sparsity", "start", "dtype", "init_std")
        return _adapter_settings(config, task, without) | {"dtype": "float32"}


class Full(Method):
    """Trains all parameters of the model; bfloat16 ones as float32 copies (trainer.master_weights)."""

    name = "full"

    def train(self, bench: Bench, config: RunConfig, listener: Listener) -> None:
        model = bench.model
        for task in config.tasks:
            listener.started(task)
            model.requires_grad_(True)
            outcome, trainable = _fit(bench, config, task, listener)
            model.requires_grad_(False)
            listener.ended(task)
            size = _written_bytes(bench, model.save_pretrained)
            if group.is_first():
                listener.trained(task, TrainedTask(trainable, outcome.steps, size))
            group.wait()
        _restore_base(bench, config)

    def settings(self, config: RunConfig, task: TaskConfig) -> dict[str, Any]:
        training = dict(provenance.settings(config, task)["training"])
        training.pop("dropout")
        return {"training": training, "dtype": "float32"}


ALL: Mapping[str, Method] = {method.name: method for method in (Loraf(), RandomMask(), FrozenA(), Lora(), Full())}


def _adapter_settings(config: RunConfig, task: TaskConfig, without: tuple[str, ...]) -> dict[str, Any]:
    adapter = config.adapter.model_dump(mode="json", include={"rank", "target_modules", "init_std"})
    settings = {**provenance.settings(config, task), **adapter}
    return {key: value for key, value in settings.items() if key not in ("data", *without)}


def _seed(config: RunConfig, task: TaskConfig) -> int:
    """The seed that a sequence gives the task's training, so that all methods see the examples in the same order."""
    return phases.seeds_of(config.seed, task.name)[phases.TRAINING_SEED]


def _on_step(listener: Listener, task: TaskConfig) -> loop.OnStep:
    return lambda loss, rate, step, total: listener.step(task, TRAINING, loss, step, total)


def _fit(bench: Bench, config: RunConfig, task: TaskConfig, listener: Listener) -> tuple[loop.Outcome, int]:
    """Trains the model's trainable parameters; returns the outcome and their number."""
    trainable = sum(p.numel() for p in bench.model.parameters() if p.requires_grad)
    outcome = loop.fit(
        bench.model,
        bench.data[task.name].train,
        phases.training_phase(task, _seed(config, task)),
        model_limits.padding_id(bench.loaded[1], model_limits.vocabulary(bench.model)),
        _on_step(listener, task),
    )
    return outcome, trainable


def _written_bytes(bench: Bench, save: Callable[[Path], Any]) -> int:
    """The size of the safetensors files that `save` writes into a folder, in bytes; the folder is deleted again."""

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
def _restore_base(bench: Bench, config: RunConfig) -> None:
    """Reads the base's weights again; a copy kept in memory would count towards the method's peak memory."""
    fresh = dict(runner.load_model(config)[0].named_parameters())
    trained = dict(bench.model.named_parameters())
    if trained.keys() != fresh.keys():
        raise RuntimeError(f"a method left other parameters in the model: {sorted(trained.keys() ^ fresh.keys())[:3]}")
    for name, parameter in trained.items():
        parameter.copy_(fresh[name])
