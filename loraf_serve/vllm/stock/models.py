"""The models of a stock `vllm serve`, including task sets.

    --lora-modules NAME=PATH, /v1/load_lora_adapter ─▶ load_lora_adapter ─┐
    a request for a model that is not known yet     ─▶ resolve_lora ──────┴─▶ LoRARequest("loraf:<digest>:<set>")

Every failure happens, as an ordinary error response, before the engine learns of a set: the manifest is checked here,
then each worker's loading threads read and verify the task files, once, and keep them in memory.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.exceptions import VLLMNotFoundError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from loraf.errors import ConfigError, LorafError, Problem, UnknownTask
from loraf.tasksets import TaskSet
from loraf_serve.vllm import relied_on
from loraf_serve.vllm.naming import STOCK_EXTENSION, UNSUPPORTED_SPLITS, lora_path, option
from loraf_serve.vllm.stock.checkpoints import (
    EVERY_TASK,
    NamedCheckpoint,
    StockCheckpoints,
    for_vllm_serve,
    read_set,
    split_path,
)
from loraf_serve.vllm.worker import remote

logger = init_logger(f"vllm.{__name__}")  # a child of `vllm`, whose handlers print

_REMEDY = "start a server without that option, or use loraf-serve"


class TaskSetModels(OpenAIServingModels):
    """vLLM's models, and task sets of LoRAF checkpoints by name.

    A name stands for one content during the server's life, and a content has one id. vLLM compares LoRA requests by
    name and keeps weights by id, so a second meaning of either would give wrong answers or end the engine.
    """

    def __init__(self, engine_client: EngineClient, *args: Any, **kwargs: Any):
        super().__init__(engine_client, *args, **kwargs)
        config = engine_client.vllm_config
        rank = config.lora_config.max_lora_rank if config.lora_config else 0
        self._checkpoints = StockCheckpoints(config.model_config.model, config.model_config.revision, rank)
        self._loading = asyncio.Lock()
        self._loaded: set[str] = set()  # digests of the checkpoints in the workers
        self._ids: dict[str, int] = {}  # LoRA path → id
        self._paths: dict[str, str] = {}  # name → LoRA path, "" for one of vLLM's own adapters
        self._whole: dict[str, NamedCheckpoint] = {}  # names that stand for a whole checkpoint

    async def load_lora_adapter(
        self, request: LoadLoRAAdapterRequest, base_model_name: str | None = None
    ) -> ErrorResponse | str:
        name, path = request.lora_name, request.lora_path
        if not name or not path:
            return await super().load_lora_adapter(request, base_model_name)
        try:
            checkpoint_and_set = split_path(path)
            if checkpoint_and_set is None:
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
            if isinstance(resolved, LoRARequest):
                self._paths.setdefault(lora_name, "")
            elif at and whole and resolved.error.code == HTTPStatus.NOT_FOUND:
                remedy = f"choose from: {', '.join(whole)}"
                raise VLLMNotFoundError(str(Problem(f"there is no checkpoint {name!r}", "model", remedy=remedy)))
            return resolved
        try:
            return await self._resolve(lora_name, whole[name], text)
        except UnknownTask as error:
            raise VLLMNotFoundError(f"model {lora_name!r}: {error}") from None
        except LorafError as error:
            return _error_response(error, f"model {lora_name!r}: ")

    async def _resolve(self, name: str, checkpoint: NamedCheckpoint, text: str) -> LoRARequest:
        task_set = read_set(text, checkpoint.manifest)
        await asyncio.to_thread(checkpoint.require_unchanged)
        return await self._serve(name, lora_path(checkpoint.digest, str(task_set)), None)

    async def _add(self, name: str, checkpoint_path: str, text: str, base_model_name: str | None) -> None:
        """Loads a checkpoint and serves one of its task sets as a model."""
        checkpoint, task_set = await self._load(checkpoint_path, text)
        await self._serve(name, lora_path(checkpoint.digest, str(task_set)), base_model_name)
        if text == EVERY_TASK:
            self._whole[name] = checkpoint

    async def _serve(self, name: str, path: str, base_model_name: str | None) -> LoRARequest:
        """Serves a task set of a loaded checkpoint as a model."""
        self._require_free(name, path)
        if path not in self._ids:
            self._ids[path] = self.lora_id_counter.inc(1)
        request = LoRARequest(lora_name=name, lora_int_id=self._ids[path], lora_path=path)
        if base_model_name is not None and self.is_base_model(base_model_name):
            request.base_model_name = base_model_name
        await self.engine_client.add_lora(request)
        self._paths[name] = path
        self.lora_requests[name] = request
        logger.info("Model '%s' is LoRAF task set '%s'", name, path)
        return request

    def _require_free(self, name: str, path: str) -> None:
        """
        Raises:
            ConfigError: the name stands for something else.
        """
        known = self._paths.get(name, path)
        if known != path:
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
            task_set = read_set(text, checkpoint.manifest)
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
        try:
            await remote.load(call, str(checkpoint.folder), checkpoint.tasks, checkpoint.digest)
        except LorafError:
            await call("loraf_drop", checkpoint.digest, [])
            raise

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
        elif parallel.worker_extension_cls != STOCK_EXTENSION:
            message = "LoRAF brings its own worker extension"
            problems.append(Problem(message, "--worker-extension-cls", remedy=_REMEDY))
        for name in UNSUPPORTED_SPLITS:
            if getattr(parallel, name) != 1:
                message = "LoRAF does not support a model that is split this way"
                problems.append(Problem(message, option(name), remedy=_REMEDY))
        for statement in relied_on.broken(relied_on.STOCK_FACTS):
            problems.append(Problem(f"no longer true of the installed vLLM: {statement}", remedy="use loraf-serve"))
        if problems:
            raise ConfigError(problems)


def _error_response(error: LorafError, prefix: str) -> ErrorResponse:
    if isinstance(error, UnknownTask):
        return create_error_response(prefix + str(error), "NotFoundError", HTTPStatus.NOT_FOUND, "model")
    return create_error_response(prefix + str(error), "BadRequestError", HTTPStatus.BAD_REQUEST, "model")
