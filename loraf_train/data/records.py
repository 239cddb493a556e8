"""Records, each a mapping of field names to values, from files and from Hugging Face datasets."""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraf.errors import ConfigError, Problem
from loraf_train.settings.config import Source

Record = dict[str, Any]
SHOWN = 3  # different mistakes of a source that are named


class Faults:
    """Gathers what is wrong with the records of one source: each mistake where it is met first, with its number."""

    def __init__(self, source: str):
        self._source = source
        self._places: dict[tuple[str, str], list[str]] = {}

    def add(self, where: str, message: str, remedy: str) -> None:
        self._places.setdefault((message, remedy), []).append(where)

    @property
    def problems(self) -> list[Problem]:
        found = []
        for (message, remedy), places in list(self._places.items())[:SHOWN]:
            more = f" (and {len(places) - 1} more like it)" if len(places) > 1 else ""
            found.append(Problem(f"{message}{more}", places[0], self._source, remedy))
        rest = sum(len(places) for places in list(self._places.values())[SHOWN:])
        if rest:
            found.append(Problem(f"{rest} more records have mistakes", "", self._source, "mend the ones above first"))
        return found


def read(source: Source, split: str = "train") -> list[Record]:
    """All records of a source, in its order.

    Args:
        split: of a Hugging Face dataset, where the source names none.

    Raises:
        ConfigError: the source cannot be read, holds no records, or some of them are no mappings.
    """
    if source.file is None:
        return _dataset(source, split)
    faults = Faults(str(source.file))
    try:
        records = list(_READERS[source.file.suffix](source.file, faults))
    except UnicodeDecodeError:
        faults.add("", "is not UTF-8 text", "save it as UTF-8")
        records = []
    except OSError as error:
        faults.add("", f"cannot be read ({error.strerror or error})", "name a readable file")
        records = []
    if not records and not faults.problems:
        faults.add("", "holds no records", "name a file with records")
    if faults.problems:
        raise ConfigError(faults.problems)
    return records


def _json_lines(file: Path, faults: Faults) -> Iterator[Record]:
    with open(file, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                faults.add(f"line {number}", f"is not JSON ({error})", "write one JSON object a line")
                continue
            if isinstance(record, dict):
                yield record
            else:
                faults.add(f"line {number}", f"is {_kind(record)}, no object", "write one JSON object a line")


def _json(file: Path, faults: Faults) -> Iterator[Record]:
    """A JSON list; a file of JSON lines under this suffix is common, and taken too."""
    with open(file, encoding="utf-8-sig") as stream:
        first = next((line.strip() for line in stream if line.strip()), "")
    if first.startswith("{") and first.endswith("}"):
        yield from _json_lines(file, faults)
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        faults.add("", f"is not JSON ({error})", "write a JSON list of objects, or one object a line")
        return
    if not isinstance(content, list):
        faults.add("", f"holds {_kind(content)}, no list", "write a JSON list of objects, or one object a line")
        return
    for number, record in enumerate(content, 1):
        if isinstance(record, dict):
            yield record
        else:
            faults.add(f"record {number}", f"is {_kind(record)}, no object", "write a JSON list of objects")


def _csv(file: Path, faults: Faults) -> Iterator[Record]:
    """Every value stays the text that the file holds."""
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if file.suffix == ".tsv" else ","
    with open(file, encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    columns = len(rows.fieldnames or ())
                    message = f"has not {columns} columns as the first line has"
                    faults.add(f"line {rows.line_num}", message, "quote values that hold the delimiter")
                    continue
                yield row
        except csv.Error as error:
            faults.add(f"line {rows.reader.line_num}", f"is not CSV ({error})", "mend the quotes there")


def _parquet(file: Path, faults: Faults) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        faults.add("", f"is not Parquet ({str(error).splitlines()[0]})", "write it again as Parquet")
        return
    yield from table.to_pylist()


def _dataset(source: Source, split: str) -> list[Record]:
    import datasets

    datasets.disable_progress_bars()
    split = source.split or split
    try:
        if _is_saved(Path(source.dataset)):
            found = _saved(source, split)
        else:
            found = datasets.load_dataset(source.dataset, source.subset, split=split, revision=source.revision)
        records = found.to_list()
    except Exception as error:  # the library raises many kinds: network, not found, gated, no such split, bad files
        reason = textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__
        if Path(source.dataset).is_dir():
            message, remedy = f"cannot be read ({reason})", "check subset: and split:, or name a file in it"
        else:
            message = f"cannot be had from the hub ({reason})"
            remedy = "check name, subset: and split:, log in with `hf auth login` if it is gated, or name a local file"
        raise ConfigError(Problem(message, "", str(source), remedy)) from None
    if not records:
        remedy = "name another split, or a source with records"
        raise ConfigError(Problem(f"split {split} holds no records", "", str(source), remedy))
    return records


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(source: Source, split: str):
    """What `load_dataset` refuses to read: the same splits, from `save_to_disk`."""
    import datasets

    found = datasets.load_from_disk(source.dataset)
    if not isinstance(found, datasets.DatasetDict):  # it has but one split, whatever it was called
        found = {part.partition("[")[0].strip(): found for part in split.split("+")}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in found.items()})
    return datasets.concatenate_datasets([found[p.splitname].select(range(p.from_ or 0, p.to)) for p in parts])


def _kind(value: Any) -> str:
    names = {str: "a text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
