"""What the service asks of a backend, and what a backend answers. Knows neither gRPC nor vLLM.

    service ── GenerationRequest ──▶ backend ── stream of Output ──▶ service

A backend is started once, is told of each adapter before any request names it and when none will any more, and is
stopped once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from loraf.errors import LorafError
from loraf.tasksets import TaskSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraf.checkpoint import Checkpoint
    from loraf.manifest import Manifest


class BackendUnavailable(Exception):
    """The backend cannot answer any more, or is being stopped. The service says UNAVAILABLE."""


class SelfCheckFailed(LorafError):
    """What the backend adds to a layer is not the adapter's ΔW: each Problem's field names a layer."""


class UnsupportedField(ValueError):
    """A sampling field that this backend does not obey. The service says INVALID_ARGUMENT naming both.

    Attributes:
        field: its name in SamplingParams.
    """

    def __init__(self, field: str, backend: str):
        self.field = field
        super().__init__(f"{field} is not supported by the {backend} backend")


@dataclass(frozen=True)
class Sampling:
    """SamplingParams with vLLM's defaults filled in; validated before it reaches a backend."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    n: int = 1
    ignore_eos: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True)
class ServedAdapter:
    """A checkpoint under the name that requests use; read and verified whole before a request can name it.

    Attributes:
        manifest: restricted to the tasks chosen at load.
        checkpoint: the tasks' values; None where only the backend's own processes hold them.
    """

    name: str
    path: Path
    manifest: Manifest
    checkpoint: Checkpoint | None = None

    @cached_property
    def digest(self) -> str:
        """The adapter digest, for the tasks chosen."""
        return self.manifest.adapter_digest

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks chosen at load, in the checkpoint's order."""
        return self.manifest.task_names

    @property
    def resident_bytes(self) -> int:
        """Bytes of the coordinates and values in this process."""
        return 0 if self.checkpoint is None else self.checkpoint.nbytes


@dataclass(frozen=True)
class GenerationRequest:
    """One validated request.

    Attributes:
        prompt_token_ids: at least one, fewer than the backend's `max_model_len`.
        adapter: None only together with the base set.
        task_set: canonical; the empty set is the base model.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    adapter: ServedAdapter | None
    task_set: TaskSet


@dataclass(frozen=True)
class TokenLogprob:
    token_id: int
    logprob: float
    rank: int  # 1: the most likely
    text: str


@dataclass(frozen=True)
class PositionLogprobs:
    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]  # most likely first, as many as asked for


@dataclass(frozen=True)
class ChoiceDelta:
    """What is new of one answer since the last Output.

    Attributes:
        finish_reason: None while it goes on, then "stop", "length" or "abort".
        stop_reason: the stop text, or the stop token's id in decimal; "" otherwise.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True)
class Output:
    choices: tuple[ChoiceDelta, ...]
    cached_prompt_tokens: int = 0


class Backend(ABC):
    """Generates tokens. Its methods run on one asyncio loop; adapters are added and removed one at a time.

    Attributes:
        name: "slots", "resident" or "merged".
        reads_checkpoints: `add_adapter` has other processes read and verify the adapter's folder, as
            `loraf_serve.adapters.registry.open_folder` would; this process then needs its manifest alone.
        tokenizer, max_model_len: known after `start`.
    """

    name: str
    reads_checkpoints = False
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int

    @abstractmethod
    async def start(self) -> None:
        """Loads the model and warms it up. Raises LorafError for what the user can mend."""

    @abstractmethod
    async def add_adapter(self, adapter: ServedAdapter) -> None:
        """Prepares an adapter while requests run, or refuses it with a LorafError and stays as it was.

        Adapters are told apart by their digest: one that is there already is accepted as it is, under any name. The
        call is never cancelled, unless the backend is about to be stopped.
        """

    @abstractmethod
    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        """Frees what is held for an adapter's digest; an unknown one is nothing. No request of it runs, none will come
        before it is added again. Never cancelled, as `add_adapter`."""

    def adapter_bytes(self, adapter: ServedAdapter) -> int:
        """Bytes held for an adapter's digest, beside `ServedAdapter.resident_bytes`; 0 if it is not there."""
        return 0

    @abstractmethod
    def generate(self, request: GenerationRequest) -> AsyncIterator[Output]:
        """Streams one answer (or n). Closing the iterator, or cancelling its task, ends the work at once.

        Raises:
            UnsupportedField: before anything is generated.
            BackendUnavailable: the engine is gone.
        """

    @abstractmethod
    async def check_health(self) -> None:
        """Raises BackendUnavailable if no further request can be answered."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends running requests and frees what the backend holds. May be called twice."""
