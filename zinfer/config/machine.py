"""A machine as the planner sees it: capacities and rates, declared in a file or measured by `zinfer doctor`."""

from __future__ import annotations

from bisect import bisect_left

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ProductRate(BaseModel):
    """One measured point: a product of `rows` activation rows with a weight matrix that comes from memory.

    `seconds_per_gb` is the time per 10**9 bytes of weight at that many rows, cold weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(ge=1)
    seconds_per_gb: float = Field(gt=0)


class StepCost(BaseModel):
    """What an op costs beside its product: attention while decoding (one new row per sequence) and in prefill."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    op_overhead_s: float = Field(ge=0)  # per op of the program: interpreter, launches, norms, small attention
    attention_flops_per_s: float = Field(gt=0)
    prefill_attention_flops_per_s: float = Field(gt=0)
    # The same in a pass that was recorded; None: none are.
    replayed_op_s: float | None = Field(default=None, ge=0)


class Compute(BaseModel):
    """How fast one compute engine multiplies: per dtype a few points over rows, and the fixed cost of an op.

    Exact mode has kernels of its own: where they were measured their points stand under "BF16 exact" and their
    step cost in `exact`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    products: dict[str, tuple[ProductRate, ...]]  # "BF16" | "F16" | "F32" -> points with growing rows
    attention_flops_per_s: float = Field(gt=0)
    prefill_attention_flops_per_s: float | None = None  # None: as while decoding
    op_overhead_s: float = Field(ge=0)  # per op of the program: interpreter, launches, norms
    replayed_op_s: float | None = Field(default=None, ge=0)  # as StepCost's
    chunk_overhead_s: float = Field(default=5e-5, ge=0)  # per chunk: fetch, lease, evict
    packing_s_per_gb: float | None = Field(default=None, gt=0)  # of bf16, without loss; None: not known
    exact: StepCost | None = None
    token_overhead_s: float = Field(default=0.0, ge=0)  # per sequence and pass: sampling, text

    def step_cost(self, *, exact: bool) -> StepCost:
        """The fixed costs of one mode."""
        if exact and self.exact is not None:
            return self.exact
        return StepCost(
            op_overhead_s=self.op_overhead_s,
            attention_flops_per_s=self.attention_flops_per_s,
            prefill_attention_flops_per_s=self.prefill_attention_flops_per_s or self.attention_flops_per_s,
            replayed_op_s=self.replayed_op_s,
        )

    def seconds_per_byte(self, dtype: str, rows: int) -> float:
        """Seconds per weight byte for a product with `rows` rows: linear between points, and beyond the last."""
        points = self.products.get(dtype) or next(iter(self.products.values()))
        if rows <= points[0].rows or len(points) == 1:
            return points[0].seconds_per_gb / 1e9
        at = min(max(bisect_left([point.rows for point in points], rows), 1), len(points) - 1)
        low, high = points[at - 1], points[at]
        slope = (high.seconds_per_gb - low.seconds_per_gb) / (high.rows - low.rows)
        return max(low.seconds_per_gb + slope * (rows - low.rows), low.seconds_per_gb * 0.5) / 1e9


class Link(BaseModel):
    """A path between two tiers: seconds = latency_s + bytes / bytes_per_s."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_s: float = Field(gt=0)
    latency_s: float = Field(default=0.0, ge=0)

    def seconds(self, nbytes: int) -> float:
        """Time of one transfer on the idle link."""
        return self.latency_s + nbytes / self.bytes_per_s


class DeviceLink(BaseModel):
    """One device's own link to host memory, and the way from that device to the one that computes.

    `together_bytes_per_s` is what reaches the computing device by this way while all the others work too: a shared
    root port, switch or last hop shows in it and nowhere else.  `peer` is None for the device that computes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    h2d: Link  # alone
    together_bytes_per_s: float = Field(gt=0)
    peer: Link | None = None

    @property
    def at_once(self) -> Link:
        """The link as it is while all of them work."""
        return Link(bytes_per_s=self.together_bytes_per_s, latency_s=self.h2d.latency_s)


class Overlap(BaseModel):
    """What reading from disk and computing in host memory cost each other: seconds at once over seconds alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    disk: float = Field(default=1.0, ge=1)
    compute: float = Field(default=1.0, ge=1)

    def at_once(self, disk_s: float, work_s: float) -> tuple[float, float]:
        """Seconds that both take side by side, of those that each takes alone.

        Each is slower by its factor for the share of its own time in which the other one works.
        """
        if not disk_s or not work_s:
            return disk_s, work_s
        disk = 1 + (self.disk - 1) * min(work_s * self.compute / disk_s, 1)
        work = 1 + (self.compute - 1) * min(disk_s * self.disk / work_s, 1)
        return disk_s * disk, work_s * work


class There(BaseModel):
    """Free memory whose pages the machine still has, for somebody gave it back a moment ago.  It is used first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nbytes: int = Field(default=0, ge=0)
    bytes_per_s: float = Field(default=1e10, gt=0)


class Machine(BaseModel):
    """Capacities in bytes, links, and compute rates of the host and of one device (None where there is none)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    host_bytes: int = Field(gt=0)
    device_bytes: int = Field(default=0, ge=0)
    pinnable_bytes: int | None = None  # None: not known, assume host_bytes
    disk_read: Link  # direct reads of large pieces, several in flight
    disk_row_latency_s: float = 1e-4  # one small read, for embedding rows
    h2d: Link | None = None
    d2h: Link | None = None
    links: tuple[DeviceLink, ...] = ()  # of several devices, that which computes first; none: h2d is all
    host_copy_bytes_per_s: float | None = None  # within host memory; for the reader, no plan uses it
    fresh_bytes_per_s: float | None = None  # memory that nobody has used gets its pages; None: at no cost
    there: There = There()  # of the free memory, as it was looked at; of no profile
    host: Compute
    overlap: Overlap = Overlap()
    device: Compute | None = None
    skipped: tuple[str, ...] = ()  # what a short probe had no time for; its figures are guesses
    measured: bool = False  # False: declared numbers, or shipped profile
    fingerprint: str = ""  # of CPU, kernel, torch, kernels, GPU: a profile measured elsewhere is announced
    disk_device: str = ""  # the block device that disk_read was measured on; another one has other rates

    @model_validator(mode="after")
    def _links_lead_to_one_device(self) -> Machine:
        if self.links and (
            self.h2d is None or self.links[0].peer or not all(link.peer for link in self.links[1:])
        ):
            raise ValueError("links: the first device computes and has no peer link, every other one has one")
        return self

    @property
    def up_bytes_per_s(self) -> float:
        """What all links that are used carry to the computing device together; 0 without a device."""
        if self.links:
            return sum(link.together_bytes_per_s for link in self.links)
        return self.h2d.bytes_per_s if self.h2d else 0.0

    def finding_s(self, nbytes: int, before: int = 0) -> float:
        """Seconds of a processor that so many bytes of memory take to be found, after `before` others."""
        if self.fresh_bytes_per_s is None:
            return 0.0
        there = min(max(self.there.nbytes - before, 0), nbytes)
        return there / self.there.bytes_per_s + (nbytes - there) / self.fresh_bytes_per_s

    def using(self, devices: int) -> Machine:
        """This machine with the first so many links in use; their rates stay those of all links at once."""
        links = self.links[:devices] if devices > 1 else ()
        return self if links == self.links else self.model_copy(update={"links": links})
