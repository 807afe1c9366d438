"""Bring a store to the disk.  In: a layout, the published files, a journal.  Out: shards, side files, manifest.

Order of what reaches the disk: a shard's blocks, then the journal's word that they are there, then the shard's
final name, at last the manifest.  Nothing in the files depends on time, machine or interruptions.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from pathlib import Path

from xxhash import xxh3_64_digest, xxh3_64_hexdigest

from zinfer.checkpoint.index import CONFIG_FILE, JOURNAL_FILE, STORE_FILE, CheckpointIndex
from zinfer.checkpoint.read import opened, read_blocks, read_into, read_range, regular_size, sha256_file
from zinfer.chunks.disk import Disk
from zinfer.chunks.encode import Misfit
from zinfer.chunks.encoding import Encoding, quantised_name
from zinfer.chunks.journal import Journal, Record
from zinfer.chunks.layout import Layout, ShardPlan, extent_bytes, extent_start
from zinfer.chunks.manifest import FileRecord, Manifest, ShardRecord, extents_of, rows_of
from zinfer.chunks.source import Source
from zinfer.chunks.table import PIECE_BYTES
from zinfer.errors import BudgetError
from zinfer.spec.stored import PUBLISHED, part_of
from zinfer.units import Bytes

Key = tuple[str, int, int]
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done


def disk_full(out: Path, needed: int, free: int) -> BudgetError:
    """The refusal where `needed` bytes are still to be written and the file system has `free`."""
    # A quota or a file-size limit refuses while there is space: then everything that is left is missing.
    missing = needed - free if needed > free else needed
    return BudgetError(
        "ZI-3101",
        f"{out}: {Bytes(needed)} are still to be written, {Bytes(free)} are free: {Bytes(missing)} are missing",
        remedy=f"df -h {shlex.quote(str(out))}   # free space, then run the same command: it goes on from here",
    )


class StoreWriter:
    """One run of `write_store`: brings what is missing to the disk, in the order that the module promises.

    `blocks[i]` are the hashes of extent i's blocks, for the extents that are known to be on the disk, `misfits[i]` how
    far its quantised matrix is from the published one.
    """

    def __init__(
        self,
        layout: Layout,
        source: Source,
        index: CheckpointIndex,
        out: Path,
        journal: Journal,
        disk: Disk,
        progress: Progress,
        sync_bytes: int,
        encoding: Encoding | None = None,
        origin: Manifest | None = None,
    ) -> None:
        self.layout = layout
        self.source = source
        self.index = index
        self.out = out
        self.journal = journal
        self.disk = disk
        self.progress = progress
        self.sync_bytes = sync_bytes
        self.encoding = encoding
        self.origin = origin  # of the store that is the source
        self.buffer = memoryview(bytearray(PIECE_BYTES))
        self.done = 0
        self.total = sum(plan.nbytes for plan in layout.shards)
        self.total += 0 if origin else sum(index.file_sizes)
        self.blocks: list[list[str]] = []
        self.misfits: dict[int, Misfit] = {}
        self.hashes: dict[str, str] = {}
        for record in journal.records:
            if "extent" in record:
                self.blocks[record["extent"] :] = [record["blocks"]]
                if "misfit" in record:
                    self.misfits[record["extent"]] = Misfit(*record["misfit"])
            else:
                self.hashes[record["source"]] = record["sha256"]

    def bytes_to_write(self) -> int:
        """What the disk must still take: files without their partial beginnings, and the small ones."""
        names = set(os.listdir(self.out))
        missing = [plan for plan in self.layout.shards if plan.name not in names]
        partial = [self.out / f"{plan.name}.partial" for plan in missing]
        begun = sum(regular_size(path) for path in partial if path.name in names)
        side = sum(regular_size(path) for path in self.index.side_files.values())
        manifest = 1024 * (1 + len(self.layout.settled))
        return sum(plan.nbytes for plan in missing) - begun + side + manifest

    def run(self) -> None:
        """Shards, side files, hashes of the sources, manifest; at last the journal goes."""
        needed, free = self.bytes_to_write(), self.disk.free_bytes(self.out)
        if needed > free:
            raise disk_full(self.out, needed, free)
        for plan in self.layout.shards:
            self._write_shard(plan)
        files = [self._copy(name, path) for name, path in self.index.side_files.items()]
        published = zip(self.index.file_names, self.index.files, strict=True)
        hashed = (self._hash(name, path) for name, path in published)
        sources = list(self.origin.sources if self.origin else hashed)
        self.disk.sync_folder(self.out)
        manifest = self._manifest(files, sources)
        self._write_file(STORE_FILE, [f"{manifest.model_dump_json()}\n".encode()])
        self.disk.sync_folder(self.out)
        self.disk.remove(self.out / JOURNAL_FILE)
        self.disk.sync_folder(self.out)

    def _write_shard(self, plan: ShardPlan) -> None:
        final = self.out / plan.name
        is_recorded = len(self.blocks) >= plan.units.stop
        if is_recorded and final.is_file() and regular_size(final) == plan.nbytes:
            self._advance(plan.nbytes, plan.name)
            return
        partial = final.with_name(f"{plan.name}.partial")
        fd = self.disk.open(partial)
        try:
            intact, end = self._recheck(partial, plan)
            del self.blocks[intact:]
            self.disk.truncate(fd, end)
            if not end:
                self.disk.write_all(fd, plan.header, 0)
                self.disk.sync_folder(self.out)
            self._advance(end or len(plan.header), plan.name)
            self._write_extents(fd, range(intact, plan.units.stop), plan.name)
        finally:
            os.close(fd)
        self.disk.rename(partial, final)
        self.disk.sync_folder(self.out)

    def _recheck(self, partial: Path, plan: ShardPlan) -> tuple[int, int]:
        """Which extent is the first that must be written, and where the intact part of the file ends.

        The journal's word is checked against the bytes, for a file may have been harmed since.
        """
        size = regular_size(partial)
        if size < len(plan.header) or read_range(partial, 0, len(plan.header)) != plan.header:
            return plan.units.start, 0
        end = len(plan.header)
        recorded = min(len(self.blocks), plan.units.stop)
        for number in range(plan.units.start, recorded):
            nbytes = extent_bytes(self.layout.settled[number])
            if end + nbytes > size:
                return number, end
            found = [xxh3_64_hexdigest(block) for block in read_blocks(partial, end, nbytes)]
            if found != self.blocks[number]:
                return number, end
            end += nbytes
            self.progress(self.done, self.total, f"checking {plan.name}")
        return recorded, end

    def _write_extents(self, fd: int, numbers: range, what: str) -> None:
        pending: list[Record] = []
        unsynced = 0
        for number in numbers:
            record: Record = {"extent": number, "blocks": self._write_extent(fd, number, what)}
            if number in self.misfits:
                record["misfit"] = list(astuple(self.misfits[number]))
            pending.append(record)
            unsynced += extent_bytes(self.layout.settled[number])
            if unsynced >= self.sync_bytes or number == numbers[-1]:
                self.disk.sync(fd)
                self.journal.append(*pending)
                self.blocks += [record["blocks"] for record in pending]
                pending, unsynced = [], 0

    def _write_extent(self, fd: int, number: int, what: str) -> list[str]:
        """Copy one op's weights, or quantise them; returns the hash of each block."""
        settled = self.layout.settled[number]
        parts = self._encoded(number)
        begin, nbytes = extent_start(settled), extent_bytes(settled)
        hashes = []
        for at in range(begin, begin + nbytes, PIECE_BYTES):
            view = self.buffer[: min(PIECE_BYTES, begin + nbytes - at)]
            self._fill(view, at, number, parts)
            hashes.append(xxh3_64_hexdigest(view))
            self.disk.write_all(fd, view, at)
            self._advance(len(view), what)
        return hashes

    def _encoded(self, number: int) -> dict[Key, memoryview]:
        """The parts of an extent that are not published bytes."""
        if self.encoding is None:
            return {}
        published, settled = self.layout.published[number], self.layout.settled[number]
        encoded = self.encoding.encode(published, settled, self.source.files)
        if encoded is None:
            return {}
        if encoded.misfit is not None:
            self.misfits[number] = encoded.misfit
        roles = {part_of(place.name): place.key for place in settled.places}
        return {roles[role]: memoryview(part) for role, part in encoded.parts.items()}

    def _fill(self, view: memoryview, at: int, number: int, parts: Mapping[Key, memoryview]) -> None:
        """What belongs at `at` of the shard: quantised parts, published bytes, zeros between them."""
        published = {place.key: place for place in self.layout.published[number].places}
        filled = 0
        for place in self.layout.settled[number].places:
            start, stop = max(place.offset - at, 0), min(place.end - at, len(view))
            if start >= stop:
                continue
            view[filled:start] = bytes(start - filled)
            skip = at + start - place.offset
            if place.key in parts:
                view[start:stop] = parts[place.key][skip : skip + stop - start]
            else:
                origin = published[place.key]
                path = self.source.files[origin.file]
                with opened(path) as fd:
                    read_into(fd, view[start:stop], origin.offset + skip, path)
            filled = stop
        view[filled:] = bytes(len(view) - filled)

    def _hash(self, name: str, path: Path) -> FileRecord:
        what = f"sha256 of {name}"
        if name in self.hashes:
            self._advance(regular_size(path), what)
        else:
            self.hashes[name] = sha256_file(path, lambda nbytes: self._advance(nbytes, what))
            self.journal.append({"source": name, "sha256": self.hashes[name]})
        return FileRecord(name=name, nbytes=regular_size(path), sha256=self.hashes[name])

    def _copy(self, name: str, path: Path) -> FileRecord:
        nbytes = regular_size(path)
        digest = hashlib.sha256()

        def blocks() -> Iterable[memoryview]:
            for view in read_blocks(path, 0, nbytes):
                digest.update(view)
                yield view

        self._write_file(name, blocks())
        return FileRecord(name=name, nbytes=nbytes, sha256=digest.hexdigest())

    def _write_file(self, name: str, blocks: Iterable[bytes | memoryview]) -> None:
        partial = self.out / f"{name}.partial"
        fd = self.disk.open(partial)
        try:
            self.disk.truncate(fd, 0)
            at = 0
            for block in blocks:
                self.disk.write_all(fd, block, at)
                at += len(block)
            self.disk.sync(fd)
        finally:
            os.close(fd)
        self.disk.rename(partial, self.out / name)

    def _manifest(self, files: list[FileRecord], sources: list[FileRecord]) -> Manifest:
        shards = [
            ShardRecord(
                name=plan.name,
                nbytes=plan.nbytes,
                header_bytes=len(plan.header),
                header=xxh3_64_hexdigest(plan.header),
            )
            for plan in self.layout.shards
        ]
        return Manifest(
            config_sha256=next(record.sha256 for record in files if record.name == CONFIG_FILE),
            dtypes=self.origin.dtypes
            if self.origin
            else {place.name: place.dtype for unit in self.layout.published for place in unit.places},
            weights=self.encoding.encoder.weights if self.encoding else PUBLISHED,
            quantised=self.encoding.record(self._quality()) if self.encoding else None,
            sources=tuple(sources),
            files=tuple(files),
            shards=tuple(shards),
            rows=rows_of(self.layout, self._row_digests()),
            extents=extents_of(self.layout, self.blocks),
        )

    def _quality(self) -> dict[str, Misfit]:
        """By published matrix: its blocks together."""
        quality: dict[str, Misfit] = {}
        for number, misfit in sorted(self.misfits.items()):
            name = quantised_name(self.layout.settled[number])
            quality[name] = quality[name] + misfit if name in quality else misfit
        return quality

    def _row_digests(self) -> dict[str, bytes]:
        """Every row's hash, from the published table: what was written is not believed because it is there."""
        digests = {}
        for table in self.source.row_tables.values():
            path, nbytes = self.source.files[table.file], table.num_rows * table.row_bytes
            hashes = []
            width = table.row_bytes
            for view in read_blocks(path, table.offset, nbytes, max(PIECE_BYTES // width, 1) * width):
                hashes += [xxh3_64_digest(view[at : at + width]) for at in range(0, len(view), width)]
                self.progress(self.done, self.total, f"hashing rows of {table.name}")
            digests[table.name] = b"".join(hashes)
        return digests

    def _advance(self, nbytes: int, what: str) -> None:
        self.done += nbytes
        self.progress(self.done, self.total, what)
