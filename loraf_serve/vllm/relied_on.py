"""What LoRAF relies on inside vLLM: statements in plain words, each with a check.

vLLM guarantees none of this. When a new release breaks a statement, `broken` names it, the server falls back to merged
weights, and a test fails with the statement instead of an engine failing with an obscure error.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

RELEASE = "0.32."

Check = Callable[[], bool]
Facts = dict[str, Check]  # statement about vLLM → whether it holds; a check that raises means that it does not

FACTS: Facts = {}  # for every backend
RESIDENT_FACTS: Facts = {}  # for the resident backend, in addition


def fact(facts: Facts, statement: str) -> Callable[[Check], Check]:
    """Adds a check to `facts`."""

    def register(check: Check) -> Check:
        facts[statement] = check
        return check

    return register


def broken(facts: Facts = FACTS) -> list[str]:
    """Returns the statements that do not hold for the installed vLLM."""
    return [statement for statement, check in facts.items() if not _holds(check)]


def _holds(check: Check) -> bool:
    try:
        return check()
    except Exception:  # whatever it is: a check that cannot run means that the statement does not hold
        return False


def parameters(function: Callable[..., object]) -> list[str]:
    """Returns the names of a function's parameters."""
    return list(inspect.signature(function).parameters)


@fact(FACTS, f"vLLM's release is {RELEASE}x, the one that loraf was written for")
def _release() -> bool:
    import vllm

    return vllm.__version__.startswith(RELEASE)


@fact(FACTS, "plugins are entry points of the group vllm.general_plugins, loaded in the engine core and in workers")
def _group() -> bool:
    from vllm import plugins
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    loaders = (EngineCore.__init__, WorkerWrapperBase.init_worker)
    same_name = plugins.DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    return same_name and all("load_general_plugins()" in inspect.getsource(loader) for loader in loaders)


@fact(FACTS, "the engine's arguments name an extension class, which each worker class inherits for remote calls")
def _extension() -> bool:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    # The order matters: the extension may import what the worker class has imported and patched.
    source = inspect.getsource(WorkerWrapperBase.init_worker)
    return 0 < source.index("parallel_config.worker_cls") < source.index("parallel_config.worker_extension_cls")


@fact(FACTS, "the model runner looks up LRUCacheWorkerLoRAManager in its own module when it loads a model")
def _manager_name() -> bool:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    return "LRUCacheWorkerLoRAManager" in LoRAModelRunnerMixin.load_lora_model.__code__.co_names


@fact(FACTS, "the worker's LoRA manager turns a request into a LoRAModel in _load_adapter(lora_request)")
def _load_adapter() -> bool:
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    called = LRUCacheWorkerLoRAManager.add_adapter.__code__.co_names
    return parameters(LRUCacheWorkerLoRAManager._load_adapter) == ["self", "lora_request"] and "_load_adapter" in called


@fact(FACTS, "the model manager wraps layers in _create_lora_modules, reading supported_lora_modules")
def _create_modules() -> bool:
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    create = LRUCacheLoRAModelManager._create_lora_modules
    used = "_manager_cls" in LRUCacheWorkerLoRAManager.create_lora_manager.__code__.co_names
    attributes = LRUCacheLoRAModelManager.__init__.__code__.co_names
    has = {"modules", "packed_modules", "supported_lora_modules"} <= set(attributes)
    return used and has and "supported_lora_modules" in create.__code__.co_names


@fact(FACTS, "a LoRAModel is an id, a rank and the weights of each module by vLLM's names")
def _lora_model() -> bool:
    from vllm.lora.lora_model import LoRAModel

    model = LoRAModel(7, 8, {})
    return (model.id, model.rank, model.loras) == (7, 8, {})


@fact(FACTS, "a module's weights are A (rank, d_in) and B (d_out, rank); scaling 1 leaves B as it is")
def _layer_weights() -> bool:
    import torch
    from vllm.lora.lora_weights import LoRALayerWeights

    a, b = torch.ones(2, 3), torch.ones(4, 2)
    weights = LoRALayerWeights("m", 2, lora_alpha=2, lora_a=a, lora_b=b, scaling=1.0).optimize()
    return weights.lora_a is a and weights.lora_b is b and weights.input_dim == 3 and weights.output_dim == 4


@fact(FACTS, "names of PEFT weights become vLLM's module names by parse_fine_tuned_lora_name")
def _names() -> bool:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    module = "model.layers.0.self_attn.q_proj"
    return parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", None) == (module, True)


