"""Selects the backend. Only the selected backend imports vLLM or transformers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraf.errors import ConfigError, LorafError, Problem
from loraf_serve.backends.backend import Backend, EngineFailed, NotProven, SelfCheckFailed
from loraf_serve.backends.fallback import Fallback

CHOICES = ("auto", "resident", "slots", "merged")
Replacements = dict[type[LorafError], Callable[[LorafError], Backend]]
MERGED_REMEDY = "leave it out, or serve with --backend resident or slots"
_REQUESTED = "requested by --backend"
_SLOT_OPTIONS = ("--max-loras", "--max-cpu-loras", "--max-lora-rank")


@dataclass(frozen=True)
class Decision:
    """Which backend serves, and why.

    Attributes:
        name: "resident", "slots" or "merged".
        reason: in words.
        others: backends that take over at start, in this order, if the first turns out not to serve.
    """

    name: str
    reason: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class BackendChoice:
    """A backend, not started, and the reason for it in words."""

    backend: Backend
    reason: str


def decide(option: str, model_folder: Path, engine_options: Sequence[str]) -> Decision:
    """Decides which backend `--backend` names. Imports vLLM unless that is merged, and makes no backend.

    Args: see `choose`.

    Raises:
        ConfigError: the backend cannot serve this model.
    """
    if option == "merged":
        return Decision("merged", _REQUESTED)
    from loraf_serve.vllm.engine.support import can_serve, can_serve_resident, not_by_default

    obstacle = can_serve(model_folder)
    if obstacle is not None:
        if option != "auto":
            message = f"{option} cannot serve this model: {obstacle}"
            raise ConfigError(Problem(message, "--backend", remedy="fix that, or serve with --backend merged"))
        return Decision("merged", obstacle)
    # Asked for by name, a backend refuses what is not proven.
    others = ("merged",) if option == "auto" else ()
    if option == "slots":
        return Decision("slots", _REQUESTED)
    resident_obstacle = can_serve_resident(model_folder)
    if option == "auto":
        names = [engine_option.partition("=")[0] for engine_option in engine_options]
        slot_option = next((name for name in _SLOT_OPTIONS if name in names), None)
        is_about_slots = f"{slot_option} is an option of slots" if slot_option else None
        resident_obstacle = resident_obstacle or is_about_slots or not_by_default()
    if resident_obstacle is None:
        reason = "any number of task sets can share a batch" if option == "auto" else _REQUESTED
        return Decision("resident", reason, ("slots", *others))
    if option == "resident":
        message, remedy = f"resident cannot serve here: {resident_obstacle}", "serve with --backend slots"
        raise ConfigError(Problem(message, "--backend", remedy=remedy))
    return Decision("slots", f"not resident: {resident_obstacle}", others)


def choose(
    option: str,
    model_folder: Path,
    engine_options: Sequence[str],
    max_rank: int,
    say: Callable[[str], None],
    adapter_memory: int | None = None,
) -> BackendChoice:
    """Makes the backend that `--backend` names.

    Args:
        option: one of CHOICES. `auto` takes the first that can serve the model, out of resident, slots and merged, and
            turns to merged if resident or slots is not proven to serve an adapter as transformers would, or its engine
            fails to start.
        engine_options: options of the command line that `loraf-serve` does not know: vLLM's.
        max_rank: the largest rank among the adapters.
        say: prints a message for the user when one backend replaces another.
        adapter_memory: bytes to leave free for adapters; None if there is no limit on them.

    Raises:
        ConfigError: the backend cannot serve this model, or does not know an option.
    """
    decision = decide(option, model_folder, engine_options)

    def merged(why: str, remedy: str) -> Backend:
        dtype, max_model_len = merged_options(engine_options, why, remedy)
        from loraf_serve.backends.merged import MergedBackend

        return MergedBackend(model_folder, dtype, max_model_len=max_model_len)

    if decision.name == "merged":
        return BackendChoice(merged(decision.reason, MERGED_REMEDY), decision.reason)
    from loraf_serve.adapters.checkpoint_folder import read_values
    from loraf_serve.vllm.engine.backends import ResidentBackend, SlotsBackend

    def instead(error: LorafError) -> Backend:
        return merged(f"chosen because {error.problems[0].field}: {error.problems[0].message}", "leave it out")

    def slots() -> Backend:
        return SlotsBackend(model_folder, engine_options, max_rank, adapter_memory)

    others: Replacements = {}
    if decision.name == "resident":
        first: Backend = ResidentBackend(model_folder, engine_options, max_rank, adapter_memory)
        others[SelfCheckFailed] = lambda _: slots()
    else:
        first = slots()
    if "merged" in decision.others:
        others |= {NotProven: instead, EngineFailed: instead}
    return BackendChoice(Fallback(first, others, say, read_values) if others else first, decision.reason)


def merged_options(engine_options: Sequence[str], reason: str, remedy: str) -> tuple[str | None, int | None]:
    """Parses --dtype and --max-model-len. Raises ConfigError, which names every other option.

    Args:
        reason: why the backend is merged.
        remedy: for another option.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dtype")
    parser.add_argument("--max-model-len")
    try:
        arguments, others = parser.parse_known_args(list(engine_options))
    except argparse.ArgumentError as error:
        raise ConfigError(Problem(error.message, str(error.argument_name), remedy="give it a value")) from None
    unknown = [option.partition("=")[0] for option in others if option.startswith("-")] or others
    problems = [Problem(f"is not an option of the merged backend ({reason})", name, remedy=remedy) for name in unknown]
    length = arguments.max_model_len
    if length is not None and not (length.isdecimal() and int(length) > 1):
        remedy = "give a number of tokens, at least 2"
        problems.append(Problem(f"{length!r} is not a length", "--max-model-len", remedy=remedy))
    if problems:
        raise ConfigError(problems)
    return arguments.dtype, int(length) if length is not None else None
