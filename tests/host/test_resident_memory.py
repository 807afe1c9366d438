"""Resident memory, seen from outside, against what the plan says: in a process of its own, decode and prefill."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models

from zinfer.memory import heap

MIB = 2**20
SLACK = 64 * MIB  # code pages of libraries, the interpreter's own objects
ROWS, SEQUENCES = 2048, 16
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
CHILD = """
import json, sys
import zinfer.memory.heap, zinfer.runtime.engine as engine
from zinfer import LLM, SamplingParams

model, exact, mutation = sys.argv[1], sys.argv[2] == "exact", sys.argv[3]
if mutation == "the heap keeps what is freed":
    engine.give_freed_memory_back = lambda: None

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

imports = resident("VmRSS")
prompts = [[(7 * i + 13 * j) % 500 + 1 for j in range(ROWS)] for i in range(SEQUENCES)]
params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
options = {"memory": {"host": "1GiB"}, "machine": "MACHINE", "max_batch": SEQUENCES, "micro_rows": 2048}
with LLM(model, device="cpu", exact=exact, **options) as llm:
    (use,) = llm.fit(prompts, params).uses
    if mutation == "activations are freed late":
        from zinfer.models import decoder
        kept, plain = [], decoder.linear
        def linear(*args, **kwargs):
            kept.append(plain(*args, **kwargs))
            del kept[:-16]
            return kept[-1]
        decoder.linear = linear
    llm.generate(prompts, params)
    print(json.dumps([resident("VmHWM") - imports, use.total, use.activations, llm.plan.workload.prefill_rows]))
"""


def peak(folder, exact, mutation="none"):
    """Peak resident bytes above the imports, and the plan's bytes: all, activations."""
    code = CHILD.replace("ROWS", str(ROWS // SEQUENCES)).replace("SEQUENCES", str(SEQUENCES))
    argv = [sys.executable, "-c", code.replace("MACHINE", "sim-default"), str(folder), exact, mutation]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE)
    above, planned, activations, rows = json.loads(done.stdout)
    assert rows == ROWS, "the pass is not the large one that this test is about"
    return above, planned, activations


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.write_tiny("llama", tmp_path_factory.mktemp("wide"), **SHAPE)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


@needs_proc
@pytest.mark.parametrize("exact", ["exact", "fast"])
def test_a_pass_of_many_rows_stays_within_its_plan(model, exact):
    above, planned, activations = peak(model, exact)
    assert activations > 32 * MIB, "activations must show beside the slack"
    assert above <= planned + SLACK


@needs_proc
def test_activations_that_nobody_counted_are_seen(model):
    above, planned, _ = peak(model, "fast", "activations are freed late")
    assert above > planned + SLACK


HEAP = """
import sys, torch
from zinfer.memory.heap import give_freed_memory_back

def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

if sys.argv[1] == "bounded" and not give_freed_memory_back():
    print("none")
    sys.exit()
del_me = torch.zeros(30 * 2**20, dtype=torch.uint8)
del del_me
before = resident()
large = torch.ones(20 * 2**20, dtype=torch.uint8)
above_it = [torch.ones(2**19, dtype=torch.uint8) for _ in range(4)]
assert resident() - before > 16 * 2**20
del large
print(resident() - before)
"""


@needs_proc
@pytest.mark.parametrize("heap", ["bounded", "as it comes"])
def test_freed_activations_leave_resident_memory(heap):
    done = subprocess.run([sys.executable, "-c", HEAP, heap], check=True, stdout=subprocess.PIPE, text=True)
    if done.stdout.strip() == "none" or (heap != "bounded" and int(done.stdout) < 16 * MIB):
        pytest.skip("this C library gives memory back by itself, or has no such setting")
    assert (int(done.stdout) < 8 * MIB) == (heap == "bounded")


@pytest.mark.parametrize("accepts", [1, 0])
def test_the_heap_is_told_what_to_map_and_what_to_keep(accepts, monkeypatch):
    """Waiting micro-batches find their pages where they left them; large activations are mappings that end."""
    told = []
    library = SimpleNamespace(mallopt=lambda *setting: told.append(setting) or accepts)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: library)
    assert heap.give_freed_memory_back.__wrapped__() is bool(accepts)
    assert (
        told == [(-3, 4 * MIB), (-1, 64 * MIB)][: 2 if accepts else 1]
    )  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
