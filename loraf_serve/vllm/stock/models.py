"""The models of a stock `vllm serve`, including task sets.

    --lora-modules NAME=PATH, /v1/load_lora_adapter ─▶ load_lora_adapter ─┐
    a request for a model that is not known yet     ─▶ resolve_lora ──────┴─▶ LoRARequest("loraf:<digest>:<set>")

Every failure happens, as an ordinary error response, before the engine learns of a set: the manifest is checked here,
then each worker's loading threads read and verify the task files, once, and keep them in memory.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.exceptions import VLLMNotFoundError
from vllm.inputs import tokens_input
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from loraf import set_text
from loraf.errors import ConfigError, LorafError, Problem, UnknownTask
from loraf.tasksets import TaskSet
from loraf_serve.vllm import relied_on
from loraf_serve.vllm.naming import RESIDENT_EXTENSION, STOCK_EXTENSION, UNSUPPORTED_SPLITS, lora_path, option
from loraf_serve.vllm.stock import choice, facts, metrics
from loraf_serve.vllm.stock.checkpoints import (
    EVERY_TASK,
    NamedCheckpoint,
    StockCheckpoints,
    for_vllm_serve,
    split_path,
)
from loraf_serve.vllm.worker import probe, remote

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = init_logger(f"vllm.{__name__}")  # a child of `vllm`, whose handlers print

MAX_RESOLVED = 1024  # names NAME@SET
MAX_IDS = 1 << 16
_REMEDY = "start a server without that option, or use loraf-serve"


class TaskSetModels(OpenAIServingModels):
    """vLLM's models, and task sets of LoRAF checkpoints by name.

    A name stands for one content during the server's life, and a content has one id. vLLM compares LoRA requests by
    name and keeps weights by id, so a second meaning of either would give wrong answers or end the engine.

    Names NAME@SET exist while NAME is loaded. Of those and of ids, the oldest are forgotten when there are many; a
    forgotten name is resolved again, to the same content.
    """

    def __init__(self, engine_client: EngineClient, *args: Any, **kwargs: Any):
        super().__init__(engine_client, *args, **kwargs)
        config = engine_client.vllm_config
        rank = config.lora_config.max_lora_rank if config.lora_config else 0
        self._checkpoints = StockCheckpoints(config.model_config.model, config.model_config.revision, rank)
        self._is_resident = config.parallel_config.worker_extension_cls == RESIDENT_EXTENSION
        if self._is_resident and config.lora_config:
            self.lora_id_counter.inc(config.lora_config.max_loras)  # lower ids belong to vLLM's warm-up
            metrics.drop_sets(engine_client)
        self._loading = asyncio.Lock()
        self._is_proven = False  # the workers have proven what they can about vLLM's layers
        self._loaded: set[str] = set()  # digests of the checkpoints in the workers
        self._ids: dict[str, int] = {}  # LoRA path → id, the oldest first
        self._paths: dict[str, str] = {}  # name that was loaded → LoRA path, "" for one of vLLM's own adapters
        self._whole: dict[str, NamedCheckpoint] = {}  # names that stand for a whole checkpoint, loaded or unloaded
        self._resolved: dict[str, None] = {}  # names NAME@SET in `lora_requests`, the oldest first

    async def load_lora_adapter(
        self, request: LoadLoRAAdapterRequest, base_model_name: str | None = None
    ) -> ErrorResponse | str:
        name, path = request.lora_name, request.lora_path
        if not name or not path:
            return await super().load_lora_adapter(request, base_model_name)
        try:
            checkpoint_and_set = split_path(path)
            if checkpoint_and_set is None:
                self._require_slots(path)
                self._require_free(name, "")
                response = await super().load_lora_adapter(request, base_model_name)
                if not isinstance(response, ErrorResponse):
                    self._paths[name] = ""
                return response
            async with self.lora_resolver_lock[name]:
                refusal = await self._check_load_lora_adapter_request(request)
                if refusal is not None:
                    return refusal
                await self._add(name, *checkpoint_and_set, base_model_name)
        except LorafError as error:
            reworded = for_vllm_serve(error, path)
            logger.error("%s=%s cannot be served: %s", name, path, reworded)  # vLLM removes paths from its responses
            return _error_response(reworded, f"{name}={path}: ")
        return f"Success: LoRA adapter '{name}' added successfully."

    async def resolve_lora(self, lora_name: str) -> LoRARequest | ErrorResponse:
        """Resolves NAME@SET if NAME stands for a whole checkpoint. Leaves other names to vLLM's resolvers.

        Raises:
            VLLMNotFoundError: there is no such checkpoint or task. (vLLM replaces the text of a 404 that is returned.)
        """
        name, at, text = lora_name.rpartition("@")
        whole = {known: checkpoint for known, checkpoint in self._whole.items() if known in self.lora_requests}
        if name not in whole:
            resolved = await super().resolve_lora(lora_name)
            self._drop_lock(lora_name)
            if isinstance(resolved, LoRARequest):
                self._paths.setdefault(lora_name, "")
            elif at and whole and resolved.error.code == HTTPStatus.NOT_FOUND:
                raise _no_checkpoint(name, whole)
            return resolved
        try:
            resolved = await self._resolve(lora_name, whole[name], text)
        except UnknownTask as error:
            raise VLLMNotFoundError(f"model {lora_name!r}: {error}") from None
        except LorafError as error:
            return _error_response(error, f"model {lora_name!r}: ")
        if name not in self.lora_requests:  # unloaded in the meantime
            self._forget([lora_name])
            raise _no_checkpoint(name, [other for other in whole if other in self.lora_requests])
        return resolved

    async def unload_lora_adapter(self, request: UnloadLoRAAdapterRequest) -> ErrorResponse | str:
        """Unloads a name. If it stands for a whole checkpoint, NAME@SET is no longer known either."""
        response = await super().unload_lora_adapter(request)
        self._drop_lock(request.lora_name)
        if not isinstance(response, ErrorResponse):
            self._forget([name for name in self._resolved if request.lora_name in (name, name.rpartition("@")[0])])
        return response

    async def _resolve(self, name: str, checkpoint: NamedCheckpoint, text: str) -> LoRARequest:
        task_set = set_text.task_set(text, checkpoint.manifest)
        await asyncio.to_thread(checkpoint.require_unchanged)
        request = await self._serve(name, lora_path(checkpoint.digest, str(task_set)), None)
        self._resolved[name] = None
        self._forget(list(self._resolved)[: max(0, len(self._resolved) - MAX_RESOLVED)])
        return request

    def _forget(self, names: Iterable[str]) -> None:
        """Removes names NAME@SET, which no longer answer unless they are resolved again."""
        for name in names:
            self._resolved.pop(name, None)
            self.lora_requests.pop(name, None)
            self._drop_lock(name)

    def _drop_lock(self, name: str) -> None:
        """Removes the lock of a name that is not served: vLLM keeps one for every name that was ever asked for."""
        if name not in self.lora_requests and not self.lora_resolver_lock[name].locked():
            del self.lora_resolver_lock[name]

    async def _add(self, name: str, checkpoint_path: str, text: str, base_model_name: str | None) -> None:
        """Loads a checkpoint and serves one of its task sets as a model."""
        checkpoint, task_set = await self._load(checkpoint_path, text)
        path = lora_path(checkpoint.digest, str(task_set))
        await self._serve(name, path, base_model_name)
        self._paths[name] = path
        self._resolved.pop(name, None)  # it stands on its own from now on
        if text == EVERY_TASK:
            self._whole[name] = checkpoint

    async def _serve(self, name: str, path: str, base_model_name: str | None) -> LoRARequest:
        """Serves a task set of a loaded checkpoint as a model."""
        self._require_free(name, path)
        if path not in self._ids:
            self._ids[path] = self.lora_id_counter.inc(1)
            self._forget_ids()
        request = LoRARequest(lora_name=name, lora_int_id=self._ids[path], lora_path=path)
        if base_model_name is not None and self.is_base_model(base_model_name):
            request.base_model_name = base_model_name
        await self.engine_client.add_lora(request)
        self.lora_requests[name] = request
        logger.info("Model '%s' is LoRAF task set '%s'", name, path)
        return request

    def _forget_ids(self) -> None:
        """Forgets the oldest ids when there are many, but none that a name or a running request has."""
        if len(self._ids) <= MAX_IDS:
            return
        processor = cast("AsyncLLM", self.engine_client).output_processor
        running = (state.lora_request for state in processor.request_states.values())
        used = {request.lora_path for request in (*self.lora_requests.values(), *running) if request is not None}
        for path in [path for path in self._ids if path not in used][: MAX_IDS // 4]:
            del self._ids[path]

    def _meaning(self, name: str) -> str | None:
        """The LoRA path that a name has stood for in this server, or may have; None if there is none."""
        if name in self._paths:
            return self._paths[name]
        whole, _, text = name.rpartition("@")
        checkpoint = self._whole.get(whole)
        if checkpoint is None:
            return None
        try:
            return lora_path(checkpoint.digest, str(set_text.task_set(text, checkpoint.manifest)))
        except LorafError:
            return None

    def _require_slots(self, path: str) -> None:
        """Raises ConfigError if the workers hold no adapters other than LoRAF's."""
        if self._is_resident:
            message = "is not a LoRAF checkpoint, and resident workers serve no other adapters"
            remedy = f"start the server without {choice.BACKEND}={choice.RESIDENT}"
            raise ConfigError(Problem(message, f"LoRA path {path!r}", remedy=remedy))

    def _require_free(self, name: str, path: str) -> None:
        """
        Raises:
            ConfigError: the name stands for something else.
        """
        known = self._meaning(name)
        if known not in (None, path):
            message = f"{name!r} already stands for {known or 'another adapter'!r} in this server"
            remedy = "choose another name, or restart the server"
            raise ConfigError(Problem(message, "lora_name", remedy=remedy))

    async def _load(self, path: str, text: str) -> tuple[NamedCheckpoint, TaskSet]:
        """Loads a checkpoint into the workers' memory unless it is loaded.

        Args:
            text: a set of its tasks, read before anything is loaded.

        This process reads task files only if the workers hold the same content from another folder.

        Raises:
            LorafError: it cannot be served.
        """
        async with self._loading:
            await asyncio.to_thread(self._require_supported)
            checkpoint = await asyncio.to_thread(self._checkpoints.check, path)
            task_set = set_text.task_set(text, checkpoint.manifest)
            if checkpoint.digest not in self._loaded:
                await self._load_in_workers(checkpoint)
                self._loaded.add(checkpoint.digest)
            elif not self._checkpoints.is_kept(checkpoint):
                await asyncio.to_thread(checkpoint.verify_contents)
            self._checkpoints.keep(checkpoint)
            return checkpoint, task_set

    async def _load_in_workers(self, checkpoint: NamedCheckpoint) -> None:
        async def call(method: str, *args: object) -> list[Any]:
            results: list[Any] = await self.engine_client.collective_rpc(method, args=args)
            return results

        if not all(await call("loraf_layers")):
            message = "vLLM's workers did not install LoRAF's LoRA manager"
            raise ConfigError(Problem(message, remedy="serve it with loraf-serve"))
        if not self._is_proven:
            length = self.engine_client.model_config.max_model_len
            await probe.prove_layers(call, self._generate, 0, length, probe.IN_SLICES)
            self._is_proven = True
        try:
            await remote.load(call, str(checkpoint.folder), checkpoint.tasks, checkpoint.digest)
        except LorafError:
            await call("loraf_drop", checkpoint.digest, [])
            raise

    def _generate(self, prompt: list[int], tokens: int) -> AsyncGenerator[object, None]:
        """Runs a request of the base model, of token ids."""
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        return self.engine_client.generate(tokens_input(prompt), params, f"loraf-{uuid.uuid4().hex}")

    def _require_supported(self) -> None:
        """
        Raises:
            ConfigError: lists every reason why this server cannot serve LoRAF checkpoints.
        """
        config = self.engine_client.vllm_config
        parallel = config.parallel_config
        problems = []
        if config.lora_config is None:
            problems.append(Problem("LoRA is not enabled", "--enable-lora", remedy="start the server with it"))
        elif parallel.worker_extension_cls not in (STOCK_EXTENSION, RESIDENT_EXTENSION):
            message = "LoRAF brings its own worker extension"
            problems.append(Problem(message, "--worker-extension-cls", remedy=_REMEDY))
        for name in UNSUPPORTED_SPLITS:
            if getattr(parallel, name) != 1:
                message = "LoRAF does not support a model that is split this way"
                problems.append(Problem(message, option(name), remedy=_REMEDY))
        for statement in relied_on.broken(facts.FACTS):
            problems.append(Problem(f"no longer true of the installed vLLM: {statement}", remedy="use loraf-serve"))
        if problems:
            raise ConfigError(problems)


def _no_checkpoint(name: str, others: Iterable[str]) -> VLLMNotFoundError:
    remedy = f"choose from: {', '.join(others) or 'none'}"
    return VLLMNotFoundError(str(Problem(f"there is no checkpoint {name!r}", "model", remedy=remedy)))


def _error_response(error: LorafError, prefix: str) -> ErrorResponse:
    if isinstance(error, UnknownTask):
        return create_error_response(prefix + str(error), "NotFoundError", HTTPStatus.NOT_FOUND, "model")
    return create_error_response(prefix + str(error), "BadRequestError", HTTPStatus.BAD_REQUEST, "model")
