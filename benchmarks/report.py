"""Records as a table and a picture.  In: JSON records.  Out: Markdown on standard output, and a PNG with --png.

usage: report.py [RECORD ...] [--png OUT.png] [--gpu]

Without a name, the newest record of each benchmark in results/ is taken.  --gpu: one table of the figures that a GPU
run must show, "not measured" where no record holds one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gpu_figures
from harness import MIB, RESULTS

GREY, BLUE, ORANGE = "#9aa0a6", "#1f6feb", "#d9822b"


def newest(folder: Path = RESULTS) -> list[Path]:
    """The newest record of each benchmark in a folder, by its date."""
    latest: dict[str, tuple[str, Path]] = {}
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        latest[record["bench"]] = max(latest.get(record["bench"], ("", path)), (record["written"], path))
    return [path for _, path in sorted(latest.values(), key=lambda found: found[1])]


def cell(value: Any, form: str = "{:.3f}") -> str:
    """A number as it is shown; nothing for what is not there."""
    return form.format(value) if isinstance(value, int | float) else ""


def ratio_of(record: dict[str, Any], row: dict[str, Any]) -> str:
    """What the record says of this row's ratio to zinfer."""
    if row["engine"].startswith("zinfer"):
        return "1.00"
    if not row["comparable"]:
        return "not comparable"
    return cell(record["baseline"].get(f"{row['engine']}, {row['mode']}", {}).get("ratio"), "{:.2f}")


def rows_table(record: dict[str, Any]) -> list[str]:
    """Markdown rows of a record with engines."""
    lines = [
        "| mode | engine | s per pass | smallest .. largest | first token s | peak RSS MiB "
        "| largest logit difference | times zinfer |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in sorted(record["rows"], key=lambda row: (row["mode"] != "streamed", row["median"] or 1e9)):
        if not row["is_right"]:
            why = row["error"] or "wrong answer"
            lines.append(f"| {row['mode']} | {row['engine']} | no figure: {why} | | | | | |")
            continue
        low, high = row["spread"]
        lines.append(
            f"| {row['mode']} | {row['engine']} | {cell(row['median'])} | {low:.3f} .. {high:.3f} "
            f"| {cell(min(row['first_token_s']), '{:.2f}')} | {row['peak_rss_bytes'] / MIB:.0f} "
            f"| {cell(row['answer']['largest_difference'])} | {ratio_of(record, row)} |"
        )
    return lines


def figures_table(record: dict[str, Any]) -> list[str]:
    """Markdown rows of a record's own medians, limits beside them."""
    lines = ["| figure | median | smallest .. largest |", "|---|--:|---|"]
    for name, value in record["median"].items():
        spread = record["spread"].get(name)
        lines.append(
            f"| {name} | {value:.6g} | {' .. '.join(f'{end:.6g}' for end in spread) if spread else ''} |"
        )
    flat = {name: value for name, value in record["limit"].items() if isinstance(value, int | float | str)}
    lines += [f"| limit: {name} | {cell(value, '{:.6g}') or value} | |" for name, value in flat.items()]
    return lines


def markdown(record: dict[str, Any]) -> str:
    """One record for people."""
    machine, dirty = (
        record["machine"],
        "" if record["answer_matches"] is not False else "  **answers do not match**",
    )
    head = [
        f"## {record['bench']}{dirty}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"kernel {machine['kernel']}; {record['written']}, commit {record['commit']}, load {machine['load_at_start']}",
        "",
    ]
    rows = [row for row in record["rows"] if "mode" in row]
    body = [*rows_table(record), ""] if rows else []
    return "\n".join(
        [*head, *body, *figures_table(record), "", *(f"- {note}" for note in record["notes"]), ""]
    )


def draw(records: list[dict[str, Any]], out: Path) -> None:
    """One panel per record with engines: seconds per pass as bars, the measured limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [record for record in records if any(row.get("is_right") for row in record["rows"])]
    figure, axes = plt.subplots(len(shown), 1, figsize=(8, 3.2 * max(len(shown), 1)), squeeze=False)
    for record, axis in zip(shown, axes[:, 0], strict=True):
        rows = [row for row in record["rows"] if row["is_right"]]
        labels = [f"{row['engine']}, {row['mode']}" for row in rows]
        medians = [row["median"] for row in rows]
        errors = [[m - row["spread"][0] for m, row in zip(medians, rows, strict=True)]]
        errors.append([row["spread"][1] - m for m, row in zip(medians, rows, strict=True)])
        colours = [BLUE if row["engine"].startswith("zinfer") else GREY for row in rows]
        axis.barh(labels, medians, xerr=errors, color=colours)
        for name in ("streamed_s", "resident_s"):
            if isinstance(record["limit"].get(name), float):
                axis.axvline(record["limit"][name], color=ORANGE, linestyle="--", linewidth=1)
        axis.invert_yaxis()
        axis.set_xlabel("seconds per pass (dashed: measured limit)")
        axis.set_title(record["bench"])
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    """Print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="*", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    records = [json.loads(path.read_text()) for path in options.records or newest()]
    if options.gpu:
        print("\n".join(gpu_figures.table(records)))
        if options.png:
            gpu_figures.draw(records, options.png)
        return
    print("\n".join(markdown(record) for record in records))
    if options.png:
        draw(records, options.png)


if __name__ == "__main__":
    main()
