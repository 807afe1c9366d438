"""Throughput over tokens per pass, beside what disk and processor allow.  In: a checkpoint.  Out: a record, SVG, PNG.

usage: roofline.py [--model DIR | --shape NAME] [--work DIR] [--budget 40] [--most 512] [--quick]

1 to 512 sequences at once, prompts of 16 ids, 8 tokens each.  A pass reads what the budget cannot hold, its KV taken
off first, whatever the pass carries; products take longer the more rows there are.  The two limits cross at T*.  The
last point is the planner's own choice for 512 waiting requests.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any

from calls import Bench, Call, kv_bytes, limit_s, median_s, num_wrong, parser, run, start
from harness import Record, summary

PROMPT, OUTPUT, PAGE_TOKENS = 16, 8, 16
WITHIN, CHOSEN_AT_LEAST = 0.15, 0.85
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Products:
    """Seconds of all products of a pass, by rows; what lies between two measured numbers is interpolated."""

    def __init__(self, by_rows: dict[str, dict[str, float]]) -> None:
        self.parts = {part: {int(rows): s for rows, s in found.items()} for part, found in by_rows.items()}

    def part_s(self, part: str, rows: float) -> float:
        """One part at so many rows; beyond the largest in proportion."""
        known = sorted(self.parts[part])
        if rows >= known[-1]:
            return self.parts[part][known[-1]] * rows / known[-1]
        at = max(bisect_left(known, rows), 1)
        low, high = known[at - 1], known[at]
        low_s, high_s = self.parts[part][low], self.parts[part][high]
        return low_s + (high_s - low_s) * max(rows - low, 0) / (high - low)

    def pass_s(self, rows: float, logit_rows: float) -> float:
        """The body for all rows, the head for those that are sampled."""
        return self.part_s("body", rows) + self.part_s("head", logit_rows)


def measure_products(bench: Bench, rows: tuple[int, ...]) -> Products:
    """By a process of its own, without a limit: products alone.  Raises RuntimeError if it fails."""
    job = {"kind": "roof", "prompts": [], "steps": 2, "options": {"rows": list(rows)}}
    seen = bench.conditions.run("roofline-products", "run_roof.py", job, limited=False)
    if seen.result is None:
        raise RuntimeError(f"the products cannot be measured: {seen.error}")
    return Products(seen.result["by_rows"])


def cache_bytes(bench: Bench, sequences: int) -> int:
    """KV of so many sequences at their end, in whole pages."""
    tokens = -(-(PROMPT + OUTPUT) // PAGE_TOKENS) * PAGE_TOKENS
    return kv_bytes(bench.conditions.model, sequences * tokens)


def point(bench: Bench, products: Products, sequences: int) -> dict[str, Any]:
    """So many sequences at once: the median decode pass beside its limit."""
    call = Call(bench.known.prompts(sequences, PROMPT, PROMPT), OUTPUT)
    seen = run(bench, f"roofline-{sequences}", [call], {"max_batch": sequences})
    row: dict[str, Any] = {"sequences": sequences, "error": seen.error, "why": seen.why}
    passes = [done for done in call.decode() if done["rows"] == sequences]
    if seen.result is None or not passes:
        return row | {"error": seen.error or "no pass carried all sequences"}
    bound = limit_s(bench, seen, products.pass_s(sequences, sequences), cache_bytes(bench, sequences))
    pass_s = median_s(passes)
    return row | {
        "num_wrong": num_wrong(bench.known, [call]),
        "pass_s": summary([done["seconds"] for done in passes]),
        "tokens_per_s": sequences / pass_s,
        "limit_tokens_per_s": sequences / bound["limit_s"],
        "share_of_limit": bound["limit_s"] / pass_s,
        "limit": bound,
        "disk_bytes": sum(done["bytes"].get("disk", 0) for done in passes) / len(passes),
        "schedule_share": sum(done["schedule_s"] / done["seconds"] for done in passes) / len(passes),
        "predicted_pass_s": seen.result["facts"]["plan"]["forecast"]["pass_s"],
    }


def chosen(bench: Bench, products: Products, waiting: int) -> dict[str, Any]:
    """`waiting` requests, everything left to the planner: all passes but the first, each beside its own limit."""
    call = Call(bench.known.prompts(waiting, PROMPT, PROMPT), OUTPUT)
    seen = run(bench, "roofline-chosen", [call])
    if seen.result is None:
        return {"sequences": "chosen", "error": seen.error}
    plan = seen.result["facts"]["plan"]
    kv = kv_bytes(bench.conditions.model, plan["workload"]["cache_tokens"] or 0) or plan["reserve"]["kv"]
    passes = [done for done in call.passes if not done["is_first"]]
    bounds = [limit_s(bench, seen, products.pass_s(done["rows"], done["sequences"]), kv) for done in passes]
    seconds = sum(done["seconds"] for done in passes)
    return {
        "sequences": "chosen",
        "error": "",
        "why": seen.why,
        "num_wrong": num_wrong(bench.known, [call]),
        "workload": plan["workload"],
        "tokens_per_s": call.num_tokens / call.seconds,
        "tokens_per_pass": call.num_tokens / len(call.passes),
        "share_of_limit": sum(bound["limit_s"] for bound in bounds) / seconds,
        "job_s": call.seconds,
        "predicted_job_s": plan["forecast"]["job_s"],
    }


def line(row: dict[str, Any]) -> str:
    """One point for people."""
    if row["error"]:
        return f"{row['sequences']!s:>6}  no figure: {row['error']}"
    rest = f"{row['limit']['binding']} binds" if "limit" in row else f"batch {row['workload']['batch']}"
    wrong = f"  {row['num_wrong']} WRONG" if row["num_wrong"] else ""
    share = f"{row['share_of_limit']:.2f} of the limit"
    return f"{row['sequences']!s:>6}  {row['tokens_per_s']:8.2f} tok/s  {share}, {rest}{wrong}"


def draw(rows: list[dict[str, Any]], choice: dict[str, Any], path: Path) -> None:
    """Both limits as lines, what was measured as points; path gets the endings .svg and .png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    x = [row["sequences"] for row in rows]
    disk = [row["sequences"] / row["limit"]["disk_s"] for row in rows if row["limit"]["disk_s"]]
    axes.plot(x[: len(disk)], disk, "--", color="#d9822b", label="disk allows")
    axes.plot(
        x, [n / row["limit"]["compute_s"] for n, row in zip(x, rows, strict=True)], "--", color="#6e7781"
    )
    axes.lines[-1].set_label("products alone allow")
    axes.plot(x, [row["tokens_per_s"] for row in rows], "o-", color="#1f6feb", label="zinfer, decode passes")
    if not choice["error"]:
        at = (choice["tokens_per_pass"], choice["tokens_per_s"])
        axes.plot(
            *at,
            "*",
            ms=14,
            color="#2da44e",
            label=f"planner's choice, batch {choice['workload']['batch']}, load included",
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens per pass", ylabel="tokens per second")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    for ending in (".svg", ".png"):
        figure.savefig(path.with_suffix(ending), dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Run, print, draw, write the record."""
    made = parser(__doc__)
    made.add_argument("--most", type=int, default=512, help="sequences of the last point")
    options = made.parse_args()
    bench = start(options)
    most = min(options.most, 4) if options.quick else options.most
    products = measure_products(bench, tuple(rows for rows in ROWS if rows <= 4 * most))
    rows = []
    for sequences in (count for count in ROWS if count <= most):
        rows.append(point(bench, products, sequences))
        print(line(rows[-1]), flush=True)
    choice = chosen(bench, products, most)
    print(line(choice))
    good = [row for row in rows if not row["error"]]
    outside = [row["sequences"] for row in good if row["share_of_limit"] < 1 - WITHIN]
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
        repeats=OUTPUT - 2,
        median={f"{row['sequences']}_tokens_per_s": row["tokens_per_s"] for row in good},
        spread={f"{row['sequences']}_pass_s": row["pass_s"]["spread"] for row in good},
        limit={f"{row['sequences']}_tokens_per_s": row["limit_tokens_per_s"] for row in good}
        | {"products_s": products.parts, "chosen_share": choice.get("share_of_limit")},
        baseline={},
        answer_matches=len(good) == len(rows) and not any(row["num_wrong"] for row in good),
        comparable=not any(row["why"] for row in rows),
        rows=[*rows, choice],
        notes=said,
    )
    path = record.write(options.results)
    if good:
        draw(good, choice, path)
    print(path)


if __name__ == "__main__":
    main()
