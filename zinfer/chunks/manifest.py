"""The manifest of a store, `zinfer.json`.  In: its bytes, from whoever wrote them.  Out: a Manifest that adds up."""

from __future__ import annotations

import math
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zinfer.checkpoint.folder import ModelFolder, open_folder
from zinfer.checkpoint.header import DTYPE_BITS
from zinfer.checkpoint.index import CONFIG_FILE, STORE_FILE, refuse_unfinished
from zinfer.checkpoint.read import read_range, regular_size, sha256_file
from zinfer.checkpoint.strict_json import MAX_JSON_BYTES, parse_object
from zinfer.chunks.layout import LAYOUT_ID, Layout, extent_bytes, extent_start
from zinfer.chunks.source import Place, Source, Unit
from zinfer.chunks.table import ALIGN, PAGE, PIECE_BYTES, RowTable
from zinfer.errors import IntegrityError
from zinfer.spec.stored import FORMATS, PARTS, PUBLISHED, layouts, part_of, shared_weights

VERSION = 1

Count = Annotated[int, Field(ge=0, lt=2**63)]
Xxh3 = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Record):
    """A file by name, size and hash: a published source, or a config or tokenizer file beside the shards."""

    name: str
    nbytes: Count
    sha256: Sha256


class ShardRecord(_Record):
    """A weight file; its first `header_bytes` are the safetensors header with its length in front."""

    name: str
    nbytes: Count
    header_bytes: Count
    header: Xxh3


class SliceRecord(_Record):
    """Rows [start, stop) of a published tensor at `offset` of the shard."""

    name: str
    start: Count
    stop: Count
    shape: tuple[Count, ...]
    dtype: str
    offset: Count
    nbytes: Count


class ExtentRecord(_Record):
    """What one op reads, or a row table (op null): a run of pages, hashed in blocks of at most PIECE_BYTES."""

    shard: Count
    offset: Count
    nbytes: Count
    op: Count | None
    layer: int
    slices: tuple[SliceRecord, ...]
    blocks: tuple[Xxh3, ...]


class RowsRecord(_Record):
    """An embedding table: row r lies r * row_bytes behind `offset` of the shard.

    Rows are read one by one, so each has a hash of its own.
    """

    name: str
    shard: Count
    offset: Count
    row_bytes: Count
    num_rows: Count
    row_shape: tuple[Count, ...]
    dtype: str
    digests: Annotated[str, Field(pattern="^([0-9a-f]{16})*$")]  # one after another


class QualityRecord(_Record):
    """How far a quantised matrix is from the published one: relative RMS error, of the whole and of the worst group."""

    name: str
    rms: Annotated[float, Field(ge=0)]
    worst: Annotated[float, Field(ge=0)]


class QuantRecord(_Record):
    """How the matrices are quantised: how many weights share a scale, which kernel reads the layout, what it cost."""

    group: Count
    layout: str
    quality: tuple[QualityRecord, ...]


class Manifest(_Record):
    """Everything that is needed to use and to check a store; written last, it makes the store complete."""

    format: Literal["zinfer-store"] = "zinfer-store"
    version: int = VERSION
    layout: str = LAYOUT_ID
    weights: str = PUBLISHED  # the format of the matrices, or one of FORMATS
    quantised: QuantRecord | None = None  # None: as published
    config_sha256: Sha256
    dtypes: dict[str, str]  # of the published tensors
    sources: tuple[FileRecord, ...]
    files: tuple[FileRecord, ...]
    shards: tuple[ShardRecord, ...]
    rows: tuple[RowsRecord, ...]
    extents: tuple[ExtentRecord, ...]


def extents_of(layout: Layout, blocks: list[list[str]]) -> tuple[ExtentRecord, ...]:
    """The layout's units with the hashes of their blocks, as the manifest has them."""
    return tuple(
        ExtentRecord(
            shard=unit.places[0].file,
            offset=extent_start(unit),
            nbytes=extent_bytes(unit),
            op=unit.op,
            layer=unit.layer,
            slices=tuple(
                SliceRecord(
                    name=place.name,
                    start=place.start,
                    stop=place.stop,
                    shape=place.shape,
                    dtype=place.dtype,
                    offset=place.offset,
                    nbytes=place.nbytes,
                )
                for place in unit.places
            ),
            blocks=tuple(hashes),
        )
        for unit, hashes in zip(layout.settled, blocks, strict=True)
    )


