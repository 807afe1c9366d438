"""The kernels' benchmark: carried out whole at tiny shapes in Triton's interpreter, and honest about it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton (pip install 'zinfer[dev]')")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "kernels.py"


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_checks_every_kernel_and_marks_its_record(tmp_path):
    done = run("--dry-run", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["bench"] == "gpu_kernels_dry_run"
    assert not record["comparable"]
    assert "no figure means anything" in record["notes"][0]
    names = {row["name"].split(" x")[0] for row in record["rows"]}
    products = {"int8 product", "int4 product", "published product"}
    assert names == {"norm", "rotate", "gate", "attention"} | products
    assert all(0 < row["error"] < 0.06 for row in record["rows"])
    assert all(row["limit_s"] > 0 and row["kernel_s"]["repeats"] == 3 for row in record["rows"])


def test_without_a_gpu_there_is_no_figure(tmp_path):
    done = run("--results", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no figure" in done.stderr
    assert not list(tmp_path.iterdir())
