"""Packed passes against padded ones.  In: a checkpoint, a budget.  Out: one record: seconds for the same requests.

usage: packed.py [--model DIR | --shape NAME] [--work DIR] [--budget 40] [--prompts 32] [--quick]

Prompts of 1 to 128 ids, half of the longest on average.  "Padded" gives the same engine the same requests, each filled
up to 128 at its beginning, which is what a rectangular batch computes; the next token is the same.  Both run in turn in
one process (A B B A ...), one token per request.
"""

from __future__ import annotations

import random
from statistics import median

from calls import Call, num_wrong, parser, run, start, turns
from harness import Record, summary

LONGEST, AT_LEAST = 128, 1.35


def half_full(count: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Prompts whose lengths are spread evenly from 1 to the longest, in a random order: half full on average."""
    draw = random.Random(seed)
    lengths = [round(1 + (LONGEST - 1) * at / (count - 1)) for at in range(count)]
    draw.shuffle(lengths)
    return [[draw.randrange(300, vocab) for _ in range(length)] for length in lengths]


def padded(prompts: list[list[int]]) -> list[list[int]]:
    """The same prompts, all of the longest's length; fillers come first, so that what follows is the same token."""
    return [[300] * (LONGEST - len(prompt)) + prompt for prompt in prompts]


def main() -> None:
    """Run, print, write the record."""
    made = parser(__doc__)
    made.add_argument("--prompts", type=int, default=32)
    made.add_argument("--repeats", type=int, default=2)
    options = made.parse_args()
    bench = start(options)
    count, repeats = (6, 1) if options.quick else (options.prompts, options.repeats)
    prompts = half_full(count, len(bench.known.next_of))
    sets = {"packed": prompts, "padded": padded(prompts)}
    order = turns(("packed", "padded"), repeats)
    loading = Call(sets["padded"], 2)  # not counted: its two passes load what stays
    calls = [loading, *(Call(sets[name], 1) for name in order)]
    seen = run(bench, "packed", calls, {"max_batch": count})
    if seen.result is None:
        raise SystemExit(f"no figure: {seen.error}")
    seconds = {
        name: [call.seconds for call, what in zip(calls[1:], order, strict=True) if what == name]
        for name in sets
    }
    rows = {name: sum(map(len, sets[name])) for name in sets}
    ratio = median(seconds["padded"]) / median(seconds["packed"])
    said = [
        f"{name}: {rows[name]} rows, {median(found):.3f} s [{min(found):.3f} .. {max(found):.3f}]"
        for name, found in seconds.items()
    ]
    said.append(f"{ratio:.2f} x, {'at least' if ratio >= AT_LEAST else 'NOT'} {AT_LEAST} x")
    print("\n".join(said))
    record = Record(
        bench="packed",
        config=bench.describe()
        | {"prompts": count, "longest": LONGEST, "fill": rows["packed"] / rows["padded"]},
        repeats=repeats,
        median={f"{name}_s": median(found) for name, found in seconds.items()} | {"ratio": ratio},
        spread={f"{name}_s": summary(found)["spread"] for name, found in seconds.items()},
        limit={"ratio_of_rows": rows["padded"] / rows["packed"], "ratio_at_least": AT_LEAST},
        baseline={"padded_s": median(seconds["padded"])},
        answer_matches=not num_wrong(bench.known, calls),
        comparable=not seen.why,
        rows=[
            {"what": what, "seconds": call.seconds, "passes": call.passes}
            for what, call in zip(order, calls[1:], strict=True)
        ],
        notes=said,
    )
    print(record.write(options.results))


if __name__ == "__main__":
    main()
