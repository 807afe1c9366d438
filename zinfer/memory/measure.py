"""Measure this machine.  In: the files that will be read, the product that will be used.  Out: a Machine of rates."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from zinfer.config.limits import memory_limits
from zinfer.config.machine import Compute, Machine, ProductRate, StepCost
from zinfer.config.profiles import fingerprint
from zinfer.memory.devices import visible_devices
from zinfer.memory.measure_beside import Beside, measure_chunk_overhead
from zinfer.memory.measure_disk import device_of, link_now, measure_disk
from zinfer.memory.measure_links import measure_copies, measure_host_copy, typical_seconds
from zinfer.memory.measure_products import (
    SHAPES,
    Clock,
    MakeWeight,
    Product,
    Shape,
    Turns,
    Weight,
    dense,
    one_round,
    pool_of,
    product_rates,
)
from zinfer.units import GIB, MIB

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
EXACT = " exact"  # marks the rates of exact mode: "BF16 exact"
_POOL_BYTES = 640 * MIB  # rotated over, so that weights come from memory and from no cache
_POOL_BYTES_PER_S = 100 * MIB  # of a short probe: making the pool must leave time for using it
_GUESS = StepCost(op_overhead_s=1e-4, attention_flops_per_s=1e10, prefill_attention_flops_per_s=5e10)
_PROMPT_ROWS = 64  # of the products beside which fresh memory is found: what loads also feeds prompts
_FRESH_BYTES = GIB
_PACKING_S = 0.05
_DEVICE_SHARE = 0.6  # of the time for computation
_FEW_TOKENS, _MANY_TOKENS, _PREFILL_ROWS = 64, 1536, 512


class SmallPasses(Protocol):
    """Passes of a model so small that only fixed costs and attention count."""

    @property
    def num_ops(self) -> int:
        """Ops of a pass."""
        ...

    def attention_flops(self, rows: int, context: int) -> float:
        """Of one pass, all layers."""
        ...

    def run(self, rows: int, context: int, *, exact: bool) -> None:
        """One pass of `rows` new rows that ends at `context` tokens; blocks until it is done."""
        ...

    def replay(self, context: int, *, exact: bool) -> Callable[[], None] | None:
        """A recorded pass of one row that ends at `context` tokens, to be carried out; None where none is recorded."""
        ...

    def recorded(self, run: Callable[[], None], *, exact: bool) -> Callable[[], None] | None:
        """Products that `run` calls, as a recorded pass has them, to be carried out; None where none is recorded."""
        ...


Pack = Callable[[Tensor], object]
SmallModels = Callable[[torch.device], SmallPasses]


def probe(
    paths: Sequence[Path],
    product: Product,
    small_model: SmallModels,
    *,
    dtype: str = "BF16",
    shapes: Sequence[Shape] = SHAPES,
    modes: Sequence[bool] = (False, True),
    formats: Mapping[str, MakeWeight] = MappingProxyType({}),
    pack: Pack | None = None,
    seconds: float = 1.7,
) -> Machine:
    """What a plan for these files needs, within `seconds` by the clock: where `zinfer doctor` has saved nothing.

    `modes` are the values of `exact` that are wanted.  What there is no time for is named in `Machine.skipped`.
    """
    return measure(
        paths,
        product,
        small_model,
        dtypes=(dtype,),
        shapes=shapes,
        modes=modes,
        formats=formats,
        pack=pack,
        seconds=seconds,
    )


def for_files(machine: Machine, paths: Sequence[Path], seconds: float = 0.05) -> Machine:
    """The machine as it is now for these files: disks drift, and another disk may hold them."""
    if not paths or not machine.measured or machine.fingerprint != fingerprint():
        return machine
    if machine.disk_device != device_of(paths):
        return machine.model_copy(update=_disk_fields(paths, seconds))
    return machine.model_copy(update={"disk_read": link_now(paths, machine.disk_read, seconds)})


def measure(
    paths: Sequence[Path],
    product: Product,
    small_model: SmallModels,
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    shapes: Sequence[Shape] = SHAPES,
    modes: Sequence[bool] = (False, True),
    formats: Mapping[str, MakeWeight] = MappingProxyType({}),
    pack: Pack | None = None,
    seconds: float = 20.0,
) -> Machine:
    """This machine as the planner sees it, in about `seconds`: a quarter for the disk, the rest for computation.

    `paths` are the weight files that will be read; without any the disk's rate is a cautious guess.  `product` is
    what layers multiply with, with matrices of `shapes` (kernels differ by shape); `small_model` makes passes that
    show what an op costs beside its weights; `formats` makes weights that are not plain tensors ("I8", "I4"); `pack`
    packs a bf16 matrix without loss.
    """
    has_gpu = visible_devices().count > 0
    _first_use(product, dtypes[0], ["cpu", "cuda"] if has_gpu else ["cpu"])
    clock = Clock(seconds)
    limits = memory_limits()
    disk = _disk_fields(paths, seconds / 5)
    chunk_s = measure_chunk_overhead(paths, seconds / 40)
    pool = pool_of(dense(DTYPES[dtypes[0]]), torch.device("cpu"), shapes, 0)
    decode, prompt = (partial(one_round, product, pool, rows, modes[0]) for rows in (1, _PROMPT_ROWS))
    beside = Beside(paths, decode, prompt, seconds)
    if clock.allows("reads beside products"):
        beside.take_turns(clock.left_s)
    fresh = None
    if clock.allows("fresh memory"):
        fresh = beside.fresh(clock.left_s, min(_FRESH_BYTES, limits.available // 8))
    device = _device_fields(product, small_model, dtypes, shapes, modes, formats, clock) if has_gpu else {}
    host_s = clock.left_s * 0.8
    host = measure_compute(
        product,
        small_model,
        torch.device("cpu"),
        dtypes,
        shapes,
        limits.available // 4,
        Clock(host_s, clock.skipped),
        modes,
        formats,
    )
    if chunk_s is not None:
        host = host.model_copy(update={"chunk_overhead_s": chunk_s})
    if pack is not None and clock.allows("packing weights"):
        host = host.model_copy(update={"packing_s_per_gb": _packing_s_per_gb(pack)})
    if clock.left_s > 0:
        beside.take_turns(clock.left_s)
    machine = Machine(
        name=platform.node() or "this machine",
        host_bytes=limits.total,
        host=host,
        overlap=beside.overlap,
        host_copy_bytes_per_s=measure_host_copy() if clock.allows("copies in host memory") else None,
        fresh_bytes_per_s=fresh,
        measured=True,
        fingerprint=fingerprint(),
        **disk,
        **device,
    )
    return machine.model_copy(update={"skipped": tuple(clock.skipped)})


def _first_use(product: Product, dtype: str, devices: Sequence[str]) -> None:
    """What is compiled, loaded or opened once per process is no part of any rate, nor of the time for measuring."""
    for device in devices:
        one_round(product, [dense(DTYPES[dtype])((64, 64), torch.device(device))], 1, exact=False)


def _packing_s_per_gb(pack: Pack) -> float:
    """Seconds per 10**9 published bytes."""
    outputs, inputs = SHAPES[0]
    matrix_OI = torch.randn(inputs, generator=torch.Generator().manual_seed(0)).bfloat16().repeat(outputs, 1)
    return typical_seconds(partial(pack, matrix_OI), _PACKING_S) / matrix_OI.nbytes * 1e9


def measure_compute(
    product: Product,
    small_model: SmallModels,
    device: torch.device,
    dtypes: Sequence[str],
    shapes: Sequence[Shape],
    free_bytes: int,
    clock: Clock,
    modes: Sequence[bool] = (False, True),
    formats: Mapping[str, MakeWeight] = MappingProxyType({}),
) -> Compute:
    """Products of cold weights at decode and prefill shapes, attention, and the fixed cost of an op.

    The first dtype comes first and always gets its first two points, then the fixed costs, then what the clock leaves.
    """
    products: dict[str, tuple[ProductRate, ...]] = {}
    steps: list[StepCost] = []

    def share_s() -> float:
        """What is left, for each series that is left; making matrices and exact mode's tests take their part."""
        series = len(modes) * (len(makers) + 0.5) - len(products) - len(steps) / 2
        return clock.left_s / max(series, 0.5)

    makers = {**{dtype: dense(DTYPES[dtype]) for dtype in dtypes}, **formats}
    with torch.no_grad():
        small = small_model(device)
        for dtype, make in makers.items():
            nbytes = min(_POOL_BYTES, free_bytes, int(_POOL_BYTES_PER_S * clock.left_s))
            names = [(dtype + EXACT if exact else dtype, exact) for exact in modes]
            names = [pair for at, pair in enumerate(names) if not products or clock.allows(pair[0])]
            pool = pool_of(make, device, shapes, nbytes) if names else []
            if dtype == next(iter(makers)):
                steps += _steps(small, modes, clock, share_s, device)
            for name, exact in names:
                # Exact mode tests itself when it meets a shape.
                if all(
                    _meets(product, weight, exact, clock, products, name) for weight in pool[: len(shapes)]
                ):
                    turns = Turns(product, pool, len(shapes), small.recorded, exact)
                    products[name] = product_rates(turns, Clock(share_s(), clock.skipped), name)
            del pool
    steps = [_with_guesses(step, next(iter(products.values()))) for step in steps or [_GUESS]]
    return Compute(products=products, exact=steps[-1] if modes[-1] else None, **steps[0].model_dump())


