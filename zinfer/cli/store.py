"""`zinfer shard`, `verify`, `inspect`.  In: a checkpoint or store.  Out: a store, its damage, its description."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zinfer.checkpoint.describe import describe
from zinfer.checkpoint.folder import open_folder
from zinfer.checkpoint.index import STORE_FILE, CheckpointIndex
from zinfer.chunks.encode import Encoder
from zinfer.chunks.manifest import Manifest, read_manifest
from zinfer.chunks.quality import Quality, check_quality
from zinfer.chunks.store import check_sources, verify_store
from zinfer.chunks.store import shard as write_shards
from zinfer.cli.progress import Progress
from zinfer.errors import IntegrityError, UsageError
from zinfer.spec.lossless import LOSSLESS
from zinfer.spec.quant import PANELS
from zinfer.spec.read import read_spec
from zinfer.spec.records import ModelSpec
from zinfer.spec.stored import FORMATS, PUBLISHED, RMS_LIMITS, STORED_BYTES, as_stored, layouts
from zinfer.units import Bytes, rate_text, seconds_text

if TYPE_CHECKING:
    from zinfer.jobs.perplexity import Perplexity


text_option = click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Of quantised weights: also measure perplexity on this text (default: heldout.txt beside the model).",
)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the store to write.")
@click.option(
    "--weights",
    type=click.Choice([PUBLISHED, *FORMATS]),
    help="The format of the matrices: lossless keeps every bit of bf16 in 3/4 of the bytes, int8 and int4 round.  "
    "Norms and embeddings stay as published; a store keeps its own.",
)
@click.option(
    "--layout",
    type=click.Choice(["auto", *PANELS]),
    default="auto",
    show_default=True,
    help="The kernel that reads quantised weights; auto: this machine's.",
)
@text_option
def shard(model: Path, out: Path, weights: str | None, layout: str, text: Path | None) -> None:
    """Write MODEL as a store: aligned for direct reads, checksummed, resumable, packed or quantised with --weights.

    Interrupted at any moment, the same command goes on where it stopped.
    """
    begin_s = time.perf_counter()
    weights = weights or stored_weights(model)
    encoder = None if weights == PUBLISHED else encoder_for(weights, layout)
    with Progress() as progress:
        write_shards(model, out, encoder=encoder, progress=progress)
    nbytes, spent_s = _folder_bytes(out), time.perf_counter() - begin_s
    for line in quality_lines(out):
        click.echo(line)
    if encoder is not None and stored_weights(model) == PUBLISHED:
        with Progress() as progress:
            for line in perplexity_lines(_measured(out, model, text, progress)):
                click.echo(line)
    click.echo(
        f"done       {out}: {Bytes(nbytes)} in {seconds_text(spent_s)} ({rate_text(nbytes / spent_s)})"
    )
    click.echo(f'next       zinfer generate {shlex.quote(str(out))} -p "Once upon a time"')


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    help="Also check that this is the folder it was made from, and how close quantised matrices are.",
)
@text_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def verify(store: Path, source: Path | None, text: Path | None, as_json: bool) -> None:
    """Read every block of STORE and compare it with its checksum."""
    with Progress(quiet=as_json) as progress:
        if source is not None:
            open_folder(source)
        mismatches = list(verify_store(store, progress))
        others = [] if source is None else list(check_sources(store, source, progress))
        quality = [] if others else _checked_quality(store, source, progress)
        is_whole = not (mismatches or others) and all(matrix.is_same for matrix in quality)
        measured = _measured(store, source, text, progress) if source and quality and is_whole else None
    if as_json:
        rows = [
            {"file": m.file, "offset": m.offset, "bytes": m.nbytes, "found": m.found}
            for m in (*mismatches, *others)
        ]
        told = {"store": str(store), "bytes": _folder_bytes(store), "mismatches": rows}
        matrices = [
            {"name": q.name, "rms": q.found.rms, "worst_group": q.found.worst, "written": q.written}
            for q in quality
        ]
        told |= {"quality": matrices} if quality else {}
        click.echo(json.dumps(told | ({"perplexity": measured.to_dict()} if measured else {})))
    for mismatch in mismatches:
        click.echo(
            f"damaged    {mismatch.file} at {mismatch.offset}, {mismatch.nbytes} bytes: {mismatch.found} "
            f"instead of {mismatch.expected}",
            err=True,
        )
    where = shlex.quote(str(store))
    if mismatches:
        raise IntegrityError(
            "ZI-6010",
            f"{len(mismatches)} of the blocks of {store} are not what its manifest promises",
            remedy=f"rm -r {where} && zinfer shard MODEL --out {where}",
        )
    if others:
        raise IntegrityError(
            "ZI-6012",
            f"{len(others)} files of {source} are not those that {store} was made from ({others[0].file}: "
            f"{others[0].found} instead of {others[0].expected}); the store itself is whole",
            remedy=f"--source the folder it was made from, or: zinfer shard {source} --out {where}-new",
        )
    if differing := [matrix for matrix in quality if not matrix.is_same]:
        first = differing[0]
        raise IntegrityError(
            "ZI-6011",
            f"{len(differing)} matrices of {store} are not what was written: {first.name} has a relative RMS error of "
            f"{first.found.rms:.6f} instead of {first.written:.6f}",
            remedy=f"rm -r {where} && zinfer shard MODEL --out {where} --weights FORMAT",
        )
    if not as_json:
        if quality:
            worst = max(quality, key=lambda matrix: matrix.found.rms)
            error = f"relative RMS error at most {worst.found.rms:.4f} ({worst.name}, limit {worst.limit})"
            found = error if worst.limit else "every bit is the published one"
            click.echo(f"quality    {len(quality)} matrices against {source}: {found}")
        for line in perplexity_lines(measured):
            click.echo(line)
        click.echo(
            f"verified   {store}: {Bytes(_folder_bytes(store))}, every block is what its checksum says"
        )


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def inspect(model: Path, tensors: bool, as_json: bool) -> None:
    """Describe MODEL: family, shapes, files, sizes.  Reads headers only."""
    index = CheckpointIndex.open(model)
    spec = read_spec(index.config, index.generation_config, index.dtypes)
    described = describe(index, spec, tensors=tensors)
    if index.is_store:
        described |= described_weights(read_manifest(model), spec)
    if as_json:
        click.echo(json.dumps(described))
        return
    rows = described.pop("tensors", [])
    for name, value in described.items():
        text = Bytes(value) if name.endswith("bytes") else value
        click.echo(
            f"{name.replace('_', ' '):<18} {', '.join(map(str, text)) if isinstance(text, list) else text}"
        )
    for row in rows:
        click.echo(f"  {row['name']:<60} {row['dtype']:<5} {row['shape']}")


def _checked_quality(store: Path, source: Path | None, progress: Progress) -> tuple[Quality, ...]:
    """The quality report of a quantised store whose source is at hand, from the bytes that it holds now."""
    manifest = read_manifest(store)
    if manifest.quantised is None or source is None:
        return ()
    return check_quality(store, source, encoder_for(manifest.weights, manifest.quantised.layout), progress)


def _measured(store: Path, source: Path, text: Path | None, progress: Progress) -> Perplexity | None:
    """The perplexity of a store and its source; None where there is no text for it."""
    from zinfer.jobs.perplexity import compare_perplexity, text_beside

    found = text_beside(source, text)
    return None if found is None else compare_perplexity(store, source, found, watch=progress)


def perplexity_lines(measured: Perplexity | None) -> Iterator[str]:
    """What rounding cost in words, and whether that is more than it should be."""
    if measured is None:
        return
    yield (
        f"perplexity {measured.published:.3f} as published, {measured.stored:.3f} in the store: {measured.rise:+.2%} "
        f"on {measured.num_tokens} tokens of {measured.text} (limit {measured.limit:+.0%})"
    )
    if not measured.is_close:
        yield f"warning    that is above {measured.limit:+.0%}; --weights int8 or published keeps more"


def described_weights(manifest: Manifest, spec: ModelSpec) -> dict[str, Any]:
    """What `inspect` adds for a store: the one format that it holds, and bits per weight, scales included."""
    if manifest.quantised is None:
        return {"weights": manifest.weights}
    ops = [op for op in as_stored(spec, manifest.weights, manifest.quantised.layout).program if op.stored]
    parts = (part for op in ops for part in op.stored if part.dtype)
    nbytes = sum(part.numel * STORED_BYTES[part.dtype] for part in parts)
    numel = sum(op.matrix.numel for op in ops if op.matrix)
    return {
        "weights": manifest.weights,
        "bits_per_weight": round(8 * nbytes / numel, 3) if numel else None,
        "group": manifest.quantised.group,
        "kernel_layout": manifest.quantised.layout,
        "rms_error": max((row.rms for row in manifest.quantised.quality), default=0.0),
    }


def stored_weights(model: Path) -> str:
    """The format that a store holds; of anything else: as published."""
    return read_manifest(model).weights if (model / STORE_FILE).is_file() else PUBLISHED


def encoder_for(weights: str, layout: str) -> Encoder:
    """Who packs or quantises, for this machine's kernel or for a named one."""
    from zinfer.kernels.packer import Packer
    from zinfer.kernels.quantise import Quantiser
    from zinfer.kernels.stored import layout_here

    if layout not in ("auto", *layouts(weights)):
        raise UsageError(
            "ZI-3005",
            f"--weights {weights} has no layout {layout!r}; it has {', '.join(layouts(weights))}",
            remedy="--layout auto",
        )
    return (
        Packer()
        if weights == LOSSLESS
        else Quantiser(weights, layout_here(weights) if layout == "auto" else layout)
    )


def quality_lines(store: Path) -> Iterator[str]:
    """The quality report of a store: what rounding cost, matrix by matrix where it is above the limit."""
    manifest = read_manifest(store)
    if manifest.quantised is None or not manifest.quantised.quality:
        return
    if manifest.weights == LOSSLESS:
        yield f"quality    {len(manifest.quantised.quality)} matrices unpacked again: every bit is the published one"
        return
    rows = sorted(manifest.quantised.quality, key=lambda row: row.rms)
    limit = RMS_LIMITS[manifest.weights]
    yield (
        f"quality    relative RMS error of {len(rows)} matrices: {rows[0].rms:.4f} to {rows[-1].rms:.4f}, "
        f"worst {rows[-1].name} (limit {limit})"
    )
    for row in rows:
        if row.rms > limit:
            yield f"warning    {row.name}: {row.rms:.4f} is above {limit}; --weights int8 or published keeps more"


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
