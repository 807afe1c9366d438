"""Does streaming hide behind computation?  In: a simulated device.  Out: one record, overlapped and serial.

usage: overlap.py

Three tiers, each as slow as the others: chunks lie on disk, pass through staging slots and a link, and compute for as
long as one of them moves.  Copies are real and paced by the simulated machine; computation is emulated by sleeping,
since a real product would fight the copies for the processor, as it does not with a copy engine.  The virtual clock's
figures stand beside those of the wall clock.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from harness import ROOT, Record, summary

sys.path.insert(0, str(ROOT / "tests"))
from chunk_files import COMPUTE, bytes_of, write_chunks

from zinfer.chunks.table import PAGE, ChunkTable
from zinfer.config.machine import Link, Machine
from zinfer.memory.assemble import open_manager
from zinfer.memory.manager import ChunkManager
from zinfer.plan.place import Reserve, place
from zinfer.plan.records import Budget, Compute, Evict, Fetch, FetchRows, Placement, Schedule, Step, Tier
from zinfer.plan.schedule import build_schedule, serial_schedule
from zinfer.plan.simulate import simulate

NUM_CHUNKS, CHUNK_PAGES, CHUNK_S, PASSES = 24, 1024, 0.02, 5  # 4 MiB a chunk at 210 MB/s
LIMITS = {"overlapped": 1.25, "serial": 1.7}  # at most, at least, times the larger of transfer and compute


def one_pass(
    manager: ChunkManager, steps: Sequence[Step], contents: Sequence[bytes] | None, compute_s: float = CHUNK_S
) -> float:
    """Carry one pass out on the wall clock, checking what was leased where `contents` are given."""
    begin_s = time.perf_counter()
    for step in steps:
        match step:
            case Fetch(chunk):
                manager.prefetch(chunk)
            case Compute(chunk):
                with manager.lease(chunk) as lease:
                    if contents is not None:
                        found = bytes_of(dict(lease.views), manager.table.chunks[chunk])
                        assert found == contents[chunk], f"chunk {chunk} does not hold its bytes"
                    time.sleep(compute_s)
            case Evict(chunk):
                manager.evict(chunk)
            case FetchRows():
                pass
    return time.perf_counter() - begin_s


def wall_passes(
    table: ChunkTable, placement: Placement, schedule: Schedule, machine: Machine, contents: Sequence[bytes]
) -> list[float]:
    """Seconds of steady passes with real copies; a last one, not counted, checks every byte that was leased."""
    budget = Budget(host=1 << 30, device=1 << 30)
    manager = open_manager(table, placement, budget, device="sim", machine=machine)
    try:
        one_pass(manager, schedule.first, None)
        seconds = [one_pass(manager, schedule.steady, None) for _ in range(PASSES)]
        one_pass(manager, schedule.steady, contents)
        manager.check()
    finally:
        manager.close()
    return seconds


def main() -> int:
    """Both schedules on both clocks; exit status 1 where a limit is missed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table, contents = write_chunks(Path(folder), [CHUNK_PAGES] * NUM_CHUNKS, piece=CHUNK_PAGES * PAGE)
        rate = table.slot_bytes / CHUNK_S
        machine = Machine(
            name="three equal tiers",
            host_bytes=1 << 30,
            device_bytes=1 << 30,
            disk_read=Link(bytes_per_s=rate),
            h2d=Link(bytes_per_s=rate),
            host=COMPUTE,
            device=COMPUTE,
        )
        small = Budget(host=4 * table.slot_bytes, device=4 * table.slot_bytes)
        placement = place(table, small, compute_tier=Tier.DEVICE, reserve=Reserve(), lookahead=3)
        placement = replace(placement, home=(Tier.DISK,) * NUM_CHUNKS)
        schedules = {
            "overlapped": build_schedule(table, placement),
            "serial": serial_schedule(table, placement),
        }
        larger_s = NUM_CHUNKS * CHUNK_S
        rows = []
        for name, schedule in schedules.items():
            _, steady = simulate(table, placement, schedule, machine, [CHUNK_S] * NUM_CHUNKS)
            wall_s = wall_passes(table, placement, schedule, machine, contents)
            rows.append(
                {
                    "schedule": name,
                    "virtual_ratio": steady.seconds / larger_s,
                    "wall_ratio": median(wall_s) / larger_s,
                    "wall_s": summary(wall_s),
                }
            )
            print(f"{name:11} virtual {rows[-1]['virtual_ratio']:.3f}  wall {rows[-1]['wall_ratio']:.3f}")
    ratios = {row["schedule"]: row["wall_ratio"] for row in rows}
    is_met = ratios["overlapped"] <= LIMITS["overlapped"] and ratios["serial"] >= LIMITS["serial"]
    record = Record(
        bench="overlap",
        config={"chunks": NUM_CHUNKS, "chunk_bytes": table.slot_bytes, "chunk_s": CHUNK_S, "lookahead": 3},
        repeats=PASSES,
        median={f"{name}_wall_ratio": ratio for name, ratio in ratios.items()},
        spread={row["schedule"]: row["wall_s"]["spread"] for row in rows},
        limit={"larger_of_transfer_and_compute_s": larger_s, **LIMITS},
        baseline={"serial_wall_ratio": ratios["serial"]},
        answer_matches=True,
        rows=rows,
    )
    print(f"{'met' if is_met else 'MISSED'}  {record.write()}")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
