"""What a user waits for before the first line: `import zinfer` and `--help` load no heavy library.

Checked by the absence of modules, not by seconds: the one is a fact, the other a mood of the machine.
"""

import json
import subprocess
import sys

import pytest

PROBE = """
import contextlib, io, json, sys
sys.argv = ["zinfer", *{words}]
with contextlib.redirect_stdout(io.StringIO()):
    try:
        {statement}
    except SystemExit as end:
        assert not end.code, end
print(json.dumps(sorted(sys.modules)))
"""
IMPORT, RUN = "import zinfer", "from zinfer.cli.main import main; main()"
PEERS = {"accelerate", "airllm", "deepspeed", "transformers"}


def modules_after(statement, *words):
    probe = [sys.executable, "-c", PROBE.format(statement=statement, words=words)]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_importing_zinfer_loads_nothing_heavy():
    assert modules_after(IMPORT) & (PEERS | {"torch", "numpy"}) == set()


@pytest.mark.parametrize("words", [("--help",), ("plan", "--help")], ids=" ".join)
def test_help_loads_nothing_heavy(words):
    assert modules_after(RUN, *words) & (PEERS | {"torch"}) == set()


def test_the_probe_sees_an_import():
    assert "numpy" in modules_after("import numpy")
