"""Chunks over published files: every byte arrives, aligned, at most once; and the search for their size."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from checkpoint_files import tiny_spec, write_folder
from chunk_bytes import assert_holds, fetch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zinfer.checkpoint.check import published_shapes
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.chunks.pack import assemble, group, layer_sizes, pack
from zinfer.chunks.search import search_limit
from zinfer.chunks.source import Place, Source, Unit, checkpoint_source, imagined_source
from zinfer.chunks.table import ALIGN, LOOSE_ALIGN, PAGE, PIECE_BYTES
from zinfer.errors import BudgetError, CheckpointError
from zinfer.units import Bytes


def written(folder, spec, pad=0, num_shards=1):
    """The spec's tensors dealt out to shards in another order than they are used."""
    shapes = dict(sorted(published_shapes(spec).items()))
    names = ["model.safetensors"] if num_shards == 1 else [f"m{i}.safetensors" for i in range(num_shards)]
    dealt = {
        name: {tensor: shapes[tensor] for tensor in list(shapes)[i::num_shards]}
        for i, name in enumerate(names)
    }
    return CheckpointIndex.open(write_folder(folder, dealt, pad=pad))


def published_bytes(index):
    """What the files say a slice is."""

    def tensor_bytes(piece):
        entry = index.weights[piece.name]
        data = index.files[entry.file].read_bytes()
        begin = entry.offset + piece.start * entry.row_bytes
        return data[begin : begin + piece.nbytes]

    return tensor_bytes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    limit=st.integers(1, 80_000),
    pad=st.integers(0, 70),
    num_shards=st.integers(1, 3),
    width=st.integers(1, 70),
    tied=st.booleans(),
)
def test_every_slice_arrives_whatever_the_files_look_like(
    tmp_path_factory, limit, pad, num_shards, width, tied
):
    spec = tiny_spec(width=width, tied=tied)
    index = written(tmp_path_factory.mktemp("model"), spec, pad, num_shards)
    table = pack(spec.program, spec.lookups, index, limit)
    assert_holds(table, published_bytes(index))
    keys = {piece.key for chunk in table.chunks for piece in chunk.tensors}
    wanted = {weight.key for op in spec.program for weight in op.weights}
    tables = {("positions", 0, 9)} if tied else {("positions", 0, 9), ("embed", 0, 50)}
    assert keys == wanted | tables
    layer_of = {op.index: op.layer for op in spec.program}
    for chunk in table.streamable:
        assert list(chunk.ops) == list(range(chunk.ops[0], chunk.ops[-1] + 1))
        assert {(w.name, w.start, w.stop) for op in chunk.ops for w in spec.program[op].weights} <= {
            piece.key for piece in chunk.tensors
        }
        assert chunk.nbytes <= limit or len(chunk.ops) == 1
        layers = {layer_of[op] for op in chunk.ops}
        whole = {op.index for op in spec.program if op.weights and op.layer in layers}
        assert len(layers) == 1 or whole == set(chunk.ops)
        assert chunk.weight_bytes == sum(piece.nbytes for piece in chunk.tensors)
        assert chunk.nbytes <= chunk.weight_bytes + len(chunk.tensors) * (2 * PAGE + 64)
    assert [chunk.id for chunk in table.chunks] == list(range(len(table.chunks)))
    assert list(table.chunk_of_op) == [op.index for op in spec.program if op.weights]


@pytest.mark.parametrize("tied", [False, True])
def test_rows_lie_where_the_row_table_says(tmp_path, tied):
    spec = tiny_spec(tied=tied)
    index = written(tmp_path, spec, pad=3)
    rows = pack(spec.program, spec.lookups, index, 1).row_tables["embed"]
    entry = index.weights["embed"]
    assert (rows.num_rows, rows.row_shape, rows.row_bytes, rows.dtype) == (50, (24,), 48, "BF16")
    assert (rows.file, rows.offset) == (entry.file, entry.offset)


def test_an_aligned_file_needs_no_moves_and_a_shifted_one_some(tmp_path):
    spec = tiny_spec(width=32, mlp=64, vocab=64)
    aligned = next(
        pad for pad in range(64) if written(tmp_path / str(pad), spec, pad).weights["embed"].offset % 64 == 0
    )
    for shift in (0, 8):
        index = written(tmp_path / "m", spec, aligned + shift)
        table = pack(spec.program, spec.lookups, index, 10**6)
        assert any(chunk.moves for chunk in table.chunks) == (shift > 0)
        assert_holds(table, published_bytes(index))
        source = replace(checkpoint_source(spec.program, spec.lookups, index), align=LOOSE_ALIGN)
        loose = assemble(source, 10**6)
        assert not any(chunk.moves for chunk in loose.chunks)
        assert_holds(loose, published_bytes(index), LOOSE_ALIGN)


