"""What tasks.yaml may say under `data:` of a task: where its records come from, and how they become text.

Nothing here opens a data file; validation only checks that a local file exists.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo, field_validator, model_validator

from loraf_train.grading.builtin import MEAN
from loraf_train.settings.declare import SettingsModel, Switch, Whole, mistake, setting

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = ".gz"  # may follow any of them
_COMPRESSIONS = (COMPRESSED, ".bz2", ".xz", ".zst", ".zip", ".lz4")
_KNOWN_FORMATS = f"{', '.join(FILE_SUFFIXES)}, each also with {COMPRESSED}"
GENERIC_NAMES = frozenset({"train", "test", "dev", "eval", "valid", "validation", "evaluation", "data"})


def file_format(file: Path) -> str:
    """Returns the suffix that says how a file is read, in small letters: `.jsonl` for `A.JSONL` and `a.jsonl.gz`."""
    return _uncompressed(file).suffix.lower()


def _uncompressed(file: Path) -> Path:
    return file.with_suffix("") if file.suffix.lower() == COMPRESSED else file


class RecordSource(SettingsModel):
    """Where records come from: a file, or a Hugging Face dataset (on the hub or in a local folder)."""

    file: Path | None = setting(
        None,
        "A local data file, relative to the tasks.yaml.",
        expects=f"a data file: {_KNOWN_FORMATS}",
    )
    dataset: str | None = setting(
        None,
        "A Hugging Face dataset, by its name on the hub or as a local folder.",
        expects="the name of a Hugging Face dataset",
        min_length=1,
    )
    subset: str | None = setting(
        None,
        "The configuration to load, for datasets that have several.",
        expects="the name of one of the dataset's configurations",
    )
    split: str | None = setting(
        None,
        "The split to load; by default train for training data and test for evaluation.",
        expects="a split such as train or test[:100]",
    )
    revision: str | None = setting(
        None,
        "A branch, tag or commit of the dataset's repository; by default its main branch.",
        expects="a branch, tag or commit of the hub, in quotes",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str | Path):
            return {"file" if _is_file(str(value), info) else "dataset": str(value)}
        return value

    @field_validator("dataset")
    @classmethod
    def _local_dataset(cls, dataset: str | None, info: ValidationInfo) -> str | None:
        """Makes a local folder, which `datasets` accepts too, absolute."""
        if dataset is None or not info.context:
            return dataset
        folder = info.context["folder"] / Path(dataset).expanduser()
        if folder.suffix and folder.is_file():
            raise mistake(f"{dataset} is a local file", "give file: instead of dataset:")
        return str(folder) if folder.is_dir() else dataset

    @field_validator("file")
    @classmethod
    def _exists(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        if file is None or not info.context:
            return file
        file = info.context["folder"] / file.expanduser()
        if not file.is_file():
            raise mistake(f"there is no file {file}", f"paths are relative to {info.context['folder']}")
        if file_format(file) not in FILE_SUFFIXES:
            raise mistake(f"{file.name} is not in a known format", f"use one of: {_KNOWN_FORMATS}")
        return file

    @model_validator(mode="after")
    def _one_origin(self) -> RecordSource:
        if (self.file is None) == (self.dataset is None):
            raise mistake("does not name a source of records", "give either file: or dataset:")
        of_datasets = [key for key in ("subset", "split", "revision") if getattr(self, key) is not None]
        if self.file is not None and of_datasets:
            raise mistake(f"a file has no {' and no '.join(of_datasets)}", "leave it out, or give dataset: instead")
        return self

    def __str__(self) -> str:
        if self.file is not None:
            return str(self.file)
        name = f"{self.dataset}@{self.revision}" if self.revision else self.dataset
        return ":".join(part for part in (name, self.subset, self.split) if part)


def _is_file(text: str, info: ValidationInfo) -> bool:
    """Whether a plain text names a file rather than a dataset of the hub."""
    path = Path(text)
    local = info.context["folder"] / path.expanduser() if info.context else None
    if local is not None and local.is_dir():
        return False
    if local is not None and path.suffix and local.is_file():
        return True
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last in FILE_SUFFIXES or last in _COMPRESSIONS and before in FILE_SUFFIXES:
        return True
    return text.startswith((".", "/", "~")) or text.count("/") > 1


def _require_characters(text: str) -> str:
    """Refuses a lone surrogate, which YAML's \\u escapes can spell and no tokenizer can read."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise mistake("has half of a character, a lone surrogate", r"write the character itself, or \U and 8 digits")
    return text


