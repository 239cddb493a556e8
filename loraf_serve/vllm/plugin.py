"""Entry point of `vllm.general_plugins`: vLLM calls `register` in each of its processes.

In processes of an engine that loraf-serve started (the variable ENGINE_OWNER says so) it does what no option of vLLM
does:

- The process leaves the terminal's process group, but not its session. Ctrl-C, and SIGTERM to the whole group, then
  reach the service alone, which drains its requests and stops the engine; vLLM's engine core would abort every request
  at once.
- torch.compile stays on in a resident engine.
- The engine core stops when the service has died without stopping it.

The LoRA manager itself comes with the worker extension, see `loraf_serve.vllm.slots.extension`.

In every other process it lets a stock `vllm serve --enable-lora` serve task sets, see `loraf_serve.vllm.stock.install`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from loraf_serve.vllm.naming import ENGINE_OWNER
from loraf_serve.vllm.resident.compiling import KEEP, keep_compile
from loraf_serve.vllm.stock import install

_GRACE_SECONDS = 20.0


def register() -> None:
    """Harmless in every process that neither belongs to an engine of ours nor names a LoRAF checkpoint."""
    owner = os.environ.get(ENGINE_OWNER)
    if owner is None:
        install.install()
        return
    parent = multiprocessing.parent_process()
    if parent is None or owner == str(os.getpid()):
        return
    if os.getpgrp() != os.getpid():
        # Not a session: Linux shares processors out between sessions first (autogroups). vLLM's processes wait for each
        # other in loops that yield, and a yield gives way only within one's own session.
        os.setpgid(0, 0)
    if os.environ.get(KEEP):
        keep_compile()
    if owner == str(parent.pid):
        threading.Thread(target=_stop_with, args=(parent,), name="loraf-watch-service", daemon=True).start()


def _stop_with(parent: BaseProcess) -> None:
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)  # for the engine to end its workers
    os._exit(1)
