"""The interface between the service and a backend. Knows neither gRPC nor vLLM.

    service ── GenerationRequest ──▶ backend ── stream of Output ──▶ service

Life of a backend: `start` once; `add_adapter` before any request names an adapter, `remove_adapter` after the last one;
`stop` once.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from loraf.errors import BaseMismatch, LorafError
from loraf.four_bits import quantization_of
from loraf.hub import HUB_ID
from loraf.tasksets import TaskSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraf.checkpoint import Checkpoint
    from loraf.manifest import Manifest


class BackendUnavailable(Exception):
    """The backend has failed or is being stopped. The service answers UNAVAILABLE."""


class EngineFailed(LorafError):
    """The backend's engine failed while it started, by a fault that is not the user's."""


class SelfCheckFailed(LorafError):
    """The backend does not add the adapter's ΔW to a layer. The field of each Problem names a layer."""


class NotProven(BaseMismatch):
    """It is not proven that the backend answers as transformers does with ΔW added to the weights. The field of each
    Problem names a module."""


class UnsupportedField(ValueError):
    """A sampling field that this backend does not support. The service answers INVALID_ARGUMENT and names both.

    Attributes:
        field: its name in SamplingParams.
    """

    def __init__(self, field: str, backend: str):
        self.field = field
        super().__init__(f"{field} is not supported by the {backend} backend")


@dataclass(frozen=True)
class StructuredOutput:
    """The form that an answer must have.

    Attributes:
        kind: "json_schema", "regex", "choice" or "grammar"; "structural_tag" for calls of tools in vLLM's own app.
        value: the schema, expression, grammar or tag; a tuple of texts for "choice".
    """

    kind: str
    value: str | tuple[str, ...]


@dataclass(frozen=True)
class Sampling:
    """Validated SamplingParams; the defaults are vLLM's."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 means off
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
    structured_output: StructuredOutput | None = None
    prompt_logprobs: int | None = None
    bad_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServedAdapter:
    """A checkpoint under the name that requests use. All its bytes are verified before a request can name it.

    Attributes:
        manifest: restricted to the tasks selected at load.
        checkpoint: the tasks' values; None if they have not been read, or only the backend's own processes hold them.
    """

    name: str
    path: Path
    manifest: Manifest
    checkpoint: Checkpoint | None = None

    @cached_property
    def digest(self) -> str:
        """The adapter digest, of the selected tasks."""
        return self.manifest.adapter_digest

    @property
    def tasks(self) -> tuple[str, ...]:
        """The selected tasks, in the checkpoint's order."""
        return self.manifest.task_names

    @property
    def base_name(self) -> str:
        """The base model as clients may see it: a hub id, or a folder's name without the folders that it lies in."""
        name = self.manifest.base_model.name
        return name if HUB_ID.fullmatch(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]

    @property
    def shown_base(self) -> str:
        """`base_name`, and what else tells bases apart.

        Of a folder, the start of the fingerprint: many folders have the same name. Of tasks that were trained on the
        base in four bits, that they were.
        """
        base = self.manifest.base_model
        fingerprint = [] if base.name == self.base_name else [f"fingerprint {base.fingerprint[:12]}"]
        methods = dict.fromkeys(method for task in self.manifest.tasks if (method := quantization_of(task)))
        return ", ".join([self.base_name, *fingerprint, *(f"in four bits ({method})" for method in methods)])

    @property
    def file_bytes(self) -> int:
        """Size of the selected tasks' files: roughly the memory that their values take."""
        return sum(task.file.bytes for task in self.manifest.tasks)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the coordinates and values in this process."""
        return 0 if self.checkpoint is None else self.checkpoint.nbytes


@dataclass(frozen=True)
class GenerationRequest:
    """One validated request.

    Attributes:
        prompt_token_ids: at least one, fewer than the backend's `max_model_len`.
        adapter: None only with the empty task set.
        task_set: in canonical order; the empty set is the base model.
        priority: lower runs first; 0 is the normal one.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    adapter: ServedAdapter | None
    task_set: TaskSet
    priority: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    token_id: int
    logprob: float
    rank: int  # 1 for the most likely token
    text: str


@dataclass(frozen=True)
class PositionLogprobs:
    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]  # most likely first, as many as requested


@dataclass(frozen=True)
class ChoiceDelta:
    """The part of one answer that is new since the last Output.

    Attributes:
        index: 0 to n - 1.
        finish_reason: None until the last part, then "stop", "length" or "abort".
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
    """What is new of the answers to one request.

    Attributes:
        prompt_logprobs: if requested, in the first Output: one entry per token of the prompt, None for the first token.
    """

    choices: tuple[ChoiceDelta, ...]
    cached_prompt_tokens: int = 0
    prompt_logprobs: tuple[PositionLogprobs | None, ...] = ()


class Backend(ABC):
    """Generates tokens. Its methods run on one asyncio loop; adapters are added and removed one at a time.

    Attributes:
        name: "slots", "resident" or "merged".
        reads_checkpoints: `add_adapter` has other processes read and verify the adapter's files, as
            `loraf_serve.adapters.checkpoint_folder.read_values` would; this process then holds only the manifest.
        tokenizer, max_model_len: set by `start`; the latter limits prompt and answer together, in tokens.
        vocab_size: number of token ids that the model can hold, set by `start`; None if the backend does not know it.
        end_tokens: ids that end an answer unless it ignores them, set by `start`; all below `vocab_size`.
        unsupported_fields: fields of requests that it refuses, such as "sampling.structured_output"; known after
            `start`.
        keeps_metrics: set before `start`: the engine keeps metrics of its own in prometheus_client's default registry,
            if it has any.
    """

    name: str
    reads_checkpoints = False
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int
    vocab_size: int | None = None
    end_tokens: frozenset[int] = frozenset()
    unsupported_fields: tuple[str, ...] = ()
    keeps_metrics = False

    @abstractmethod
    async def start(self) -> None:
        """Loads the model and warms it up.

        Raises:
            EngineFailed: the engine failed.
            LorafError: a mistake that the user can correct.
        """

    @abstractmethod
    async def add_adapter(self, adapter: ServedAdapter) -> None:
        """Prepares an adapter while requests run.

        Adapters are identified by their digest: no-op if the same content is there, under any name. Never cancelled,
        unless the backend is about to be stopped.

        Raises:
            LorafError: the adapter is refused. Nothing has changed.
        """

    @abstractmethod
    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        """Frees what is held for an adapter's digest. No-op if it is unknown.

        Called only while no request uses the adapter. Never cancelled, as `add_adapter`.
        """

    def adapter_bytes(self, adapter: ServedAdapter) -> int:
        """Bytes held for an adapter's digest in addition to `ServedAdapter.resident_bytes`; 0 if it is not there."""
        return 0

    @abstractmethod
    def generate(self, request: GenerationRequest) -> AsyncGenerator[Output]:
        """Streams the `n` answers to one request. Closing the iterator, or cancelling its task, ends the work at once.

        Raises:
            UnsupportedField: before anything is generated.
            BackendUnavailable: the engine is gone.
        """

    @abstractmethod
    async def check_health(self) -> None:
        """Raises BackendUnavailable if the backend cannot answer further requests."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends running requests and frees what the backend holds. Idempotent."""
