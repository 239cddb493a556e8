"""The model's vocabulary: the token ids that it can hold. Nothing beyond it may be used as an index into the model.

A tokenizer may have more tokens than the model's embedding has rows, and generation_config.json may name any end token.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from loraf.base_model import weight_files
from loraf.errors import ConfigError, Problem

log = logging.getLogger(__name__)

# Names of the token embedding in transformers' models, without the names of the modules around it.
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_OTHER_PARTS = ("vision", "visual", "audio", "encoder.", "mtp.")  # parts of a model whose embeddings are not the text's


def vocab_size(model_folder: Path) -> int | None:
    """Returns the number of token ids that a model can hold, None if neither its config nor its weights say.

    It is the smaller of the size in config.json and the number of the embedding's rows.

    Raises:
        ConfigError: config.json cannot be read.
    """
    file = model_folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        size = (config.get("text_config") or config).get("vocab_size")
    except (OSError, ValueError, AttributeError) as error:
        remedy = "restore the model's config.json"
        raise ConfigError(Problem(f"cannot be read ({error})", file=str(file), remedy=remedy)) from None
    sizes = [n for n in (size, _embedding_rows(model_folder)) if isinstance(n, int) and n > 0]
    return min(sizes, default=None)


def _embedding_rows(model_folder: Path) -> int | None:
    """The number of rows of the token embedding, read from the weights' headers; None if it is not there, or not one.

    Damaged weights are not reported here: the backend that loads them does it.
    """
    rows = set()
    try:
        for file in weight_files(model_folder):
            with safe_open(os.fspath(file), framework="pt") as tensors:
                rows |= {tensors.get_slice(name).get_shape()[0] for name in tensors.keys() if _is_embedding(name)}  # noqa: SIM118 - safe_open is not a mapping
    except (ConfigError, OSError, SafetensorError, IndexError):
        return None
    return rows.pop() if len(rows) == 1 else None


def _is_embedding(name: str) -> bool:
    module, _, kind = name.rpartition(".")
    is_token_embedding = kind == "weight" and module.rpartition(".")[2] in _EMBEDDINGS
    return is_token_embedding and not any(part in name for part in _OTHER_PARTS)


def ends_within(vocab_size: int, ends: object, source: str) -> frozenset[int]:
    """Returns the end tokens that the model can produce, and warns of the others.

    Args:
        ends: an id, several, or None, as transformers' configs have them.
        source: where they come from, for the warning.
    """
    several = ends if isinstance(ends, Iterable) and not isinstance(ends, str) else [] if ends is None else [ends]
    valid, invalid = set(), []
    for end in several:
        if isinstance(end, int) and 0 <= end < vocab_size:
            valid.add(end)
        else:
            invalid.append(end)
    if invalid:
        message = "%s: end tokens beyond the model's vocabulary of %d are ignored: %s"
        log.warning(message, source, vocab_size, ", ".join(map(repr, invalid)))
    return frozenset(valid)
