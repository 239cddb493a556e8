"""Backend `merged`: adds ΔW(S) to the weights of a transformers model.

For machines without vLLM, and for models without LoRA in vLLM. One task set is merged at a time; sets take turns.

    MergedBackend ─▶ Engine (turns) ─┬─▶ MergedWeights     the task set in the weights
        ▲                            ├─▶ Prefill, Batch    the model and its KV cache (model_runner)
        └──── OutputQueue ◀──────────┴─▶ AnswerState       sampler, detokenizer, end of the answer
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from loraf import base_files
from loraf.errors import ConfigError, Problem, one_line
from loraf_serve.backends.answer_state import DecodingConfig
from loraf_serve.backends.backend import (
    Backend,
    BackendUnavailable,
    GenerationRequest,
    Output,
    ServedAdapter,
    UnsupportedField,
)
from loraf_serve.backends.merged_engine import MAX_ROWS, TURN_STEPS, Engine, Job
from loraf_serve.backends.merged_weights import MergedWeights, key_of
from loraf_serve.backends.model_runner import Forward, Prefill, cache_layers, lengths_interfere, unsupported_cache
from loraf_serve.backends.output_queue import OutputQueue
from loraf_serve.backends.vocabulary import ends_within

log = logging.getLogger(__name__)

DTYPES: dict[str, str | torch.dtype] = {  # vLLM's names
    "auto": "auto",
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
# Share of the memory that is free once the model is loaded. Rearranging caches temporarily takes as much again.
KV_SHARE = 0.3
_WARM_UP_TOKENS = 8


class MergedBackend(Backend):
    """Generates with merged weights. Supports every field of Sampling but `structured_output`.

    Args:
        model_folder: a transformers model with safetensors weights and a fast tokenizer.
        dtype: "auto" or None for the model's own, "float32", "bfloat16", "float16", or vLLM's other names for these.
        max_model_len: limit on prompt and answer together, in tokens; None for the limit in the model's config.
        device: a torch device; None for "cuda" if available, else "cpu".
        kv_cache_bytes: memory for the KV cache of all running and pausing requests; None for a share of free memory.
        turn_steps: length of a task set's turn while others wait, in tokens.
    """

    name = "merged"
    unsupported_fields = ("sampling.structured_output",)

    def __init__(
        self,
        model_folder: Path,
        dtype: str | None = "auto",
        max_model_len: int | None = None,
        device: str | None = None,
        *,
        kv_cache_bytes: int | None = None,
        turn_steps: int = TURN_STEPS,
    ):
        self._folder = Path(model_folder)
        self._dtype = dtype or "auto"
        self._max_model_len = max_model_len
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._kv_cache_bytes = kv_cache_bytes
        self._turn_steps = turn_steps
        self._engine: Engine | None = None
        self._weights: MergedWeights | None = None
        self._changing = asyncio.Lock()  # one adapter is added or removed at a time

    async def start(self) -> None:
        """Raises ConfigError if the folder, the dtype or the length cannot be used."""
        engine, self._weights = await asyncio.to_thread(self._load)
        self._engine = engine
        engine.start()

    async def add_adapter(self, adapter: ServedAdapter) -> None:
        """Raises BaseMismatch or CorruptCheckpoint: the adapter does not fit the model, or A is not the one stated."""
        _, weights = self._running()
        assert adapter.checkpoint is not None  # because `reads_checkpoints` is False
        async with self._changing:
            await asyncio.to_thread(weights.add, adapter.digest, adapter.checkpoint)

    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        engine, weights = self._running()
        async with self._changing:
            await asyncio.wrap_future(engine.call(partial(weights.remove, adapter.digest)))

    def adapter_bytes(self, adapter: ServedAdapter) -> int:
        """Bytes of A in float32."""
        return 0 if self._weights is None else self._weights.resident_bytes(adapter.digest)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Output]:
        engine, weights = self._running()
        if request.sampling.structured_output is not None:
            raise UnsupportedField("structured_output", self.name)
        key = key_of(request.adapter.digest if request.adapter else None, request.task_set)
        self._check(request, weights)
        queue = OutputQueue()
        job = Job(request, key, queue)
        engine.submit(job)
        try:
            while (output := await queue.get()) is not None:
                yield output
        finally:
            engine.cancel(job)

    async def check_health(self) -> None:
        self._running()[0].check()

    async def stop(self) -> None:
        engine, self._engine, self._weights = self._engine, None, None
        if engine is not None:
            await asyncio.to_thread(engine.stop)

    def _running(self) -> tuple[Engine, MergedWeights]:
        if self._engine is None or self._weights is None:
            raise BackendUnavailable("the merged backend is not running")
        return self._engine, self._weights

    def _check(self, request: GenerationRequest, weights: MergedWeights) -> None:
        """Repeats checks of the service: an id out of range would break the GPU for all requests.

        Raises:
            ValueError: an id is not in the vocabulary, the prompt's length is out of range, the adapter is unknown.
        """
        sampling = request.sampling
        vocab_size = self.vocab_size or 0
        for name, ids in (
            ("prompt_token_ids", request.prompt_token_ids),
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", sampling.logit_bias),
        ):
            if any(not 0 <= token < vocab_size for token in ids):
                raise ValueError(f"{name}: an id is not in the vocabulary of {vocab_size}")
        if not 0 < len(request.prompt_token_ids) < self.max_model_len:
            raise ValueError(f"the prompt has {len(request.prompt_token_ids)} tokens, of at most {self.max_model_len}")
        if not request.task_set.is_base and (request.adapter is None or not weights.knows(request.adapter.digest)):
            raise ValueError("the adapter has not been added")

    def _load(self) -> tuple[Engine, MergedWeights]:
        model, self.tokenizer = _load_model(self._folder, self._dtype, self._device)
        config = model.config.get_text_config(decoder=True)
        self.max_model_len = context_limit(self._max_model_len, getattr(config, "max_position_embeddings", None))
        require_only_attention(self._folder, model.config)
        forward = Forward(model)
        self.vocab_size, bytes_per_token = _warm_up(model, forward)
        budget = self._kv_cache_bytes or int(KV_SHARE * _free_memory(self._device))
        kv_tokens = budget // bytes_per_token
        eos, more_eos = _ends(model, self.tokenizer.eos_token_id, self.vocab_size)
        self.end_tokens = more_eos if eos is None else more_eos | {eos}
        # The thread that decodes gets its own copy, because fast tokenizers are not thread-safe.
        decoding = DecodingConfig(copy.deepcopy(self.tokenizer), eos, more_eos, self.max_model_len)
        log.info("%s on %s: room for %d tokens in the KV cache", model.dtype, self._device, kv_tokens)
        weights = MergedWeights(model)
        max_rows = 1 if lengths_interfere(model.config) else MAX_ROWS
        return Engine(forward, weights, decoding, kv_tokens, max_rows, self._turn_steps), weights


def _ends(model: PreTrainedModel, eos: int | None, vocab_size: int) -> tuple[int | None, frozenset[int]]:
    """The tokenizer's end-of-sequence token and further ones of the generation config, without ids out of range."""
    config = model.generation_config
    named = None if config is None else config.eos_token_id
    main = ends_within(vocab_size, eos, "the tokenizer")
    return next(iter(main), None), ends_within(vocab_size, named, "generation_config.json") - main


