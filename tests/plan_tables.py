"""Chunk tables built by hand: the planner needs sizes and order only."""

from pathlib import Path

from hypothesis import strategies as st

from zinfer.chunks.table import PAGE, Chunk, ChunkId, ChunkTable, Read, RowTable, TensorSlice

FILES = (Path("model.safetensors"),)


def chunk(index, pages, ops):
    nbytes = pages * PAGE
    tensor = TensorSlice(f"layers.{index}.matrix", 0, pages, (pages, PAGE // 2), "BF16", 0, nbytes)
    return Chunk(ChunkId(index), ops, (tensor,), (Read(0, 0, nbytes, 0, nbytes),), (), nbytes, nbytes)


def table_of(pages, row_table_pages=0):
    """One chunk per entry of `pages`, in pages, one op each; then a row table if asked for."""
    chunks = [chunk(i, count, (i,)) for i, count in enumerate(pages)]
    row_tables = {}
    if row_table_pages:
        chunks.append(chunk(len(chunks), row_table_pages, ()))
        row_tables["embed"] = RowTable("embed", 0, 0, PAGE, row_table_pages, (PAGE // 2,), "BF16")
    return ChunkTable(FILES, tuple(chunks), row_tables)


page_counts = st.lists(st.integers(1, 16), min_size=1, max_size=40)
equal_page_counts = st.builds(lambda count, n: [count] * n, st.integers(1, 16), st.integers(1, 40))
