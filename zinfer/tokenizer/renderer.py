"""The process in which a stranger's template runs.  In: jobs.  Out: answers, or why there is none."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_CHILD = Path(__file__).with_name("render.py")
_START_S = 60  # for a new interpreter on a machine that is very busy
_MOST_JOBS = (
    256  # of one process: its memory is limited, and what fragments it must not end somebody else's job
)


class DiedError(Exception):
    """The process ended without an answer; says how."""


class Renderer:
    """Renders one conversation after another in a process that is started when it is needed.

    Whatever a template does to the process, the next job finds a new one.  Used by one thread; close ends the process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._num_jobs = 0

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def render(self, job: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
        """The answer to one job, which may compute for `deadline_s`.  Raises DiedError."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        watchdog = threading.Timer(_START_S + deadline_s, process.kill)
        watchdog.start()
        try:
            process.stdin.write(json.dumps(job, default=_placeholder).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            watchdog.cancel()
            watchdog.join()
        if not answer.endswith(b"\n"):
            raise DiedError(self._last_words(process, deadline_s))
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process; may be called again."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._num_jobs == _MOST_JOBS:
            self.close()
        if self._process is None:
            self._num_jobs = 0
            # -P: the folder of render.py must not shadow the standard library.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        self._num_jobs += 1
        return self._process

    def _last_words(self, process: subprocess.Popen[bytes], deadline_s: float) -> str:
        self._process = None
        # Its end of the answers is closed: it is ending, or was ended.
        _, stderr = process.communicate()
        if process.returncode in (-signal.SIGPROF, -signal.SIGKILL):
            return f"did not end within {deadline_s:g} s"
        return f"died with exit code {process.returncode}: {stderr.decode(errors='replace')[-300:]}"


def _placeholder(value: object) -> str:
    """What JSON does not know (images, arrays) is only named; templates ask no more than whether it is there."""
    return f"<{type(value).__name__}>"