@fact(FACTS, "the CPU platform names its LoRA products in get_punica_wrapper, called when a model is loaded")
def _punica() -> bool:
    from vllm.lora.punica_wrapper import punica_selector
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.platforms.cpu import CpuPlatform

    named = CpuPlatform.get_punica_wrapper().endswith("PunicaWrapperCPU")
    linear = parameters(PunicaWrapperCPU.add_lora_linear)[:7]
    expected = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"]
    return named and linear == expected and "get_punica_wrapper" in punica_selector.get_punica_wrapper.__code__.co_names


@fact(FACTS, "slot -1 in the products' token indices means no adapter")
def _base_rows() -> bool:
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.utils import convert_mapping

    mapping = LoRAMapping((0, 5, 0), (0, 5, 0), is_prefill=True)
    slots, *_ = convert_mapping(mapping, [None, 5], 2, 100, torch.device("cpu"))
    return slots.tolist() == [-1, 1, -1]


@fact(FACTS, "a LoRA request is a name, an id from 1 and a path")
def _request() -> bool:
    from vllm.lora.request import LoRARequest

    request = LoRARequest(lora_name="name", lora_int_id=1, lora_path="path")
    return (request.lora_name, request.lora_int_id, request.lora_path) == ("name", 1, "path")


@fact(FACTS, "the prefix cache's key holds the LoRA's name and path")
def _prefix_cache() -> bool:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

    def key(name: str, path: str) -> list[tuple[str, str, str]]:
        request: Any = SimpleNamespace(lora_request=LoRARequest(name, 1, path))
        return _gen_lora_extra_hash_keys(request)

    return len({str(key(name, path)) for name, path in (("a", "p"), ("b", "p"), ("a", "q"))}) == 3


@fact(FACTS, "the scheduler never runs more than max_loras adapters in one step")
def _max_loras() -> bool:
    from vllm.v1.core.sched.scheduler import Scheduler

    return "self.lora_config.max_loras" in inspect.getsource(Scheduler.schedule)


@fact(FACTS, "AsyncLLM generates, aborts by our request id, calls workers, and reports when its engine has died")
def _async_llm() -> bool:
    from vllm.v1.engine.async_llm import AsyncLLM

    generate = {"prompt", "sampling_params", "request_id", "lora_request"} <= set(parameters(AsyncLLM.generate))
    abort = parameters(AsyncLLM.abort)[1] == "request_id"
    call = {"method", "args"} <= set(parameters(AsyncLLM.collective_rpc))
    others = ("errored", "get_tokenizer", "from_vllm_config")
    handler = "output_handler" in AsyncLLM.__init__.__code__.co_names and "timeout" in parameters(AsyncLLM.shutdown)
    return generate and abort and call and handler and all(hasattr(AsyncLLM, name) for name in others)


@fact(FACTS, "end tokens come from the input processor's generation_config_fields and its renderer's get_eos_token_id")
def _end_tokens() -> bool:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    source = inspect.getsource(InputProcessor.process_inputs)
    added = source.partition("update_from_generation_config(")[2].split()[:2]
    shared = "InputProcessor(self.vllm_config, renderer)" in inspect.getsource(AsyncLLM.__init__)
    return shared and added == ["self.generation_config_fields,", "self.renderer.get_eos_token_id(),"]


@fact(FACTS, "add_request gives every answer a detokenizer in request_states, which decodes with stream.step alone")
def _detokenizer() -> bool:
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    added = inspect.getsource(OutputProcessor.add_request)
    keeps = "self.request_states[request_id] = req_state" in added and "detokenizer" in parameters(RequestState)
    source = inspect.getsource(FastIncrementalDetokenizer)
    steps = source.count("self.stream.step(self.tokenizer, next_token_id)")
    resets = source.count("self.stream = tokenizers.decoders.DecodeStream(")
    return keeps and (steps, resets, source.count("self.stream")) == (2, 2, 4)


@fact(FACTS, "text and log-probabilities of an answer come from two methods, and its queue passes an exception on")
def _answers() -> bool:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    process = inspect.getsource(OutputProcessor.process_outputs)
    called = "detokenizer.update(" in process and "logprobs_processor.update_from_output(" in process
    untold = "if self.tokenizer is None:" in inspect.getsource(LogprobsProcessor._update_sample_logprobs)
    raised = "raise output" in inspect.getsource(RequestOutputCollector.get)
    aborted = "raise EngineGenerateError() from e" in inspect.getsource(AsyncLLM.generate)
    return called and untold and raised and aborted


