"""What LoRAF relies on inside vLLM, in plain words, each with a check.

vLLM promises none of this. When a new release changes something here, `broken` names it, the server falls back to
merged weights, and one test fails with these words instead of an engine failing with its own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace

RELEASE = "0.32."

Check = Callable[[], bool]


def facts() -> Iterator[tuple[str, Check]]:
    """(statement about vLLM, whether it holds). A check may also raise: then the statement does not hold."""
    yield f"vLLM's release is {RELEASE}x, the one whose insides were read", _release
    yield "plugins are entry points of the group vllm.general_plugins, loaded in the engine core and in workers", _group
    yield "a worker class takes an extension class, named in the engine's arguments, for remote calls", _extension
    yield "the model runner looks up LRUCacheWorkerLoRAManager in its own module when it loads a model", _manager_name
    yield "the worker's LoRA manager turns a request into a LoRAModel in _load_adapter(lora_request)", _load_adapter
    yield "the model manager wraps layers in _create_lora_modules, reading supported_lora_modules", _create_modules
    yield "a LoRAModel is an id, a rank and the weights of each module by vLLM's names", _lora_model
    yield "a module's weights are A (rank, d_in) and B (d_out, rank); scaling 1 leaves B as it is", _layer_weights
    yield "names of PEFT weights become vLLM's module names by parse_fine_tuned_lora_name", _names
    yield "the CPU platform names its LoRA products by get_punica_wrapper, looked up when a model is loaded", _punica
    yield "slot -1 in the products' token indices means «no adapter»", _base_rows
    yield "a LoRA request is a name, an id from 1 and a path", _request
    yield "the prefix cache's key holds the LoRA's name and path", _prefix_cache
    yield "the scheduler never runs more than max_loras adapters in one step", _max_loras
    yield "AsyncLLM generates, aborts by our request id, calls workers, says when its engine died", _async_llm
    yield "a request ends with CancelledError or a closed iterator by being aborted", _abort_on_close
    yield "a worker that waits for a call looks again and again, with SpinCondition.wait(timeout_ms) between", _waiting
    yield "an adapter's rank is one of a fixed list, and the engine's arguments have the names we set", _arguments


def resident_facts() -> Iterator[tuple[str, Check]]:
    """As `facts`: what the resident backend relies on besides."""
    yield "the model manager makes its layers with from_layer, looked up in its own module", _from_layer
    yield "a linear LoRA layer adds its delta in _apply_lora_to_output(x, output), after the base product", _apply
    yield "a LoRA layer allocates in create_lora_weights and is emptied by reset_lora", _allocation
    yield "the manager's _init_punica_wrapper fills punica_wrapper_mapping; layers keep what set_mapping gave", _wrapper
    yield "before a step update_metadata gets a mapping with a LoRA id for each token, if the mapping is new", _mapping
    yield "activate_adapter gives an id a slot in lora_index_to_id and the LRU of active adapters", _activation
    yield "slice_lora_a keeps columns and slice_lora_b rows; fused layers take lists of them", _slicing
    yield "on the CPU check_and_update_config switches torch.compile off where LoRA is configured", _compile_off


def stock_facts() -> Iterator[tuple[str, Check]]:
    """As `facts`: what serving from a stock `vllm serve` relies on besides."""
    yield "vllm serve loads plugins, then makes its configuration by EngineArgs.create_engine_config", _configuration
    yield "an OpenAI server's models are an OpenAIServingModels, looked up in app_state when the server starts", _models
    yield "models are named by load_lora_adapter, whatever asked for it, and kept by name in lora_requests", _loading
    yield "an unknown model name is asked of resolve_lora; the VLLMNotFoundError it raises becomes a 404", _resolving
    yield "PunicaWrapperCPU applies LoRA to linear layers by add_lora_linear, add_shrink and add_expand", _cpu_products


def broken(statements: Callable[[], Iterator[tuple[str, Check]]] = facts) -> list[str]:
    """The statements that do not hold for the vLLM that is installed."""
    return [statement for statement, check in statements() if not _holds(check)]


def _holds(check: Check) -> bool:
    try:
        return check()
    except Exception:  # any kind: that the check cannot even be made is the finding
        return False


def _parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def _release() -> bool:
    import vllm

    return vllm.__version__.startswith(RELEASE)


def _group() -> bool:
    from vllm import plugins
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    loaders = (EngineCore.__init__, WorkerWrapperBase.init_worker)
    named = plugins.DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    return named and all("load_general_plugins()" in inspect.getsource(loader) for loader in loaders)


def _extension() -> bool:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    # The order matters: the extension may import what the worker class has imported and patched.
    source = inspect.getsource(WorkerWrapperBase.init_worker)
    return 0 < source.index("parallel_config.worker_cls") < source.index("parallel_config.worker_extension_cls")


def _manager_name() -> bool:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    return "LRUCacheWorkerLoRAManager" in LoRAModelRunnerMixin.load_lora_model.__code__.co_names


def _load_adapter() -> bool:
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    called = LRUCacheWorkerLoRAManager.add_adapter.__code__.co_names
    return (
        _parameters(LRUCacheWorkerLoRAManager._load_adapter) == ["self", "lora_request"] and "_load_adapter" in called
    )


def _create_modules() -> bool:
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    create = LRUCacheLoRAModelManager._create_lora_modules
    used = "_manager_cls" in LRUCacheWorkerLoRAManager.create_lora_manager.__code__.co_names
    attributes = LRUCacheLoRAModelManager.__init__.__code__.co_names
    has = {"modules", "packed_modules", "supported_lora_modules"} <= set(attributes)
    return used and has and "supported_lora_modules" in create.__code__.co_names


def _lora_model() -> bool:
    from vllm.lora.lora_model import LoRAModel

    model = LoRAModel(7, 8, {})
    return (model.id, model.rank, model.loras) == (7, 8, {})


def _layer_weights() -> bool:
    import torch
    from vllm.lora.lora_weights import LoRALayerWeights

    a, b = torch.ones(2, 3), torch.ones(4, 2)
    weights = LoRALayerWeights("m", 2, lora_alpha=2, lora_a=a, lora_b=b, scaling=1.0).optimize()
    return weights.lora_a is a and weights.lora_b is b and weights.input_dim == 3 and weights.output_dim == 4


def _names() -> bool:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    module = "model.layers.0.self_attn.q_proj"
    return parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", None) == (module, True)


def _punica() -> bool:
    from vllm.lora.punica_wrapper import punica_selector
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.platforms.cpu import CpuPlatform

    named = CpuPlatform.get_punica_wrapper().endswith("PunicaWrapperCPU")
    linear = _parameters(PunicaWrapperCPU.add_lora_linear)[:7]
    expected = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"]
    return named and linear == expected and "get_punica_wrapper" in punica_selector.get_punica_wrapper.__code__.co_names


def _base_rows() -> bool:
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.utils import convert_mapping

    mapping = LoRAMapping((0, 5, 0), (0, 5, 0), is_prefill=True)
    slots, *_ = convert_mapping(mapping, [None, 5], 2, 100, torch.device("cpu"))
    return slots.tolist() == [-1, 1, -1]


def _request() -> bool:
    from vllm.lora.request import LoRARequest

    request = LoRARequest(lora_name="name", lora_int_id=1, lora_path="path")
    return (request.lora_name, request.lora_int_id, request.lora_path) == ("name", 1, "path")


def _prefix_cache() -> bool:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    def key(name: str, path: str) -> list:
        return _gen_lora_extra_hash_keys(SimpleNamespace(lora_request=LoRARequest(name, 1, path)))

    return len({str(key(*named)) for named in (("a", "p"), ("b", "p"), ("a", "q"))}) == 3


def _max_loras() -> bool:
    from vllm.v1.core.sched.scheduler import Scheduler

    return "self.lora_config.max_loras" in inspect.getsource(Scheduler.schedule)


def _async_llm() -> bool:
    from vllm.v1.engine.async_llm import AsyncLLM

    generate = {"prompt", "sampling_params", "request_id", "lora_request"} <= set(_parameters(AsyncLLM.generate))
    abort = _parameters(AsyncLLM.abort)[1] == "request_id"
    call = {"method", "args"} <= set(_parameters(AsyncLLM.collective_rpc))
    rest = ("errored", "get_tokenizer", "from_vllm_config")
    handler = "output_handler" in AsyncLLM.__init__.__code__.co_names and "timeout" in _parameters(AsyncLLM.shutdown)
    return generate and abort and call and handler and all(hasattr(AsyncLLM, name) for name in rest)


def _abort_on_close() -> bool:
    from vllm.v1.engine.async_llm import AsyncLLM

    source = inspect.getsource(AsyncLLM.generate)
    return "except (asyncio.CancelledError, GeneratorExit)" in source and "self.abort(" in source


def _waiting() -> bool:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

    wait = inspect.getsource(SpinCondition.wait)
    read = inspect.getsource(MessageQueue.acquire_read)
    looped = "self.last_read + self.busy_loop_s" in wait and "while True:" in read
    return looped and "self._spin_condition.wait(" in read and _parameters(SpinCondition.wait) == ["self", "timeout_ms"]


def _arguments() -> bool:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks
    from vllm.engine.arg_utils import AsyncEngineArgs

    names = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    ours = {"model", "enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank", "worker_extension_cls"}
    ours |= {"use_tqdm_on_load", "disable_log_stats", "kv_cache_memory_bytes", "gpu_memory_utilization"}
    return ours <= names and all(isinstance(rank, int) for rank in get_args(MaxLoRARanks))


def _configuration() -> bool:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.usage.usage_lib import UsageContext

    first = _parameters(EngineArgs.create_engine_config)[:2] == ["self", "usage_context"]
    plugins = "load_general_plugins()" in inspect.getsource(EngineArgs.__post_init__)
    made = inspect.getsource(entry.build_async_engine_client_from_engine_args)
    called = "engine_args.create_engine_config(usage_context=usage_context)" in made
    return first and plugins and called and hasattr(UsageContext, "OPENAI_API_SERVER")


def _models() -> bool:
    from vllm.entrypoints.launchers.api_server import app_state
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    used = "OpenAIServingModels" in app_state.init_app_state.__code__.co_names
    named = issubclass(app_state.OpenAIServingModels, OpenAIServingModels)  # maybe ours by now
    return used and named and _parameters(OpenAIServingModels.__init__)[1] == "engine_client"


def _loading() -> bool:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    load = _parameters(OpenAIServingModels.load_lora_adapter) == ["self", "request", "base_model_name"]
    static = "self.load_lora_adapter(" in inspect.getsource(OpenAIServingModels.init_static_loras)
    kept = {"lora_requests", "lora_id_counter", "lora_resolver_lock"}
    attributes = set(OpenAIServingModels.__init__.__code__.co_names)
    check = hasattr(OpenAIServingModels, "_check_load_lora_adapter_request")
    return load and static and kept <= attributes and check


def _resolving() -> bool:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve import create_error_response
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.exceptions import VLLMNotFoundError

    asked = inspect.getsource(BaseServing._check_model)
    resolve = _parameters(OpenAIServingModels.resolve_lora) == ["self", "lora_name"]
    order = 0 < asked.index("self.models.lora_requests") < asked.index("self.models.resolve_lora(request.model)")
    return resolve and order and create_error_response(VLLMNotFoundError("text")).error.code == 404


def _cpu_products() -> bool:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    names = set(PunicaWrapperCPU.add_lora_linear.__code__.co_names)
    return {"add_shrink", "add_expand"} <= names


def _from_layer() -> bool:
    from vllm.lora import model_manager

    create = model_manager.LoRAModelManager._create_lora_modules
    arguments = ["layer", "max_loras", "lora_config", "packed_modules_list", "model_config"]
    return "from_layer" in create.__code__.co_names and _parameters(model_manager.from_layer) == arguments


def _apply() -> bool:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA as Layer

    sync, base = inspect.getsource(Layer._apply_sync), inspect.getsource(Layer._apply_base_forward)
    called = all("return self._apply_lora_to_output(x, " in source for source in (sync, base))
    first = sync.index(".apply(self.base_layer, x, bias)") < sync.index("_apply_lora_to_output")
    return called and first and _parameters(Layer._apply_lora_to_output) == ["self", "x", "output"]


def _allocation() -> bool:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.utils import _all_lora_classes

    linear = [layer for layer in _all_lora_classes if issubclass(layer, BaseLinearLayerWithLoRA)]
    expected = ["self", "max_loras", "lora_config", "model_config"]
    made = all(_parameters(layer.create_lora_weights) == expected for layer in linear)
    return len(linear) > 4 and made and all(_parameters(layer.reset_lora) == ["self", "index"] for layer in linear)


def _wrapper() -> bool:
    from vllm.lora import model_manager
    from vllm.lora.layers import BaseLayerWithLoRA

    begin = inspect.getsource(model_manager.LoRAModelManager.__init__)
    order = 0 < begin.index("_init_punica_wrapper(") < begin.index("_create_lora_modules()")
    fills = "self.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY]"
    filled = fills in inspect.getsource(model_manager.LoRAModelManager._init_punica_wrapper)
    return order and filled and "self.punica_wrapper" in inspect.getsource(BaseLayerWithLoRA.set_mapping)


def _mapping() -> bool:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.model_manager import LoRAModelManager

    mapping = LoRAMapping((0, 7, 7), (0, 7), is_prefill=True)
    refreshed = inspect.getsource(LoRAModelManager.set_adapter_mapping)
    handed = "update_metadata(" in inspect.getsource(LoRAModelManager._set_adapter_mapping)
    return mapping.index_mapping == (0, 7, 7) and "self._last_mapping != mapping" in refreshed and handed


def _activation() -> bool:
    from vllm.lora.model_manager import LRUCacheLoRAModelManager

    attributes = {"_active_adapters", "_registered_adapters", "lora_index_to_id"}
    used = set(LRUCacheLoRAModelManager.__init__.__code__.co_names)
    freed = "self.lora_index_to_id[index] = None" in inspect.getsource(LRUCacheLoRAModelManager._deactivate_adapter)
    called = _parameters(LRUCacheLoRAModelManager.activate_adapter) == ["self", "lora_id"]
    return attributes <= used and freed and called


def _slicing() -> bool:
    import torch
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA, RowParallelLinearWithLoRA

    rows, columns = torch.arange(8).unsqueeze(1), torch.arange(8).unsqueeze(0)
    row = SimpleNamespace(input_size=4, tp_rank=1)
    kept = RowParallelLinearWithLoRA.slice_lora_a(row, columns).tolist() == [[4, 5, 6, 7]]
    whole = RowParallelLinearWithLoRA.slice_lora_b(row, rows) is rows
    merged = SimpleNamespace(n_slices=2, output_ids=(1, 1), output_slices=(4, 2))
    parts = MergedColumnParallelLinearWithLoRA.slice_lora_b(merged, [rows, rows[:4]])
    return kept and whole and [part.flatten().tolist() for part in parts] == [[4, 5, 6, 7], [2, 3]]


def _compile_off() -> bool:
    from vllm.platforms.cpu import CpuPlatform

    found = CpuPlatform.check_and_update_config
    source = inspect.getsource(getattr(found, "stock", found))  # ours by now, where a resident engine was started
    after = source.partition("vllm_config.lora_config is not None")[2]
    return after.split()[:4] == [":", "compilation_config.mode", "=", "CompilationMode.NONE"]
