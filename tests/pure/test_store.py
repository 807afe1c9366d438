"""The store: what goes in comes out, whatever interrupts it, and what is damaged is named."""

import hashlib
import json
import os
import tracemalloc
import warnings

import pytest
from checkpoint_files import tiny_spec, write_folder
from chunk_bytes import assert_holds, fetch
from faulty_disk import ForgetfulDisk, PowerCutError, ShortDisk, StepDisk, disk_full, io_error, kill
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from zinfer.checkpoint.check import published_shapes
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.chunks.disk import Disk
from zinfer.chunks.journal import Journal
from zinfer.chunks.layout import lay_out
from zinfer.chunks.pack import layer_sizes
from zinfer.chunks.source import checkpoint_source
from zinfer.chunks.store import check_sources, load_store, open_store, shard, verify_store, write_store
from zinfer.chunks.table import PAGE
from zinfer.errors import (
    BudgetError,
    CheckpointError,
    IntegrityError,
    MachineError,
    UsageError,
    ZinferError,
)

SPEC = tiny_spec(width=40, mlp=64)


def model(folder, spec=SPEC, dtype="F16", num_shards=2):
    shapes = dict(sorted(published_shapes(spec).items()))
    dealt = {f"m{i}.safetensors": dict(list(shapes.items())[i::num_shards]) for i in range(num_shards)}
    write_folder(folder, dealt, pad=3, dtype=dtype, weight_map=None)
    if num_shards == 1:
        (folder / "m0.safetensors").rename(folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"model": {}}')
    return CheckpointIndex.open(folder)


@pytest.fixture
def index(tmp_path):
    return model(tmp_path / "model")


