"""Small weight files and the chunk tables that describe them, made by hand: no packer is involved."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash

from zinfer.chunks.table import ALIGN, PAGE, Chunk, ChunkId, ChunkTable, Move, Read, RowTable, TensorSlice
from zinfer.config.machine import Compute, Link, Machine, ProductRate
from zinfer.plan.records import Placement, Tier
from zinfer.units import round_up

COMPUTE = Compute(
    products={"F32": (ProductRate(rows=1, seconds_per_gb=0.1),)}, attention_flops_per_s=1e9, op_overhead_s=0
)
FAST = Machine(
    name="fast",
    host_bytes=2**30,
    device_bytes=2**30,
    disk_read=Link(bytes_per_s=1e12),
    h2d=Link(bytes_per_s=1e12),
    host=COMPUTE,
    device=COMPUTE,
)


def write_chunks(
    folder: Path,
    pages: Sequence[int],
    *,
    shift: int = 0,
    piece: int = 2 * PAGE,
    digests: bool = True,
    seed: int = 0,
) -> tuple[ChunkTable, list[bytes]]:
    """One file with one chunk per entry of `pages` (its data is about that many pages), and each chunk's data.

    A chunk holds an F32 matrix [n, 16] "w<i>" and a BF16 vector "b<i>".  With `shift` the data begins at that
    many bytes behind a page's border; unless it is a multiple of ALIGN the bytes must be moved after reading.
    """
    random_bytes = random.Random(seed).randbytes
    path = folder / f"weights-{seed}.bin"
    text, chunks, contents = bytearray(), [], []
    for number, count in enumerate(pages):
        rows = (count * PAGE - 2 * ALIGN) // 64
        data = random_bytes(rows * 64 + ALIGN)
        begin = len(text) + shift
        text += bytes(shift) + data + bytes(-(shift + len(data)) % PAGE)
        slack = shift % ALIGN
        nbytes = round_up(shift + len(data), PAGE)
        tensors = (
            TensorSlice(f"w{number}", 0, rows, (rows, 16), "F32", shift - slack, rows * 64),
            TensorSlice(f"b{number}", 0, 32, (32,), "BF16", shift - slack + rows * 64, 64),
        )
        moves = (Move(shift, shift - slack, len(data)),) if slack else ()
        reads = [
            Read(0, begin - shift + at, min(piece, nbytes - at), at, min(piece, nbytes - at))
            for at in range(0, nbytes, piece)
        ]
        chunks.append(Chunk(ChunkId(number), (number,), tensors, tuple(reads), moves, nbytes, len(data)))
        contents.append(data)
    path.write_bytes(text)
    if digests:
        chunks = [_with_digests(chunk, bytes(text)) for chunk in chunks]
    return ChunkTable((path,), tuple(chunks)), contents


def _with_digests(chunk: Chunk, text: bytes) -> Chunk:
    reads = tuple(
        Read(
            r.file,
            r.offset,
            r.nbytes,
            r.at,
            r.valid,
            xxhash.xxh3_64_intdigest(text[r.offset : r.offset + r.valid]),
        )
        for r in chunk.reads
    )
    return Chunk(chunk.id, chunk.ops, chunk.tensors, reads, chunk.moves, chunk.nbytes, chunk.weight_bytes)


def with_rows(table: ChunkTable, number: int) -> ChunkTable:
    """The same table, chunk `number`'s matrix also being a row table."""
    chunk = table.chunks[number]
    piece = chunk.tensors[0]
    begin = chunk.reads[0].offset + (chunk.moves[0].source if chunk.moves else piece.offset)
    rows = RowTable(piece.name, 0, begin, 64, piece.stop, (16,), "F32")
    return ChunkTable(table.files, table.chunks, {piece.name: rows})


def cpu_placement(table: ChunkTable, resident: Sequence[int], slots: int) -> Placement:
    """Host memory computes; `resident` chunks stay."""
    homes = tuple(Tier.HOST if chunk.id in resident else Tier.DISK for chunk in table.chunks)
    return Placement(Tier.HOST, homes, slots, table.slot_bytes, 0, max(slots - 1, 0))


def sim_placement(
    table: ChunkTable, resident: Sequence[int], host: Sequence[int], slots: int, staging: int
) -> Placement:
    """A device computes; `resident` chunks stay there, those in `host` have their home in host memory."""
    homes = tuple(
        Tier.DEVICE if chunk.id in resident else Tier.HOST if chunk.id in host else Tier.DISK
        for chunk in table.chunks
    )
    return Placement(Tier.DEVICE, homes, slots, table.slot_bytes, staging, max(slots - 1, 0))


def needed_bytes(table: ChunkTable, placement: Placement, tier: Tier) -> int:
    """What homes, slots and staging of a tier take: the smallest budget for weights."""
    homes = sum(chunk.nbytes for chunk in table.chunks if placement.home[chunk.id] is tier)
    slots = (
        placement.slots if tier is placement.compute_tier else placement.staging if tier is Tier.HOST else 0
    )
    return homes + slots * placement.slot_bytes


def bytes_of(views, chunk: Chunk) -> bytes:
    """The chunk's data as its views show it."""
    return b"".join(views[piece.key].flatten().view(torch.uint8).numpy().tobytes() for piece in chunk.tensors)
