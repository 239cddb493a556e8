"""Backend `merged`: ΔW(S) is added to the model's own weights, and transformers runs the model.

For machines without vLLM, and models that vLLM cannot apply LoRA to. One set is in the weights at a time; sets take
turns (loraf_serve.backends.turns).

    MergedBackend ─▶ Engine (turns) ─┬─▶ MergedWeights     which set is in the weights
        ▲                            ├─▶ Prefill, Batch    the model and its KV cache (decoding)
        └──── Mailbox ◀──────────────┴─▶ Answer            sampler, text, when it ends
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from loraf.errors import ConfigError, Problem
from loraf_serve.backends.answers import ModelFacts
from loraf_serve.backends.backend import Backend, BackendUnavailable, GenerationRequest, Output, ServedAdapter
from loraf_serve.backends.decoding import Forward, Prefill, lengths_interfere, unsupported_cache
from loraf_serve.backends.mailbox import Mailbox
from loraf_serve.backends.merged_weights import MergedWeights, key_of
from loraf_serve.backends.turns import MAX_ROWS, TURN_STEPS, Engine, Job

log = logging.getLogger(__name__)

DTYPES = {  # vLLM's names
    "auto": "auto",
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
# Of the memory that is free when the model is loaded. Growing and re-arranging caches takes as much again for a while.
KV_SHARE = 0.3
_WARM_UP_TOKENS = 8


class MergedBackend(Backend):
    """Generates with merged weights. Every field of Sampling is obeyed.

    Args:
        model_folder: a transformers model with safetensors weights and a fast tokenizer.
        dtype: "auto" or None (the model's own), "float32", "bfloat16", "float16", or vLLM's other names for these.
        max_model_len: tokens of prompt and answer together; None: what the model's config allows.
        device: as torch names it; None: "cuda" where there is one, else "cpu".
        kv_cache_bytes: memory for the KV cache of all running and pausing requests; None: a share of what is free.
        turn_steps: tokens after which a set lets others have their turn.

    Attributes:
        vocab_size: number of token ids, known after `start`.
    """

    name = "merged"
    vocab_size: int

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
        self._changing = asyncio.Lock()  # adapters come and go one at a time

    async def start(self) -> None:
        """Raises ConfigError: the folder, the dtype or the length cannot be used; every mistake that can be seen."""
        self._engine, self._weights = await asyncio.to_thread(self._load)
        self._engine.start()

    async def add_adapter(self, adapter: ServedAdapter) -> None:
        """Raises BaseMismatch or CorruptCheckpoint: it does not fit the model, or A is not what its digest says."""
        _, weights = self._running()
        async with self._changing:
            await asyncio.to_thread(weights.add, adapter.digest, adapter.checkpoint)

    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        engine, weights = self._running()
        async with self._changing:
            await asyncio.wrap_future(engine.call(partial(weights.remove, adapter.digest)))

    def adapter_bytes(self, adapter: ServedAdapter) -> int:
        """A, in float32."""
        return 0 if self._weights is None else self._weights.resident_bytes(adapter.digest)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Output]:
        engine, weights = self._running()
        key = key_of(request.adapter.digest if request.adapter else None, request.task_set)
        self._check(request, weights)
        mailbox = Mailbox()
        job = Job(request, key, mailbox)
        engine.submit(job)
        try:
            while (output := await mailbox.get()) is not None:
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
        """The service has validated the request; an id out of range would break a GPU for everybody.

        Raises:
            ValueError: an id is not in the vocabulary, the prompt's length is out of range, the adapter is unknown.
        """
        sampling = request.sampling
        for name, ids in (
            ("prompt_token_ids", request.prompt_token_ids),
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", sampling.logit_bias),
        ):
            if any(not 0 <= token < self.vocab_size for token in ids):
                raise ValueError(f"{name}: an id is not in the vocabulary of {self.vocab_size}")
        if not 0 < len(request.prompt_token_ids) < self.max_model_len:
            raise ValueError(f"the prompt has {len(request.prompt_token_ids)} tokens, of at most {self.max_model_len}")
        if not request.task_set.is_base and (request.adapter is None or not weights.knows(request.adapter.digest)):
            raise ValueError("the adapter has not been added")

    def _load(self) -> tuple[Engine, MergedWeights]:
        model, self.tokenizer = _load_model(self._folder, self._dtype, self._device)
        config = model.config.get_text_config(decoder=True)
        self.max_model_len = _context(self._max_model_len, getattr(config, "max_position_embeddings", None))
        other = unsupported_cache(model.config)
        if other:
            message = f"keeps a state that is not keys and values ({other}), which the merged backend cannot pause"
            raise ConfigError(Problem(message, file=str(self._folder), remedy="serve a model with attention alone"))
        forward = Forward(model)
        self.vocab_size, bytes_per_token = _warm_up(model, forward)
        budget = self._kv_cache_bytes or int(KV_SHARE * _free_memory(self._device))
        kv_tokens = budget // bytes_per_token
        eos, more_eos = _ends(model, self.tokenizer.eos_token_id, self.vocab_size)
        # The thread that decodes has a tokenizer of its own: a fast one does not bear two threads at once.
        facts = ModelFacts(copy.deepcopy(self.tokenizer), eos, more_eos, self.max_model_len)
        log.info("%s on %s: room for %d tokens in the KV cache", model.dtype, self._device, kv_tokens)
        weights = MergedWeights(model)
        max_rows = 1 if lengths_interfere(model.config) else MAX_ROWS
        return Engine(forward, weights, facts, kv_tokens, max_rows, self._turn_steps), weights


def _ends(model: PreTrainedModel, eos: int | None, vocab_size: int) -> tuple[int | None, frozenset[int]]:
    """The tokenizer's end-of-sequence token, and what the generation config names beside it, as far as they exist."""
    named = model.generation_config.eos_token_id
    ids = [eos, *([named] if isinstance(named, int) else named or ())]
    first, *more = [token if token is not None and token < vocab_size else None for token in ids]
    return first, frozenset(more) - {first, None}


def _load_model(folder: Path, dtype: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Raises ConfigError."""
    if dtype not in DTYPES:
        raise ConfigError(Problem(f"{dtype!r} is no dtype", "--dtype", remedy=f"choose from: {', '.join(DTYPES)}"))
    options = {"local_files_only": True, "trust_remote_code": False}
    remedy = "name a folder with a transformers model: config.json, *.safetensors and a tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises many kinds: files, config values, safetensors' own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(Problem(f"cannot be loaded ({lines[0]})", file=str(folder), remedy=remedy)) from error
    if not getattr(tokenizer, "backend_tokenizer", None):
        message = f"its tokenizer ({type(tokenizer).__name__}) is not a fast one"
        raise ConfigError(Problem(message, file=str(folder), remedy="save the tokenizer as tokenizer.json"))
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        message = f"lacks {len(missing)} weights of the model ({', '.join(missing[:4])}, …)"
        raise ConfigError(Problem(message, file=str(folder), remedy="complete the download of the model"))
    return model.to(device).eval().requires_grad_(False), tokenizer


def _context(asked: int | None, allowed: int | None) -> int:
    """Raises ConfigError."""
    if asked is None and allowed is None:
        remedy = "say how many tokens prompt and answer may have together"
        raise ConfigError(Problem("is needed: the model's config does not say it", "--max-model-len", remedy=remedy))
    if asked is not None and (asked < 2 or (allowed is not None and asked > allowed)):
        remedy = f"use a value from 2 to {allowed}" if allowed else "use at least 2"
        raise ConfigError(Problem(f"{asked} is out of range", "--max-model-len", remedy=remedy))
    return asked if asked is not None else allowed


@torch.inference_mode()
def _warm_up(model: PreTrainedModel, forward: Forward) -> tuple[int, int]:
    """Runs the model once. Returns the number of token ids and the bytes that one token takes in the KV cache."""
    prefill = Prefill([0] * _WARM_UP_TOKENS)
    logits = prefill.step(forward)
    kept = [states for layer in prefill.cache.layers for states in (layer.keys, layer.values)]
    size = sum(states.numel() * states.element_size() for states in kept) // _WARM_UP_TOKENS
    return min(len(logits), model.get_input_embeddings().weight.shape[0]), size


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
