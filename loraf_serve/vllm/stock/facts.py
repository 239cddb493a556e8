"""What serving from a stock `vllm serve` relies on inside vLLM, in addition to `relied_on.FACTS`."""

from __future__ import annotations

import inspect

from loraf_serve.vllm.relied_on import Facts, fact, parameters

FACTS: Facts = {}


@fact(FACTS, "vllm serve loads plugins, then creates its configuration with EngineArgs.create_engine_config")
def _configuration() -> bool:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.usage.usage_lib import UsageContext

    first = parameters(EngineArgs.create_engine_config)[:2] == ["self", "usage_context"]
    plugins = "load_general_plugins()" in inspect.getsource(EngineArgs.__post_init__)
    source = inspect.getsource(entry.build_async_engine_client_from_engine_args)
    called = "engine_args.create_engine_config(usage_context=usage_context)" in source
    return first and plugins and called and hasattr(UsageContext, "OPENAI_API_SERVER")


@fact(FACTS, "an OpenAI server's models are an OpenAIServingModels, looked up in app_state when the server starts")
def _models() -> bool:
    from vllm.entrypoints.launchers.api_server import app_state
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    used = "OpenAIServingModels" in app_state.init_app_state.__code__.co_names
    # Read from the module's dictionary, because it may be loraf's subclass by now.
    replaceable = issubclass(vars(app_state)["OpenAIServingModels"], OpenAIServingModels)
    return used and replaceable and parameters(OpenAIServingModels.__init__)[1] == "engine_client"


@fact(FACTS, "every LoRA model is added by load_lora_adapter and kept by name in lora_requests")
def _loading() -> bool:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    load = parameters(OpenAIServingModels.load_lora_adapter) == ["self", "request", "base_model_name"]
    static = "self.load_lora_adapter(" in inspect.getsource(OpenAIServingModels.init_static_loras)
    kept = {"lora_requests", "lora_id_counter", "lora_resolver_lock"}
    attributes = set(OpenAIServingModels.__init__.__code__.co_names)
    check = hasattr(OpenAIServingModels, "_check_load_lora_adapter_request")
    return load and static and kept <= attributes and check


@fact(FACTS, "unload_lora_adapter removes the name from lora_requests; resolve_lora makes a lock for every name")
def _unloading() -> bool:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.engine.async_llm import AsyncLLM

    unload = inspect.getsource(OpenAIServingModels.unload_lora_adapter)
    lock = "self.lora_resolver_lock[lora_name]" in inspect.getsource(OpenAIServingModels.resolve_lora)
    running = "self.output_processor" in inspect.getsource(AsyncLLM.__init__)
    return "del self.lora_requests[lora_name]" in unload and lock and running


@fact(FACTS, "resolve_lora is called for an unknown model name; a VLLMNotFoundError from it becomes a 404")
def _resolving() -> bool:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve import create_error_response
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.exceptions import VLLMNotFoundError

    check_model = inspect.getsource(BaseServing._check_model)
    resolve = parameters(OpenAIServingModels.resolve_lora) == ["self", "lora_name"]
    order = (
        0
        < check_model.index("self.models.lora_requests")
        < check_model.index("self.models.resolve_lora(request.model)")
    )
    return resolve and order and create_error_response(VLLMNotFoundError("text")).error.code == 404


@fact(FACTS, "PunicaWrapperCPU applies LoRA to linear layers with add_lora_linear, add_shrink and add_expand")
def _cpu_products() -> bool:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    names = set(PunicaWrapperCPU.add_lora_linear.__code__.co_names)
    return {"add_shrink", "add_expand"} <= names


@fact(FACTS, "vllm:lora_requests_info is gauge_lora_info of the stat_loggers in an AsyncLLM's logger_manager")
def _metrics() -> bool:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

    gauge = "if self.gauge_lora_info is not None:" in inspect.getsource(PrometheusStatLogger.record)
    kept = "stat_loggers" in StatLoggerManager.__init__.__code__.co_names
    return gauge and kept and "logger_manager" in AsyncLLM.__init__.__code__.co_names


@fact(FACTS, "EngineArgs has worker_extension_cls and fully_sharded_loras; ids of adapters come from an AtomicCounter")
def _choice() -> bool:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.counter import AtomicCounter

    fields = {"worker_extension_cls", "fully_sharded_loras", "pipeline_parallel_size", "data_parallel_size"}
    counter = AtomicCounter(0)
    return fields <= set(EngineArgs.__dataclass_fields__) and (counter.inc(5), counter.inc(1)) == (5, 6)