def _load_model(folder: Path, dtype: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Raises ConfigError."""
    known_dtype = dtype_of(dtype)
    base_files.require_loadable(folder)
    # Written a second time in loraf_train.sequence.runner: neither package imports the other, and `loraf` must not
    # import transformers.
    remedy = "name a folder with a transformers model: config.json, *.safetensors and a tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=known_dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `loading_problems` reports them
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        model, loading_info = loaded  # a tuple because of output_loading_info
    except Exception as error:  # transformers raises many kinds: files, config values, safetensors' own
        raise ConfigError(
            Problem(f"could not be loaded ({one_line(error)})", file=str(folder), remedy=remedy)
        ) from error
    if not getattr(tokenizer, "backend_tokenizer", None):
        message = f"has a tokenizer ({type(tokenizer).__name__}) that is not a fast one"
        raise ConfigError(Problem(message, file=str(folder), remedy="save the tokenizer as tokenizer.json"))
    problems = base_files.loading_problems(folder, model, loading_info)
    if problems:
        raise ConfigError(problems)
    prepared: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return prepared, tokenizer


def dtype_of(name: str) -> str | torch.dtype:
    """What `--dtype` names: a dtype, or "auto" for the model's own. Raises ConfigError."""
    if name not in DTYPES:
        raise ConfigError(Problem(f"{name!r} is not a dtype", "--dtype", remedy=f"choose from: {', '.join(DTYPES)}"))
    return DTYPES[name]


def require_only_attention(folder: Path, config: PreTrainedConfig) -> None:
    """Raises ConfigError if a model keeps a state that requests cannot be paused with."""
    unsupported = unsupported_cache(config)
    if unsupported:
        message = f"keeps a state other than keys and values ({unsupported}), which the merged backend cannot pause"
        raise ConfigError(Problem(message, file=str(folder), remedy="serve a model that has only attention"))


def context_limit(option: int | None, allowed: int | None) -> int:
    """The limit on prompt and answer together, in tokens. Raises ConfigError.

    Args:
        option: --max-model-len.
        allowed: the limit in the model's config.
    """
    if option is None:
        if allowed is None:
            message, remedy = "is required: the model's config has no limit", "give a number of tokens"
            raise ConfigError(Problem(message, "--max-model-len", remedy=remedy))
        return allowed
    if option < 2 or (allowed is not None and option > allowed):
        remedy = f"use a value from 2 to {allowed}" if allowed else "use at least 2"
        raise ConfigError(Problem(f"{option} is out of range", "--max-model-len", remedy=remedy))
    return option


@torch.inference_mode()
def _warm_up(model: PreTrainedModel, forward: Forward) -> tuple[int, int]:
    """Runs the model once. Returns the number of token ids, and the bytes that one token takes in the KV cache."""
    prefill = Prefill([0] * _WARM_UP_TOKENS)
    logits = prefill.step(forward)
    assert logits is not None  # the prompt is one chunk
    size = sum(keys.nbytes + values.nbytes for _, keys, values in cache_layers(prefill.cache)) // _WARM_UP_TOKENS
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    return min(len(logits), embedding.shape[0]), size


def _free_memory(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
