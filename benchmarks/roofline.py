"""Throughput over tokens per pass, beside what disk and processor allow.  In: a checkpoint.  Out: a record, SVG, PNG.

usage: roofline.py [--model DIR | --shape NAME] [--work DIR] [--budget 40] [--most 256] [--quick]

1 to 256 sequences at once (up to 512 with --most 512, minutes more), prompts of 16 ids, 8 tokens each.  A pass reads
what the budget cannot hold, its KV taken off first, whatever the pass carries; products take longer the more rows
there are.  The two limits cross at T*.  Both drift: the disk's rate is that right before and after each run, and so is
the mean time of some products, over theirs at the start.  The last point is the planner's own choice for as many
requests.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any

from calls import Bench, Call, limit_s, num_wrong, parser, run, start
from harness import Record, summary

PROMPT, OUTPUT = 16, 8
WARM_UP = 3  # passes: the first two load what stays
WITHIN, CHOSEN_AT_LEAST = 0.15, 0.85
MOST_MEASURED = 1024  # rows; beyond in proportion
DRIFT_ROWS, DRIFT_BYTES = 256, 300 * 10**6  # of the products that are timed beside every run
EACH_S, DRIFT_S = 0.5, 2.0  # for which a product is timed: at each number of rows; beside a run
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Products:
    """Seconds of all products of a pass, by rows; what lies between two measured numbers is interpolated."""

    def __init__(self, by_rows: dict[str, dict[str, float]], times: float = 1.0) -> None:
        self.parts = {
            part: {int(rows): s * times for rows, s in found.items()} for part, found in by_rows.items()
        }

    def part_s(self, part: str, rows: float) -> float:
        """One part at so many rows: interpolated, or some fewer rows at a time where that takes less."""
        known = sorted(self.parts[part])
        in_pieces = [self.parts[part][count] * rows / count for count in known if count <= rows]
        if rows >= known[-1] or len(known) == 1:
            return min(in_pieces, default=self.parts[part][known[0]])
        at = max(bisect_left(known, rows), 1)
        low, high = known[at - 1], known[at]
        low_s, high_s = self.parts[part][low], self.parts[part][high]
        whole_s = low_s + (high_s - low_s) * max(rows - low, 0) / (high - low)
        return min([whole_s, *in_pieces])

    def pass_s(self, rows: float, logit_rows: float) -> float:
        """The body for all rows, the head for those that are sampled."""
        return self.part_s("body", rows) + self.part_s("head", logit_rows)


def measure_products(
    bench: Bench, rows: tuple[int, ...], least_s: float, most_bytes: int | None = None
) -> dict[str, dict[str, float]]:
    """By a process of its own, without a limit: products alone.  Raises RuntimeError if it fails."""
    options = {"rows": list(rows), "least_s": least_s, "most_bytes": most_bytes}
    job = {"kind": "roof", "prompts": [], "steps": 2, "options": options}
    seen = bench.conditions.run("roofline-products", "run_roof.py", job, limited=False)
    if seen.result is None:
        raise RuntimeError(f"the products cannot be measured: {seen.error}")
    found: dict[str, dict[str, float]] = seen.result["by_rows"]
    return found


def some_products_s(bench: Bench) -> float:
    """Seconds of some of them, as they are now."""
    return sum(
        found[str(DRIFT_ROWS)]
        for found in measure_products(bench, (DRIFT_ROWS,), DRIFT_S, DRIFT_BYTES).values()
    )


def point(
    bench: Bench, alone: dict[str, dict[str, float]], some_s: list[float], waiting: int, batch: int | None
) -> dict[str, Any]:
    """`waiting` requests, `batch` of them at once (None: the planner's choice), weights loaded before.

    Every pass has its own limit, by the rows that it carried; the share is that of all passes together.  `alone` is
    what products took when some of them took the first of `some_s`, which gets what they take behind this point.
    """
    name = "chosen" if batch is None else str(batch)
    call = Call(bench.known.prompts(waiting, PROMPT, PROMPT), OUTPUT)
    warm_up = Call(call.prompts[:1], WARM_UP)
    seen = run(bench, f"roofline-{name}", [warm_up, call], {"max_batch": batch} if batch else {})
    row: dict[str, Any] = {"batch": name, "error": seen.error, "why": seen.why}
    some_s.append(some_products_s(bench))
    if seen.result is None:
        return row
    drift = (some_s[-2] + some_s[-1]) / (2 * some_s[0])
    products = Products(alone, drift)
    plan = seen.result["facts"]["plan"]
    kv = plan["reserve"]["kv"]
    bounds = [
        limit_s(bench, seen, products.pass_s(done["rows"], done["sequences"]), kv) for done in call.passes
    ]
    limit = {key: sum(bound[key] for bound in bounds) for key in ("disk_s", "compute_s", "limit_s")}
    return row | {
        "num_wrong": num_wrong(bench.known, [call]),
        "planned_batch": plan["workload"]["batch"],
        "token_rows": plan["forecast"]["token_rows"],
        "passes": len(call.passes),
        "seconds": call.seconds,
        "pass_s": summary([done["seconds"] for done in call.passes]),
        "tokens_per_pass": call.num_tokens / len(call.passes),
        "tokens_per_s": call.num_tokens / call.seconds,
        "limit": limit | {"kv_bytes": kv, "read_bytes_per_s": bounds[0]["read_bytes_per_s"]},
        "share_of_limit": limit["limit_s"] / call.seconds,
        "products_drift": drift,
        "disk_bytes_per_pass": sum(done["bytes"].get("disk", 0) for done in call.passes) / len(call.passes),
        "schedule_share": sum(done["schedule_s"] for done in call.passes) / call.seconds,
        "predicted_pass_s": plan["forecast"]["pass_s"],
        "each_pass": call.passes,
    }


def line(row: dict[str, Any]) -> str:
    """One point for people."""
    if row["error"]:
        return f"{row['batch']:>6}  no figure: {row['error']}"
    wrong = f"  {row['num_wrong']} WRONG" if row["num_wrong"] else ""
    binds = "disk" if row["limit"]["disk_s"] >= row["limit"]["compute_s"] else "compute"
    told = f"{row['tokens_per_pass']:6.1f} tokens a pass  {row['tokens_per_s']:8.2f} tok/s"
    share = f"{row['share_of_limit']:.2f} of the limit, {binds} binds, scheduling {row['schedule_share']:.2%}"
    drift = f"products {row['products_drift']:.2f} x"
    return f"{row['batch']:>6}  {told}  {share}, {drift}, batch {row['planned_batch']}{wrong}"


def draw(rows: list[dict[str, Any]], choice: dict[str, Any], path: Path) -> None:
    """Both limits as lines, what was measured as points; path gets the endings .svg and .png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    x = [row["tokens_per_pass"] for row in rows]
    tokens = [row["tokens_per_s"] * row["seconds"] for row in rows]
    for key, colour, label in (
        ("disk_s", "#d9822b", "disk allows"),
        ("compute_s", "#6e7781", "products alone allow"),
    ):
        allowed = [
            count / row["limit"][key] for count, row in zip(tokens, rows, strict=True) if row["limit"][key]
        ]
        axes.plot(x[: len(allowed)], allowed, "--", color=colour, label=label)
    axes.plot(x, [row["tokens_per_s"] for row in rows], "o-", color="#1f6feb", label="zinfer")
    if not choice["error"]:
        label = f"planner's choice: batch {choice['planned_batch']}"
        axes.plot(choice["tokens_per_pass"], choice["tokens_per_s"], "*", ms=14, color="#2da44e", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens per pass", ylabel="tokens per second")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    for ending in (".svg", ".png"):
        figure.savefig(path.with_suffix(ending), dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Run, print, draw, write the record."""
    made = parser(__doc__)
    made.add_argument("--most", type=int, default=256, help="sequences of the last point")
    options = made.parse_args()
    bench = start(options)
    most = min(options.most, 4) if options.quick else options.most
    fullest = min(max(PROMPT * most, 4 * most), MOST_MEASURED)  # a pass may carry all prompts
    alone = measure_products(bench, tuple(rows for rows in ROWS if rows <= fullest), EACH_S)
    some_s = [some_products_s(bench)]
    rows = []
    for sequences in (count for count in ROWS if count <= most):
        rows.append(point(bench, alone, some_s, sequences, sequences))
        print(line(rows[-1]), flush=True)
    choice = point(bench, alone, some_s, most, None)
    print(line(choice))
    good = [row for row in rows if not row["error"]]
    outside = [row["batch"] for row in good if row["share_of_limit"] < 1 - WITHIN]
    said = [f"outside {WITHIN:.0%} of the limit: {outside or 'none'}"]
    if not choice["error"]:
        met = "at least" if choice["share_of_limit"] >= CHOSEN_AT_LEAST else "NOT"
        said.append(
            f"the planner's choice: {choice['share_of_limit']:.2f} of the limit, {met} {CHOSEN_AT_LEAST}"
        )
    print("\n".join(said))
    record = Record(
        bench="roofline",
        config=bench.describe() | {"prompt": PROMPT, "output": OUTPUT},
        repeats=1,
        median={f"{row['batch']}_tokens_per_s": row["tokens_per_s"] for row in good},
        spread={f"{row['batch']}_pass_s": row["pass_s"]["spread"] for row in good},
        limit={f"{row['batch']}_tokens_per_s": row["tokens_per_s"] / row["share_of_limit"] for row in good}
        | {"products_s": alone, "chosen_share": choice.get("share_of_limit")},
        baseline={},
        answer_matches=len(good) == len(rows) and not any(row["num_wrong"] for row in good),
        comparable=not any(row["why"] for row in rows),
        rows=[*rows, choice],
        notes=[*(line(row) for row in (*rows, choice)), *said],
    )
    path = record.write(options.results)
    if good:
        draw(good, choice, path)
    print(path)


if __name__ == "__main__":
    main()