@fact(FACTS, "a request is aborted when its iterator is closed or its task is cancelled")
def _abort_on_close() -> bool:
    from vllm.v1.engine.async_llm import AsyncLLM

    source = inspect.getsource(AsyncLLM.generate)
    return "except (asyncio.CancelledError, GeneratorExit)" in source and "self.abort(" in source


@fact(FACTS, "a worker polls for the next call, with SpinCondition.wait(timeout_ms) between two polls")
def _waiting() -> bool:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

    method = getattr(SpinCondition.wait, "stock", SpinCondition.wait)  # a worker replaces it
    wait = inspect.getsource(method)
    read = inspect.getsource(MessageQueue.acquire_read)
    polls = "self.last_read + self.busy_loop_s" in wait and "while True:" in read
    return polls and "self._spin_condition.wait(" in read and parameters(method) == ["self", "timeout_ms"]


@fact(FACTS, "LoRA ranks come from a fixed list, and the engine's arguments have the names that loraf sets")
def _arguments() -> bool:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks
    from vllm.engine.arg_utils import AsyncEngineArgs

    names = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    ours = {"model", "enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank", "worker_extension_cls"}
    ours |= {"use_tqdm_on_load", "disable_log_stats", "kv_cache_memory_bytes", "gpu_memory_utilization"}
    return ours <= names and all(isinstance(rank, int) for rank in get_args(MaxLoRARanks))


@fact(
    FACTS,
    "an engine without log statistics gives them to stat_loggers; PrometheusStatLogger takes gauge_lora_info=None",
)
def _metrics() -> bool:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

    enabled = "self.log_stats = log_stats or has_custom_loggers" in inspect.getsource(AsyncLLM.__init__)
    given = {"stat_loggers", "disable_log_stats"} <= set(parameters(AsyncLLM.from_vllm_config))
    only = "isinstance(global_stat_logger, PrometheusStatLogger)" in inspect.getsource(StatLoggerManager.__init__)
    optional = "if self.gauge_lora_info is not None:" in inspect.getsource(PrometheusStatLogger.record)
    made = parameters(PrometheusStatLogger.__init__) == ["self", "vllm_config", "engine_indexes"]
    return enabled and given and only and optional and made


@fact(
    FACTS,
    "XGrammar's forms fill a mask and accept tokens by two methods, and a request whose tokens are not accepted fails "
    "alone; parameters of a subclass are taken, and their check of a form is a method of its own",
)
def _forms() -> bool:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    methods = parameters(XgrammarGrammar.fill_bitmask), parameters(XgrammarGrammar.accept_tokens)
    update = inspect.getsource(Scheduler.update_from_output)
    refused = update.partition("structured_output_manager.accept_tokens(")[2].partition("routed_experts")[0]
    checked = "self._validate_structured_outputs(" in inspect.getsource(SamplingParams.verify)
    alone = "RequestStatus.FINISHED_ERROR" in refused
    return methods == (["self", "bitmask", "idx"], ["self", "request_id", "tokens"]) and alone and checked


@fact(FACTS, "a linear LoRA layer's forward calls its apply, which adds LoRA with punica_wrapper")
def _layer_apply() -> bool:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA as Layer
    from vllm.lora.utils import _all_lora_classes

    linear = [layer.forward for layer in _all_lora_classes if issubclass(layer, Layer)]
    adds = "self.punica_wrapper." in inspect.getsource(Layer)
    return adds and all("self.apply(" in inspect.getsource(forward) for forward in linear)


@fact(FACTS, "every step calls set_active_adapters; do_not_compile and valid_modes make it run layers in Python")
def _steps() -> bool:
    from vllm.compilation import decorators
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    begins = "set_active_adapters(" in inspect.getsource(LoRAModelRunnerMixin._set_active_loras)
    skipped = "if self.do_not_compile or " in inspect.getsource(decorators)
    return begins and skipped and "valid_modes" in parameters(CudagraphDispatcher.dispatch)


@fact(RESIDENT_FACTS, "the model manager makes its layers with from_layer, looked up in its own module")
def _from_layer() -> bool:
    from vllm.lora import model_manager

    create = model_manager.LoRAModelManager._create_lora_modules
    arguments = ["layer", "max_loras", "lora_config", "packed_modules_list", "model_config"]
    return "from_layer" in create.__code__.co_names and parameters(vars(model_manager)["from_layer"]) == arguments