class EvaluationSource(RecordSource):
    """Records to score a task on."""

    choices: tuple[Annotated[str, AfterValidator(_require_characters)], ...] = setting(
        (),
        "The possible answers, for the metric choice.",
        expects='a list of texts, for example ["true", "false"]',
    )


def _check_template(text: str) -> str:
    """Allows `{field}` and `{field[key]}` only: no attributes of values, and no numbers."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise mistake(f"is not a template ({error})", "write {field}, and {{ or }} for a literal brace") from None
    for name in names:
        first = name.split("[")[0]
        if not first or first.isdigit() or "." in name:
            raise mistake(f"{{{name}}} does not name a field", "write the name of a record's field in braces")
    return text


Template = Annotated[str, AfterValidator(_require_characters), AfterValidator(_check_template)]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _by_name(value: Any) -> Any:
    """Expands the short forms of `eval`, one source or a list of them; each set is named after its file."""
    if value is None:
        return {}
    if isinstance(value, dict) and not value.keys() & RecordSource.model_fields.keys():
        return value
    sources: dict[str, Any] = {}
    for source in _as_list(value):
        name = _set_name(source)
        if name in sources:
            raise mistake(f"two evaluation sets would be named {name!r}", "write eval: {name: file, name: file}")
        sources[name] = source
    return sources


def _set_name(source: Any) -> str:
    origin = source.get("file") or source.get("dataset") if isinstance(source, dict) else source
    path = _uncompressed(Path(str(origin)))
    return path.parent.name if path.stem in GENERIC_NAMES and path.parent.name else path.stem


class DataConfig(SettingsModel):
    """A task's records and how they become text."""

    train: Annotated[tuple[RecordSource, ...], BeforeValidator(_as_list)] = setting(
        ...,
        "Training records.",
        expects="a data file, a Hugging Face dataset, or a list of them",
        min_length=1,
    )
    eval: Annotated[dict[str, EvaluationSource], BeforeValidator(_by_name)] = setting(
        {},
        "Evaluation sets; a task without any gets no score.",
        expects="a data file, a list of them, or a mapping of names to files",
    )
    prompt: Template | None = setting(
        None,
        "Template of the prompt over a record's fields; by default chosen by the kind of record.",
        expects='a template such as "{question}\\n"',
    )
    completion: Template | None = setting(
        None,
        "Template of the completion over a record's fields; by default chosen by the kind of record.",
        expects='a template such as "{answer}"',
    )
    chosen: Template | None = setting(
        None,
        "DPO's template of the preferred answer over a record's fields; by default the field chosen.",
        expects='a template such as "{better}"',
    )
    rejected: Template | None = setting(
        None,
        "DPO's template of the other answer over a record's fields; by default the field rejected.",
        expects='a template such as "{worse}"',
    )
    streaming: Switch = setting(
        False,
        "Reads training records while they are trained on, so that memory does not grow with their number.",
        expects="true or false",
    )
    limit: Whole | None = setting(
        None,
        "Use at most this many training records, drawn by the run's seed from all training sources together.",
        expects="a whole number from 1",
        ge=1,
    )
    eval_limit: Whole | None = setting(
        None,
        "Use at most this many records of each evaluation set, drawn by the run's seed.",
        expects="a whole number from 1",
        ge=1,
    )

    @field_validator("eval")
    @classmethod
    def _no_mean(cls, sets: dict[str, EvaluationSource]) -> dict[str, EvaluationSource]:
        if MEAN in sets:
            raise mistake(f"{MEAN!r} is reserved for the mean over all evaluation sets", "choose another name")
        return sets
