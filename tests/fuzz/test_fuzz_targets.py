"""The fuzz targets run, and would tell."""

import random

import pytest
from checkpoint_files import header_fields, safetensors_bytes
from fuzz import fuzz_header


def test_the_header_target_finds_nothing_in_a_short_run(tmp_path):
    rng, seeds = (
        random.Random(1),
        [safetensors_bytes(header_fields(fuzz_header.SHAPES)), b'{"weight_map": {}}'],
    )
    for _ in range(300):
        fuzz_header.try_one(fuzz_header.mutated(seeds, rng), tmp_path)


def test_the_header_target_tells_of_a_crash(tmp_path, monkeypatch):
    def crash(*_):
        raise KeyError("dtype")

    monkeypatch.setattr(fuzz_header, "parse_header", crash)
    with pytest.raises(KeyError):
        fuzz_header.try_one(safetensors_bytes(header_fields(fuzz_header.SHAPES)), tmp_path)
