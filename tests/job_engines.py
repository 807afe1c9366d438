"""Engines for job tests: one that answers without computing, and processes that run a real job and end as told."""

import asyncio
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

from xxhash import xxh3_64_intdigest

from zinfer.api import LLM
from zinfer.jobs.run import Brake, Job
from zinfer.runtime.request import CompletionOutput, RequestOutput
from zinfer.sampling.params import SamplingParams

DEMO = {"machine": "sim-default", "device": "cpu", "threads": 1, "max_batch": 4, "memory": {"host": "8MiB"}}
DEFAULTS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


class QuickLLM:
    """Answers with tokens made from ids, seed and length alone, a few requests at a time and out of order."""

    def __init__(self, llm, window=3):
        self.model, self.plan, self.stats = llm.model, llm.plan, llm.stats
        self.window = window
        self.pulled = 0
        self.most_ahead = 0

    def generate_iter(self, prompts, params=None):
        flying, finished = [], 0
        for position, (ids, own) in enumerate(prompts):
            self.pulled += 1
            flying.append((position, ids, own))
            self.most_ahead = max(self.most_ahead, self.pulled - finished)
            if len(flying) == self.window:
                finished += 1
                yield self._output(*flying.pop(position % self.window))
        for each in flying:
            yield self._output(*each)

    def _output(self, position, ids, params):
        number = xxh3_64_intdigest(repr((ids, params.seed)).encode())
        tokens = [(number >> (5 * i)) % 100 for i in range(params.max_tokens)]
        logprobs = None if params.logprobs is None else [{token: -1.5, 7: -2.0} for token in tokens]
        text = " ".join(map(str, tokens))
        return RequestOutput(position, None, ids, [CompletionOutput(0, text, tokens, logprobs, "length")])


def run_job(llm, source, results, brake=None, **options):
    """Run a job to its end; returns the Outcome."""
    options = {"defaults": DEFAULTS, "model_name": "zinfer-demo"} | options
    return asyncio.run(Job(llm, Path(source), Path(results), brake=brake or Brake(), **options).run())


class Killer(Brake):
    """Kills the process at the n-th chunk that passes use."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __call__(self, done, total, what):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        super().__call__(done, total, what)


def run_demo(source, results, kill_at=None):
    """What a child process does: the bundled model under a small budget, killed at chunk `kill_at`."""
    random.seed(0)
    brake = Killer(kill_at or -1)
    with LLM(**DEMO, watch=brake) as llm:
        run_job(llm, source, results, brake)
        assert llm.plan.placement.slots > 0, "weights were streamed"


def run_cli(argv):
    """What a child process does: the command line, which exits."""
    from zinfer.cli.main import main

    main(argv)


def run_cli_terminated(argv, after):
    """Likewise, and SIGTERM comes when more than `after` results are on disk; nothing runs ahead of the disk."""
    from zinfer.jobs import run
    from zinfer.jobs.output import JobOutput

    append, pull, pulled = JobOutput.append, Brake.pull, threading.Event()

    def appended(self, entries):
        append(self, entries)
        if self.num_done > after and not pulled.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            assert pulled.wait(60)

    run.MAX_WAITING = 1
    JobOutput.append = appended
    Brake.pull = lambda self: (pull(self), pulled.set())
    run_cli(argv)


def processes():
    """A context whose processes start in no time: torch was imported by the server that forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zinfer.cli.run_batch"])
    return context
