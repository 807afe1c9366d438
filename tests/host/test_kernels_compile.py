"""Triton's kernels compile for GPUs that are not here: the interpreter forgives what the compiler does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton (pip install 'zinfer[dev]')")

SCRIPT = Path(__file__).resolve().parents[1] / "compile_kernels.py"


def compile_kernels(tmp_path, *arguments):
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(SCRIPT.parents[1]),
    }
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path):
    done = compile_kernels(tmp_path, "90", "bf16")
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = Path(SCRIPT.parents[1], "zinfer", "kernels", "jit")
    written = sum(path.read_text().count("\n@triton.jit\n") for path in kernels.glob("*.py"))
    compiled = dict(line.split() for line in done.stdout.splitlines())
    assert len(compiled) == written - 1  # all but what only others call
    assert set(compiled.values()) == {"True"}


def test_a_kernel_that_no_compiler_takes_is_seen(tmp_path):
    done = compile_kernels(tmp_path, "90", "bf16", "planted")
    assert done.returncode == 1
    assert "power of 2" in done.stderr
