"""Write a seeded random checkpoint at a published model's shape, for measuring.

usage: make_checkpoint.py --shape llama-3.2-1b --out DIR [--seed N] [--dtype bf16|f16|f32] [--layers N]

The shapes are the config.json files in configs/shapes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from zinfer.checkpoint.synthetic import write_checkpoint
from zinfer.spec.read import read_spec
from zinfer.units import Bytes, rate_text

SHAPES = Path(__file__).resolve().parents[1] / "configs" / "shapes"
LAYER_KEYS = ("num_hidden_layers", "n_layer")
DTYPES = {"bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16"), "f32": ("F32", "float32")}


def shape_config(shape: str, layers: int | None = None, dtype: str | None = None) -> dict[str, Any]:
    """The published config.json, with as many layers and the dtype that are wanted."""
    config: dict[str, Any] = json.loads((SHAPES / f"{shape}.json").read_text(encoding="utf-8"))
    if layers is not None:
        config[next(key for key in LAYER_KEYS if key in config)] = layers
    if dtype is not None:
        config["torch_dtype"] = DTYPES[dtype][1]
    return config


def main() -> None:
    """Parse the command line and write."""
    names = sorted(path.stem for path in SHAPES.glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", required=True, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--layers", type=int, help="how many layers instead of the published number")
    options = parser.parse_args()
    config = shape_config(options.shape, options.layers, options.dtype)
    begin_s = time.perf_counter()
    write_checkpoint(read_spec(config), config, options.out, options.seed, DTYPES[options.dtype][0])
    seconds = time.perf_counter() - begin_s
    nbytes = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    print(f"{options.out}: {Bytes(nbytes)} in {seconds:.1f} s, {rate_text(nbytes / seconds)}")


if __name__ == "__main__":
    main()
