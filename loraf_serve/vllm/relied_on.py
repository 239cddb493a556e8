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
    yield "an adapter's rank is one of a fixed list, and the engine's arguments have the names we set", _arguments


def broken() -> list[str]:
    """The statements that do not hold for the vLLM that is installed."""
    return [statement for statement, check in facts() if not _holds(check)]


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


def _arguments() -> bool:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks
    from vllm.engine.arg_utils import AsyncEngineArgs

    names = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    ours = {"model", "enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank", "worker_extension_cls"}
    ours |= {"use_tqdm_on_load", "disable_log_stats", "kv_cache_memory_bytes", "gpu_memory_utilization"}
    return ours <= names and all(isinstance(rank, int) for rank in get_args(MaxLoRARanks))
