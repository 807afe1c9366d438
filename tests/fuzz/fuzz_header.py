"""Fuzz the header and index parsers: whatever the bytes, only a ZinferError may come out, soon and in little memory.

usage: fuzz_header.py [--seconds N] [--seed N]        a plain mutation loop over honest inputs
       fuzz_header.py CORPUS [libFuzzer options]      coverage-guided, where atheris is installed
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from checkpoint_files import header_fields, safetensors_bytes  # noqa: E402

from zinfer.checkpoint.header import header_bytes, parse_header  # noqa: E402
from zinfer.checkpoint.index import INDEX_FILE, CheckpointIndex  # noqa: E402
from zinfer.errors import ZinferError  # noqa: E402

SHAPES = {"a": (3, 4), "b": (5,), "c": (0, 7), "d": ()}
DATA_BYTES = 2 * (12 + 5 + 1)
WEIGHT_MAP = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}, "metadata": {"total_size": 40}}
TOKENS = b'{ } [ ] " : , 0 1 -1 1e9 9223372036854775808 null true NaN "a" "BF16" "F4" "U8" \\ud800 ../ \0 \xff'.split()
MAX_SECONDS = 10.0
MAX_BYTES = 2**30


def parse_as_header(data: bytes) -> None:
    """The bytes are a whole file."""
    length = header_bytes(data[:8], len(data), "file")
    entries = parse_header(data[8 : 8 + length], len(data), "file")
    assert sum(entry.nbytes for entry in entries) == len(data) - 8 - length, "accepted what does not add up"


def parse_as_index(data: bytes, folder: Path) -> None:
    """The bytes are model.safetensors.index.json and config.json of a folder without shards."""
    for name in (INDEX_FILE, "config.json"):
        (folder / name).write_bytes(data)
        CheckpointIndex.open(folder)


def try_one(data: bytes, folder: Path) -> None:
    """Feed one input to both parsers; anything but a ZinferError, and anything slow or large, is a find."""
    for parse, arguments in ((parse_as_header, (data,)), (parse_as_index, (data, folder))):
        begin_s = time.perf_counter()
        try:
            parse(*arguments)
        except ZinferError as error:
            assert error.code.startswith("ZI-"), error
            assert error.remedy, error
        assert time.perf_counter() - begin_s < MAX_SECONDS, "too slow"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MAX_BYTES, "too much memory"


def mutated(seeds: list[bytes], rng: random.Random) -> bytes:
    """An honest input with a few bytes, tokens or spans changed; the length in front is mended half of the time."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if data:
                data[at % len(data)] = rng.randrange(256)
            case 1:
                data[at:at] = rng.choice(TOKENS)
            case 2:
                del data[at : at + rng.randint(1, 8)]
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 40)] * rng.randint(1, 3)
            case 4:
                data[at:at] = rng.choice([b"[", b'{"a":', b" "]) * rng.choice([1, 50, 3000])
    if rng.random() < 0.5:
        data[:8] = max(len(data) - 8 - DATA_BYTES, 0).to_bytes(8, "little")
    return bytes(data)


def main() -> None:
    """Run the loop, or hand over to atheris."""
    seeds = [safetensors_bytes(header_fields(SHAPES)), json.dumps(WEIGHT_MAP).encode()]
    seeds.append(safetensors_bytes(header_fields(SHAPES) | {"__metadata__": {"format": "pt"}}, pad=9))
    with tempfile.TemporaryDirectory() as folder:
        try:
            import atheris
        except ImportError:
            atheris = None
        if atheris and len(sys.argv) > 1 and not sys.argv[1].startswith("--"):
            atheris.Setup(sys.argv, lambda data: try_one(data, Path(folder)))
            atheris.Fuzz()
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument("--seconds", type=float, default=60.0)
        parser.add_argument("--seed", type=int, default=0)
        options = parser.parse_args()
        rng, count, end_s = random.Random(options.seed), 0, time.perf_counter() + options.seconds
        while time.perf_counter() < end_s:
            data = mutated(seeds, rng)
            try:
                try_one(data, Path(folder))
            except BaseException:
                Path("found.bin").write_bytes(data)
                print(f"input {count} of seed {options.seed} is a find, kept in found.bin", file=sys.stderr)
                raise
            count += 1
        print(f"{count} inputs, no find")


if __name__ == "__main__":
    main()