def test_a_source_is_packed_once_per_grouping_and_never_with_another_alignment(tmp_path):
    spec = tiny_spec(width=32, mlp=64, vocab=64)
    index = written(tmp_path, spec, pad=3)
    source = checkpoint_source(spec.program, spec.lookups, index)
    fresh = checkpoint_source(spec.program, spec.lookups, index)
    limits = [1, 2, 4096, 8192, 10**6, 10**9]
    tables = [assemble(source, limit) for limit in limits]
    assert tables[0] is tables[1]
    assert tables[-1] is tables[-2]
    assert [assemble(source, limit) for limit in limits] == tables
    loose = replace(source, align=LOOSE_ALIGN)
    for limit, table in zip(limits, tables, strict=True):
        assert assemble(fresh, limit) == table
        assert assemble(loose, limit) == assemble(replace(fresh, align=LOOSE_ALIGN), limit)
        assert assemble(loose, limit) is not table
    sizes = layer_sizes(source)
    sizes.clear()  # a copy
    assert layer_sizes(source) == layer_sizes(fresh)
    assert source == fresh


def test_a_source_remembers_so_many_tables_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr("zinfer.chunks.pack._MOST_TABLES", 2)
    spec = tiny_spec(width=32, mlp=64, vocab=64)
    source = checkpoint_source(spec.program, spec.lookups, written(tmp_path, spec))
    tables = {limit: assemble(source, limit) for limit in (1, 4096, 8192, 10**6)}
    assert len(source.packed) <= 3
    assert all(assemble(source, limit) == table for limit, table in tables.items())


def places_in_a_file(sizes_and_gaps, begin):
    places = []
    for number, (size, gap) in enumerate(sizes_and_gaps):
        begin += gap
        places.append(Place(f"t{number}", 0, size, (size,), "U8", 0, begin, size))
        begin += size
    return places, begin


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([0, 1, 3, 64, 4095, 4096, 9000])), min_size=1),
    st.integers(0, 5000),
    st.integers(0, 2**32),
    st.sampled_from([LOOSE_ALIGN, ALIGN]),
)
def test_moves_never_overwrite_what_a_later_one_needs(tmp_path_factory, sizes_and_gaps, begin, seed, align):
    rng = random.Random(seed)
    places, end = places_in_a_file(sizes_and_gaps, begin)
    path = tmp_path_factory.mktemp("raw") / "file"
    data = rng.randbytes(end)
    path.write_bytes(data)
    shuffled = rng.sample(places, len(places))
    units = tuple(Unit(i, 0, (place,)) for i, place in enumerate(shuffled))
    source = Source((path,), (end,), units, {}, align=align)
    by_name = {place.name: data[place.offset : place.end] for place in places}
    for limit in (1, 30_000, 10**9):
        table = assemble(source, limit)
        assert_holds(table, lambda piece: by_name[piece.name], align)
        for chunk in table.chunks:
            assert chunk.nbytes <= limit or len(chunk.ops) == 1


def test_moves_in_the_wrong_order_would_be_noticed(tmp_path):
    """The mutation: without their order some bytes are lost."""
    places, end = places_in_a_file([(100, 8), (70, 0), (66, 0), (130, 0)], 0)
    path = tmp_path / "file"
    path.write_bytes(bytes(i % 251 for i in range(end)))
    source = Source((path,), (end,), (Unit(0, 0, tuple(places)),), {})
    (chunk,) = assemble(source, 1).chunks
    assert {move.target < move.source for move in chunk.moves} == {True, False}
    right = fetch(chunk, (path,))
    wrong = replace(chunk, moves=chunk.moves[::-1])
    lost = [
        piece.name
        for piece in chunk.tensors
        if fetch(wrong, (path,))[piece.offset :][: piece.nbytes] != right[piece.offset :][: piece.nbytes]
    ]
    assert lost


def test_a_large_tensor_is_read_in_pieces(tmp_path):
    size = 2 * PIECE_BYTES + 5000
    place = Place("t", 0, size, (size,), "U8", 0, 100, size)
    path = tmp_path / "file"
    path.write_bytes(bytes(100) + b"x" * size)
    (chunk,) = assemble(Source((path,), (size + 100,), (Unit(0, 0, (place,)),), {}), 1).chunks
    assert [read.nbytes for read in chunk.reads] == [PIECE_BYTES, PIECE_BYTES, 2 * PAGE]
    assert [read.valid for read in chunk.reads] == [PIECE_BYTES, PIECE_BYTES, 5100]


