"""One pass over 16 prompts of 128 tokens, engines side by side.  In: a checkpoint, a budget.  Out: one record, a table.

usage: offload_prefill.py [--model DIR | --shape NAME] [--work DIR] [--budget 40] [--rounds N] [--quick] ...

A pass this large is bound by arithmetic long before it is bound by the disk, streamed or not: the question is
whether streaming costs anything.  `--tokens` is the number of passes; the first, which loads, is thrown away.
"""

from __future__ import annotations

from contest import STREAMED
from offload_decode import compete, parse, record

PROMPTS, LENGTH = 16, 128


def main() -> None:
    """Run, print, write the record."""
    options = parse(__doc__, tokens=3, modes=STREAMED)
    options.tokens = min(options.tokens, 2) if options.quick else options.tokens
    contest, roofs = compete(options, "prefill", (PROMPTS, LENGTH))
    written = record(options, contest, roofs, "offload_prefill")
    written.limit["passes_at_disk_rate_s"] = written.limit.pop("streamed_disk_s")
    for mode in ("streamed_s", "resident_s", "streamed_over_limit", "resident_over_limit"):
        written.limit.pop(mode, None)  # limits of one row, not of 2048
    print("\n".join(f"  {note}" for note in written.notes))
    print(written.write(options.results))


if __name__ == "__main__":
    main()
