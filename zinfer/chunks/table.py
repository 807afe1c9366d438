"""What a chunk is.  Frozen records only: which tensors travel together, where they lie in files and in a slot."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NewType

ChunkId = NewType("ChunkId", int)

ALIGN = 64  # every weight view starts at a multiple of this address: results must not depend on placement
LOOSE_ALIGN = 8  # where results need not be those of a store and the processor reads the weights: no moves
PAGE = 4096  # chunks, slots and direct reads are cut at multiples of this
HUGE_PAGE = 2 * 2**20  # what large memory is made of
PIECE_BYTES = 16 * 2**20  # largest single read; four in flight reach the disk's own rate


class TensorSlice(NamedTuple):
    """Rows [start, stop) of a published tensor, and where they lie inside their chunk's buffer."""

    name: str  # the tensor's published name
    start: int
    stop: int
    shape: tuple[int, ...]  # of the slice
    dtype: str  # safetensors' word: "BF16", "F16", "F32"
    offset: int  # in the chunk's buffer, a multiple of the source's align
    nbytes: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What an op asks for: (published name, first row, end row)."""
        return (self.name, self.start, self.stop)


class Move(NamedTuple):
    """After a read: bytes at `source` in the chunk's buffer belong at `target` (they may overlap)."""

    source: int
    target: int
    nbytes: int


class Read(NamedTuple):
    """One read of at most PIECE_BYTES: file range -> buffer range, both PAGE-aligned so that it can be direct.

    `nbytes` may reach past the end of the file by less than a page: the short count is then expected, and
    `valid` says how many bytes must arrive.  `digest` is the XXH3-64 of those `valid` bytes when the file is a
    zinfer store; a mismatch is an IntegrityError that names file and block.
    """

    file: int  # index into ChunkTable.files
    offset: int
    nbytes: int
    at: int  # where in the chunk's buffer
    valid: int
    digest: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit of weight movement and placement.

    `nbytes` is the buffer it needs (alignment slack included, a multiple of PAGE), `weight_bytes` what of it is
    weights.  `ops` are the indices of the program's ops that read it, consecutive; a chunk with no ops is a row
    table (input embedding) that is either resident as a whole or read row by row.
    """

    id: ChunkId
    ops: tuple[int, ...]
    tensors: tuple[TensorSlice, ...]
    reads: tuple[Read, ...]
    moves: tuple[Move, ...]  # to be done in this order when all reads have landed
    nbytes: int
    weight_bytes: int

    @property
    def read_bytes(self) -> int:
        """What one fetch from disk reads."""
        return sum(read.nbytes for read in self.reads)


@dataclass(frozen=True, slots=True)
class RowTable:
    """An embedding table as rows on disk: row r lies at `offset + r * row_bytes` of files[file].

    `digests` holds 8 bytes per row, xxh3_64_digest of it, when the file is a zinfer store; else nothing.
    """

    name: str
    file: int
    offset: int
    row_bytes: int
    num_rows: int
    row_shape: tuple[int, ...]
    dtype: str
    digests: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class ChunkTable:
    """All chunks of a model in execution order, the files they come from, and the row tables.

    Streamed chunks are those with ops.  A tied head's chunks hold the same rows as the row table of that name.
    `packed` are smaller forms that chunks may have in memory (`zinfer.chunks.at_home`), where a plan wants them.
    """

    files: tuple[Path, ...]
    chunks: tuple[Chunk, ...]
    row_tables: dict[str, RowTable] = field(default_factory=dict)
    packed: dict[ChunkId, Chunk] = field(default_factory=dict)

    @cached_property
    def chunk_of_op(self) -> dict[int, ChunkId]:
        """op index -> the chunk that holds its weights (ops without weights are absent)."""
        return {op: chunk.id for chunk in self.chunks for op in chunk.ops}

    @cached_property
    def streamable(self) -> tuple[Chunk, ...]:
        """Chunks with ops, in the order a pass uses them."""
        return tuple(chunk for chunk in self.chunks if chunk.ops)

    @cached_property
    def slot_bytes(self) -> int:
        """The size of a streaming slot: the largest streamable chunk."""
        return max((chunk.nbytes for chunk in self.streamable), default=0)

    @cached_property
    def read_bytes(self) -> tuple[int, ...]:
        """What one fetch of each chunk reads from disk."""
        return tuple([chunk.read_bytes for chunk in self.chunks])

    @cached_property
    def total_bytes(self) -> int:
        """Buffer bytes of all chunks together: what full residency takes."""
        return sum(chunk.nbytes for chunk in self.chunks)
