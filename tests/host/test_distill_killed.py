"""`zinfer distill` as a process that is killed with signal 9 in every stage, again and again, and goes on."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from text_models import WORDS, write_encoder

import zinfer
from zinfer.cli.main import run

# A file of each stage, in order: teacher, student 1, student 2, polish, calibration.  The process is killed when one of
# them changes.
MOMENTS = [
    "work/teacher/record.json",
    "work/training.safetensors",
    "work/round-1.safetensors",
    "work/round-2.safetensors",
    "work/polish.safetensors",
]
OPTIONS = [
    "--students",
    "2",
    "--layers",
    "1",
    "--epochs",
    "5",
    "--polish",
    "5",
    "--batch",
    "4",
    "--lr",
    "1e-3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher and a table."""
    folder = tmp_path_factory.mktemp("killed")
    write_encoder("bert", folder / "teacher")
    draw = random.Random(5)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(130)]
    (folder / "train.csv").write_text("text\n" + "\n".join(lines) + "\n")
    return folder


def command(folder, out):
    """As a user gives it; the same again goes on."""
    files = ["--teacher", folder / "teacher", "--data", folder / "train.csv", "--out", out]
    return ["distill", *map(str, files), *OPTIONS, "--resume"]


def hashes(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def state(path):
    """What tells one version of a file from the next."""
    found = path.stat() if path.exists() else None
    return None if found is None else (found.st_mtime_ns, found.st_size)


def killed_when(path, words, environment):
    """Run a command until a file changes; whether the kill came before the end."""
    before = state(path)
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        while process.poll() is None:
            now = state(path)
            if now not in (None, before):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.0005)
        process.communicate(timeout=100)
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(400)  # seven processes, on a machine that may do other work
def test_killed_in_every_stage_it_ends_in_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ZINFER_MACHINE", "sim-default")
    monkeypatch.setenv("ZINFER_DEVICE", "cpu")
    monkeypatch.setenv("ZINFER_RUNTIME_THREADS", "1")
    threads, root = torch.get_num_threads(), str(Path(zinfer.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    assert run(command(folder, tmp_path / "whole")) == 0
    out = tmp_path / "out"
    words = [sys.executable, "-m", "zinfer", *command(folder, out)]
    killed = [moment for moment in MOMENTS if killed_when(out / moment, words, environment)]
    assert run(command(folder, out)) == 0
    torch.set_num_threads(threads)
    assert hashes(out) == hashes(tmp_path / "whole")
    # What follows the polish may be over before it is seen; the stages before it are long.
    assert killed[:4] == MOMENTS[:4]
