"""Which backend serves, and why. vLLM and transformers are imported only by the backend that is chosen."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraf.errors import ConfigError, Problem
from loraf_serve.backends.base import Backend

CHOICES = ("auto", "slots", "merged")


@dataclass(frozen=True)
class Chosen:
    backend: Backend
    why: str


def choose(wanted: str, model_folder: Path, engine_options: Sequence[str], max_rank: int) -> Chosen:
    """The backend that `--backend` means, not started.

    Args:
        wanted: one of CHOICES; `auto` is slots where vLLM can serve the model, else merged.
        engine_options: what of the command line is not `loraf-serve`'s own: vLLM's options.
        max_rank: the largest rank among the adapters.

    Raises:
        ConfigError: the backend cannot serve this model, or does not know an option.
    """
    why = "asked for by --backend"
    if wanted in ("auto", "slots"):
        from loraf_serve.vllm.backend import SlotsBackend, can_serve

        obstacle = can_serve(model_folder)
        if obstacle is None:
            if wanted == "auto":
                why = "vLLM can apply LoRA to this model"
            return Chosen(SlotsBackend(model_folder, engine_options, max_rank), why)
        if wanted == "slots":
            remedy = "mend that, or serve with --backend merged"
            raise ConfigError(Problem(f"slots cannot serve this model: {obstacle}", "--backend", remedy=remedy))
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
    remedy = "leave it out, or serve with --backend slots"
    problems = [Problem(f"is not an option of the merged backend ({why})", name, remedy=remedy) for name in unknown]
    length = given.max_model_len
    if length is not None and not (length.isdecimal() and int(length) > 1):
        remedy = "give a number of tokens, at least 2"
        problems.append(Problem(f"{length!r} is no length", "--max-model-len", remedy=remedy))
    if problems:
        raise ConfigError(problems)
    return given.dtype, int(length) if length is not None else None
