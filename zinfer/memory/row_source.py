"""Rows of embedding tables, wherever they are.  In: ids.  Out: rows on the device, from memory or from disk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zinfer.chunks.table import ChunkId, ChunkTable, TensorSlice
from zinfer.memory.lease import DTYPES, WeightKey
from zinfer.memory.rows import RowReader

Gather = Callable[[ChunkId, WeightKey, Tensor], Tensor | None]


class RowSource:
    """Knows which chunks hold rows of which table: the table's own chunk, or a tied head's.

    `gather(chunk, key, ids)` gives rows of a chunk that is in memory, or None; what nobody has is read from disk.
    """

    def __init__(self, table: ChunkTable, reader: RowReader, gather: Gather) -> None:
        self._tables = table.row_tables
        self._reader = reader
        self._gather = gather
        self._pieces: dict[str, list[tuple[ChunkId, TensorSlice]]] = {name: [] for name in table.row_tables}
        for record in table.chunks:
            for piece in record.tensors:
                if piece.name in self._pieces:
                    self._pieces[piece.name].append((record.id, piece))

    def read(self, name: str, ids_T: Tensor, device: torch.device) -> Tensor:
        """Rows by id (int [T], any order, repeated at will): [T, *row shape].  Raises as RowReader.read."""
        table = self._tables[name]
        ids_T = ids_T.to("cpu", torch.int64)
        is_missing_T = torch.ones(len(ids_T), dtype=torch.bool)
        rows = torch.empty((len(ids_T), *table.row_shape), dtype=DTYPES[table.dtype], device=device)
        for chunk, piece in self._pieces[name]:
            is_here_T = (ids_T >= piece.start) & (ids_T < piece.stop)
            here_N = is_here_T.nonzero()[:, 0]
            found = self._gather(chunk, piece.key, ids_T[here_N] - piece.start) if len(here_N) else None
            if found is not None:
                rows[here_N] = found
                is_missing_T &= ~is_here_T
        missing_N = is_missing_T.nonzero()[:, 0]
        if len(missing_N):
            octets = torch.from_numpy(self._reader.read(table, ids_T[missing_N].numpy()))
            rows[missing_N] = octets.view(rows.dtype).reshape(-1, *table.row_shape).to(device)
        return rows