def _steps(
    small: SmallPasses,
    modes: Sequence[bool],
    clock: Clock,
    share_s: Callable[[], float],
    device: torch.device,
) -> Iterator[StepCost]:
    """Fixed costs and attention in each mode: before products, which take whatever time there is."""
    for exact in modes:
        name = "fixed costs and attention" + EXACT * exact
        if clock.allows(name):
            # Kernels are compiled, and chosen, when a pass first wants them; exact mode tests itself.
            small.run(1, _FEW_TOKENS, exact=exact)
            small.run(_PREFILL_ROWS, _PREFILL_ROWS, exact=exact)
            yield _step_cost(small, exact, Clock(share_s() / 2, clock.skipped), name, device)


def _with_guesses(step: StepCost, rates: Sequence[ProductRate]) -> StepCost:
    """Attention that there was no time to measure, from products: decoding reads about a byte per FLOP, at half of
    memory's rate; prompts come to a tenth of what large products do.
    """
    read_s, full = rates[0].seconds_per_gb, rates[-1]
    guesses = {
        "attention_flops_per_s": 0.5e9 / max(read_s, 1e-9),
        "prefill_attention_flops_per_s": 0.1e9 * full.rows / max(full.seconds_per_gb, 1e-9),
    }
    known = _GUESS.model_dump()
    unknown = {
        name: max(guess, known[name]) for name, guess in guesses.items() if getattr(step, name) == known[name]
    }
    return step.model_copy(update=unknown)