def write(index, out, disk=None, spec=SPEC, shard_bytes=30_000, sync_bytes=20_000, **options):
    options |= {"shard_bytes": shard_bytes, "sync_bytes": sync_bytes, "disk": disk or StepDisk()}
    write_store(spec.program, spec.lookups, index, out, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published_bytes(index):
    def tensor_bytes(piece):
        entry = index.weights[piece.name]
        data = index.files[entry.file].read_bytes()
        begin = entry.offset + piece.start * entry.row_bytes
        return data[begin : begin + piece.nbytes]

    return tensor_bytes


def refused(error, call, *args, **options):
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert caught.value.remedy
    return caught.value


SPECS = {
    "untied": SPEC,
    "tied": tiny_spec(tied=True),
    "tied, blocks end to end": tiny_spec(tied=True, width=64, vocab=64, head_blocks=2),
    "tied, blocks torn": tiny_spec(tied=True, width=40, vocab=50, head_blocks=3),
    "no layers": tiny_spec(layers=0),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("shard_bytes", [1, 30_000, 2**31])
def test_what_goes_in_comes_out(tmp_path, spec, shard_bytes):
    index = model(tmp_path / "model", spec)
    out = tmp_path / "out"
    write(index, out, spec=spec, shard_bytes=shard_bytes)
    assert verify_store(out) == ()
    assert not list(out.glob("*.partial"))
    for limit in (1, 25_000, 10**9):
        table = load_store(out, limit)
        assert_holds(table, published_bytes(index))
        for chunk in table.chunks:
            assert not chunk.moves
            buffer = fetch(chunk, table.files)
            for read in chunk.reads:
                assert read.valid == read.nbytes
                assert read.digest == xxh3_64_intdigest(buffer[read.at : read.at + read.nbytes])
        for name, rows in table.row_tables.items():
            data = table.files[rows.file].read_bytes()[rows.offset :][: rows.num_rows * rows.row_bytes]
            entry = index.weights[name]
            whole = index.files[entry.file].read_bytes()[entry.offset : entry.offset + entry.nbytes]
            assert data == whole
            hashes = [
                xxh3_64_digest(data[at:][: rows.row_bytes]) for at in range(0, len(data), rows.row_bytes)
            ]
            assert rows.digests == b"".join(hashes)
    store = CheckpointIndex.open(out)
    assert store.is_store
    assert store.dtypes.items() <= index.dtypes.items()
    assert store.side_files["tokenizer.json"].read_bytes() == b'{"model": {}}'
    assert [unit.op for unit in open_store(store, spec)[1].units if unit.op is not None] == [
        op.index for op in spec.program if op.weights
    ]


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_a_store_needs_no_larger_slots_than_the_published_files(tmp_path, spec):
    index = model(tmp_path / "model", spec)
    write(index, tmp_path / "out", spec=spec)
    _, store = open_store(CheckpointIndex.open(tmp_path / "out"), spec)
    published = checkpoint_source(spec.program, spec.lookups, index)
    for held, found in zip(layer_sizes(store), layer_sizes(published), strict=True):
        assert all(one <= other for one, other in zip(held, found, strict=True))


def test_a_tied_table_is_stored_twice_only_where_its_blocks_are_torn(tmp_path):
    for name, copies in (("tied", 1), ("tied, blocks end to end", 1), ("tied, blocks torn", 2)):
        index = model(tmp_path / name, SPECS[name])
        layout = lay_out(checkpoint_source(SPECS[name].program, SPECS[name].lookups, index))
        held = sum(
            place.stop - place.start
            for unit in layout.settled
            for place in unit.places
            if place.name == "embed"
        )
        assert held == copies * index.weights["embed"].shape[0]


def test_the_upstream_library_opens_every_shard(index, tmp_path):
    write(index, tmp_path / "out")
    bytes_of, seen = published_bytes(index), set()
    for path in (tmp_path / "out").glob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + header) % PAGE == 0
        with safe_open(path, "np") as file:
            assert file.metadata()["layout"] == "rows-v1"
            for key in file.keys():  # noqa: SIM118 - safe_open is no dict
                array = file.get_tensor(key)
                if key.startswith("__pad__."):
                    assert not array.any()
                    continue
                name, _, rows = key.rstrip("]").partition("[")
                start, _, stop = rows.partition(":")
                piece = _piece(name, int(start or 0), array)
                assert int(stop or array.shape[0]) - piece.start == array.shape[0]
                assert array.tobytes() == bytes_of(piece)
                seen.add(name)
    assert seen == set(index.weights)


def _piece(name, start, array):
    return type("Piece", (), {"name": name, "start": start, "nbytes": array.nbytes})


def test_nothing_in_a_store_depends_on_where_and_how_it_was_written(index, tmp_path):
    write(index, tmp_path / "a")
    write(index, tmp_path / "b", ShortDisk(), sync_bytes=1)
    os.utime(index.files[0], (1, 1))
    write(model(tmp_path / "again"), tmp_path / "c", Disk())
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def count_steps(index, folder, only=None):
    disk = StepDisk() if only is None else StepDisk(only=only)
    write(index, folder, disk)
    return disk.steps


def journaled(folder):
    path = folder / "zinfer.journal"
    return path.read_bytes().count(b'"extent"') if path.exists() else 0


def assert_resumes(index, out, whole):
    """What an interruption left never loads; going on gives the same bytes and rewrites nothing recorded."""
    if (out / "zinfer.json").exists():
        assert verify_store(out) == ()
    else:
        refused((IntegrityError, CheckpointError), load_store, out)
        refused((IntegrityError, CheckpointError), CheckpointIndex.open, out)
    recorded, written = journaled(out), []
    write(index, out, progress=lambda done, _total, _what: written.append(done))
    assert contents(out) == whole
    assert written == sorted(written)
    return recorded


def test_sigkill_at_every_step_loses_nothing(index, tmp_path):
    steps = count_steps(index, tmp_path / "whole")
    assert set(steps) == {"open", "write", "truncate", "sync", "rename", "remove", "sync_folder"}
    whole, recorded = contents(tmp_path / "whole"), []
    for at in range(len(steps)):
        out = tmp_path / f"killed-{at}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads; the child uses none
            child = os.fork()
        if child == 0:
            write(index, out, StepDisk(at, kill))
            os._exit(99)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"step {at} ({steps[at]}) was not reached"
        recorded.append(assert_resumes(index, out, whole))
    assert max(recorded) == 11


UNSYNCED = {"lost": lambda _: b"", "kept": lambda data: data, "half": lambda data: data[: len(data) // 2]}


@pytest.mark.parametrize("keeps_newest", [False, True])
@pytest.mark.parametrize("unsynced", UNSYNCED.values(), ids=list(UNSYNCED))
def test_a_power_cut_at_every_step_loses_nothing(index, tmp_path, unsynced, keeps_newest):
    steps = count_steps(index, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    for at in range(len(steps)):
        out = tmp_path / f"cut-{at}"
        disk = ForgetfulDisk(out, at)
        with pytest.raises(PowerCutError):
            write(index, out, disk)
        if out.exists():
            disk.come_back(unsynced, keeps_newest)
        assert_resumes(index, out, whole)


def test_without_its_syncs_a_power_cut_would_be_noticed(index, tmp_path):
    """The mutation: a writer that renames what it never synced leaves a store that fails its verification."""

    class Hasty(ForgetfulDisk):
        def sync(self, fd):
            if os.fstat(fd).st_size > 20_000:  # the shards
                return
            super().sync(fd)

    disk = Hasty(tmp_path / "out")
    write(index, tmp_path / "out", disk)
    disk.come_back(lambda data: bytes(len(data)))
    assert verify_store(tmp_path / "out")


def test_a_full_disk_at_every_write_loses_nothing(index, tmp_path):
    steps = count_steps(index, tmp_path / "whole", only=("write",))
    whole, last = contents(tmp_path / "whole"), 0
    for at in range(len(steps)):
        out = tmp_path / f"full-{at}"
        error = refused(BudgetError, write, index, out, StepDisk(at, disk_full, only=("write",)))
        assert (error.code, "are missing" in error.message) == ("ZI-3101", True)
        recorded = assert_resumes(index, out, whole)
        assert recorded >= last
        last = recorded


def test_a_failing_disk_at_every_step_is_reported_and_survived(index, tmp_path):
    steps = count_steps(index, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    for at in range(len(steps)):
        out = tmp_path / f"failed-{at}"
        error = refused(MachineError, write, index, out, StepDisk(at, io_error))
        assert error.code == "ZI-3102"
        assert_resumes(index, out, whole)


def test_too_small_a_disk_is_refused_before_anything_is_written(index, tmp_path):
    class Small(StepDisk):
        def free_bytes(self, folder):
            return 40_000

    error = refused(BudgetError, write, index, tmp_path / "out", Small())
    assert error.code == "ZI-3101"
    assert "are missing" in error.message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["zinfer.journal"]


def test_what_is_recorded_is_not_written_again(index, tmp_path):
    whole = count_steps(index, tmp_path / "whole", only=("write",))
    refused(BudgetError, write, index, tmp_path / "out", StepDisk(len(whole) - 4, disk_full, only=("write",)))
    assert len(count_steps(index, tmp_path / "out", only=("write",))) == 4 + 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert count_steps(index, tmp_path / "out", only=("write", "rename")) == []


def harm(path, at):
    data = bytearray(path.read_bytes())
    data[at] = (data[at] + 1) % 256
    path.write_bytes(data)


HARMS = {
    "header": lambda path: harm(path, 10),
    "recorded": lambda path: harm(path, PAGE + 10),
    "shorter": lambda path: path.write_bytes(path.read_bytes()[: PAGE + 10]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(100_000)),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("harmed", HARMS.values(), ids=list(HARMS))
def test_a_partial_shard_that_was_harmed_is_written_anew_where_it_must(index, tmp_path, harmed):
    write(index, tmp_path / "whole")
    out = tmp_path / "out"
    # Stopped twice: the second time while it mends what is recorded already.
    for at in (10, 4):
        refused(BudgetError, write, index, out, StepDisk(at, disk_full, only=("write",)), sync_bytes=1)
        (partial,) = out.glob("*.partial")
        assert partial.read_bytes()[:PAGE].rstrip().endswith(b"}"), "the header is there"
        assert journaled(out) >= 2
        harmed(partial)
    write(index, out, sync_bytes=1)
    assert contents(out) == contents(tmp_path / "whole")


def test_memory_does_not_grow_with_the_model(tmp_path):
    spec = tiny_spec(layers=1, width=2048, mlp=6000, vocab=8192, blocks=1)
    index = model(tmp_path / "model", spec, num_shards=1)
    assert index.weight_bytes > 80 * 2**20
    tracemalloc.start()
    try:
        write(index, tmp_path / "out", spec=spec, shard_bytes=2**31, sync_bytes=2**26)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()


def test_progress_ends_where_it_said(index, tmp_path):
    heard = []
    write(index, tmp_path / "out", progress=lambda *what: heard.append(what))
    assert [done for done, _, _ in heard] == sorted(done for done, _, _ in heard)
    assert len({total for _, total, _ in heard}) == 1
    assert heard[-1][0] == heard[-1][1]


def test_3001_another_folder_is_not_written_over(index, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    error = refused(UsageError, write, index, tmp_path / "out")
    assert (error.code, error.remedy) == ("ZI-3001", f"--out {tmp_path / 'out-zinfer'}"), (
        "no word of removing it"
    )
    other = model(tmp_path / "other", tiny_spec())
    write(other, tmp_path / "store", spec=tiny_spec())
    assert refused(UsageError, write, index, tmp_path / "store").code == "ZI-3001"
    refused(BudgetError, write, index, tmp_path / "half", StepDisk(5, disk_full, only=("write",)))
    assert refused(UsageError, write, other, tmp_path / "half", spec=tiny_spec()).code == "ZI-3001"
    os.utime(index.files[0], (1, 1))
    assert refused(UsageError, write, index, tmp_path / "half").code == "ZI-3001"


def test_3002_the_models_own_folder(index):
    assert refused(UsageError, write, index, index.folder).code == "ZI-3002"


def test_3003_one_writer_at_a_time(index, tmp_path):
    refused(BudgetError, write, index, tmp_path / "out", StepDisk(5, disk_full, only=("write",)))
    identity = json.loads((tmp_path / "out" / "zinfer.journal").read_bytes().split(b"\n")[0][17:])["identity"]
    first = Journal(tmp_path / "out" / "zinfer.journal", identity, Disk())
    try:
        assert refused(UsageError, write, index, tmp_path / "out").code == "ZI-3003"
    finally:
        first.close()
    write(index, tmp_path / "out")


@pytest.mark.parametrize("target", ["header", "weights", "pad", "tokenizer.json"])
def test_a_flipped_bit_is_found_with_file_and_block(index, tmp_path, target):
    out = tmp_path / "out"
    write(index, out)
    table = load_store(out, 1)
    chunk = table.chunks[-1]
    path = out / target if target.endswith(".json") else table.files[chunk.reads[0].file]
    at = {"header": 20, "weights": chunk.reads[0].offset, "pad": path.stat().st_size - 1}.get(target, 3)
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)
    (found,) = verify_store(out)
    assert found.file == path.name
    assert found.offset <= at < found.offset + found.nbytes
    assert found.expected != found.found


def test_a_block_that_cannot_be_read_is_reported_and_the_rest_still_checked(index, tmp_path, monkeypatch):
    write(index, tmp_path / "out")
    pread, calls = os.preadv, []

    def failing(fd, buffers, offset):
        calls.append(offset)
        if len(calls) == 8:
            raise OSError(5, "Input/output error")
        return pread(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    (found,) = verify_store(tmp_path / "out")
    assert "Input/output error" in found.found
    assert found.offset == calls[7]


def test_provenance(index, tmp_path):
    write(index, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "zinfer.json").read_bytes())
    for record, path in zip(manifest["sources"], index.files, strict=True):
        assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert check_sources(tmp_path / "out", index.folder) == ()
    index.files[1].unlink()
    (missing,) = check_sources(tmp_path / "out", index.folder)
    assert missing.file == "m1.safetensors"


def test_6003_a_program_that_cuts_otherwise(index, tmp_path):
    write(index, tmp_path / "out")
    store = CheckpointIndex.open(tmp_path / "out")
    assert refused(IntegrityError, open_store, store, tiny_spec(width=40, mlp=64, blocks=3)).code == "ZI-6003"


def test_6004_and_6005_files_that_are_not_those(index, tmp_path):
    out = tmp_path / "out"
    write(index, out)
    path = next(out.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(IntegrityError, load_store, out).code == "ZI-6004"
    path.unlink()
    assert refused(IntegrityError, load_store, out).code == "ZI-6004"
    write(index, tmp_path / "again")
    config = tmp_path / "again" / "config.json"
    config.write_bytes(config.read_bytes().replace(b"n", b"m", 1))
    assert refused(IntegrityError, load_store, tmp_path / "again").code == "ZI-6005"


LIES = {
    "version": ("ZI-6003", lambda m: m.update(version=2)),
    "layout": ("ZI-6003", lambda m: m.update(layout="rows-v9")),
    "weights": ("ZI-6003", lambda m: m.update(weights="int4")),
    "format": ("ZI-6002", lambda m: m.update(format="other")),
    "unknown key": ("ZI-6002", lambda m: m.update(extra=1)),
    "missing key": ("ZI-6002", lambda m: m.pop("rows")),
    "shard elsewhere": ("ZI-4010", lambda m: m["shards"][0].update(name="../x")),
    "shard size": ("ZI-6004", lambda m: m["shards"][0].update(nbytes=2**40)),
    "no such shard": ("ZI-6002", lambda m: m["extents"][0].update(shard=99)),
    "negative": ("ZI-6002", lambda m: m["extents"][0].update(offset=-4096)),
    "text": ("ZI-6002", lambda m: m["extents"][0].update(offset="4096")),
    "into the header": ("ZI-6002", lambda m: m["extents"][0].update(offset=0)),
    "unaligned extent": ("ZI-6002", lambda m: m["extents"][-1].update(nbytes=100)),
    "extent behind the end": ("ZI-6002", lambda m: m["extents"][-1].update(offset=2**40)),
    "overlap": ("ZI-6002", lambda m: m["extents"][1].update(offset=m["extents"][0]["offset"])),
    "blocks": ("ZI-6002", lambda m: m["extents"][0].update(blocks=[])),
    "hash": ("ZI-6002", lambda m: m["extents"][0].update(blocks=["xyz"])),
    "order": ("ZI-6002", lambda m: m["extents"][-1].update(op=1)),
    "nothing": ("ZI-6002", lambda m: m["extents"][-1].update(slices=[])),
    "slice outside": ("ZI-6002", lambda m: m["extents"][-1]["slices"][0].update(offset=0)),
    "slice unaligned": ("ZI-6002", lambda m: _shift(m["extents"][-1]["slices"][0], 2)),
    "slice shape": ("ZI-6002", lambda m: m["extents"][0]["slices"][0].update(shape=[9, 41])),
    "slice rows": ("ZI-6002", lambda m: m["extents"][0]["slices"][0].update(stop=7)),
    "slice dtype": ("ZI-6002", lambda m: m["extents"][0]["slices"][0].update(dtype="BF16")),
    "rows outside": ("ZI-6002", lambda m: m["rows"][0].update(num_rows=2**40)),
    "rows hashes": ("ZI-6002", lambda m: m["rows"][0].update(digests="00" * 8)),
    "not filled": ("ZI-6002", lambda m: m["extents"][-1]["slices"].pop(0)),
    "far apart": ("ZI-6002", lambda m: m["extents"][-1]["slices"].pop()),
    "rows shape": ("ZI-6002", lambda m: m["rows"][0].update(row_shape=[3])),
}


def _shift(record, by):
    record["offset"] += by


@pytest.mark.parametrize(("code", "lie"), LIES.values(), ids=list(LIES))
def test_a_lying_manifest_is_refused(index, tmp_path, code, lie):
    out = tmp_path / "out"
    write(index, out)
    manifest = json.loads((out / "zinfer.json").read_bytes())
    lie(manifest)
    (out / "zinfer.json").write_text(json.dumps(manifest))
    assert refused(ZinferError, load_store, out).code == code


@given(st.data())
def test_a_mutated_manifest_gives_a_refusal_or_a_table(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    if not folder.exists():
        write(model(tmp_path_factory.getbasetemp() / "mutated-model"), folder)
        (folder / "honest").write_bytes((folder / "zinfer.json").read_bytes())
    text = bytearray((folder / "honest").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.sampled_from(list(b'0129-a"[]{},:. ')))
    (folder / "zinfer.json").write_bytes(text)
    try:
        table = load_store(folder)
    except ZinferError:
        return
    for chunk in table.chunks:
        fetch(chunk, table.files)


def test_shard_takes_a_folder_and_refuses_what_there_is_nothing_of(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert refused(CheckpointError, shard, tmp_path, tmp_path / "out").code == "ZI-4020"
