"""Rows to and from Parquet. pyarrow ships no types, so it is touched here alone, and imported where rows move."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

from fleet.core.identity import Json

ColumnType = Literal["str", "float", "int", "bool"]


class Column(NamedTuple):
    """One column of a table."""

    name: str
    type: ColumnType
    nullable: bool


def write_rows(rows: Sequence[Mapping[str, Json]], columns: Sequence[Column]) -> bytes:
    """A Parquet file of these rows, zstd; the same rows give the same bytes."""
    import pyarrow as pa  # noqa: PLC0415 - planning imports this module and writes no rows
    import pyarrow.parquet as pq  # noqa: PLC0415

    types = {"str": pa.string(), "float": pa.float64(), "int": pa.int64(), "bool": pa.bool_()}
    schema = pa.schema([pa.field(c.name, types[c.type], nullable=c.nullable) for c in columns])
    target = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), target, compression="zstd")
    return target.getvalue()


def read_rows(data: bytes) -> tuple[list[str], list[dict[str, Json]]]:
    """The columns' names, and the rows.

    Raises:
        ValueError: It is no Parquet file.
    """
    import pyarrow as pa  # noqa: PLC0415 - planning imports this module and reads no rows
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error
    return table.column_names, cast(list[dict[str, Json]], table.to_pylist())
