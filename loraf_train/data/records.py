"""Reads records, each a mapping of field names to values, from files and from Hugging Face datasets."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from loraf.errors import ConfigError, Problem, one_line
from loraf_train.data.columns import STREAMED_AT_ONCE, read_parquet, records_of, stream_parquet
from loraf_train.data.values import Unreadable
from loraf_train.settings.data import COMPRESSED, RecordSource, file_format

if TYPE_CHECKING:
    import datasets

Record = dict[str, Any]
_JSON = (".jsonl", ".ndjson", ".json")
SHOWN = 3  # different mistakes of a source that are reported; the others are only counted
_GZIP = b"\x1f\x8b"  # the first bytes of every such file
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # its byte order marks
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class _Unusable(Exception):
    """A file that is not what its name says: message and remedy."""


class Faults:
    """Collects the mistakes in the records of one source; each is reported once, at its first place, with a count.

    Args:
        kind: how they are called: mistakes or warnings.
    """

    def __init__(self, source: str, kind: str = "mistakes"):
        self._source = source
        self._kind = kind
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
            problems.append(Problem(f"{others} more records have {self._kind}", "", self._source, remedy))
        return problems


class _FirstFault(Faults):
    """Raises the first mistake instead of collecting them."""

    def add(self, where: str, message: str, remedy: str) -> None:
        raise ConfigError(Problem(message, where, self._source, remedy))


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
    records: list[Record] = []
    with _told(faults):
        records = list(_READERS[file_format(source.file)](source.file, faults))
    if len(records) == 1 and file_format(source.file) in _JSON and _is_by_columns(records[0]):
        remedy = "write one object for each record (in pandas: to_json with orient='records')"
        faults.add("", "is one object of columns, not of records", remedy)
    if not records and not faults.problems:
        faults.add("", "has no records", "name a file with records")
    if faults.problems:
        raise ConfigError(faults.problems)
    return records


@contextmanager
def _told(faults: Faults) -> Iterator[None]:
    """Adds to `faults` what keeps a file from being read."""
    try:
        yield
    except _Unusable as error:
        faults.add("", *error.args)
    except UnicodeDecodeError:
        faults.add("", "is not UTF-8 text", "save it as UTF-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"is not a whole gzip file ({one_line(error)})"
        faults.add("", message, f"compress it again, or take {COMPRESSED} off its name if it is not compressed")
    except OSError as error:
        faults.add("", f"cannot be read ({error.strerror or error})", "name a readable file")


def _is_by_columns(record: Record) -> bool:
    """Whether a file's only record is a whole table: pandas' `to_json` writes columns of numbered values by default."""
    values = list(record.values())
    if len(values) < 2:
        return False
    if all(isinstance(value, dict) for value in values):  # numbered as in the table that its rows were taken from
        numbers = list(values[0])
        return bool(numbers) and all(n.isdecimal() for n in numbers) and all(list(v) == numbers for v in values)
    lists = [value for value in values if isinstance(value, list)]
    known = any(record.keys() >= form for form in ({"prompt", "completion"}, {"instruction", "output"}))
    same = len(lists) == len(values) and len({len(value) for value in lists}) == 1 and len(lists[0]) > 1
    return known and same and not any(isinstance(item, dict | list) for value in lists for item in value)


def stream(source: RecordSource, split: str = "train") -> Iterator[Record]:
    """Yields the records of a source one by one, as `read` returns them, without holding the source in memory.

    Of Parquet, a thousand rows are in memory at a time; of a compressed file, what is unpacked so far is not.

    Args:
        split: as for `read`.

    Raises:
        ConfigError: at the first record that cannot be read; a JSON list, which has to be read whole.
    """
    if source.dataset is not None:
        yield from _streamed_dataset(source, source.dataset, source.split or split)
        return
    assert source.file is not None  # a source is a file or a dataset
    faults = _FirstFault(str(source.file))
    with _told(faults):
        yield from _READERS[file_format(source.file)](source.file, faults, lazily=True)


@contextmanager
def _binary(file: Path, lazily: bool = False) -> Iterator[BinaryIO]:
    """Opens a file; one that is compressed as its whole content, so that damage shows before anything is read.

    Args:
        lazily: unpack it as it is read instead.
    """
    with open(file, "rb") as stream:
        compressed = stream.read(len(_GZIP)) == _GZIP or file.suffix.lower() == COMPRESSED
        stream.seek(0)
        if not compressed:
            yield stream
        elif lazily:
            yield gzip.GzipFile(fileobj=stream)  # type: ignore[misc]  # reads as a BinaryIO does
        else:
            yield io.BytesIO(gzip.GzipFile(fileobj=stream).read())


@contextmanager
def _text(file: Path, newline: str | None = None, lazily: bool = False) -> Iterator[TextIO]:
    """Opens a text file in UTF-8, with or without a byte order mark.

    Args:
        newline: as for `open`.
        lazily: see `_binary`.

    Raises:
        _Unusable: it is in UTF-16.
    """
    with _binary(file, lazily) as stream:
        start = stream.read(4)
        if start.startswith(_UTF16) or b"\0" in start:
            raise _Unusable("is UTF-16 text", "save it as UTF-8")
        stream.seek(0)
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _from_json(text: str) -> Any:
    """Decodes JSON. A key that occurs twice in an object has no value that could be meant."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                record[key] = Unreadable("occurs twice in its object", "keep one of the two")
            seen.add(key)
    return record