def _meets(
    product: Product,
    weight: Weight,
    exact: bool,
    clock: Clock,
    products: Mapping[str, tuple[ProductRate, ...]],
    name: str,
) -> bool:
    """One product with a weight of a new shape; False when there is no time left for it, unless it is the first."""
    if products and name not in clock.skipped and not clock.allows(name):
        return False
    one_round(product, [weight], 1, exact)
    return name not in clock.skipped


def _device_fields(
    product: Product,
    small_model: SmallModels,
    dtypes: Sequence[str],
    shapes: Sequence[Shape],
    modes: Sequence[bool],
    formats: Mapping[str, MakeWeight],
    clock: Clock,
) -> dict[str, Any]:
    """Links and products of the current CUDA device, in most of the time: it is what computes where there is one."""
    device = torch.device("cuda", torch.cuda.current_device())
    seconds = _DEVICE_SHARE * clock.left_s
    copies = measure_copies(device, memory_limits().available, seconds / 2)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    own = Clock(seconds, clock.skipped)
    compute = measure_compute(
        product, small_model, device, dtypes, shapes, free_bytes // 4, own, modes, formats
    )
    return {
        "device_bytes": total_bytes,
        "pinnable_bytes": copies.pinnable_bytes,
        "h2d": copies.h2d,
        "d2h": copies.d2h,
        "device": compute,
    }


def _disk_fields(paths: Sequence[Path], seconds: float) -> dict[str, Any]:
    disk = measure_disk(paths, seconds)
    return {
        "disk_read": disk.link,
        "disk_row_latency_s": disk.row_latency_s,
        "disk_device": device_of(paths),
    }


def _step_cost(small: SmallPasses, exact: bool, clock: Clock, name: str, device: torch.device) -> StepCost:
    """Fixed cost from a decode pass over few tokens, attention from what many tokens and many rows add to it.

    A device attends while the host still asks for the rest of a pass: what it takes shows in recorded ones alone.
    """
    share_s = clock.left_s / 4
    plain_s = typical_seconds(partial(small.run, 1, _FEW_TOKENS, exact=exact), share_s)

    replay = small.replay(_FEW_TOKENS, exact=exact)
    replayed_s = None if replay is None else typical_seconds(replay, share_s / 8)

    def rate(rows: int, context: int, guess: float) -> float:
        if not clock.allows(f"{name}, {rows} rows"):
            return guess
        small.run(rows, context, exact=exact)  # likewise
        run: Callable[[], None] = partial(small.run, rows, context, exact=exact)
        base_s, recorded = plain_s, None
        if rows == 1 and device.type == "cuda":
            recorded = small.replay(context, exact=exact)
        if recorded is not None and replayed_s is not None:
            run, base_s = recorded, replayed_s
        added_s = typical_seconds(run, share_s) - base_s
        # Noise must not make it infinite.
        return small.attention_flops(rows, context) / max(added_s, 0.05 * base_s)

    prefill_guess = _GUESS.prefill_attention_flops_per_s
    return StepCost(
        replayed_op_s=None if replayed_s is None else replayed_s / small.num_ops,
        op_overhead_s=plain_s / small.num_ops,
        attention_flops_per_s=rate(1, _MANY_TOKENS, _GUESS.attention_flops_per_s),
        prefill_attention_flops_per_s=rate(_PREFILL_ROWS, _PREFILL_ROWS, prefill_guess),
    )