def test_a_weight_that_is_not_there_is_named(tmp_path):
    spec = tiny_spec()
    index = written(tmp_path / "a", tiny_spec(layers=1))
    with pytest.raises(CheckpointError, match=r"layers\.1\.norm") as caught:
        pack(spec.program, spec.lookups, index, 1)
    assert caught.value.code == "ZI-4151"
    with pytest.raises(CheckpointError, match=r"as \(24,\)") as caught:
        pack(tiny_spec(width=25).program, (), written(tmp_path / "b", spec), 1)
    assert caught.value.code == "ZI-4153"


@pytest.mark.parametrize("limit", [1, 10**9])
def test_an_imagined_source_stands_for_a_real_one(tmp_path, limit):
    spec = tiny_spec()
    real = assemble(checkpoint_source(spec.program, spec.lookups, written(tmp_path, spec)), limit)
    imagined = assemble(imagined_source(spec.program, spec.lookups, "BF16"), limit)
    assert [chunk.ops for chunk in imagined.chunks] == [chunk.ops for chunk in real.chunks]
    for one, other in zip(imagined.chunks, real.chunks, strict=True):
        assert one.weight_bytes == other.weight_bytes
        assert not one.moves
        assert one.nbytes <= other.nbytes + PAGE * len(one.ops)
    assert imagined.row_tables.keys() == real.row_tables.keys()


def plain_cost(layers, limit, budget, slots, fetch_bytes):
    """The cost of a limit, written down again as plainly as can be; None: it does not fit."""
    units = iter([size for sizes in layers for size in sizes])
    chunks = [sum(next(units) for _ in range(count)) for count in group(layers, limit)]
    if sum(chunks) <= budget:
        return len(chunks) * fetch_bytes + max(chunks)
    room = budget - slots * max(chunks)
    streamed = 0
    for size in sorted(chunks, reverse=True):
        if room < 0:
            return None
        if size <= room:
            room -= size
        else:
            streamed += size + fetch_bytes
    return streamed


def source_of(layers):
    """A source whose units have these sizes."""
    units, at, op = [], 0, 0
    for layer, sizes in enumerate(layers):
        for size in sizes:
            units.append(Unit(op, layer, (Place(f"t{op}", 0, size, (size,), "U8", 0, at, size),)))
            at, op = at + size, op + 1
    return Source((Path("none"),), (at,), tuple(units), {})


LAYERS = st.lists(
    st.lists(st.integers(1, 6).map(lambda n: n * PAGE), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=5,
)


@given(LAYERS, st.integers(1, 40), st.integers(1, 3), st.sampled_from([0, 100, PAGE, 5 * PAGE]))
def test_the_search_equals_brute_force(layers, budget_pages, slots, fetch_bytes):
    source, budget = source_of(layers), budget_pages * PAGE
    assert layer_sizes(source) == layers
    total = sum(map(sum, layers))
    costs = [
        plain_cost(layers, limit, budget, slots, fetch_bytes)
        for limit in range(max(map(max, layers)), max(budget, total) + 1, PAGE)
    ]
    costs = [cost for cost in costs if cost is not None]
    if not costs:
        with pytest.raises(BudgetError) as caught:
            search_limit(source, budget, slots, fetch_bytes)
        assert caught.value.code == "ZI-2301"
        return
    limit = search_limit(source, budget, slots, fetch_bytes)
    assert plain_cost(layers, limit, budget, slots, fetch_bytes) == min(costs)


@given(LAYERS)
def test_the_budget_that_a_refusal_names_suffices_and_less_does_not(layers):
    source = source_of(layers)
    with pytest.raises(BudgetError) as caught:
        search_limit(source, PAGE - 1, 2)
    total, largest = sum(map(sum, layers)), max(map(max, layers))
    least = min(total, 2 * largest)
    assert str(Bytes(least)) in caught.value.remedy
    search_limit(source, least, 2)
    with pytest.raises(BudgetError):
        search_limit(source, least - 1, 2)


@given(LAYERS, st.integers(1, 60).map(lambda n: n * PAGE))
def test_groups_hold_whole_layers_or_parts_of_one(layers, limit):
    units = [(layer, size) for layer, sizes in enumerate(layers) for size in sizes]
    ends = [0]
    for count in group(layers, limit):
        ends.append(ends[-1] + count)
    assert ends[-1] == len(units)
    chunks = [units[begin:end] for begin, end in pairwise(ends)]
    for chunk in chunks:
        assert sum(size for _, size in chunk) <= limit or len(chunk) == 1
        spanned = {layer for layer, _ in chunk}
        if len(spanned) > 1:
            assert len(chunk) == sum(len(layers[layer]) for layer in spanned)
