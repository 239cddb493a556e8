"""Schedules the merged backend's requests in the thread that owns the model. Task sets take turns.

    submit ─▶ waiting ─▶ prefill (one chunk per step) ─▶ batch (one token per answer and step) ─▶ sink
              └───────────────────── for each task set ────────────────────┘

A set's turn ends when it has nothing to do, or after TURN_STEPS steps if other sets have work (later if merging the set
into the weights took longer than that). Its answers then pause and keep their KV cache.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from loraf_serve.backends.answer_state import AnswerState, DecodingConfig, longest_answer
from loraf_serve.backends.backend import BackendUnavailable, ChoiceDelta, GenerationRequest, PositionLogprobs
from loraf_serve.backends.logprobs import PromptLogprobs
from loraf_serve.backends.merged_weights import BASE, MergedWeights, SetKey
from loraf_serve.backends.model_runner import Batch, Forward, Prefill

log = logging.getLogger(__name__)

TURN_STEPS = 64
MAX_ROWS = 16  # answers of one set in a batch
PREFILL_TOKENS_PER_STEP = 64  # this many prompt tokens count as one decoding step


class Sink(Protocol):
    """Receives a request's answers. Called from the engine's thread; must not block."""

    def put(self, deltas: Sequence[ChoiceDelta], prompt_logprobs: Sequence[PositionLogprobs | None] = ()) -> None: ...

    def end(self, error: Exception | None) -> None: ...


@dataclass(eq=False)
class Job:
    """A request in the engine.

    Attributes:
        reserved: tokens of KV cache that its answers may need together.
        arrival: its number in the order of arrival.
        prompt_logprobs: if the request wants them.
        over: it has been answered, has failed, or was cancelled.
    """

    request: GenerationRequest
    key: SetKey
    sink: Sink
    reserved: int = 0
    arrival: int = 0
    answers: list[AnswerState] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    over: bool = False

    @property
    def place(self) -> tuple[int, int]:
        """Its place in a queue: lower priorities first, then in the order of arrival."""
        return self.request.priority, self.arrival


class Group:
    """The jobs of one task set."""

    def __init__(self, key: SetKey):
        self.key = key
        self.waiting: list[Job] = []  # in the order of their places
        self.prefill: tuple[Job, Prefill] | None = None
        self.running: list[Job] = []  # jobs with answers in the batch
        self.batch = Batch()

    @property
    def busy(self) -> bool:
        """Whether a prompt or an answer is in progress."""
        return self.prefill is not None or len(self.batch) > 0

    @property
    def jobs(self) -> list[Job]:
        """All jobs, those in progress first."""
        return [*([self.prefill[0]] if self.prefill else []), *self.running, *self.waiting]

    @property
    def priority(self) -> int:
        """The lowest number among its jobs, of which there is at least one."""
        return min(job.request.priority for job in self.jobs)

    def remove(self, job: Job) -> None:
        """Removes a job and frees its KV cache."""
        if job in self.waiting:
            self.waiting.remove(job)
        if self.prefill and self.prefill[0] is job:
            self.prefill = None
        if job in self.running:
            self.running.remove(job)
        for answer in job.answers:
            answer.finished = True
        self.drop_finished()

    def drop_finished(self) -> None:
        """Removes finished answers from the batch."""
        self.batch.keep([row for row, answer in enumerate(self.batch.answers) if not answer.finished])


class Engine:
    """Runs jobs in its own thread until `stop`, or until the model fails for good.

    Args:
        kv_tokens: tokens of KV cache that all jobs together may reserve; a single job may exceed it.
        max_rows: maximum number of answers in a batch; a single job may exceed it.
        turn_steps: length of a set's turn, in decoding steps.
    """

    def __init__(
        self,
        forward: Forward,
        weights: MergedWeights,
        config: DecodingConfig,
        kv_tokens: int,
        max_rows: int = MAX_ROWS,
        turn_steps: int = TURN_STEPS,
    ):
        self._forward = forward
        self._weights = weights
        self._config = config
        self._kv_tokens = kv_tokens
        self._max_rows = max_rows
        self._turn_steps = turn_steps
        self._groups: dict[SetKey, Group] = {}  # in the order of their turns
        self._reserved = 0
        self._arrivals = itertools.count()
        self._inbox: list[Callable[[], None]] = []
        self._condition = threading.Condition()
        self._ended: str | None = None  # the reason why no more jobs are accepted
        self._thread = threading.Thread(target=self._run, name="merged-backend", daemon=True)

    # Called from any thread

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Adds a job. Raises BackendUnavailable."""
        self._post(partial(self._enqueue, job))

    def cancel(self, job: Job) -> None:
        """Ends a job before the next step. Its sink gets nothing more. No-op if the job is over."""
        if not job.over:
            try:
                self._post(partial(self._close, job))
            except BackendUnavailable:
                return  # all jobs are over

    def call(self, action: Callable[[], None]) -> Future[None]:
        """Runs `action` in the engine's thread between two steps. Raises BackendUnavailable."""
        done: Future[None] = Future()

        def act() -> None:
            try:
                action()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._post(act)
        return done

    def check(self) -> None:
        """Raises BackendUnavailable if no more jobs are accepted."""
        with self._condition:
            if self._ended is not None:
                raise BackendUnavailable(self._ended)

    def stop(self) -> None:
        """Ends all jobs with BackendUnavailable, after the current step. Idempotent."""
        self._end("the backend has been stopped")
        self._thread.join()

    def _end(self, reason: str) -> None:
        with self._condition:
            self._ended = self._ended or reason
            self._condition.notify()

    def _post(self, action: Callable[[], None]) -> None:
        with self._condition:
            if self._ended is not None:
                raise BackendUnavailable(self._ended)
            self._inbox.append(action)
            self._condition.notify()

    # Called in the engine's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._ended is None:
                    self._receive(wait=not self._ready())
                    ready = self._ready()
                    if ready:
                        self._turn(ready[0])
        except Exception as error:
            log.critical("the merged backend has failed", exc_info=error)
            self._end(f"the model has failed ({type(error).__name__})")
        finally:
            self._receive(wait=False)  # from now on `_post` refuses
            for job in [job for group in self._groups.values() for job in group.jobs]:
                self._close(job)
                job.sink.end(BackendUnavailable(self._ended))

    def _receive(self, wait: bool) -> None:
        """Runs the actions that other threads have posted. `wait`: blocks until there is one."""
        with self._condition:
            if wait:
                self._condition.wait_for(lambda: bool(self._inbox) or self._ended is not None)
            actions, self._inbox = self._inbox, []
        for action in actions:
            action()

    def _enqueue(self, job: Job) -> None:
        job.arrival = next(self._arrivals)
        sampling = job.request.sampling
        # One token more than needed: the last token of an answer is never cached.
        length = len(job.request.prompt_token_ids) + longest_answer(job.request, self._config.max_model_len)
        job.reserved = sampling.n * length
        insort(self._groups.setdefault(job.key, Group(job.key)).waiting, job, key=lambda job: job.place)

    def _ready(self) -> list[Group]:
        """The groups that can make progress, in the order of their turns. Drops groups without jobs.

        A group with a job of a lower priority number comes first.
        """
        self._groups = {key: group for key, group in self._groups.items() if group.jobs}
        ready = [group for group in self._groups.values() if group.busy or self._may_start(group)]
        return sorted(ready, key=lambda group: group.priority)

    def _may_start(self, group: Group) -> bool:
        """Whether the group's next waiting job may start."""
        return self._has_room(group) and group.waiting[0].place < self._place_limit()

    def _has_room(self, group: Group) -> bool:
        """Whether the group has a waiting job and rows for it in its batch; memory is not considered."""
        if not group.waiting or group.prefill:
            return False
        return not group.batch or len(group.batch) + group.waiting[0].request.sampling.n <= self._max_rows

    def _place_limit(self) -> tuple[float, float]:
        """Only jobs with a place before this may start: none overtakes the first job that waits for memory."""
        heads = [group.waiting[0] for group in self._groups.values() if self._has_room(group)]
        full = [job.place for job in heads if self._reserved and self._reserved + job.reserved > self._kv_tokens]
        return min(full, default=(math.inf, math.inf))

    def _turn(self, group: Group) -> None:
        self._groups[group.key] = self._groups.pop(group.key)  # moves to the end of the queue
        steps, merging, began = 0, 0.0, time.monotonic()
        while self._ended is None:
            try:
                merging += self._weights.use(group.key)  # before every step: a failed step may have changed the weights
            except Exception as error:
                self._recover(group.jobs, error)
                return
            steps += self._step(group)
            self._receive(wait=False)
            ready = self._ready()
            if group not in ready:
                return
            if len(ready) > 1 and steps >= self._turn_steps and time.monotonic() - began >= 2 * merging:
                return

    def _step(self, group: Group) -> int:
        """Runs one chunk of a prompt, or one token of every answer. Returns its cost in decoding steps."""
        if self._may_start(group):
            job = group.waiting.pop(0)
            self._reserved += job.reserved
            try:
                group.prefill = (job, self._begin(job))
            except Exception as error:
                self._fail(job, error)
                return 0
        if group.prefill:
            return self._prefill(group, *group.prefill)
        self._decode(group)
        return 1

    def _begin(self, job: Job) -> Prefill:
        prompt, count = job.request.prompt_token_ids, job.request.sampling.prompt_logprobs
        if count is None:
            return Prefill(prompt)
        job.prompt_logprobs = PromptLogprobs(self._config.tokenizer, prompt, count)
        return Prefill(prompt, job.prompt_logprobs.add)

    def _prefill(self, group: Group, job: Job, prefill: Prefill) -> int:
        """Runs one chunk of a prompt; after the last one, starts the job's answers. Returns the cost."""
        cost = math.ceil(prefill.next_chunk / PREFILL_TOKENS_PER_STEP)
        try:
            logits = prefill.step(self._forward)
        except Exception as error:
            self._recover([job], error)
            return cost
        if logits is None:
            return cost
        group.prefill = None
        group.running.append(job)
        try:
            job.answers = [AnswerState(job.request, index, self._config) for index in range(job.request.sampling.n)]
        except Exception as error:
            self._fail(job, error)
            return cost
        self._advance(job, [logits] * len(job.answers))
        unfinished = [answer for answer in job.answers if not answer.finished]
        try:
            group.batch.add(unfinished, prefill.cache, len(job.request.prompt_token_ids))
        except Exception as error:  # out of memory: the batch's cache may be inconsistent
            self._recover(group.running, error)
        return cost

    def _decode(self, group: Group) -> None:
        """Runs one token of every answer in the batch."""
        try:
            logits = group.batch.step(self._forward)
        except Exception as error:
            self._recover(group.running, error)
            return
        row_of = {answer: row for row, answer in enumerate(group.batch.answers)}
        for job in list(group.running):
            self._advance(job, [logits[row_of[answer]] for answer in job.answers if not answer.finished])
        group.drop_finished()

    def _advance(self, job: Job, logits: Sequence[torch.Tensor]) -> None:
        """Samples the next token of each unfinished answer. `logits`: one row for each."""
        unfinished = [answer for answer in job.answers if not answer.finished]
        try:
            deltas = [answer.accept(row) for answer, row in zip(unfinished, logits, strict=True)]
        except Exception as error:
            self._fail(job, error)
            return
        gathered, job.prompt_logprobs = job.prompt_logprobs, None
        job.sink.put(deltas, gathered.positions if gathered else ())
        if all(answer.finished for answer in job.answers):
            self._close(job)
            job.sink.end(None)

    def _close(self, job: Job) -> None:
        """Removes a job from its group and frees its memory. No-op if it is over."""
        if job.over:
            return
        job.over = True
        group = self._groups[job.key]
        if job not in group.waiting:
            self._reserved -= job.reserved
        group.remove(job)

    def _fail(self, job: Job, error: Exception) -> None:
        """Ends a job with an error."""
        log.error("request %s failed", job.request.request_id, exc_info=error)
        self._close(job)
        failure = RuntimeError(f"decoding failed ({type(error).__name__})")
        failure.__cause__ = error
        job.sink.end(failure)

    def _recover(self, jobs: Iterable[Job], error: Exception) -> None:
        """Ends the jobs with an error, then checks that the model still works: a device fault may be permanent.

        Raises:
            Exception: the model does not work any more.
        """
        for job in list(jobs):
            self._fail(job, error)
        self._weights.use(BASE)
        Prefill([0]).step(self._forward)
