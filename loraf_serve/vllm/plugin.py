"""Entry point of `vllm.general_plugins`: vLLM calls `register` in each of its processes.

It acts only in processes of an engine that the slots backend started (the variable ENGINE_OWNER says so), and there it
does what no option of vLLM does:

- The process leaves the terminal's process group. Ctrl-C, and SIGTERM to the whole group, then reach the service alone,
  which drains its requests and stops the engine; vLLM's engine core would abort every request at once.
- The engine core stops when the service has died without stopping it.

The LoRA manager itself comes with the worker extension, see `loraf_serve.vllm.extension`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

ENGINE_OWNER = "LORAF_ENGINE_OWNER"  # process id of the service
_GRACE_SECONDS = 20.0


def register() -> None:
    """Harmless in every process that does not belong to a LoRAF engine."""
    owner = os.environ.get(ENGINE_OWNER)
    parent = multiprocessing.parent_process()
    if owner is None or parent is None or owner == str(os.getpid()):
        return
    if os.getpgrp() != os.getpid():
        os.setsid()
    if owner == str(parent.pid):
        threading.Thread(target=_stop_with, args=(parent,), name="loraf-watch-service", daemon=True).start()


def _stop_with(parent: BaseProcess) -> None:
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)  # for the engine to end its workers
    os._exit(1)