@fact(RESIDENT_FACTS, "a linear LoRA layer adds its delta in _apply_lora_to_output(x, output), after the base product")
def _apply() -> bool:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA as Layer

    sync, base = inspect.getsource(Layer._apply_sync), inspect.getsource(Layer._apply_base_forward)
    called = all("return self._apply_lora_to_output(x, " in source for source in (sync, base))
    first = sync.index(".apply(self.base_layer, x, bias)") < sync.index("_apply_lora_to_output")
    return called and first and parameters(Layer._apply_lora_to_output) == ["self", "x", "output"]


@fact(RESIDENT_FACTS, "a LoRA layer allocates in create_lora_weights and is emptied by reset_lora")
def _allocation() -> bool:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.utils import _all_lora_classes

    linear = [layer for layer in _all_lora_classes if issubclass(layer, BaseLinearLayerWithLoRA)]
    expected = ["self", "max_loras", "lora_config", "model_config"]
    create = all(parameters(layer.create_lora_weights) == expected for layer in linear)
    return len(linear) > 4 and create and all(parameters(layer.reset_lora) == ["self", "index"] for layer in linear)


@fact(
    RESIDENT_FACTS,
    "_init_punica_wrapper fills punica_wrapper_mapping, and layers keep the wrapper passed to set_mapping",
)
def _wrapper() -> bool:
    from vllm.lora import model_manager
    from vllm.lora.layers import BaseLayerWithLoRA

    begin = inspect.getsource(model_manager.LoRAModelManager.__init__)
    order = 0 < begin.index("_init_punica_wrapper(") < begin.index("_create_lora_modules()")
    fills = "self.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY]"
    filled = fills in inspect.getsource(model_manager.LoRAModelManager._init_punica_wrapper)
    return order and filled and "self.punica_wrapper" in inspect.getsource(BaseLayerWithLoRA.set_mapping)


@fact(RESIDENT_FACTS, "before a step with a new mapping, update_metadata gets a LoRA id for each token")
def _mapping() -> bool:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.model_manager import LoRAModelManager

    mapping = LoRAMapping((0, 7, 7), (0, 7), is_prefill=True)
    refreshed = inspect.getsource(LoRAModelManager.set_adapter_mapping)
    passed = "update_metadata(" in inspect.getsource(LoRAModelManager._set_adapter_mapping)
    return mapping.index_mapping == (0, 7, 7) and "self._last_mapping != mapping" in refreshed and passed


@fact(RESIDENT_FACTS, "activate_adapter gives an id a slot in lora_index_to_id and the LRU of active adapters")
def _activation() -> bool:
    from vllm.lora.model_manager import LRUCacheLoRAModelManager

    attributes = {"_active_adapters", "_registered_adapters", "lora_index_to_id"}
    used = set(LRUCacheLoRAModelManager.__init__.__code__.co_names)
    freed = "self.lora_index_to_id[index] = None" in inspect.getsource(LRUCacheLoRAModelManager._deactivate_adapter)
    called = parameters(LRUCacheLoRAModelManager.activate_adapter) == ["self", "lora_id"]
    return attributes <= used and freed and called


@fact(RESIDENT_FACTS, "slice_lora_a keeps columns and slice_lora_b keeps rows; fused layers take lists of them")
def _slicing() -> bool:
    import torch
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA, RowParallelLinearWithLoRA

    rows, columns = torch.arange(8).unsqueeze(1), torch.arange(8).unsqueeze(0)
    row: Any = SimpleNamespace(input_size=4, tp_rank=1)
    kept = RowParallelLinearWithLoRA.slice_lora_a(row, columns).tolist() == [[4, 5, 6, 7]]
    whole = RowParallelLinearWithLoRA.slice_lora_b(row, rows) is rows
    merged: Any = SimpleNamespace(n_slices=2, output_ids=(1, 1), output_slices=(4, 2))
    parts = MergedColumnParallelLinearWithLoRA.slice_lora_b(merged, [rows, rows[:4]])
    return kept and whole and [part.flatten().tolist() for part in parts if part is not None] == [[4, 5, 6, 7], [2, 3]]


@fact(RESIDENT_FACTS, "on the CPU check_and_update_config switches torch.compile off if LoRA is configured")
def _compile_off() -> bool:
    from vllm.platforms.cpu import CpuPlatform

    method = CpuPlatform.check_and_update_config
    # Where a resident engine was started, `keep_compile` has replaced the method.
    source = inspect.getsource(getattr(method, "stock", method))
    after = source.partition("vllm_config.lora_config is not None")[2]
    return after.split()[:4] == [":", "compilation_config.mode", "=", "CompilationMode.NONE"]
