"""What a fetch does, in the plainest way: read the ranges, do the moves, look at the slices."""

from itertools import pairwise

import numpy as np

from zinfer.chunks.table import ALIGN, PAGE, PIECE_BYTES


def fetch(chunk, files):
    """The chunk's buffer after its reads and moves; every rule of a Read is checked on the way."""
    buffer = bytearray(b"\xff" * chunk.nbytes)
    for read in chunk.reads:
        for number in (read.offset, read.nbytes, read.at):
            assert number % PAGE == 0
        assert 0 < read.nbytes <= PIECE_BYTES
        with open(files[read.file], "rb") as file:
            file.seek(read.offset)
            data = file.read(read.nbytes)
        assert len(data) == read.valid > read.nbytes - PAGE
        assert read.at + read.nbytes <= chunk.nbytes
        buffer[read.at : read.at + len(data)] = data
    for move in chunk.moves:
        buffer[move.target : move.target + move.nbytes] = buffer[move.source : move.source + move.nbytes]
    return bytes(buffer)


def write_noise(folder, sizes):
    """Files of so many random bytes, named as weights are."""
    paths = [folder / f"{at}.safetensors" for at in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(np.random.default_rng(0).bytes(size))
    return paths


def assert_disjoint(ranges):
    """No two (begin, size) ranges share a byte."""
    ordered = sorted((begin, begin + size) for begin, size in ranges if size)
    for (_, end), (begin, _) in pairwise(ordered):
        assert end <= begin


def assert_holds(table, tensor_bytes, align=ALIGN):
    """Every slice of every chunk is aligned, apart from the others, and what `tensor_bytes(slice)` says."""
    for chunk in table.chunks:
        assert chunk.nbytes % PAGE == 0
        assert_disjoint((read.at, read.nbytes) for read in chunk.reads)
        assert_disjoint((piece.offset, piece.nbytes) for piece in chunk.tensors)
        buffer = fetch(chunk, table.files)
        for piece in chunk.tensors:
            assert piece.offset % align == 0
            assert piece.offset + piece.nbytes <= chunk.nbytes
            assert buffer[piece.offset : piece.offset + piece.nbytes] == tensor_bytes(piece)
