"""Checks everything that a start would, as far as that is possible without one."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraf.errors import ConfigError, LorafError, Problem
from loraf_serve import choose_backend
from loraf_serve.adapters.checkpoint_folder import read_values
from loraf_serve.adapters.registry import Registry
from loraf_serve.addresses import address_of, is_socket
from loraf_serve.backends.backend import ServedAdapter
from loraf_serve.check import http, memory, sizes
from loraf_serve.check.memory import Plan
from loraf_serve.check.report import Result
from loraf_serve.service.server_options import ServerOptions


@dataclass(frozen=True)
class Start:
    """What a start would begin with. The options have been checked one by one.

    Attributes:
        model: `--model`, as it was written.
        backend: `--backend`.
    """

    model: str
    model_folder: Path
    backend: str
    engine_options: Sequence[str]
    registry: Registry
    options: ServerOptions


def check(start: Start) -> Result:
    """Checks a start. Reads every byte of the adapters; of the model only configs and headers."""
    options = start.options
    problems = [*_address_problems(options), *_damage(start.registry)]
    decision, size, plan = None, None, None
    try:
        size = sizes.model_size(start.model_folder)
        decision = choose_backend.decide(start.backend, start.model_folder, start.engine_options)
        plan = _plan(start, decision, size)
    except LorafError as error:
        problems += error.problems
    if options.http_port is not None:
        problems += http.problems(options, decision.name if decision else "")
    if plan is not None:
        problems += plan.problems()
        over = memory.adapter_memory_problem(plan, options.adapter_memory)
        problems += [over] if over else []
    return Result(start.model, tuple(problems), options, start.registry, size, decision, plan)


def refused(error: ConfigError, model: str) -> Result:
    """The result if options were refused before anything else could be checked."""
    return Result(model, error.problems)


def _plan(start: Start, decision: choose_backend.Decision, size: sizes.ModelSize) -> Plan:
    """Raises ConfigError if the backend refuses an option or the model."""
    # Names of the same content share it.
    manifests = {a.name: a.manifest for a in reversed({a.digest: a for a in reversed(list(start.registry))}.values())}
    if decision.name == "merged":
        dtype, length = choose_backend.merged_options(
            start.engine_options, decision.reason, choose_backend.MERGED_REMEDY
        )
        return memory.merged_plan(start.model_folder, size, manifests, dtype, length)
    from loraf_serve.vllm.engine.plan import plan

    max_rank = max((manifest.rank for manifest in manifests.values()), default=1)
    engine = plan(decision.name, start.model_folder, start.engine_options, max_rank, start.options.adapter_memory)
    return memory.vllm_plan(engine, size, manifests)


def _damage(registry: Registry) -> list[Problem]:
    """Everything that is damaged in any adapter. Holds the values of one adapter at a time."""
    problems = []
    read: set[tuple[Path, str]] = set()
    for adapter in registry:
        if (adapter.path, adapter.digest) not in read:
            read.add((adapter.path, adapter.digest))
            problems += _damage_of(adapter)
    return problems


def _damage_of(adapter: ServedAdapter) -> list[Problem]:
    try:
        read_values(adapter)
    except LorafError as error:
        return list(error.problems)
    return []


def _address_problems(options: ServerOptions) -> list[Problem]:
    """The problem of each address on which nothing can listen now."""
    addresses = [(options.host, options.port, "--host, --port")]
    if options.metrics_port is not None:
        addresses.append((options.http_host, options.metrics_port, "--host, --metrics-port"))
    if options.http_port is not None:
        addresses.append((options.http_host, options.http_port, "--host, --http-port"))
    problems = []
    for host, port, field in addresses:
        if not _is_free(host, port):
            remedy = "choose another address (port 0 takes a free one), or stop the program that listens there"
            problems.append(Problem(f"cannot listen on {address_of(host, port)}", field, remedy=remedy))
    return problems


def _is_free(host: str, port: int) -> bool:
    if is_socket(host):
        folder = os.path.dirname(host.removeprefix("unix:").removeprefix("//")) or "."
        return host.startswith("unix-abstract:") or os.access(folder, os.W_OK)
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
                tried.listen()
                return True
    return False
