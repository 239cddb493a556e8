"""A vLLM engine as a backend: start and stop, streams, workers. Subclasses define how a task set reaches the engine."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from abc import abstractmethod
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loraf.errors import ConfigError, Problem, UnknownTask, one_line
from loraf.tasksets import TaskSet
from loraf_serve.backends.backend import (
    Backend,
    BackendUnavailable,
    EngineFailed,
    GenerationRequest,
    Output,
    Sampling,
    ServedAdapter,
    StructuredOutput,
)
from loraf_serve.backends.vocabulary import ends_within
from loraf_serve.vllm.engine import answers, quantised
from loraf_serve.vllm.engine.environment import engine_environment
from loraf_serve.vllm.engine.lora_requests import LoraRequests
from loraf_serve.vllm.engine.support import can_serve
from loraf_serve.vllm.forms.form_checker import FormChecker
from loraf_serve.vllm.naming import lora_path
from loraf_serve.vllm.worker import faults, probe, remote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import EngineInput
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

_POLL_SECONDS = 0.02
_HEALTH_SECONDS = 1.0
_STOP_SECONDS = 1.0  # grace for running requests when the backend stops
_EXIT_SECONDS = 30.0  # grace for vLLM's processes before they are killed


class VllmBackend(Backend):
    """Serves task sets as LoRA requests of vLLM. Its workers keep the checkpoints in memory.

    Args:
        model_folder: a transformers model.
        engine_options: vLLM's own command-line options.
        max_rank: the largest rank among the adapters known at start.
        reserve: bytes to leave free for adapters when the KV cache is sized.
    """

    reads_checkpoints = True

    def __init__(
        self, model_folder: Path, engine_options: Sequence[str] = (), max_rank: int = 64, reserve: int | None = None
    ):
        self._model_folder = Path(model_folder).resolve()
        self._engine_options = tuple(engine_options)
        self._max_rank = max_rank
        self._reserve = reserve or 0
        self._engine: AsyncLLM | None = None
        self._forms: FormChecker | None = None
        self._stopping = False
        self._bytes: dict[str, int] = {}  # digests of loaded checkpoints → bytes in all workers
        self._request_ids: set[str] = set()
        self._lora_requests = LoraRequests(1, 0)

    @abstractmethod
    def _engine_args(self) -> AsyncEngineArgs:
        """Returns the engine's arguments.

        Raises:
            ConfigError: the user's vLLM options cannot be used.
        """

    def _configured(self, config: VllmConfig) -> None:
        """Adjusts the engine's configuration, as vLLM has completed it, before the engine starts."""

    @abstractmethod
    def _lora_request(self, key: str, priority: int = 0) -> AbstractAsyncContextManager[LoRARequest]:
        """Returns vLLM's request object of a task set, held while a request of the set runs.

        Args:
            priority: of the request.
        """

    async def start(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="loraf-") as folder:
                faults_file = Path(folder) / "faults"
                try:
                    await self._start(faults_file)
                except BackendUnavailable as error:
                    raise self._failed(faults.first(faults_file) or one_line(error)) from error
        except BaseException:
            await self.stop()
            raise

    async def _start(self, faults_file: Path) -> None:
        await asyncio.to_thread(self._start_engine, faults_file)
        engine = self._running()
        self.tokenizer = cast("PreTrainedTokenizerBase", engine.get_tokenizer())
        self.max_model_len = engine.model_config.max_model_len
        self.vocab_size = engine.model_config.get_vocab_size()
        self.end_tokens = _keep_ends_within(engine, self.vocab_size)
        spaces = not engine.vllm_config.structured_outputs_config.disable_any_whitespace
        self._forms = FormChecker(self.tokenizer, self.vocab_size, spaces)
        if engine.vllm_config.scheduler_config.policy != "priority":
            self.unsupported_fields = ("priority",)
        answers.install(engine)
        if not all(await self._call_workers("loraf_layers")):
            message = "vLLM's workers did not install LoRAF's LoRA manager"
            raise ConfigError(Problem(message, self._option, remedy="serve with --backend merged"))
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            await self._warm_up()
        except (EngineDeadError, EngineGenerateError) as error:
            raise _dead() from error

    @property
    def _option(self) -> str:
        return f"--backend {self.name}"

    def _failed(self, reason: str) -> EngineFailed:
        message, remedy = f"vLLM's engine failed while it started ({reason})", "serve with --backend merged"
        method = quantised.method(self._model_folder)
        if method:  # merged serves no quantised weights
            message, remedy = f"{message}; the model's weights are quantised ({method})", quantised.REMEDY
        return EngineFailed(Problem(message, self._option, remedy=remedy))

    def _start_engine(self, faults_file: Path) -> None:
        """Blocks until the engine's processes have loaded the model.

        Args:
            faults_file: where they write why they failed.

        Raises:
            ConfigError: the options or the model cannot be used.
            BackendUnavailable: the processes failed.
        """
        with engine_environment({faults.FAULTS: str(faults_file), **self._environment()}):
            reason = can_serve(self._model_folder)
            if reason:
                raise ConfigError(Problem(reason, self._option, remedy="serve with --backend merged"))
            from vllm.v1.engine.async_llm import AsyncLLM

            from loraf_serve.vllm.engine.arguments import engine_config, require_xgrammar

            config = engine_config(self._engine_args())
            require_xgrammar(config)
            self._configured(config)
            try:
                # Statistics are only computed if somebody gets them.
                self._engine = AsyncLLM.from_vllm_config(
                    config, disable_log_stats=True, stat_loggers=self._stat_loggers()
                )
            except Exception as error:
                raise BackendUnavailable(one_line(error)) from error
        if self._stopping:  # `start` was cancelled in the meantime
            self._engine.shutdown(_EXIT_SECONDS)

    def _stat_loggers(self) -> list[Any]:
        if not self.keeps_metrics:
            return []
        from loraf_serve.vllm.engine.metrics import EngineMetrics

        return [EngineMetrics]

    def _environment(self) -> dict[str, str]:
        """Returns additional environment variables for vLLM's processes."""
        return {}

    async def _warm_up(self) -> None:
        """Generates some tokens of the base model, because an engine's first steps are slow. Meanwhile and afterwards
        the workers prove that LoRA on vLLM's layers acts as in transformers."""
        from vllm.inputs import tokens_input
        from vllm.sampling_params import SamplingParams

        def generate(prompt: list[int], tokens: int) -> AsyncGenerator[object, None]:
            params = SamplingParams(max_tokens=tokens, ignore_eos=True)
            return self._running().generate(tokens_input(prompt), params, _new_request_id())

        bos = self.tokenizer.bos_token_id
        token = bos if bos is not None and 0 <= bos < (self.vocab_size or 0) else 0
        await probe.prove_layers(self._call_workers, generate, token, self.max_model_len, probe.AT_ONCE)

    async def add_adapter(self, adapter: ServedAdapter) -> None:
        """Has every worker read the checkpoint, verify it against the adapter's digest, and prepare it."""
        await self.check_health()
        if adapter.digest in self._bytes:
            return
        folder = str(adapter.path.resolve())
        try:
            nbytes = await remote.load(self._call_workers, folder, adapter.tasks, adapter.digest)
        except BaseException:
            if self._engine is not None and not self._engine.errored:
                await asyncio.shield(self._call_workers("loraf_drop", adapter.digest, []))
            raise
        self._bytes[adapter.digest] = nbytes

    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        if self._bytes.pop(adapter.digest, None) is not None:
            await self._call_workers("loraf_drop", adapter.digest, self._lora_requests.forget(adapter.digest))

    def adapter_bytes(self, adapter: ServedAdapter) -> int:
        return self._bytes.get(adapter.digest, 0)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Output]:
        """See `Backend.generate`.

        Raises:
            LorafError: vLLM refuses a sampling field or the prompt, with vLLM's explanation; or the answer cannot have
                its form.
        """
        self._running()
        form = await self._form(request.sampling)
        if request.task_set.is_base:
            async with aclosing(self._stream(request, None, form)) as outputs:
                async for output in outputs:
                    yield output
            return
        async with (
            self._lora_request(self._set_key(request), request.priority) as lora_request,
            aclosing(self._stream(request, lora_request, form)) as outputs,
        ):
            async for output in outputs:
                yield output

    async def _form(self, sampling: Sampling) -> tuple[str, str] | None:
        """Returns the form of the answer as vLLM takes it. Raises LorafError: vLLM could not keep to it."""
        if sampling.structured_output is None:
            return None
        return await self.checked_form(sampling.structured_output, sampling.stop_token_ids)

    async def checked_form(self, form: StructuredOutput, stop_token_ids: Collection[int]) -> tuple[str, str]:
        """Returns a form of the answer as vLLM takes it.

        Args:
            stop_token_ids: the request's own.

        Raises:
            LorafError: vLLM could not keep to it.
        """
        assert self._forms is not None  # since `start`
        return await self._forms.check(form, {*stop_token_ids, *self.end_tokens})

    def _set_key(self, request: GenerationRequest) -> str:
        """Returns the set's name in the engine.

        Raises:
            UnknownTask: the adapter is not loaded. Within a step this would end the engine.
        """
        adapter = request.adapter
        if adapter is None or adapter.digest not in self._bytes:
            name = "none" if adapter is None else adapter.name
            raise UnknownTask(Problem(f"adapter {name!r} is not loaded", "adapter"))
        task_set = TaskSet.of(request.task_set.weights, adapter.tasks)
        return lora_path(adapter.digest, str(task_set))

    async def _stream(
        self, request: GenerationRequest, lora_request: LoRARequest | None, form: tuple[str, str] | None
    ) -> AsyncGenerator[Output, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        from loraf_serve.vllm.engine import convert

        sampling = request.sampling
        converter = convert.Converter(self.tokenizer, sampling.logprobs, sampling.prompt_logprobs)
        prompt = tokens_input(list(request.prompt_token_ids))
        try:
            params = convert.sampling_params(sampling, form)
        except (VLLMClientError, ValueError) as error:
            raise convert.request_error(error) from None
        async with aclosing(self._engine_outputs(request, lora_request, prompt, params)) as outputs:
            async for output in outputs:
                async for converted in converter.outputs(output):
                    yield converted

    async def outputs(
        self, request: GenerationRequest, prompt: EngineInput, params: SamplingParams, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `generate`, with a prompt and parameters of vLLM's own app, and vLLM's outputs.

        Args:
            request: says what answers, and how urgent that is; its prompt and sampling are those of `prompt` and
                `params`.
            options: further arguments of vLLM's `generate`.
        """
        self._running()
        if request.task_set.is_base:
            async with aclosing(self._engine_outputs(request, None, prompt, params, **options)) as outputs:
                async for output in outputs:
                    yield output
            return
        async with (
            self._lora_request(self._set_key(request), request.priority) as lora_request,
            aclosing(self._engine_outputs(request, lora_request, prompt, params, **options)) as outputs,
        ):
            async for output in outputs:
                yield output

    async def _engine_outputs(
        self,
        request: GenerationRequest,
        lora_request: LoRARequest | None,
        prompt: EngineInput,
        params: SamplingParams,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        from loraf_serve.vllm.engine import convert

        engine = self._running()
        request_id = _new_request_id()  # the caller's ids may repeat
        finished = False
        self._request_ids.add(request_id)
        try:
            convert.require_room_for_prompt_logprobs(engine.vllm_config, request)
            generated = engine.generate(
                prompt, params, request_id, lora_request=lora_request, priority=request.priority, **options
            )
            async with aclosing(generated) as outputs:
                async for output in outputs:
                    finished = output.finished
                    reasons = {choice.finish_reason for choice in output.outputs}
                    if self._stopping and "abort" in reasons:
                        raise _stopped()
                    if "error" in reasons:
                        raise convert.failed_within_engine(request.sampling)
                    yield output
        except EngineDeadError as error:
            raise _dead() from error
        except EngineGenerateError as error:
            if engine.errored:
                raise _dead() from error
            raise
        except (VLLMClientError, ValueError) as error:
            raise convert.request_error(error) from None
        finally:
            self._request_ids.discard(request_id)
            if not finished:
                # vLLM aborts by itself, except while a request is still on its way into the engine.
                await asyncio.shield(engine.abort(request_id))

    async def check_health(self) -> None:
        if self._running().errored:
            raise _dead()

    async def stop(self) -> None:
        self._stopping = True
        engine, self._engine = self._engine, None
        if engine is None:
            return
        self._end_waiting(_stopped())
        if self._forms is not None:
            await self._forms.stop()
        deadline = asyncio.get_running_loop().time() + _STOP_SECONDS
        while self._request_ids and asyncio.get_running_loop().time() < deadline:
            await engine.abort(list(self._request_ids))
            await asyncio.sleep(_POLL_SECONDS)
        if engine.output_handler is not None:
            engine.output_handler.cancel()  # it would report the processes' exit as a failure
        await asyncio.to_thread(engine.shutdown, _EXIT_SECONDS)

    def _end_waiting(self, error: BackendUnavailable) -> None:
        """Ends requests that are not in the engine yet."""

    @property
    def engine(self) -> AsyncLLM:
        """The running engine. Raises BackendUnavailable."""
        return self._running()

    def _running(self) -> AsyncLLM:
        if self._engine is None or self._stopping:
            raise _stopped()
        return self._engine

    async def _call_workers(self, method: str, *args: object) -> list[Any]:
        """Calls a method of `RemoteCalls` in every worker. Returns each worker's result."""
        engine = self._running()
        call: asyncio.Future[list[Any]] = asyncio.ensure_future(engine.collective_rpc(method, args=args))
        try:
            # A call never returns if the engine dies during it.
            while not call.done() and not engine.errored:
                await asyncio.wait([call], timeout=_HEALTH_SECONDS)
            if call.done() and call.exception() is None:
                return call.result()
            if not engine.errored:  # a dying engine raises plain exceptions before it reports its death
                await asyncio.sleep(_HEALTH_SECONDS)
            if engine.errored:
                raise _dead() from (call.exception() if call.done() else None)
            return call.result()
        finally:
            call.cancel()


def _keep_ends_within(engine: AsyncLLM, vocab_size: int) -> frozenset[int]:
    """Removes end tokens beyond the vocabulary from what vLLM adds to every request: it would use them as indices.

    Returns:
        The end tokens that are left.
    """
    fields, renderer = engine.input_processor.generation_config_fields, engine.renderer
    named = ends_within(vocab_size, fields.get("eos_token_id"), "the generation config")
    main = ends_within(vocab_size, renderer.get_eos_token_id(), "the tokenizer")
    fields["eos_token_id"] = sorted(named) or None
    # Not by changing the tokenizer: a chat template may write the token.
    eos = next(iter(main), None)
    renderer.get_eos_token_id = lambda: eos  # type: ignore[method-assign]  # vLLM has no setting for it
    return named | main


def _stopped() -> BackendUnavailable:
    return BackendUnavailable("the engine is being stopped")


def _dead() -> BackendUnavailable:
    return BackendUnavailable("the engine has died")


def _new_request_id() -> str:
    return uuid.uuid4().hex
