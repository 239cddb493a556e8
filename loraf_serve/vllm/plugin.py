"""Entry point of `vllm.general_plugins`: vLLM calls `register` in each of its processes.

In processes of an engine that loraf-serve started (ENGINE_OWNER is set) it does what no option of vLLM can:

- The process leaves the terminal's process group, but not its session. Then Ctrl-C and SIGTERM to the whole group
  reach only the service, which drains its requests and stops the engine. vLLM's engine core would abort every request
  at once.
- torch.compile stays on in a resident engine.
- A form of an answer that takes too much time ends its own request.
- The errors that vLLM logs reach the service, for its message.
- The engine core stops if the service dies without stopping it.

The LoRA manager comes with the worker extension, see `loraf_serve.vllm.worker.extension`.

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

from loraf_serve.vllm.forms import budget
from loraf_serve.vllm.naming import ENGINE_OWNER
from loraf_serve.vllm.resident.compiling import KEEP, keep_compile
from loraf_serve.vllm.stock import install
from loraf_serve.vllm.worker.faults import FAULTS, record

_GRACE_SECONDS = 20.0


def register() -> None:
    """Does nothing in processes of other engines and of servers without LoRA."""
    owner = os.environ.get(ENGINE_OWNER)
    if owner is None:
        if os.environ.get(KEEP):  # processes of a stock server with resident workers
            keep_compile()
        install.install()
        return
    parent = multiprocessing.parent_process()
    if parent is None or owner == str(os.getpid()):
        return
    if os.getpgrp() != os.getpid():
        # Not a new session: Linux divides processors between sessions first (autogroups). vLLM's processes wait for
        # each other in loops that yield, and a yield only gives way to processes of the same session.
        os.setpgid(0, 0)
    if os.environ.get(FAULTS):
        record(os.environ[FAULTS])
    if os.environ.get(KEEP):
        keep_compile()
    if owner == str(parent.pid):
        budget.install()
        threading.Thread(target=_exit_after, args=(parent,), name="loraf-watch-service", daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)  # lets the engine end its workers
    os._exit(1)
