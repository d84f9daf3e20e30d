"""Tables whose rows are rows of other tables, or means of some: embeddings and heads in another vocabulary."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from fleet.checkpoint.headers import KNOWN_DTYPE_BYTES
from fleet.checkpoint.views import VIEW_BYTES, TensorView

if TYPE_CHECKING:
    import torch

Row: TypeAlias = tuple[str, int]
"""A table by its name in `RowTable.sources`, and one of its rows."""

RUN_BYTES = 280
"""Memory of one `Run` with one source (measured with tracemalloc); a renumbered vocabulary has one a token."""


class Run(NamedTuple):
    """Rows [start, stop), each the mean of one row of every source; all sources go on row by row."""

    start: int
    stop: int
    sources: tuple[Row, ...]
    """What the first row is the mean of. One source: the row itself; none: zeros."""


@dataclass(frozen=True)
class RowTable:
    """A `TensorView` of an embedding or a head, with a row a token; means are taken in float64 and rounded once."""

    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    """In order, and together all rows."""
    sources: Mapping[str, TensorView]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * KNOWN_DTYPE_BYTES[self.dtype]

    @property
    def memory_bytes(self) -> int:
        return VIEW_BYTES + RUN_BYTES * len(self.runs) + sum(table.memory_bytes for table in self.sources.values())

    def read_rows(self, start: int, stop: int, buffer: memoryview) -> None:
        size = self.row_bytes
        at = bisect_right([run.start for run in self.runs], start) - 1
        while start < stop:
            run = self.runs[at]
            until = min(stop, run.stop)
            self._read_run(run, start, until, buffer[: (until - start) * size])
            buffer = buffer[(until - start) * size :]
            start, at = until, at + 1

    def _read_run(self, run: Run, start: int, stop: int, buffer: memoryview) -> None:
        rows = [(self.sources[name], row + start - run.start) for name, row in run.sources]
        if len(rows) == 1 and rows[0][0].dtype == self.dtype:
            rows[0][0].read_rows(rows[0][1], rows[0][1] + stop - start, buffer)
            return
        import torch

        from fleet.checkpoint.tensors import TORCH_DTYPES

        if not len(buffer):
            return
        out = torch.frombuffer(buffer, dtype=TORCH_DTYPES[self.dtype]).zero_()
        values = [_values(source, row, stop - start) for source, row in rows]
        if len(values) == 1:
            out.copy_(values[0])
        elif values:
            out.copy_(torch.stack(values).double().mean(dim=0))


def _values(table: TensorView, row: int, count: int) -> torch.Tensor:
    """Some rows of a table, flat, in its own dtype."""
    import torch

    from fleet.checkpoint.tensors import TORCH_DTYPES

    data = torch.empty(count * table.row_bytes, dtype=torch.uint8)
    table.read_rows(row, row + count, data.numpy().data)
    return data.view(TORCH_DTYPES[table.dtype])


def runs_of(rows: Sequence[tuple[Row, ...]]) -> tuple[Run, ...]:
    """The fewest runs that say what each row is the mean of."""
    runs: list[Run] = []
    for i, sources in enumerate(rows):
        if runs and len(sources) == len(runs[-1].sources):
            last = runs[-1]
            expected = tuple((name, row + i - last.start) for name, row in last.sources)
            if expected == sources:
                runs[-1] = last._replace(stop=i + 1)
                continue
        runs.append(Run(i, i + 1, sources))
    return tuple(runs)
