"""From a proto request to a GenerationRequest, or to every mistake in it at once.

    selection  which adapter and task set       (loraf_serve.request.selection)
    prompt     text or chat to token ids        (loraf_serve.request.prompts)
    sampling   ranges and defaults              (loraf_serve.request.sampling)

One answer names all violations, each by its path in the request (`sampling.top_p`). INVALID_ARGUMENT goes before
NOT_FOUND, and that before FAILED_PRECONDITION, where a request has mistakes of several kinds.
"""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from loraf.errors import LorafError, Problem, UnknownTask
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import Backend, GenerationRequest, Sampling, ServedAdapter
from loraf_serve.errors import DigestMismatch, InvalidRequest
from loraf_serve.request import sampling, selection
from loraf_serve.request.prompts import PromptReader
from loraf_serve.v1 import generation_pb2 as pb

AnyRequest = pb.GenerateRequest | pb.StreamGenerateRequest

MAX_REQUEST_ID = 128  # characters


class Validator:
    """Reads requests, in a thread of its own: a long prompt takes long to tokenize.

    Args:
        backend: started; its tokenizer is copied, so that nobody else uses the copy at the same time.
        vocab_size: number of token ids of the model (its embedding, which may have more rows than the tokenizer has
            tokens); None: the tokenizer's.
    """

    def __init__(self, backend: Backend, vocab_size: int | None = None):
        self._prompts = PromptReader(backend.tokenizer, backend.max_model_len, vocab_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="validation")

    async def read(self, request: AnyRequest, registry: Registry) -> GenerationRequest:
        """Raises what `read_now` raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.read_now, request, registry)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def read_now(self, request: AnyRequest, registry: Registry) -> GenerationRequest:
        """The validated request, under an id that no other request has (clients may choose equal ones).

        Args:
            registry: the adapters that the request may name.

        Raises:
            InvalidRequest: fields out of range; also holds what would be NOT_FOUND alone.
            UnknownTask: an adapter or task that is not loaded.
            DigestMismatch: the adapter is another than the request insists on.
        """
        errors: list[LorafError] = []
        adapter, task_set, only = selection.read(request, registry, errors)
        wanted = self._sampling(request, errors)
        token_ids = self._token_ids(request, adapter, only, errors)
        problem = request_id_problem(request.request_id)
        if problem:
            errors.append(InvalidRequest(problem))
        room = self._prompts.max_model_len - len(token_ids)
        if token_ids and wanted.min_tokens > room:
            message = f"{wanted.min_tokens} is more than the {room} tokens that the context has room for"
            errors.append(InvalidRequest(Problem(message, "sampling.min_tokens", remedy=f"use at most {room}")))
        _raise_worst(errors)
        unique = uuid.uuid4().hex
        return GenerationRequest(
            request_id=f"{request.request_id}-{unique[:12]}" if request.request_id else unique,
            prompt_token_ids=token_ids,
            sampling=replace(wanted, max_tokens=min(wanted.max_tokens, room)),
            adapter=adapter,
            task_set=task_set,
        )

    def _sampling(self, request: AnyRequest, errors: list[LorafError]) -> Sampling:
        try:
            return sampling.read(request.sampling, self._prompts.vocab_size)
        except InvalidRequest as error:
            errors.append(error)
            return Sampling()

    def _token_ids(
        self, request: AnyRequest, adapter: ServedAdapter | None, task: str | None, errors: list[LorafError]
    ) -> tuple[int, ...]:
        """The prompt's token ids; () if something is wrong with it."""
        templates = None
        try:
            if request.apply_task_template:
                if request.WhichOneof("input") in ("messages", "prompt_token_ids"):
                    raise _template_misused("wraps a prompt, and there is none", "send prompt")
                if adapter is None or task is None:
                    if errors:  # why the selection is wrong has been said
                        return ()
                    raise _template_misused("needs exactly one task chosen", "choose one task")
                templates = adapter.manifest.task(task).templates
            return self._prompts.read(request, templates)
        except InvalidRequest as error:
            errors.append(error)
            return ()


def request_id_problem(request_id: str) -> Problem | None:
    """What is wrong with a client's request id, or None."""
    if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
        remedy = f"use at most {MAX_REQUEST_ID} printable characters"
        return Problem("is too long or holds a character that cannot be printed", "request_id", remedy=remedy)
    return None


def _template_misused(message: str, remedy: str) -> InvalidRequest:
    return InvalidRequest(Problem(message, "apply_task_template", remedy=f"{remedy}, or leave the field out"))


def _raise_worst(errors: list[LorafError]) -> None:
    """Raises nothing if there is nothing; else one error that holds all problems of the worst kind's answer."""
    if not errors:
        return
    unknown = [e for e in errors if isinstance(e, UnknownTask)]
    mismatches = [e for e in errors if isinstance(e, DigestMismatch)]
    invalid = [e for e in errors if e not in unknown and e not in mismatches]
    if invalid:
        raise InvalidRequest([p for e in errors if e not in mismatches for p in e.problems])
    if unknown:
        raise UnknownTask([p for e in unknown for p in e.problems])
    raise DigestMismatch([p for e in mismatches for p in e.problems])
