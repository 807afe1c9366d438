"""The command line from its first moment: also `python -m zinfer`."""

from __future__ import annotations

import sys


def main() -> None:
    """Import the command line and run it; Ctrl-C before it is there ends like any later one, with 130."""
    try:
        from zinfer.cli.main import main as begin

        begin()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing half-written is left; run the same command to go on\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
