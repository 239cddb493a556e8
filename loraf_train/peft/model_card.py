"""The model card of what PEFT saves: that of the checkpoint, in place of the empty one that PEFT writes.

PEFT writes README.md before anything else: the hub's template, unfilled, with the base model's path on this machine as
its name. Of a README.md that is there already it changes the header.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import yaml

from loraf import manifest
from loraf.hub import HUB_ID
from loraf_train import card

_TAG = "base_model:adapter:"  # of PEFT, before the base's name
_TEMPLATE = "# Model Card for Model ID"  # the title of the hub's template


def write_card(folder: Path) -> None:
    """Puts the card of the checkpoint in a folder in place of PEFT's, if PEFT has written one there.

    A card of the user's keeps its text; from its header goes a base model that is a folder of this machine.
    """
    path = folder / card.FILE_NAME
    with suppress(OSError, UnicodeDecodeError):  # a card is no part of the checkpoint
        text = path.read_text(encoding="utf-8")
        if _TEMPLATE in text or card.GENERATED in text:
            name = folder.resolve().name
            path.write_text(f"{card.card(manifest.read(folder), name)}\n{card.GENERATED}\n", encoding="utf-8")
        else:
            path.write_text(_without_local_base(text), encoding="utf-8")


def _without_local_base(text: str) -> str:
    """Returns a card without a base model in its header that is not on the hub."""
    before, *parts = text.split("---\n", 2)
    try:
        header = yaml.safe_load(parts[0]) if not before and len(parts) == 2 else None
    except yaml.YAMLError:
        header = None
    if not isinstance(header, dict):
        return text
    kept = {key: value for key, value in header.items() if key != "base_model" or _is_on_hub(value)}
    if isinstance(kept.get("tags"), list):
        kept["tags"] = [tag for tag in kept["tags"] if not str(tag).startswith(_TAG) or _is_on_hub(tag[len(_TAG) :])]
    if kept == header:
        return text
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---\n{parts[1]}"


def _is_on_hub(base: object) -> bool:
    return not isinstance(base, str) or HUB_ID.fullmatch(base) is not None
