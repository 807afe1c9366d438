"""Servers as their users meet them.  In: a command, a load.  Out: what became of every request; memory from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ENVIRONMENT, ROOT, run_child

ENGINES = ROOT / "benchmarks" / "engines"
BUNDLED = ROOT / "zinfer" / "assets" / "classifier"
START_S = 90.0


@dataclass(slots=True)
class Running:
    """A server that is ready."""

    url: str
    process: subprocess.Popen[str]

    def rss_bytes(self) -> int:
        """Resident memory, as the kernel has it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def handles(self) -> int:
        """Open file descriptors."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[Running]:
    """Start a server, wait until it says where it is, end it with SIGTERM; an exit other than 0 is an error."""
    with open(log, "w") as err:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=err, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT
        )
        try:
            assert process.stdout is not None, "a pipe was asked for"
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
            yield Running(json.loads(line)["url"], process)
            process.send_signal(signal.SIGTERM)
            status = process.wait(START_S)
            if status not in (0, -signal.SIGTERM):
                raise SystemExit(f"{' '.join(command)} ended with {status}:\n{log.read_text()[-2000:]}")
        finally:
            process.kill()
            process.wait()


def zinfer_command(model: Path, *options: str) -> list[str]:
    """`zinfer serve` of the tree beside this file, on a free port."""
    start = [sys.executable, "-m", "zinfer", "serve", str(model), "--port", "0", "--json", "--device", "cpu"]
    return [*start, *options]


def code_texts(count: int, least: int = 60, most: int = 220) -> list[str]:
    """Windows of this Python's own sources, of `least` to `most` characters: what the bundled classifier reads."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.glob("*.py")) if file.stat().st_size > 8000]
    found = []
    for at in range(count):
        text = files[at % len(files)].read_text(encoding="utf-8", errors="replace")
        begin = 2000 + 311 * (at // len(files))
        found.append(text[begin : begin + least + (at * 37) % (most - least)])
    return found


@dataclass(slots=True)
class Traffic:
    """Requests of some texts each, and the texts themselves."""

    texts: list[str]
    texts_of: list[list[int]]
    work: Path

    @classmethod
    def of(cls, work: Path, per_request: int, num_bodies: int = 48) -> Traffic:
        """Bodies of `per_request` texts, all different."""
        texts = code_texts(per_request * num_bodies)
        numbers = [list(range(at * per_request, (at + 1) * per_request)) for at in range(num_bodies)]
        return cls(texts, numbers, work)

    def facts(self, name: str, model: Path, pass_texts: int, repeats: int = 5) -> dict[str, Any]:
        """What a model answers to the texts, and what its passes take, in a process of its own."""
        job, result = self.work / f"{name}.job.json", self.facts_file(name)
        given = {"model": str(model), "texts": self.texts, "pass_texts": pass_texts, "repeats": repeats}
        job.write_text(json.dumps(given))
        child = run_child(
            [sys.executable, str(ENGINES / "encoder_facts.py"), str(job), str(result)],
            self.work / f"{name}.log",
        )
        if child.returncode:
            raise SystemExit(f"{model}: {child.why}\n{child.log[-2000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def facts_file(self, name: str) -> Path:
        """Where `facts` writes."""
        return self.work / f"{name}.facts.json"

    def offer(
        self,
        url: str,
        name: str,
        segments: Sequence[tuple[float, float]],
        connections: int = 0,
        seed: int = 1,
    ) -> dict[str, Any]:
        """Run the load of `http_load.py` in its own process against a server that should answer as model `name`.

        Without a name no answer is checked.
        """
        bodies = [
            json.dumps({"texts": [self.texts[text] for text in some], "raw_scores": True})
            for some in self.texts_of
        ]
        job, result = self.work / "load.job.json", self.work / "load.result.json"
        given = {"url": url, "bodies": bodies, "texts_of": self.texts_of, "seed": seed}
        given |= {
            "segments": segments,
            "connections": connections,
            "expected": str(self.facts_file(name)) if name else None,
        }
        job.write_text(json.dumps(given))
        seconds = sum(seconds for seconds, _ in segments)
        script = str(ROOT / "benchmarks" / "http_load.py")
        child = run_child(
            [sys.executable, script, str(job), str(result)], self.work / "load.log", None, seconds + 90
        )
        if child.returncode:
            raise SystemExit(f"load: {child.why}\n{child.log[-2000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def bundled_or(given: Path | None) -> Path:
    """The folder with teacher/ and group/."""
    model = given or BUNDLED
    for part in ("teacher", "group"):
        if not (model / part / "config.json").is_file():
            raise SystemExit(f"{model / part} is no model: --model takes a folder with teacher/ and group/")
    return model
