"""What `zinfer inspect` tells.  In: an index and its model's spec.  Out: a plain dict, that command's JSON."""

from __future__ import annotations

from typing import Any

from zinfer.checkpoint.index import CheckpointIndex

SHOWN = (
    "architecture",
    "family",
    "dtype",
    "num_parameters",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "vocab_size",
    "max_context",
    "kv_bytes_per_token",
)


def describe(index: CheckpointIndex, spec: object, *, tensors: bool = False) -> dict[str, Any]:
    """Shapes, files and tensors of a folder.

    Keys: folder, kind ("checkpoint" | "store" | "config"), the ModelSpec's fields in SHOWN, num_tensors,
    weight_file_bytes, files, side_files; with `tensors` also tensors, a list of {name, file, offset, nbytes, dtype,
    shape} in file order (empty for a store).
    """
    described: dict[str, Any] = {
        "folder": str(index.folder),
        "kind": "store" if index.is_store else "checkpoint" if index.weights else "config",
        **{name: getattr(spec, name) for name in SHOWN},
        "num_tensors": len(index.dtypes),
        "weight_file_bytes": sum(index.file_sizes),
        "files": list(index.file_names),
        "side_files": sorted(index.side_files),
    }
    if tensors:
        described["tensors"] = [
            {
                "name": entry.name,
                "file": index.file_names[entry.file],
                "offset": entry.offset,
                "nbytes": entry.nbytes,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
            }
            for entry in sorted(index.weights.values(), key=lambda entry: (entry.file, entry.offset))
        ]
    return described
