"""Arrow tables as records: Parquet files and Hugging Face datasets.

Values are those of `pyarrow.Table.to_pylist`, but for

    a column that occurs twice, a value that Python cannot hold   `Unreadable`: a mistake only where it is used
    class labels of Hugging Face datasets                         `Label`
    numbers of 16 and 32 bits with a decimal point                the shortest number that they stand for: 0.1
    maps                                                          mappings
    messages and tools                                            without keys that are null
    JSON (the type arrow.json)                                    what it says
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from loraf.errors import one_line
from loraf_train.data.values import Label, Unreadable

if TYPE_CHECKING:
    import pyarrow

STREAMED_AT_ONCE = 1000  # rows
Features = Mapping[str, Any]  # column → its Hugging Face feature, as `datasets.Features.to_dict` writes it
_METADATA = b"huggingface"  # the key under which the datasets library stores features in Parquet files
_DIFFERENT = "store the field in another way, or leave it out of the templates"


def read_parquet(stream: BinaryIO) -> list[dict[str, Any]]:
    """Reads the records of a Parquet file.

    Raises:
        pyarrow.ArrowException, OSError: the file is not Parquet, or no column can be read.
    """
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    schema = file.schema_arrow
    try:
        columns = list(file.read().columns)
    except (pyarrow.ArrowException, OSError) as error:  # in one of the columns, which may be an unused one
        columns = [_read_column(file, name, schema.names) for name in schema.names]
        if all(isinstance(column, Unreadable) for column in columns):
            raise error
    return _records(schema, columns, file.metadata.num_rows, _stored_features(schema))


def stream_parquet(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yields the records of a Parquet file, STREAMED_AT_ONCE rows in memory at a time.

    Raises:
        pyarrow.ArrowException, OSError: the file is not Parquet, or a column cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(stream)
    features = _stored_features(file.schema_arrow)
    for batch in file.iter_batches(batch_size=STREAMED_AT_ONCE):
        table = pyarrow.Table.from_batches([batch])
        yield from _records(table.schema, list(table.columns), table.num_rows, features)


def records_of(table: pyarrow.Table, features: Features) -> list[dict[str, Any]]:
    """Returns the rows of a dataset's table as records."""
    return _records(table.schema, table.columns, table.num_rows, features)


def _read_column(file: pyarrow.parquet.ParquetFile, name: str, names: list[str]) -> pyarrow.ChunkedArray | Unreadable:
    import pyarrow

    if names.count(name) > 1:
        return _twice()
    try:
        return file.read(columns=[name])[name]
    except (pyarrow.ArrowException, OSError) as error:
        return Unreadable(f"cannot be read ({one_line(error)})", _DIFFERENT)


def _records(
    schema: pyarrow.Schema, columns: list[pyarrow.ChunkedArray | Unreadable], rows: int, features: Features
) -> list[dict[str, Any]]:
    import pyarrow

    values: dict[str, list[Any]] = {}
    for name, column in zip(schema.names, columns, strict=True):
        column = _twice() if name in values else column
        values[name] = [column] * rows if isinstance(column, Unreadable) else _values(column, features.get(name))
        if isinstance(column, pyarrow.ChunkedArray) and _holds_messages_or_tools(name, column.type):
            values[name] = [_without_nulls(value) for value in values[name]]
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _holds_messages_or_tools(name: str, kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if not (types.is_list(kind) or types.is_large_list(kind)) or not types.is_struct(kind.value_type):
        return False
    return name == "tools" or kind.value_type.get_field_index("role") >= 0


def _without_nulls(value: Any) -> Any:
    """Leaves out keys without a value: a struct has the keys of all records, of which a message has only some."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _twice() -> Unreadable:
    return Unreadable("is the name of two columns", "rename or remove one of them")


def _values(column: pyarrow.ChunkedArray, feature: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist(maps_as_pydicts="strict")
    except Exception:  # of many kinds: dates beyond Python's, unknown time zones, texts that are not UTF-8
        values = [_value(scalar) for scalar in column]
    convert = _converter(column.type, feature)
    if convert is None:
        return values
    return [value if isinstance(value, Unreadable) else convert(value) for value in values]


def _value(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py(maps_as_pydicts="strict")
    except Exception as error:
        return Unreadable(f"has a value that cannot be read ({one_line(error)})", _DIFFERENT)


def _converter(kind: pyarrow.DataType, feature: Any) -> Callable[[Any], Any] | None:
    """Returns what turns pyarrow's value of a type into a record's; None: nothing."""
    import pyarrow
    from pyarrow import types

    if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel" and types.is_integer(kind):
        names = list(feature.get("names") or ())
        return _unless_null(lambda i: Label(i, names[i] if 0 <= i < len(names) else None))
    if types.is_float32(kind) or types.is_float16(kind):
        import numpy

        narrow = numpy.float32 if types.is_float32(kind) else numpy.float16
        return _unless_null(lambda number: float(str(narrow(number))))
    if isinstance(kind, pyarrow.JsonType):
        return _unless_null(_from_json)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _converter(kind.storage_type, feature)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        of_item = _converter(kind.value_type, _item(feature))
        return of_item and _unless_null(lambda items: [of_item(item) for item in items])
    if types.is_struct(kind):
        children = {child.name: _converter(child.type, _child(feature, child.name)) for child in kind}
        changed = {name: convert for name, convert in children.items() if convert}
        if changed:
            return _unless_null(lambda struct: struct | {name: of(struct[name]) for name, of in changed.items()})
    if types.is_map(kind):
        of_value = _converter(kind.item_type, None)
        return of_value and _unless_null(lambda items: {key: of_value(value) for key, value in items.items()})
    return None


def _unless_null(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"has a value that is not JSON ({one_line(error)})", _DIFFERENT)


def _item(feature: Any) -> Any:
    """The feature of a list's items."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    return feature.get("feature") if isinstance(feature, Mapping) else None


def _child(feature: Any, name: str) -> Any:
    """The feature of a struct's child. A `Sequence` of a mapping is stored as a struct of lists."""
    if not isinstance(feature, Mapping):
        return None
    inner = feature.get("feature")
    if feature.get("_type") == "Sequence" and isinstance(inner, Mapping):
        return {"_type": "Sequence", "feature": inner.get(name)}
    return feature.get(name)


def _stored_features(schema: pyarrow.Schema) -> Features:
    """The features that the datasets library stored in a Parquet file; empty for files that it did not write."""
    stored = (schema.metadata or {}).get(_METADATA)
    try:
        features = json.loads(stored)["info"]["features"] if stored else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, Mapping) else {}
