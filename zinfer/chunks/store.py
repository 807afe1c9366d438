"""The store's faces.  In: a checkpoint and a folder, or a store.  Out: a store, its chunks, what in it is damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from zinfer.checkpoint.check import check_weights
from zinfer.checkpoint.index import CONFIG_FILE, JOURNAL_FILE, STORE_FILE, CheckpointIndex
from zinfer.checkpoint.read import read_blocks, sha256_file
from zinfer.chunks.disk import Disk
from zinfer.chunks.encode import Encoder
from zinfer.chunks.encoding import Encoding
from zinfer.chunks.journal import Journal, occupied
from zinfer.chunks.layout import SHARD_BYTES, Layout, lay_out
from zinfer.chunks.manifest import Manifest, extents_of, read_manifest, refusal, source_of
from zinfer.chunks.pack import assemble
from zinfer.chunks.source import Source, checkpoint_source
from zinfer.chunks.table import PIECE_BYTES, ChunkTable
from zinfer.chunks.writer import Progress, StoreWriter, disk_full
from zinfer.errors import CheckpointError, MachineError, UsageError, ZinferError
from zinfer.spec.read import read_spec
from zinfer.spec.records import ModelSpec, Op, RowLookup
from zinfer.spec.stored import PUBLISHED, as_stored
from zinfer.units import MIB

SYNC_BYTES = 64 * MIB  # what an interruption may cost
DEFAULT_LIMIT = 256 * MIB
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def silent(_done: int, _total: int, _what: str) -> None:
    """Progress that nobody watches."""


def open_store(index: CheckpointIndex, spec: ModelSpec) -> tuple[ModelSpec, Source]:
    """A finished store as something to pack, and the spec with what it holds: quantised where it is.

    A store has one format (`spec.weights`); another format is another store.  Raises IntegrityError ZI-6001 to
    ZI-6006 as `read_manifest`, ZI-6003 where the program cuts otherwise.
    """
    manifest = read_manifest(index.folder)
    if manifest.quantised is not None:
        spec = as_stored(spec, manifest.weights, manifest.quantised.layout)
    source = source_of(manifest, index.folder)
    wanted = [(op.index, {part.key for part in op.reads}) for op in spec.program if op.reads]
    held = [(u.op, {place.key for place in u.places}) for u in source.units if u.op is not None]
    if wanted != held:
        raise refusal("ZI-6003", index.folder, "was cut into other ops than this zinfer computes")
    return spec, source


def load_store(folder: str | Path, limit: int = DEFAULT_LIMIT) -> ChunkTable:
    """Chunks of at most `limit` bytes: one run of pages each, no moves, a digest for every read.

    The store fixes the ops, not the chunks: any limit will do.  Raises IntegrityError as `store_source`.
    """
    folder = Path(folder)
    return assemble(source_of(read_manifest(folder), folder), limit)


def shard(
    model: str | Path,
    out: str | Path,
    *,
    encoder: Encoder | None = None,
    progress: Progress = silent,
    disk: Disk | None = None,
) -> None:
    """`zinfer shard`: check the model folder, then `write_store`, quantised where an encoder is given.

    A store that is quantised in the encoder's format is laid out anew for its kernel, not rounded again.  Raises what
    its parts raise, each with a code.
    """
    index = CheckpointIndex.open(model)
    origin = read_manifest(index.folder) if index.is_store else None
    if not (index.weights or (origin and encoder)):
        raise CheckpointError(
            "ZI-4020",
            f"{model} is {'a zinfer store already' if index.is_store else 'only a config.json'}: nothing to shard",
            remedy=f"zinfer inspect {shlex.quote(str(model))}",
        )
    if origin and encoder and origin.weights not in (PUBLISHED, encoder.weights):
        raise UsageError(
            "ZI-3004",
            f"{model} holds {origin.weights} weights: rounding them again to {encoder.weights} would cost twice",
            remedy=f"zinfer shard PUBLISHED --out {shlex.quote(str(out))} --weights {encoder.weights}",
        )
    spec = read_spec(index.config, index.generation_config, index.dtypes)
    if origin is None:
        check_weights(index, spec)
    if encoder is not None:
        spec = as_stored(spec, encoder.weights, encoder.layout)
        if not any(op.stored for op in spec.program):
            raise UsageError(
                "ZI-3006",
                f"{model} ({spec.stored_dtype or spec.dtype}) holds no matrix that can be stored as {encoder.weights}",
                remedy=f"zinfer shard {shlex.quote(str(model))} --out {shlex.quote(str(out))}   # as published",
            )
    write_store(
        spec.program, spec.lookups, index, out, progress=progress, disk=disk, encoder=encoder, origin=origin
    )


def write_store(
    program: Sequence[Op],
    lookups: Sequence[RowLookup],
    index: CheckpointIndex,
    out: str | Path,
    *,
    progress: Progress = silent,
    disk: Disk | None = None,
    encoder: Encoder | None = None,
    origin: Manifest | None = None,
    shard_bytes: int = SHARD_BYTES,
    sync_bytes: int = SYNC_BYTES,
) -> None:
    """Write the checkpoint behind `index` as a store to the folder `out`, or go on with one that was interrupted.

    Where the program's ops have `stored` parts the `encoder` makes them.  `origin`: the manifest, where `index` is a
    store itself.  Needs the memory of one block, quantising
    that of a few ops, whatever the model's size.  What the journal has is not written again.
    Raises UsageError ZI-3001 to ZI-3003 (`out` holds something else, is the model's own folder, is being written),
    BudgetError ZI-3101 (disk full, found before or while writing), MachineError ZI-3102 (the disk fails).
    """
    out, disk = Path(out), disk or Disk()
    if out.resolve() == index.folder.resolve():
        raise UsageError(
            "ZI-3002", f"{out} is the model's own folder", remedy=f"--out {shlex.quote(f'{out}-zinfer')}"
        )
    source = source_of(origin, index.folder) if origin else checkpoint_source(program, lookups, index)
    layout = lay_out(source, shard_bytes, program=program)
    quality = origin.quantised.quality if origin and origin.quantised else ()
    encoding = Encoding(encoder, program, quality) if encoder else None
    writer = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        disk.sync_folder(out.parent)
        names = os.listdir(out)
        if STORE_FILE in names:
            _accept_finished(read_manifest(out), layout, index, out, disk, encoder, origin)
            return
        if names and JOURNAL_FILE not in names:
            raise occupied(out, "is not empty, and what it holds is no store", is_ours=False)
        with closing(Journal(out / JOURNAL_FILE, _identity(layout, index), disk)) as journal:
            writer = StoreWriter(
                layout, source, index, out, journal, disk, progress, sync_bytes, encoding, origin
            )
            writer.run()
    except OSError as error:
        if error.errno in DISK_FULL:
            left = writer.bytes_to_write() if writer else sum(plan.nbytes for plan in layout.shards)
            here = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
            raise disk_full(out, left, disk.free_bytes(here)) from error
        raise MachineError(
            "ZI-3102",
            f"{out} cannot be written: {error.strerror or error}",
            remedy=f"ls -ld {shlex.quote(str(out))}   # then run the same command: it goes on where it stopped",
        ) from error


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A range of a file whose bytes are not what the manifest says; `found` is a hash, or why it was not read."""

    file: str
    offset: int
    nbytes: int
    expected: str
    found: str


def verify_store(folder: str | Path, progress: Progress = silent) -> tuple[Mismatch, ...]:
    """Read every byte of a finished store and compare; returns all that differs, in file order.

    Raises IntegrityError ZI-6001 to ZI-6005 where already the manifest or a size is wrong.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    total, done = sum(shard.nbytes for shard in manifest.shards), 0
    mismatches = []
    ranges = [(shard.name, 0, shard.header_bytes, [shard.header]) for shard in manifest.shards]
    for extent in manifest.extents:
        name = manifest.shards[extent.shard].name
        ranges.append((name, extent.offset, extent.nbytes, list(extent.blocks)))
    for name, offset, nbytes, blocks in sorted(ranges):
        mismatches += _differing(folder / name, offset, nbytes, blocks)
        done += nbytes
        progress(done, total, name)
    for record in manifest.files:
        found = sha256_file(folder / record.name)
        if found != record.sha256:
            mismatches.append(Mismatch(record.name, 0, record.nbytes, record.sha256, found))
    return tuple(mismatches)


def check_sources(
    folder: str | Path, published: str | Path, progress: Progress = silent
) -> tuple[Mismatch, ...]:
    """Provenance: whether the files in `published` are those that the store was made from, by their SHA-256."""
    records = read_manifest(Path(folder)).sources
    total, done = sum(record.nbytes for record in records), 0
    mismatches = []
    for record in records:

        def advance(nbytes: int, what: str = record.name) -> None:
            nonlocal done
            done += nbytes
            progress(done, total, what)

        try:
            found = sha256_file((Path(published) / record.name).resolve(), advance)
        except ZinferError as error:
            found = error.message
        if found != record.sha256:
            mismatches.append(Mismatch(record.name, 0, record.nbytes, record.sha256, found))
    return tuple(mismatches)


def _differing(path: Path, offset: int, nbytes: int, blocks: list[str]) -> list[Mismatch]:
    found: list[str] = []
    reason = ""
    try:
        found += (xxh3_64_hexdigest(view) for view in read_blocks(path, offset, nbytes))
    except (CheckpointError, MachineError) as error:
        reason = error.message
    found += [reason] * (len(blocks) - len(found))
    return [
        Mismatch(path.name, offset + at, min(PIECE_BYTES, nbytes - at), expected, got)
        for at, expected, got in zip(range(0, nbytes, PIECE_BYTES), blocks, found, strict=False)
        if expected != got
    ]


def _identity(layout: Layout, index: CheckpointIndex) -> str:
    """A hash of everything the store's bytes follow from, and of the times of the files they are copied from."""
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in index.files]
    extents = [extent.model_dump() for extent in extents_of(layout, [[]] * len(layout.settled))]
    text = json.dumps([sha256_file(index.side_files[CONFIG_FILE]), stamps, extents])
    return hashlib.sha256(text.encode()).hexdigest()


def _accept_finished(
    manifest: Manifest,
    layout: Layout,
    index: CheckpointIndex,
    out: Path,
    disk: Disk,
    encoder: Encoder | None,
    origin: Manifest | None,
) -> None:
    """The store is there already, or the folder holds another one."""
    held = [extent.model_copy(update={"blocks": ()}) for extent in manifest.extents]
    sizes = sorted((record.name, record.nbytes) for record in manifest.sources)
    published = list(zip(index.file_names, index.file_sizes, strict=True))
    if origin is not None:
        published = [(record.name, record.nbytes) for record in origin.sources]
    is_same = (
        manifest.weights == (encoder.weights if encoder else PUBLISHED)
        and held == list(extents_of(layout, [[]] * len(layout.settled)))
        and sizes == sorted(published)
        and manifest.config_sha256 == sha256_file(index.side_files[CONFIG_FILE])
    )
    if not is_same:
        raise occupied(out, "holds the store of another model")
    disk.remove(out / JOURNAL_FILE)
