"""Every benchmark, one after another.  In: where to work.  Out: their records, and what could not be run.

usage: all.py [--quick] [other options, given to every benchmark]

One that fails does not keep the next from running; the exit status is 1 if any did.  Engines that fail inside a
benchmark are rows without a figure there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from harness import ENVIRONMENT

BENCHMARKS = ("overlap.py", "roofs.py", "offload_decode.py", "offload_prefill.py", "prediction.py")
TAKES_NO_OPTIONS = ("overlap.py",)
QUICK_IS_UNKNOWN = ("roofs.py",)


def main() -> int:
    """Run them; print how each ended."""
    here, ended = Path(__file__).resolve().parent, []
    environment = os.environ | ENVIRONMENT
    for script in BENCHMARKS:
        options = [word for word in sys.argv[1:] if not (word == "--quick" and script in QUICK_IS_UNKNOWN)]
        options = [] if script in TAKES_NO_OPTIONS else options
        print(f"\n== {script} {' '.join(options)}", flush=True)
        start = time.perf_counter()
        status = subprocess.run(
            [sys.executable, str(here / script), *options], env=environment, check=False
        ).returncode
        ended.append((script, status, time.perf_counter() - start))
    print()
    for script, status, seconds in ended:
        print(f"{script:20} {'ok' if status == 0 else f'FAILED ({status})':12} {seconds:6.0f} s")
    return int(any(status for _, status, _ in ended))


if __name__ == "__main__":
    sys.exit(main())
