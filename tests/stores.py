"""Stores as tests look at them: their bytes, their spec, and checksums made to fit whatever they hold."""

import json

from xxhash import xxh3_64_hexdigest

from zinfer.checkpoint.index import CheckpointIndex
from zinfer.chunks.store import open_store
from zinfer.chunks.table import PIECE_BYTES
from zinfer.spec.read import read_spec


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def opened(store):
    index = CheckpointIndex.open(store)
    return open_store(index, read_spec(index.config, index.generation_config, index.dtypes))


def rehash(store):
    """Make the checksums agree with whatever the shards hold now."""
    manifest = json.loads((store / "zinfer.json").read_bytes())
    for extent in manifest["extents"]:
        data = (store / manifest["shards"][extent["shard"]]["name"]).read_bytes()
        data = data[extent["offset"] : extent["offset"] + extent["nbytes"]]
        extent["blocks"] = [
            xxh3_64_hexdigest(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES)
        ]
    (store / "zinfer.json").write_text(json.dumps(manifest))
