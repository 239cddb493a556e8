"""The result of a check, as text for people and as JSON for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError, Problem
from loraf.units import size_text
from loraf_serve.addresses import address_of
from loraf_serve.check.memory import Plan
from loraf_serve.check.sizes import ModelSize
from loraf_serve.choose_backend import Decision
from loraf_serve.service.server_options import ServerOptions

if TYPE_CHECKING:
    from loraf_serve.adapters.registry import Registry
    from loraf_serve.backends.backend import ServedAdapter

# What only a start can tell.
NOT_CHECKED = (
    "that the backend computes what transformers computes (its self-check, and the proof for every layer)",
    "memory of the programs themselves, and of a step in the engine",
)
_WIDTH = 13


@dataclass(frozen=True)
class Result:
    """What a start would find.

    Attributes:
        model: as it was written.
        options, registry: None if the options were refused.
        size, decision, plan: None if a problem kept them from being known.
    """

    model: str
    problems: tuple[Problem, ...]
    options: ServerOptions | None = None
    registry: Registry | None = None
    size: ModelSize | None = None
    decision: Decision | None = None
    plan: Plan | None = None

    @property
    def fits(self) -> bool:
        return not self.problems

    def show(self, as_json: bool) -> int:
        """Prints the result: problems on standard error, or everything as JSON. Returns the exit status."""
        if as_json:
            print(self.to_json(), flush=True)
        else:
            print("\n".join([*self.lines(), "fits" if self.fits else "does not fit"]), flush=True)
            if self.problems:
                print(f"loraf-serve check: {ConfigError(self.problems)}", file=sys.stderr)
        return 0 if self.fits else 2

    def lines(self) -> list[str]:
        """The text, without the problems."""
        if self.registry is None or self.options is None:
            return []
        lines = []
        if self.size is not None:
            dtype = f", {_dtype(self.plan)}" if self.plan else ""
            length = f", up to {self.plan.max_model_len:,} tokens" if self.plan else ""
            lines.append(_line("model", f"{self.model}, {self.size.architecture}{dtype}{length}"))
        if self.decision is not None:
            lines.append(_line("backend", f"{self.decision.name}: {self.decision.reason}"))
            if self.decision.others:
                others = ", then ".join(self.decision.others)
                lines.append(_line("", f"if it turns out at start that it cannot serve: {others}"))
        for adapter in self.registry:
            rank, tasks = adapter.manifest.rank, ", ".join(adapter.tasks)
            lines.append(_line("adapter", f"{adapter.name}: rank {rank}, digest {adapter.digest[:12]}, tasks {tasks}"))
            for named in self.registry.sets_of(adapter).values():
                origin = "operator" if named.by_operator else "checkpoint"
                lines.append(_line("", f"named set {named.name} = {named.task_set} (from the {origin})"))
        if self.plan is not None:
            for place, free in self.plan.free.items():
                needed = size_text(self.plan.needed(place))
                lines.append(_line("memory", f"{needed} of {place}, {size_text(free)} free"))
                for use in self.plan.uses:
                    if use.place == place:
                        lines.append(_line("", f"{size_text(use.nbytes):>9}  {use.what} ({use.detail})"))
            lines.append(_line("", f"the KV cache has room for {self.plan.kv_tokens:,} tokens"))
        tls = "TLS" if self.options.tls_cert else "no TLS"
        tokens = "tokens" if self.options.token_file else "no tokens"
        lines.append(_line("listens on", f"{self.options.address}, {tls}, {tokens}"))
        if url := _url(self.options):
            pages = ", ".join(("its own page", *self.options.http_allowed_origin))
            lines.append(_line("", f"{url}, OpenAI's API, for programs and {pages}"))
        return lines + [_line("not checked", text) for text in NOT_CHECKED]

    def to_json(self) -> str:
        """One JSON object. Sizes are in bytes."""
        registry, options = self.registry, self.options
        content: dict[str, Any] = {
            "fits": self.fits,
            "problems": [asdict(problem) for problem in self.problems],
            "model": self.model,
            "address": options.address if options else None,
            "http": _url(options) if options else None,
            "tls": bool(options and options.tls_cert),
            "tokens": bool(options and options.token_file),
            "architecture": self.size.architecture if self.size else None,
            "backend": asdict(self.decision) if self.decision else None,
            "adapters": [] if registry is None else [_adapter(adapter, registry) for adapter in registry],
            "memory": None,
            "not_checked": NOT_CHECKED,
        }
        if self.plan is not None:
            content["memory"] = {
                "dtype": _dtype(self.plan),
                "max_model_len": self.plan.max_model_len,
                "kv_cache_tokens": self.plan.kv_tokens,
                "places": [
                    {"place": place, "free": free, "needed": self.plan.needed(place)}
                    for place, free in self.plan.free.items()
                ],
                "uses": [asdict(use) for use in self.plan.uses],
            }
        return json.dumps(content, ensure_ascii=False)


def _url(options: ServerOptions) -> str | None:
    """Of the HTTP door, if there is one."""
    if options.http_port is None:
        return None
    return f"{'https' if options.tls_cert else 'http'}://{address_of(options.http_host, options.http_port)}"


def _adapter(adapter: ServedAdapter, registry: Registry) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "digest": adapter.digest,
        "rank": adapter.manifest.rank,
        "tasks": adapter.tasks,
        "sets": {name: str(named.task_set) for name, named in registry.sets_of(adapter).items()},
    }


def _line(label: str, text: str) -> str:
    return f"{label:<{_WIDTH}}{text}"


def _dtype(plan: Plan) -> str:
    return str(plan.dtype).removeprefix("torch.")
