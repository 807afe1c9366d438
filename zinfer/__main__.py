"""`python -m zinfer` is the command line."""

from __future__ import annotations

from zinfer.cli.main import main

main()
