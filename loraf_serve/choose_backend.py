"""Which backend serves, and why. vLLM and transformers are imported only by the backend that is chosen."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraf.errors import ConfigError, Problem
from loraf_serve.backends.backend import Backend
from loraf_serve.backends.fallback import Fallback

CHOICES = ("auto", "resident", "slots", "merged")
_SLOT_OPTIONS = ("--max-loras", "--max-cpu-loras", "--max-lora-rank")


@dataclass(frozen=True)
class Chosen:
    backend: Backend
    why: str


def choose(
    wanted: str,
    model_folder: Path,
    engine_options: Sequence[str],
    max_rank: int,
    say: Callable[[str], None],
    adapter_memory: int | None = None,
) -> Chosen:
    """The backend that `--backend` means, not started.

    Args:
        wanted: one of CHOICES; `auto` is resident where vLLM and this project can, else slots where vLLM can serve the
            model, else merged.
        engine_options: what of the command line is not `loraf-serve`'s own: vLLM's options.
        max_rank: the largest rank among the adapters.
        say: tells the user when a backend has to fall back on another.
        adapter_memory: bytes to leave free for adapters; None: nobody said.

    Raises:
        ConfigError: the backend cannot serve this model, or does not know an option.
    """
    why = "asked for by --backend"
    if wanted != "merged":
        from loraf_serve.vllm.engine.backends import ResidentBackend, SlotsBackend
        from loraf_serve.vllm.engine.support import can_serve, can_serve_resident, not_by_default

        def slots() -> SlotsBackend:
            return SlotsBackend(model_folder, engine_options, max_rank, adapter_memory)

        obstacle = can_serve(model_folder)
        if obstacle is None and wanted != "slots":
            against = can_serve_resident(model_folder)
            if wanted == "auto":
                why = "any number of task sets mix in a batch"
                spoken = [o for o in _SLOT_OPTIONS if any(given.partition("=")[0] == o for given in engine_options)]
                against = against or (f"{spoken[0]} speaks of slots" if spoken else not_by_default())
            if against is None:
                first = ResidentBackend(model_folder, engine_options, max_rank, adapter_memory)
                return Chosen(Fallback(first, slots, say), why)
            if wanted == "resident":
                remedy = "serve with --backend slots"
                raise ConfigError(Problem(f"resident cannot serve here: {against}", "--backend", remedy=remedy))
            why = f"not resident: {against}"
        if obstacle is None:
            return Chosen(slots(), why)
        if wanted != "auto":
            remedy = "mend that, or serve with --backend merged"
            raise ConfigError(Problem(f"{wanted} cannot serve this model: {obstacle}", "--backend", remedy=remedy))
        why = obstacle
    dtype, max_model_len = _merged_options(engine_options, why)
    from loraf_serve.backends.merged import MergedBackend

    return Chosen(MergedBackend(model_folder, dtype, max_model_len=max_model_len), why)


def _merged_options(engine_options: Sequence[str], why: str) -> tuple[str | None, int | None]:
    """--dtype and --max-model-len; every other option is refused by name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dtype")
    parser.add_argument("--max-model-len")
    try:
        given, rest = parser.parse_known_args(list(engine_options))
    except argparse.ArgumentError as error:
        raise ConfigError(Problem(error.message, str(error.argument_name), remedy="give it a value")) from None
    unknown = [option.partition("=")[0] for option in rest if option.startswith("-")] or rest
    remedy = "leave it out, or serve with --backend resident or slots"
    problems = [Problem(f"is not an option of the merged backend ({why})", name, remedy=remedy) for name in unknown]
    length = given.max_model_len
    if length is not None and not (length.isdecimal() and int(length) > 1):
        remedy = "give a number of tokens, at least 2"
        problems.append(Problem(f"{length!r} is no length", "--max-model-len", remedy=remedy))
    if problems:
        raise ConfigError(problems)
    return given.dtype, int(length) if length is not None else None
