"""Reads records, each a mapping of field names to values, from files and from Hugging Face datasets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraf.errors import ConfigError, Problem, one_line
from loraf_train.settings.data import RecordSource

if TYPE_CHECKING:
    import datasets

Record = dict[str, Any]
SHOWN = 3  # different mistakes of a source that are reported; the others are only counted


class Faults:
    """Collects the mistakes in the records of one source; each is reported once, at its first place, with a count."""

    def __init__(self, source: str):
        self._source = source
        self._places: dict[tuple[str, str], list[str]] = {}

    def add(self, where: str, message: str, remedy: str) -> None:
        self._places.setdefault((message, remedy), []).append(where)

    @property
    def problems(self) -> list[Problem]:
        problems = []
        for (message, remedy), places in list(self._places.items())[:SHOWN]:
            more = f" (and {len(places) - 1} more like it)" if len(places) > 1 else ""
            problems.append(Problem(f"{message}{more}", places[0], self._source, remedy))
        others = sum(len(places) for places in list(self._places.values())[SHOWN:])
        if others:
            remedy = "fix the ones above first"
            problems.append(Problem(f"{others} more records have mistakes", "", self._source, remedy))
        return problems


def read(source: RecordSource, split: str = "train") -> list[Record]:
    """Reads all records of a source, in its order.

    Args:
        split: of a Hugging Face dataset, if the source does not name one.

    Raises:
        ConfigError: the source cannot be read, has no records, or some of them are not mappings.
    """
    if source.dataset is not None:
        return _dataset(source, source.dataset, source.split or split)
    assert source.file is not None  # a source is a file or a dataset
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
        faults.add("", "has no records", "name a file with records")
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
                faults.add(f"line {number}", f"is not JSON ({error})", "write one JSON object per line")
                continue
            if isinstance(record, dict):
                yield record
            else:
                faults.add(f"line {number}", f"is {_kind(record)}, not an object", "write one JSON object per line")


def _json(file: Path, faults: Faults) -> Iterator[Record]:
    """Reads a JSON list, or JSON lines, which are common under this suffix too."""
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
        faults.add("", f"is not JSON ({error})", "write a JSON list of objects, or one object per line")
        return
    if not isinstance(content, list):
        faults.add("", f"is {_kind(content)}, not a list", "write a JSON list of objects, or one object per line")
        return
    for number, record in enumerate(content, 1):
        if isinstance(record, dict):
            yield record
        else:
            faults.add(f"record {number}", f"is {_kind(record)}, not an object", "write a JSON list of objects")


def _csv(file: Path, faults: Faults) -> Iterator[Record]:
    """Reads every value as text, as it is in the file."""
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if file.suffix == ".tsv" else ","
    with open(file, encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    columns = len(rows.fieldnames or ())
                    message = f"does not have the {columns} columns of the first line"
                    faults.add(f"line {rows.line_num}", message, "quote values that contain the delimiter")
                    continue
                yield row
        except csv.Error as error:
            faults.add(f"line {rows.reader.line_num}", f"is not CSV ({error})", "fix the quotes there")


def _parquet(file: Path, faults: Faults) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        faults.add("", f"is not Parquet ({one_line(error)})", "write it again as Parquet")
        return
    yield from table.to_pylist()


def _dataset(source: RecordSource, name: str, split: str) -> list[Record]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if _is_saved(Path(name)):
            dataset = _saved(name, split)
        else:
            dataset = datasets.load_dataset(name, source.subset, split=split, revision=source.revision)
        records: list[Record] = dataset.to_list()
    except Exception as error:  # the library raises many kinds: network, not found, gated, no such split, bad files
        if Path(name).is_dir():
            message, remedy = f"cannot be read ({one_line(error)})", "check subset: and split:, or name a file in it"
        else:
            message = f"could not be downloaded from the hub ({one_line(error)})"
            remedy = "check name, subset: and split:, log in with `hf auth login` if it is gated, or use a local file"
        raise ConfigError(Problem(message, "", str(source), remedy)) from None
    if not records:
        remedy = "name another split, or a source with records"
        raise ConfigError(Problem(f"the split {split} has no records", "", str(source), remedy))
    return records


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(folder: str, split: str) -> datasets.Dataset:
    """Loads what `save_to_disk` wrote, which `load_dataset` refuses to read; splits mean the same."""
    import datasets

    splits = datasets.load_from_disk(folder)
    if not isinstance(splits, datasets.DatasetDict):  # a single split, regardless of its name
        splits = {part.partition("[")[0].strip(): splits for part in split.split("+")}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_ or 0, p.to)) for p in parts])


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
