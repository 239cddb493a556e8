"""Names that the service and vLLM's processes share: task sets, worker extensions, environment variables.

Name and path of a LoRA request are the same text, `loraf:<adapter digest>:<canonical task set>`. vLLM keys its prefix
cache by both, so no cache can mix two versions of a checkpoint or two sets. The path is no file: the worker builds the
set from the checkpoint that it keeps in memory under that digest.
"""

from __future__ import annotations

SCHEME = "loraf"

# Worker extensions (`--worker-extension-cls`), which vLLM imports by name in its workers.
SLOTS_EXTENSION = "loraf_serve.vllm.slots.extension.WorkerExtension"
RESIDENT_EXTENSION = "loraf_serve.vllm.resident.extension.WorkerExtension"
STOCK_EXTENSION = "loraf_serve.vllm.stock.worker.WorkerExtension"

ENGINE_OWNER = "LORAF_ENGINE_OWNER"  # environment variable: process id of the service that started the engine


def lora_path(digest: str, task_set: str) -> str:
    """Args: the adapter digest in hex, and `str(TaskSet)`."""
    return f"{SCHEME}:{digest}:{task_set}"


def parse_lora_path(path: str) -> tuple[str, str] | None:
    """(adapter digest, task set), or None for a path that is not LoRAF's."""
    scheme, _, rest = path.partition(":")
    digest, colon, task_set = rest.partition(":")
    return (digest, task_set) if scheme == SCHEME and colon else None
