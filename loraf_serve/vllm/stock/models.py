"""The models of a stock `vllm serve`, task sets among them.

    --lora-modules NAME=PATH, /v1/load_lora_adapter ─▶ load_lora_adapter ─┐
    a request for a model that is not known yet     ─▶ resolve_lora ──────┴─▶ LoRARequest("loraf:<digest>:<set>")

Everything that may fail has failed, as an ordinary answer, before the engine hears of a set: the checkpoint is verified
here, then in the workers' threads, which keep it in memory.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.exceptions import VLLMNotFoundError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from loraf.errors import ConfigError, LorafError, Problem, UnknownTask
from loraf_serve.vllm import relied_on
from loraf_serve.vllm.naming import STOCK_EXTENSION, lora_path
from loraf_serve.vllm.stock.checkpoints import (
    EVERY_TASK,
    Source,
    StockCheckpoints,
    in_these_words,
    read_set,
    split_path,
)
from loraf_serve.vllm.worker import remote
from loraf_serve.vllm.worker.store import raise_error

logger = init_logger(f"vllm.{__name__}")  # below `vllm`, whose handlers print

_ALONE = "start a server without that option, or use loraf-serve"


class TaskSetModels(OpenAIServingModels):
    """vLLM's models, and task sets of LoRAF checkpoints by name.

    A name means one content as long as the server lives, and a content has one id: vLLM compares LoRA requests by name
    and keeps weights by id, so that a second meaning of either would give wrong answers or end the engine.
    """

    def __init__(self, engine_client: EngineClient, *args, **kwargs):
        super().__init__(engine_client, *args, **kwargs)
        config = engine_client.vllm_config
        rank = config.lora_config.max_lora_rank if config.lora_config else 0
        self._checkpoints = StockCheckpoints(config.model_config.model, config.model_config.revision, rank)
        self._loading = asyncio.Lock()
        self._in_engine: set[str] = set()  # digests
        self._ids: dict[str, int] = {}  # path in the engine → id
        self._meanings: dict[str, str] = {}  # name → path in the engine, "" for an adapter of vLLM's own kind
        self._whole: dict[str, Source] = {}  # names that stand for a whole checkpoint

    async def load_lora_adapter(
        self, request: LoadLoRAAdapterRequest, base_model_name: str | None = None
    ) -> ErrorResponse | str:
        name, path = request.lora_name, request.lora_path
        if not name or not path:
            return await super().load_lora_adapter(request, base_model_name)
        try:
            named = split_path(path)
            if named is None:
                self._require_meaning(name, "")
                answer = await super().load_lora_adapter(request, base_model_name)
                if not isinstance(answer, ErrorResponse):
                    self._meanings[name] = ""
                return answer
            async with self.lora_resolver_lock[name]:
                refusal = await self._check_load_lora_adapter_request(request)
                if refusal is not None:
                    return refusal
                await self._name(name, *named, base_model_name)
        except LorafError as error:
            error = in_these_words(error, path)
            logger.error("%s=%s cannot be served: %s", name, path, error)  # vLLM takes paths out of its answers
            return _answer(error, f"{name}={path}: ")
        return f"Success: LoRA adapter '{name}' added successfully."

    async def resolve_lora(self, lora_name: str) -> LoRARequest | ErrorResponse:
        """Takes NAME@SET where NAME stands for a whole checkpoint; asks vLLM's resolvers for the rest.

        Raises:
            VLLMNotFoundError: there is no such checkpoint or task. (vLLM replaces the text of a 404 that is returned.)
        """
        name, at, text = lora_name.rpartition("@")
        whole = {known: source for known, source in self._whole.items() if known in self.lora_requests}
        if name not in whole:
            answer = await super().resolve_lora(lora_name)
            if isinstance(answer, LoRARequest):
                self._meanings.setdefault(lora_name, "")
            elif at and whole and answer.error.code == HTTPStatus.NOT_FOUND:
                remedy = f"choose from: {', '.join(whole)}"
                raise VLLMNotFoundError(str(Problem(f"there is no checkpoint {name!r}", "model", remedy=remedy)))
            return answer
        try:
            return await self._resolve(lora_name, whole[name], text)
        except UnknownTask as error:
            raise VLLMNotFoundError(f"model {lora_name!r}: {error}") from None
        except LorafError as error:
            return _answer(error, f"model {lora_name!r}: ")

    async def _resolve(self, name: str, source: Source, text: str) -> LoRARequest:
        task_set = read_set(text, source.manifest)
        await asyncio.to_thread(source.require_unchanged)
        return await self._serve(name, lora_path(source.digest, str(task_set)), None)

    async def _name(self, name: str, checkpoint: str, text: str, base_model_name: str | None) -> None:
        """Makes a checkpoint's set a model."""
        source = await self._load(checkpoint)
        task_set = read_set(text, source.manifest)
        await self._serve(name, lora_path(source.digest, str(task_set)), base_model_name)
        if text == EVERY_TASK:
            self._whole[name] = source

    async def _serve(self, name: str, path: str, base_model_name: str | None) -> LoRARequest:
        """Has the engine build a set of a checkpoint that it has, and makes it a model."""
        self._require_meaning(name, path)
        if path not in self._ids:
            self._ids[path] = self.lora_id_counter.inc(1)
        request = LoRARequest(lora_name=name, lora_int_id=self._ids[path], lora_path=path)
        if base_model_name is not None and self.is_base_model(base_model_name):
            request.base_model_name = base_model_name
        await self.engine_client.add_lora(request)
        self._meanings[name] = path
        self.lora_requests[name] = request
        logger.info("Model '%s' is LoRAF task set '%s'", name, path)
        return request

    def _require_meaning(self, name: str, path: str) -> None:
        """Raises ConfigError if the name has meant something else."""
        meant = self._meanings.get(name, path)
        if meant != path:
            message = f"{name!r} has meant {meant or 'another adapter'!r} since this server started"
            remedy = "choose another name, or start the server again"
            raise ConfigError(Problem(message, "lora_name", remedy=remedy))

    async def _load(self, checkpoint: str) -> Source:
        """Brings a checkpoint into the workers' memory unless it is there. Raises LorafError."""
        async with self._loading:
            await asyncio.to_thread(self._require_able)
            source = await asyncio.to_thread(self._checkpoints.read, checkpoint)
            if source.digest not in self._in_engine:
                await self._load_in_workers(source)
                self._in_engine.add(source.digest)
            self._checkpoints.keep(source)
            return source

    async def _load_in_workers(self, source: Source) -> None:
        async def call(method: str, *args: object) -> list:
            return await self.engine_client.collective_rpc(method, args=args)

        if not all(await call("loraf_layers")):
            message = "vLLM's workers did not take LoRAF's LoRA manager"
            raise ConfigError(Problem(message, remedy="serve it with loraf-serve"))
        states = await remote.load(call, str(source.folder), source.tasks, source.digest)
        try:
            for state in states:
                raise_error(state)
        except LorafError:
            await call("loraf_drop", source.digest, [])
            raise

    def _require_able(self) -> None:
        """Raises ConfigError: all reasons why this server can serve no LoRAF checkpoint."""
        config = self.engine_client.vllm_config
        parallel = config.parallel_config
        problems = []
        if config.lora_config is None:
            problems.append(Problem("LoRA is off", "--enable-lora", remedy="start the server with it"))
        elif parallel.worker_extension_cls != STOCK_EXTENSION:
            message = "LoRAF brings its own worker extension"
            problems.append(Problem(message, "--worker-extension-cls", remedy=_ALONE))
        for name in ("pipeline_parallel_size", "data_parallel_size"):
            if getattr(parallel, name) != 1:
                option = "--" + name.replace("_", "-")
                problems.append(Problem("LoRAF checkpoints cannot be served split this way", option, remedy=_ALONE))
        for statement in relied_on.broken(relied_on.stock_facts):
            problems.append(Problem(f"no longer true of the installed vLLM: {statement}", remedy="use loraf-serve"))
        if problems:
            raise ConfigError(problems)


def _answer(error: LorafError, before: str) -> ErrorResponse:
    if isinstance(error, UnknownTask):
        return create_error_response(before + str(error), "NotFoundError", HTTPStatus.NOT_FOUND, "model")
    return create_error_response(before + str(error), "BadRequestError", HTTPStatus.BAD_REQUEST, "model")