def _json_lines(file: Path, faults: Faults, lazily: bool = False) -> Iterator[Record]:
    with _text(file, lazily=lazily) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = _from_json(line)
            except (ValueError, RecursionError) as error:
                faults.add(f"line {number}", f"is not JSON ({error})", "write one JSON object per line")
                continue
            if isinstance(record, dict):
                yield record
            else:
                faults.add(f"line {number}", f"is {_kind(record)}, not an object", "write one JSON object per line")


def _json(file: Path, faults: Faults, lazily: bool = False) -> Iterator[Record]:
    """Reads a JSON list, or JSON lines, which are common under this suffix too."""
    with _text(file, lazily=lazily) as stream:
        first = next((line.strip() for line in stream if line.strip()), "")
    if first.startswith("{") and first.endswith("}"):
        yield from _json_lines(file, faults, lazily)
        return
    if lazily:
        faults.add("", "is a JSON list, which has to be read whole", "write one object per line, or streaming: false")
        return
    try:
        with _text(file) as stream:
            content = _from_json(stream.read())
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


def _csv(file: Path, faults: Faults, lazily: bool = False) -> Iterator[Record]:
    """Reads every value as text, as it is in the file."""
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if file_format(file) == ".tsv" else ","
    with _text(file, newline="", lazily=lazily) as stream:
        rows = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            columns = list(rows.fieldnames or ())
            _require_delimiter(columns, delimiter)
            twice = Unreadable("is the name of two columns", "rename or remove one of them")
            repeated = {name: twice for name in columns if columns.count(name) > 1}
            for row in rows:
                if None in row or None in row.values():
                    message = f"does not have the {len(columns)} columns of the first line"
                    faults.add(f"line {rows.line_num}", message, "quote values that contain the delimiter")
                    continue
                yield row | repeated
        except csv.Error as error:
            faults.add(f"line {rows.reader.line_num}", f"is not CSV ({error})", "fix the quotes there")


def _require_delimiter(columns: list[str], expected: str) -> None:
    """Raises _Unusable if the first line is not divided by the delimiter of the file's format, but by another."""
    others = _DELIMITERS.keys() - {expected}
    used = next((other for other in sorted(others) if len(columns) == 1 and other in columns[0]), None)
    if used is not None:
        remedy = f"save it with {_DELIMITERS[expected]}" + (", or name it .tsv" if used == "\t" else "")
        raise _Unusable(f"has {_DELIMITERS[used]} between its columns, not {_DELIMITERS[expected]}", remedy)


def _parquet(file: Path, faults: Faults, lazily: bool = False) -> Iterator[Record]:
    import pyarrow

    try:
        with _binary(file, lazily) as stream:
            yield from stream_parquet(stream) if lazily else read_parquet(stream)
    except pyarrow.ArrowException as error:
        faults.add("", f"is not Parquet ({one_line(error)})", "write it again as Parquet")


def _dataset(source: RecordSource, name: str, split: str) -> list[Record]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if _is_saved(Path(name)):
            dataset = _saved(name, split)
        else:
            dataset = datasets.load_dataset(name, source.subset, split=split, revision=source.revision)
        records: list[Record] = records_of(dataset.with_format("arrow")[:], dataset.features.to_dict())
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


def _streamed_dataset(source: RecordSource, name: str, split: str) -> Iterator[Record]:
    import datasets

    try:
        if _is_saved(Path(name)):
            rows: Any = _saved(name, split)  # mapped from disk
        else:
            rows = datasets.load_dataset(name, source.subset, split=split, revision=source.revision, streaming=True)
        features = rows.features.to_dict() if rows.features is not None else {}
        tables = iter(rows.with_format("arrow").iter(batch_size=STREAMED_AT_ONCE))
        while (table := next(tables, None)) is not None:
            yield from records_of(table, features)
    except Exception as error:  # the library raises many kinds, also later on, of the network
        remedy = "check name, subset: and split: (parts such as train[:100] cannot be streamed), or streaming: false"
        raise ConfigError(Problem(f"cannot be streamed ({one_line(error)})", "", str(source), remedy)) from None


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
