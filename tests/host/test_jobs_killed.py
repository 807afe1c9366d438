"""The bundled model under a small budget, killed at random moments: nothing twice, nothing missing, nothing other.

JOB_KILLS=20 kills more often than the suite has time for.
"""

import json
import os
import random
import signal

import pytest
from job_engines import DEFAULTS, DEMO, processes, run_cli, run_cli_terminated, run_demo, run_job

from zinfer import LLM
from zinfer.jobs.line import read_line
from zinfer.jobs.run import Brake

KILLS = int(os.environ.get("JOB_KILLS", "8"))
PROMPTS = ["import os", "def f(x):", "class A", "x = 1", "while True:", "for i in range(", "try:\n", "return"]


class Counter(Brake):
    """Counts the chunks that passes use."""

    def __init__(self):
        super().__init__()
        self.chunks = 0

    def __call__(self, done, total, what):
        self.chunks += 1
        super().__call__(done, total, what)


def lines():
    """Texts of several lengths, some drawn at random, some faulty."""
    for number, prompt in enumerate(PROMPTS * 2):
        yield {"prompt": prompt * (1 + number % 3), "max_tokens": 2 + number % 4, "temperature": number % 2}
    yield {"prompt": "x", "max_tokens": -1}
    body = {"prompt": "import re", "max_tokens": 3, "logprobs": 1}
    yield {"custom_id": "named", "method": "POST", "url": "/v1/completions", "body": body}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The input, what an uninterrupted run makes of it, and how many chunks that takes."""
    folder = tmp_path_factory.mktemp("killed")
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines()))
    counter = Counter()
    with LLM(**DEMO, watch=counter) as llm:
        outcome = run_job(llm, source, folder / "whole.jsonl", counter)
        assert llm.plan.placement.slots > 0, "weights were streamed"
        assert max(done.sequences for done in llm.stats.passes) > 1, "sequences shared passes"
    assert (outcome.done, outcome.faults) == (18, 1)
    return source, results(folder / "whole.jsonl"), counter.chunks


def results(path):
    """Sorted lines, without the time at which the job began."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record.get("response"):
            del record["response"]["body"]["created"]
    return sorted(json.dumps(record, sort_keys=True) for record in records)


def end_of(target, *args):
    """Run in a process of its own; returns its exit code."""
    process = processes().Process(target=target, args=args)
    process.start()
    process.join(100)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def test_a_killed_job_goes_on_and_ends_as_if_it_had_not_been(job, tmp_path):
    """Killed again and again: each run lives for a random share of what the whole job takes."""
    source, expected, chunks = job
    draw = random.Random(20)
    target, kills, partly = tmp_path / "out.jsonl", 0, 0
    while kills < KILLS:
        code = end_of(run_demo, source, target, draw.randint(1, max(2, chunks // 4)))
        if code == -signal.SIGKILL:
            kills += 1
            partly += target.exists() and 0 < target.read_bytes().count(b"\n") < len(expected)
            continue
        assert code == 0
        assert results(target) == expected
        target = tmp_path / f"out-{kills}.jsonl"  # it got through: begin another
    assert partly > 0, "some kills found a part of the results written"
    assert end_of(run_demo, source, target) == 0
    assert results(target) == expected


def test_sigterm_ends_with_130_and_the_same_command_goes_on(job, tmp_path):
    source, expected, _ = job
    target = tmp_path / "out.jsonl"
    argv = ["run-batch", "-i", str(source), "-o", str(target), "--device", "cpu", "--host-mem", "8MiB"]
    argv += ["--max-tokens", "6", "--ignore-eos", "--machine", "sim-default", "--set", "runtime.threads=1"]
    assert end_of(run_cli_terminated, argv, 2) == 130
    assert target.read_bytes().endswith(b"\n")
    assert 2 < target.read_bytes().count(b"\n") < len(expected)
    assert end_of(run_cli, argv) == 7
    assert results(target) == expected


def test_outputs_do_not_depend_on_batch_mates(job):
    _, expected, _ = job
    found = [json.loads(line) for line in expected]
    answered = [r for r in found if "text" in r]
    with LLM(**DEMO) as llm:
        for record in answered[::4]:
            own = list(lines())[record["id"] - 1]
            params = read_line(record["id"], json.dumps(own).encode(), DEFAULTS).params
            (alone,) = llm.generate(own["prompt"], params)
            assert alone.outputs[0].token_ids == record["token_ids"]
