"""How near decoding comes to the link, the disk and the prediction, by how much of the weights stays on the device.

Batch 1 with 0, 25, 50 and 75 % resident, everything else in page-locked host memory; 64 requests at the batch that the
planner likes; batch 1 with nothing to spare in host memory, so that every pass reads the disk.  Every token is checked.
Seconds are medians of steady decode passes.
"""

from __future__ import annotations

import sys
from statistics import median
from typing import Any

from setting import MIB, Bench, block, num_wrong, saved_probe

SHARES = (0.0, 0.25, 0.5, 0.75)
DISK_TOKENS = 8


def steady(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Decode passes after the first two."""
    passes = [
        done
        for call in entry["calls"]
        for done in call["passes"]
        if done["is_decode"] and not done["is_first"]
    ]
    return passes[2:] or passes


def row_of(entry: dict[str, Any], known: Any, probe: dict[str, float]) -> dict[str, Any]:
    """What an entry comes to; only its name and error where it failed."""
    if entry["error"]:
        return {"name": entry["name"], "error": entry["error"]}
    passes = steady(entry)
    pass_s = median(done["seconds"] for done in passes)
    moved = {lane: median(done["bytes"].get(lane, 0) for done in passes) for lane in ("h2d", "disk")}
    predicted_s = entry["plan"]["forecast"]["pass_s"]
    rates = {lane: probe.get(f"{lane}_bytes_per_s") for lane in moved}
    planned = entry["plan"]["uses"].get("host", {})
    locked, wanted = entry["host"]["pinned"], entry["plan"]["locked"]
    peak = entry["stats"]["peak_bytes"].get("host", 0)
    return {
        "name": entry["name"],
        "error": "",
        "num_wrong": num_wrong(known, entry),
        "pass_s": pass_s,
        "predicted_pass_s": predicted_s,
        "prediction_error": abs(pass_s / predicted_s - 1),
        "binding": entry["plan"]["forecast"]["binding"],
        "batch": entry["plan"]["batch"],
        "limit_share": max(entry["plan"]["forecast"]["busy_s"].values()) / pass_s,
        "resident_share": entry["plan"]["resident_share"],
        "bytes_per_pass": moved,
        "share_of_rate": {
            lane: nbytes / pass_s / rates[lane] for lane, nbytes in moved.items() if nbytes and rates[lane]
        },
        "locked_bytes": locked or None,
        "pinned_over_planned": locked / wanted if locked and wanted else None,
        "host_peak_over_planned": peak / planned["total"] if planned else None,
        "device_peak_bytes": entry["device_peak_bytes"],
        "uses": entry["plan"]["uses"],
    }


def series(bench: Bench, known: Any) -> list[dict[str, Any]]:
    """The entries: shares from host memory, then from disk."""
    prompt = known.prompts(1, bench.size.prompt, bench.size.prompt)
    call = {"prompts": prompt, "max_tokens": bench.size.tokens, "ignore_eos": True}
    host = 64 * MIB if bench.is_dry else "90%"
    little = 3 * MIB if bench.is_dry else 2048 * MIB
    common = {"calls": [call], "slack_bytes": bench.size.slack}
    found = [
        {"name": f"host, {share:.0%} resident", "memory": {"host": host}, "resident_share": share, **common}
        for share in (SHARES[:2] if bench.is_dry else SHARES)
    ]
    count, tokens = (6, 3) if bench.is_dry else (64, 12)
    many = {"prompts": known.prompts(count, bench.size.prompt, bench.size.prompt), "max_tokens": tokens}
    found.append(
        {"name": "host, 0% resident, planner's batch", "memory": {"host": host}, "resident_share": 0.0}
        | common
        | {"calls": [many | {"ignore_eos": True}]}
    )
    # A pass takes as long as all of it from disk.
    few = {"calls": [call | {"max_tokens": min(bench.size.tokens, DISK_TOKENS)}]}
    return [*found, {"name": "disk", "memory": {"host": little}, "resident_share": 0.0} | common | few]


def run(bench: Bench) -> None:
    """Run, judge, write."""
    model = bench.checkpoint()
    known, probe = bench.known(model), saved_probe(bench)
    rows = [row_of(entry, known, probe) for entry in bench.zinfer(model, series(bench, known))]
    right = {row["name"]: row for row in rows if not row["error"] and not row["num_wrong"]}
    link, disk = right.get("host, 0% resident"), right.get("disk")
    batch = right.get("host, 0% resident, planner's batch")
    errors = [row["prediction_error"] for row in right.values()]
    pinned = [row["pinned_over_planned"] for row in right.values() if row["pinned_over_planned"]]
    figures = {
        "host_link_share": link and link["share_of_rate"].get("h2d"),
        "disk_read_share": disk and disk["share_of_rate"].get("disk"),
        "prediction_error": max(errors, default=None),
        "pinned_over_planned": max(pinned, default=None),
        "batch_roofline_share": batch and batch["limit_share"],
        **{f"pass_s, {name}": row["pass_s"] for name, row in right.items()},
    }
    notes = [f"{row['name']}: {row['error'] or 'wrong tokens'}" for row in rows if row["name"] not in right]
    if not probe:
        notes.append("no probe was there: shares of the link and the disk were not measured")
    bench.record(figures, rows, is_right=len(right) == len(rows), limit=probe, notes=notes)


main = block(__doc__, "decode", run, 420)

if __name__ == "__main__":
    sys.exit(main())