def rows_of(layout: Layout, digests: dict[str, bytes]) -> tuple[RowsRecord, ...]:
    """The layout's row tables with the hashes of their rows, as the manifest has them."""
    return tuple(
        RowsRecord(
            name=table.name,
            shard=table.file,
            offset=table.offset,
            row_bytes=table.row_bytes,
            num_rows=table.num_rows,
            row_shape=table.row_shape,
            dtype=table.dtype,
            digests=digests[table.name].hex(),
        )
        for table in layout.row_tables.values()
    )


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest and the files' names, sizes and config; no weight is read.

    Raises IntegrityError: ZI-6001 unfinished, ZI-6002 a manifest that cannot be, ZI-6003 another version,
    ZI-6004 a file missing or of another size, ZI-6005 another config.json, ZI-6006 quantised for an unknown kernel.
    """
    opened = open_folder(folder)
    refuse_unfinished(opened)
    path = opened.file(STORE_FILE)
    if path is None:
        raise refusal("ZI-6002", folder, f"has no {STORE_FILE}: not a zinfer store")
    try:
        raw = read_range(path, 0, min(regular_size(path), MAX_JSON_BYTES + 1))
        fields = parse_object(raw)
        if fields.get("format") == "zinfer-store" and fields.get("version") != VERSION:
            found = f"is a store of version {fields.get('version')!r}, this zinfer reads {VERSION}"
            raise refusal("ZI-6003", folder, found)
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise refusal("ZI-6002", folder, f"{STORE_FILE}: {where}: {first['msg']}") from None
    except ValueError as error:
        raise refusal("ZI-6002", folder, f"{STORE_FILE}: {error}") from None
    _check_format(manifest, folder)
    _check_extents(manifest, folder)
    _check_files(manifest, opened)
    return manifest


def _check_format(manifest: Manifest, folder: Path) -> None:
    quantised = manifest.quantised
    known = FORMATS if quantised else (PUBLISHED,)
    if manifest.layout != LAYOUT_ID or manifest.weights not in known:
        found = f"has the layout {manifest.layout!r} with weights {manifest.weights!r}"
        raise refusal("ZI-6003", folder, f"{found}; this zinfer reads {LAYOUT_ID!r} with {', '.join(known)}")
    known_layouts = layouts(manifest.weights)
    if quantised and (
        quantised.group != shared_weights(manifest.weights) or quantised.layout not in known_layouts
    ):
        found = f"its {manifest.weights} weights are in groups of {quantised.group} for {quantised.layout!r}"
        reads = (
            f"this zinfer reads groups of {shared_weights(manifest.weights)} for {', '.join(known_layouts)}"
        )
        fresh = shlex.quote(f"{folder}-new")
        raise IntegrityError(
            "ZI-6006",
            f"{folder}: {found}; {reads}",
            remedy=f"zinfer shard MODEL --out {fresh} --weights {manifest.weights}   # MODEL: the published folder",
        )


def source_of(manifest: Manifest, folder: Path) -> Source:
    """The store as something to pack: one run of pages per op, cut where its blocks were hashed."""
    units, blocks = [], {}
    for extent in manifest.extents:
        places = tuple(
            Place(
                piece.name,
                piece.start,
                piece.stop,
                piece.shape,
                piece.dtype,
                extent.shard,
                piece.offset,
                piece.nbytes,
            )
            for piece in extent.slices
        )
        units.append(Unit(extent.op, extent.layer, places))
        for number, block in enumerate(extent.blocks):
            at = number * PIECE_BYTES
            nbytes = min(PIECE_BYTES, extent.nbytes - at)
            blocks[extent.shard, extent.offset + at] = (nbytes, int(block, 16))
    tables = {
        rows.name: RowTable(
            rows.name,
            rows.shard,
            rows.offset,
            rows.row_bytes,
            rows.num_rows,
            rows.row_shape,
            rows.dtype,
            bytes.fromhex(rows.digests),
        )
        for rows in manifest.rows
    }
    files = tuple((folder / shard.name).resolve() for shard in manifest.shards)
    sizes = tuple(shard.nbytes for shard in manifest.shards)
    return Source(files, sizes, tuple(units), tables, blocks)


def _check_extents(manifest: Manifest, folder: Path) -> None:
    """Extents and slices are aligned, inside what holds them, and share no byte; sizes follow from shapes."""

    def demand(is_right: bool, what: str) -> None:
        if not is_right:
            raise refusal("ZI-6002", folder, f"{STORE_FILE}: {what}")

    ends = [shard.header_bytes for shard in manifest.shards]
    outputs = layouts(manifest.weights)[manifest.quantised.layout] if manifest.quantised else 1
    last_op = -1
    for number, extent in enumerate(manifest.extents):
        demand(extent.shard < len(ends), f"extent {number} lies in no shard")
        demand(extent.offset >= ends[extent.shard], f"extent {number} overlaps what is before it")
        demand(extent.offset % PAGE == extent.nbytes % PAGE == 0, f"extent {number} is not cut at pages")
        ends[extent.shard] = extent.offset + extent.nbytes
        demand(len(extent.blocks) == -(-extent.nbytes // PIECE_BYTES), f"extent {number} lacks hashes")
        demand(extent.op is None or extent.op > last_op, f"op {extent.op} stands in no order")
        last_op = last_op if extent.op is None else extent.op
        spans = [(piece.offset, piece.offset + piece.nbytes) for piece in extent.slices]
        edges = [*sorted(spans), (ends[extent.shard], 0)]
        demand(bool(spans), f"extent {number} holds nothing")
        # Wider gaps would part the reads from the blocks that were hashed.
        are_close = all(0 <= two[0] - one[1] < PAGE for one, two in pairwise(edges))
        is_filled = edges[0][0] == extent.offset and are_close
        demand(is_filled, f"slices of extent {number} overlap or do not fill it")
        for piece in extent.slices:
            demand(piece.offset % ALIGN == 0, f"{piece.name!r} is not aligned")
            role = part_of(piece.name) if manifest.quantised else ""
            dtype = PARTS[role] if role else manifest.dtypes.get(piece.name)
            demand(piece.dtype == dtype, f"{piece.name!r} has two dtypes")
            # Scales lie as the kernel reads them: the outputs in the second place, by panels.
            count = piece.shape[1:2] if role == "scales" else piece.shape[:1]
            unit = outputs if role == "scales" else 1
            demand(count == ((piece.stop - piece.start) * unit,), f"{piece.name!r} has other rows than shape")
            demand(
                _nbytes(piece.shape, piece.dtype) == piece.nbytes,
                f"{piece.name!r} has another size than shape",
            )
    for shard, end in zip(manifest.shards, ends, strict=True):
        demand(
            end <= shard.nbytes and shard.header_bytes % PAGE == 0, f"{shard.name!r} ends before its extents"
        )
    for rows in manifest.rows:
        is_inside = (
            rows.shard < len(ends) and rows.offset + rows.num_rows * rows.row_bytes <= ends[rows.shard]
        )
        demand(is_inside, f"the rows of {rows.name!r} leave their shard")
        demand(len(rows.digests) == 16 * rows.num_rows, f"the rows of {rows.name!r} lack hashes")
        demand(
            _nbytes(rows.row_shape, rows.dtype) == rows.row_bytes,
            f"{rows.name!r} has another size than shape",
        )


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * DTYPE_BITS.get(dtype, 0) // 8


def _check_files(manifest: Manifest, folder: ModelFolder) -> None:
    wanted = {record.name: record.nbytes for record in manifest.shards}
    wanted |= {record.name: record.nbytes for record in manifest.files}
    for name, nbytes in wanted.items():
        path = folder.file(name)
        found = None if path is None else regular_size(path)
        if found != nbytes:
            what = "is missing" if found is None else f"has {found} bytes instead of {nbytes}"
            raise refusal("ZI-6004", folder.path, f"{name!r} {what}")
    config = folder.file(CONFIG_FILE)
    if config is None or sha256_file(config) != manifest.config_sha256:
        raise refusal("ZI-6005", folder.path, f"{CONFIG_FILE} is not the one that this store was made with")


def refusal(code: str, folder: Path, what: str) -> IntegrityError:
    """A store that must not be used."""
    fresh = shlex.quote(f"{folder}-new")
    return IntegrityError(code, f"{folder}: {what}", remedy=f"zinfer shard MODEL --out {fresh}")
