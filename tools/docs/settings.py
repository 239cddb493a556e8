"""Reference of tasks.yaml, generated from the settings' own declarations (loraf_train.settings.reference)."""

from __future__ import annotations

import re
from collections.abc import Collection

from loraf_train.settings.reference import REQUIRED, SettingDescription, describe_settings

TOP = "Top level"


def markdown() -> str:
    """A section for each mapping of the file, in the file's order."""
    sections: dict[str, list[SettingDescription]] = {}
    meanings: dict[str, str] = {}
    for setting in describe_settings():
        sections.setdefault(setting.key.rpartition(".")[0], []).append(setting)
        meanings[setting.key] = setting.meaning
    parts = []
    for section, settings in sections.items():
        if section:
            parts += [f"## `{section}` {{#{_anchor(section)}}}", meanings.get(_holder(section), "")]
        else:
            parts.append(f"## {TOP}")
        parts += [_entry(setting, sections) for setting in settings]
    return "\n\n".join(part for part in parts if part)


def _holder(section: str) -> str:
    """The setting whose entries a section describes: `tasks` for `tasks[]`."""
    return section.removesuffix("[]").removesuffix(".<name>")


def _anchor(section: str) -> str:
    return re.sub(r"[^a-z_]+", "-", section.lower()).strip("-")


def _entry(setting: SettingDescription, sections: Collection[str]) -> str:
    name = setting.key.rpartition(".")[2]
    note = ""
    if setting.default == REQUIRED:
        note = ", **required**"
    elif setting.default not in ("", "null"):
        note = f", default `{setting.default.strip(chr(34))}`"
    lines = [f"`{name}` *{setting.type}*{note}", f":   {setting.meaning}  "]
    below = next((s for s in sections if _holder(s) == setting.key), None)
    takes = f"Takes {setting.expects}."
    lines.append(f"    {takes}" if below is None else f"    {takes} See [`{below}`](#{_anchor(below)}).")
    return "\n".join(lines) + "\n"
