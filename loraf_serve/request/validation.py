"""Converts a proto request to a GenerationRequest, or to one error that names every mistake.

    selection  adapter and task set             (loraf_serve.request.selection)
    prompt     text or chat to token ids        (loraf_serve.request.prompts)
    sampling   ranges and defaults              (loraf_serve.request.sampling)
    limits     of what takes time to read       (loraf_serve.limits, loraf_serve.request.lanes)

Each violation is named by its path in the request (`sampling.top_p`). If a request has mistakes of several kinds,
INVALID_ARGUMENT takes precedence over NOT_FOUND, and that over FAILED_PRECONDITION.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from google.protobuf.message import Message

from loraf.errors import LorafError, Problem, UnknownTask
from loraf.tasksets import TaskSet
from loraf_serve.adapters.registry import Registry
from loraf_serve.backends.backend import Backend, GenerationRequest, Sampling, ServedAdapter
from loraf_serve.errors import DigestMismatch, InvalidRequest
from loraf_serve.limits import MAX_PRIORITY, MAX_PROMPT_LOGPROBS_ENTRIES, MAX_REQUEST_ID, MAX_SELECTED_TASKS
from loraf_serve.request import chat, sampling, selection, structured_output
from loraf_serve.request.lanes import Lanes
from loraf_serve.request.prompts import PromptReader
from loraf_serve.v1 import generation_pb2 as pb

AnyRequest = pb.GenerateRequest | pb.StreamGenerateRequest

_REMEDIES = {"priority": "leave it out, or serve with a vLLM backend and --scheduling-policy priority"}


@dataclass(frozen=True)
class Unrendered:
    """A chat of which everything is valid but the prompt, which is not known yet."""

    request: AnyRequest
    adapter: ServedAdapter | None
    task_set: TaskSet
    sampling: Sampling


class Validator:
    """Validates requests in threads, because a long prompt takes long to tokenize.

    Args:
        backend: started. Its tokenizer is copied for each thread, since a tokenizer is not thread-safe.
        vocab_size: the model's number of token ids (rows of its embedding, which may be more or fewer than the
            tokenizer has tokens); the backend's counts if it is smaller. None for the backend's, or the tokenizer's.
    """

    def __init__(self, backend: Backend, vocab_size: int | None = None):
        size = min((n for n in (vocab_size, backend.vocab_size) if n), default=None)
        self._backend = backend
        self._end_tokens = backend.end_tokens
        self._lanes = Lanes(lambda: PromptReader(backend.tokenizer, backend.max_model_len, size))

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model can hold."""
        return self._lanes.any_reader.vocab_size

    async def read(self, request: AnyRequest, registry: Registry) -> GenerationRequest:
        """Validates a request in a thread. Raises as `read_now`."""
        # What is too long is refused here: it would keep a thread busy.
        problems = _size_problems(request)
        if problems:
            raise InvalidRequest(problems)
        return await self._lanes.run(request.ByteSize(), lambda prompts: self._read(request, registry, prompts))

    def close(self) -> None:
        """Ends the threads."""
        self._lanes.close()

    def read_now(self, request: AnyRequest, registry: Registry) -> GenerationRequest:
        """Validates a request and gives it a unique id (ids of clients need not be unique).

        Args:
            registry: the adapters that the request may name.

        Raises:
            InvalidRequest: invalid fields; includes unknown adapters and tasks.
            UnknownTask: only an adapter or task that is not loaded.
            DigestMismatch: only another version of the adapter than the request requires.
        """
        problems = _size_problems(request)
        if problems:
            raise InvalidRequest(problems)
        return self._read(request, registry, self._lanes.any_reader)

    async def read_unrendered(self, request: AnyRequest, registry: Registry) -> Unrendered:
        """Validates everything but the prompt of a chat, which the backend's engine renders. Raises as `read_now`."""
        problems = _size_problems(request)
        if problems:
            raise InvalidRequest(problems)
        return await self._lanes.run(
            request.ByteSize(), lambda prompts: self._read_unrendered(request, registry, prompts)
        )

    def _read_unrendered(self, request: AnyRequest, registry: Registry, prompts: PromptReader) -> Unrendered:
        errors: list[LorafError] = []
        adapter, task_set, _ = selection.read(request, registry, errors)
        params = self._sampling(request, prompts, errors)
        errors += [InvalidRequest(problem) for problem in self._other_problems(request)]
        try:
            prompts.check_chat(request)
        except InvalidRequest as error:
            errors.append(error)
        _raise_worst(errors)
        return Unrendered(request, adapter, task_set, params)

    def rendered(self, request: Unrendered, token_ids: Sequence[int]) -> GenerationRequest:
        """The request with its prompt. Raises InvalidRequest: the prompt is empty or too long for the request."""
        prompts, errors = self._lanes.any_reader, list[LorafError]()
        try:
            prompts.check_ids("messages", tuple(token_ids))
        except InvalidRequest as error:
            errors.append(error)
        errors += self._length_errors(request.sampling, tuple(token_ids))
        _raise_worst(errors)
        return self._valid(request.request, request.adapter, request.task_set, request.sampling, tuple(token_ids))

    def _read(self, request: AnyRequest, registry: Registry, prompts: PromptReader) -> GenerationRequest:
        errors: list[LorafError] = []
        adapter, task_set, only_task = selection.read(request, registry, errors)
        params = self._sampling(request, prompts, errors)
        token_ids = self._token_ids(request, prompts, adapter, only_task, errors)
        errors += [InvalidRequest(problem) for problem in self._other_problems(request)]
        errors += self._length_errors(params, token_ids)
        _raise_worst(errors)
        return self._valid(request, adapter, task_set, params, token_ids)

    def _valid(
        self,
        request: AnyRequest,
        adapter: ServedAdapter | None,
        task_set: TaskSet,
        params: Sampling,
        token_ids: tuple[int, ...],
    ) -> GenerationRequest:
        unique = uuid.uuid4().hex
        room = self._backend.max_model_len - len(token_ids)
        return GenerationRequest(
            request_id=f"{request.request_id}-{unique[:12]}" if request.request_id else unique,
            prompt_token_ids=token_ids,
            sampling=replace(params, max_tokens=min(params.max_tokens, room)),
            adapter=adapter,
            task_set=task_set,
            priority=request.priority,
        )

    def _length_errors(self, params: Sampling, token_ids: tuple[int, ...]) -> list[LorafError]:
        """What is too much for a prompt of this length."""
        errors: list[LorafError] = []
        entries = 0 if params.prompt_logprobs is None else (params.prompt_logprobs + 1) * len(token_ids)
        if entries > MAX_PROMPT_LOGPROBS_ENTRIES:
            message = f"{params.prompt_logprobs} for {len(token_ids)} tokens are {entries} log-probabilities"
            remedy = f"use at most {MAX_PROMPT_LOGPROBS_ENTRIES}: a smaller number, or a shorter prompt"
            errors.append(InvalidRequest(Problem(message, "sampling.prompt_logprobs", remedy=remedy)))
        room = self._backend.max_model_len - len(token_ids)
        if token_ids and params.min_tokens > room:
            message = f"{params.min_tokens} is more than the {room} tokens that are left of the context"
            errors.append(InvalidRequest(Problem(message, "sampling.min_tokens", remedy=f"use at most {room}")))
        return errors

    def _other_problems(self, request: AnyRequest) -> list[Problem]:
        """The problems with fields that are neither the prompt nor the selection nor sampling."""
        problems = []
        if abs(request.priority) > MAX_PRIORITY:
            remedy = f"use a value from {-MAX_PRIORITY} to {MAX_PRIORITY}"
            problems.append(Problem(f"{request.priority} is out of range", "priority", remedy=remedy))
        if request.tools and request.WhichOneof("input") != "messages":
            problems.append(Problem("requires messages", "tools", remedy="send messages, or leave tools out"))
        unsupported = set(self._backend.unsupported_fields)
        for field in sorted(unsupported & {*_set_fields(request), *_set_fields(request.sampling, "sampling.")}):
            if field != "priority" or request.priority:  # 0 is what every request has
                message = f"is not supported by the {self._backend.name} backend"
                remedy = _REMEDIES.get(field, "leave it out, or serve with a vLLM backend")
                problems.append(Problem(message, field, remedy=remedy))
        problem = request_id_problem(request.request_id)
        return [*problems, problem] if problem else problems

    def _sampling(self, request: AnyRequest, prompts: PromptReader, errors: list[LorafError]) -> Sampling:
        params = request.sampling
        if structured_output.FIELD in self._backend.unsupported_fields:  # refused below: nothing of it is read
            params = pb.SamplingParams()
            params.CopyFrom(request.sampling)
            params.ClearField("structured_output")
        try:
            return sampling.read(params, prompts.vocab_size, self._end_tokens, prompts.bad_word_tokens)
        except InvalidRequest as error:
            errors.append(error)
            return Sampling()

    def _token_ids(
        self,
        request: AnyRequest,
        prompts: PromptReader,
        adapter: ServedAdapter | None,
        task: str | None,
        errors: list[LorafError],
    ) -> tuple[int, ...]:
        """The prompt's token ids; () after appending an error."""
        templates = None
        try:
            if request.apply_task_template:
                if request.WhichOneof("input") in ("messages", "prompt_token_ids"):
                    raise _template_misused("requires a prompt", "send prompt")
                if adapter is None or task is None:
                    if errors:  # the selection's own error has been reported
                        return ()
                    raise _template_misused("requires that exactly one task is selected", "select one task")
                templates = adapter.manifest.task(task).templates
            return prompts.read(request, templates)
        except InvalidRequest as error:
            errors.append(error)
            return ()


def request_id_problem(request_id: str) -> Problem | None:
    """The problem with a client's request id, or None."""
    if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
        remedy = f"use at most {MAX_REQUEST_ID} printable characters"
        return Problem("is too long or has a character that cannot be printed", "request_id", remedy=remedy)
    return None


def _size_problems(request: AnyRequest) -> list[Problem]:
    """What is too long to be read. Takes little time however much a client sends."""
    problems = chat.size_problems(request)
    count = len(request.task_selection.tasks.tasks)
    if count > MAX_SELECTED_TASKS:
        remedy = f"use at most {MAX_SELECTED_TASKS}"
        problems.append(Problem(f"has {count} tasks", "task_selection.tasks.tasks", remedy=remedy))
    return problems


def _set_fields(message: Message, prefix: str = "") -> list[str]:
    return [prefix + field.name for field, _ in message.ListFields()]


def _template_misused(message: str, remedy: str) -> InvalidRequest:
    return InvalidRequest(Problem(message, "apply_task_template", remedy=f"{remedy}, or leave the field out"))


def _raise_worst(errors: list[LorafError]) -> None:
    """Raises one error with all problems of the kind that takes precedence. No-op without errors."""
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
