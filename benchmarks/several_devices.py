"""Do the links of several devices add up?  In: simulated devices.  Out: one record, by links, on both clocks.

usage: several_devices.py [--dry-run] [--results DIR]

Every chunk comes up from host memory in shares, over two links of the same rate, over unequal ones, and over two that
stand behind one root port.  Copies are real and paced by the simulated machine; nothing computes, so that a pass takes
as long as the links need.  Every byte of one more pass is compared with the file's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from harness import RESULTS, ROOT, Record, summary
from overlap import one_pass

sys.path.insert(0, str(ROOT / "tests"))
from chunk_files import FAST, write_chunks
from links_of import with_links

from zinfer.chunks.table import PAGE, ChunkTable
from zinfer.config.machine import Machine
from zinfer.memory.assemble import open_manager
from zinfer.parallel.aggregate import by_several_links
from zinfer.plan.place import Reserve, place
from zinfer.plan.records import Budget, Placement, Schedule, Tier
from zinfer.plan.schedule import build_schedule
from zinfer.plan.simulate import simulate

LOOKAHEAD = 3
RATE = 200e6  # of one link alone: slow, so that the copies of all links are little work for one processor
CASES = {  # what each link carries while all work, in shares of RATE; the gather's rate in the same unit
    "one link": ((1.0,), 4.0),
    "two links": ((1.0, 1.0), 4.0),
    "links of 3:1": ((1.0, 1 / 3), 4.0),
    "one root port": ((0.5, 0.5), 4.0),
    "slow bridge": ((1.0, 1.0), 0.5),
}
EXPECTED = {
    "one link": 1,
    "two links": 1 / 2,
    "links of 3:1": 3 / 4,
    "one root port": 1,
    "slow bridge": 2 / 3,
}
TOLERANCE = 0.08


def machine_of(shares: Sequence[float], peer: float) -> Machine:
    """A machine with such links; one of them needs no list."""
    machine = with_links(
        FAST, [share * RATE for share in shares], peer=peer * RATE, alone=[RATE] * len(shares)
    )
    return machine.using(len(shares))


def wall_passes(
    table: ChunkTable,
    placement: Placement,
    schedule: Schedule,
    machine: Machine,
    contents: Sequence[bytes],
    passes: int,
) -> tuple[list[float], dict[str, int]]:
    """Seconds of steady passes and the bytes of one of them by link; one more pass checks every byte."""
    budget = Budget(host=1 << 32, device=1 << 32)
    make = by_several_links(table, placement, budget, machine, "sim")
    manager = open_manager(table, placement, budget, device="sim", machine=machine, make_transfer=make)
    try:
        one_pass(manager, schedule.first, None, 0.0)
        one_pass(manager, schedule.steady, None, 0.0)
        before = manager.log.num_bytes
        seconds = [one_pass(manager, schedule.steady, None, 0.0) for _ in range(passes)]
        moved = {link: (nbytes - before[link]) // passes for link, nbytes in manager.log.num_bytes.items()}
        one_pass(manager, schedule.steady, contents, 0.0)
        manager.check()
    finally:
        manager.close()
    return seconds, moved


def main() -> int:
    """All cases on both clocks; exit status 1 where the wall clock is off by more than TOLERANCE."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dry-run", action="store_true", help="small, and no record")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder for records")
    options = made.parse_args()
    count, pages, passes = (6, 64, 1) if options.dry_run else (24, 2048, 5)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        table, contents = write_chunks(Path(folder), [pages] * count, piece=pages * PAGE)
        small = Budget(host=(count + 4) * table.slot_bytes, device=(LOOKAHEAD + 1) * table.slot_bytes)
        placement = place(table, small, compute_tier=Tier.DEVICE, reserve=Reserve(), lookahead=LOOKAHEAD)
        placement = replace(placement, home=(Tier.HOST,) * count)
        schedule = build_schedule(table, placement)
        alone_s = count * table.slot_bytes / RATE
        for name, (shares, peer) in CASES.items():
            machine = machine_of(shares, peer)
            _, steady = simulate(table, placement, schedule, machine, [0.0] * count)
            wall_s, moved = wall_passes(table, placement, schedule, machine, contents, passes)
            rows.append(
                {
                    "links": name,
                    "expected_ratio": EXPECTED[name],
                    "virtual_ratio": steady.seconds / alone_s,
                    "wall_ratio": median(wall_s) / alone_s,
                    "wall_s": summary(wall_s),
                    "bytes_per_pass": moved,
                }
            )
            virtual, wall = rows[-1]["virtual_ratio"], rows[-1]["wall_ratio"]
            print(f"{name:14} expected {EXPECTED[name]:.3f}  virtual {virtual:.3f}  wall {wall:.3f}")
    off = [row["links"] for row in rows if abs(row["wall_ratio"] / row["expected_ratio"] - 1) > TOLERANCE]
    if options.dry_run:
        return 0
    record = Record(
        bench="several_devices",
        config={"chunks": count, "chunk_bytes": table.slot_bytes, "rate": RATE, "lookahead": LOOKAHEAD},
        repeats=passes,
        median={f"{row['links']}": row["wall_ratio"] for row in rows},
        spread={row["links"]: row["wall_s"]["spread"] for row in rows},
        limit={"expected": EXPECTED, "tolerance": TOLERANCE},
        baseline={"one_link_s": alone_s},
        answer_matches=True,
        rows=rows,
    )
    print(f"{'MISSED by ' + ', '.join(off) if off else 'met'}  {record.write(options.results)}")
    return int(bool(off))


if __name__ == "__main__":
    sys.exit(main())
