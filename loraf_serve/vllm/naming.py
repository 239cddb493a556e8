"""Names that the service and vLLM's processes share: task sets, worker extensions, environment variables, options.

Name and path of a LoRA request are the same text, `loraf:<adapter digest>:<canonical task set>`. vLLM's prefix cache is
keyed by both, so it cannot mix two versions of a checkpoint or two task sets. The path is not a file: the worker builds
the set from the checkpoint that it holds in memory under that digest.
"""

from __future__ import annotations

SCHEME = "loraf"

# Worker extensions (`--worker-extension-cls`), which vLLM imports by name in its workers.
SLOTS_EXTENSION = "loraf_serve.vllm.slots.extension.WorkerExtension"
RESIDENT_EXTENSION = "loraf_serve.vllm.resident.extension.WorkerExtension"
STOCK_EXTENSION = "loraf_serve.vllm.stock.worker.WorkerExtension"

ENGINE_OWNER = "LORAF_ENGINE_OWNER"  # environment variable: process id of the service that started the engine

# vLLM's ways to split a model that LoRAF does not support, by their names in EngineArgs.
UNSUPPORTED_SPLITS = ("pipeline_parallel_size", "data_parallel_size")


def lora_path(digest: str, task_set: str) -> str:
    """Args: the adapter digest in hex, and `str(TaskSet)`."""
    return f"{SCHEME}:{digest}:{task_set}"


def parse_lora_path(path: str) -> tuple[str, str] | None:
    """Returns (adapter digest, task set), or None for a path that is not LoRAF's."""
    scheme, _, digest_and_set = path.partition(":")
    digest, colon, task_set = digest_and_set.partition(":")
    return (digest, task_set) if scheme == SCHEME and colon else None


def option(name: str) -> str:
    """Returns vLLM's command-line option for a name in EngineArgs."""
    return "--" + name.replace("_", "-")
