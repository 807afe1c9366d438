"""Rows of embedding tables, wherever they are.  In: ids.  Out: rows on the device, from memory or from disk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zinfer.chunks.table import ChunkId, ChunkTable, RowTable, TensorSlice
from zinfer.memory.lease import DTYPES, WeightKey
from zinfer.memory.rows import RowReader
from zinfer.memory.transfer import Transfer
from zinfer.memory.upload import upload

Gather = Callable[[ChunkId, WeightKey, Tensor], Tensor | None]


class RowSource:
    """Knows which chunks hold rows of which table: the table's own chunk, or a tied head's.

    `gather(chunk, key, ids)` gives rows of a chunk that is in memory, or None; what nobody has is read from disk.
    """

    def __init__(self, table: ChunkTable, reader: RowReader, gather: Gather, transfer: Transfer) -> None:
        self._transfer = transfer
        self._tables = table.row_tables
        self._reader = reader
        self._gather = gather
        self._pieces: dict[str, list[tuple[ChunkId, TensorSlice]]] = {name: [] for name in table.row_tables}
        for record in table.chunks:
            for piece in record.tensors:
                if piece.name in self._pieces:
                    self._pieces[piece.name].append((record.id, piece))

    def read(self, name: str, ids_T: Tensor) -> Tensor:
        """Rows by id (int [T] of the host, any order, repeated at will): [T, *row shape].

        Raises as RowReader.read.
        """
        table, device = self._tables[name], self._transfer.device
        ids_T = ids_T.to("cpu", torch.int64)
        is_missing_T = torch.ones(len(ids_T), dtype=torch.bool)
        rows: Tensor | None = None
        for chunk, piece in self._pieces[name]:
            is_here_T = (ids_T >= piece.start) & (ids_T < piece.stop)
            here_N = is_here_T.nonzero()[:, 0]
            found = self._gather(chunk, piece.key, ids_T[here_N] - piece.start) if len(here_N) else None
            found = None if found is None else self._lift(found)
            if found is not None and len(here_N) == len(ids_T):
                return found
            if found is not None:
                rows = self._rows(table, len(ids_T), device) if rows is None else rows
                rows.index_copy_(0, upload(here_N, device), found)
                is_missing_T &= ~is_here_T
        missing_N = is_missing_T.nonzero()[:, 0]
        if len(missing_N) or rows is None:
            octets = torch.from_numpy(self._reader.read(table, ids_T[missing_N].numpy()))
            read = self._lift(octets.flatten().view(DTYPES[table.dtype]).view(-1, *table.row_shape))
            if rows is None:
                return read
            rows.index_copy_(0, upload(missing_N, device), read)
        return rows

    def _lift(self, rows: Tensor) -> Tensor:
        """Rows to the device.  They are few beside weights: a simulated one does not count them."""
        return rows if rows.device == self._transfer.device else self._transfer.to_device(rows)

    def _rows(self, table: RowTable, count: int, device: torch.device) -> Tensor:
        return torch.empty((count, *table.row_shape), dtype=DTYPES[table.dtype], device=device)
