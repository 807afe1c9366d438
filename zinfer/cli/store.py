"""`zinfer shard`, `verify`, `inspect`.  In: a checkpoint or store.  Out: a store, its damage, its description."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from zinfer.checkpoint.describe import describe
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.chunks.store import check_sources, verify_store
from zinfer.chunks.store import shard as write_shards
from zinfer.cli.progress import Progress
from zinfer.errors import IntegrityError
from zinfer.spec.read import read_spec
from zinfer.units import Bytes, rate_text, seconds_text


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the store to write.")
def shard(model: Path, out: Path) -> None:
    """Write MODEL as a store: aligned for direct reads, checksummed, resumable.

    Interrupted at any moment, the same command goes on where it stopped.
    """
    begin_s = time.perf_counter()
    with Progress() as progress:
        write_shards(model, out, progress=progress)
    nbytes, spent_s = _folder_bytes(out), time.perf_counter() - begin_s
    click.echo(
        f"done       {out}: {Bytes(nbytes)} in {seconds_text(spent_s)} ({rate_text(nbytes / spent_s)})"
    )
    click.echo(f'next       zinfer generate {out} -p "Once upon a time"')


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--source", type=click.Path(path_type=Path), help="Also check that this is the folder it was made from."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def verify(store: Path, source: Path | None, as_json: bool) -> None:
    """Read every block of STORE and compare it with its checksum."""
    with Progress(quiet=as_json) as progress:
        mismatches = list(verify_store(store, progress))
        if source is not None:
            mismatches += check_sources(store, source, progress)
    if as_json:
        rows = [{"file": m.file, "offset": m.offset, "bytes": m.nbytes, "found": m.found} for m in mismatches]
        click.echo(json.dumps({"store": str(store), "bytes": _folder_bytes(store), "mismatches": rows}))
    for mismatch in mismatches:
        click.echo(
            f"damaged    {mismatch.file} at {mismatch.offset}, {mismatch.nbytes} bytes: {mismatch.found} "
            f"instead of {mismatch.expected}",
            err=True,
        )
    if mismatches:
        raise IntegrityError(
            "ZI-6010",
            f"{len(mismatches)} of the blocks of {store} are not what its manifest promises",
            remedy=f"rm -r {store} && zinfer shard MODEL --out {store}",
        )
    if not as_json:
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


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
