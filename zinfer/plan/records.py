"""What a plan says.  Frozen records: tiers, placement, schedule steps, forecast.  All have a JSON form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil
from typing import Literal

from zinfer.chunks.table import Chunk, ChunkId, ChunkTable


class Tier(StrEnum):
    """A class of memory.  With device="cpu" host memory is compute memory and there is no DEVICE tier."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Fetch:
    """Begin moving a chunk into the compute tier; never blocks.  Needs a free slot (streamed) or its home bytes.

    A guest takes a slot although it has a home: whoever has computed with it evicts or settles it.
    """

    chunk: ChunkId
    as_guest: bool = False


@dataclass(frozen=True, slots=True)
class Compute:
    """Lease a chunk (waiting for it alone) and run its ops over all micro-batches of the pass."""

    chunk: ChunkId


@dataclass(frozen=True, slots=True)
class Evict:
    """Drop a streamed chunk, or a guest, from the compute tier; its slot is free."""

    chunk: ChunkId


@dataclass(frozen=True, slots=True)
class FetchRows:
    """Read the rows of the embedding tables that this pass's ids name (a fetch that depends on data)."""


@dataclass(frozen=True, slots=True)
class Settle:
    """Pack a guest's weights into its home, which is smaller than the chunk; its slot is free."""

    chunk: ChunkId


Step = Fetch | Compute | Evict | Settle | FetchRows


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of the first pass (which also loads what stays) and of every later one.

    Where the placement has guests there is a `second` pass between, which loads them.  The steady pass assumes that the
    leading streamed chunks are already on their way: look-ahead wraps around.  With `parks` a micro-batch comes up from
    host memory for each computation and goes down again behind it, where there are several.
    """

    first: tuple[Step, ...]
    steady: tuple[Step, ...]
    parks: bool = False
    second: tuple[Step, ...] = ()

    @property
    def loading(self) -> tuple[tuple[Step, ...], ...]:
        """The passes before the steady ones."""
        return (self.first, self.second) if self.second else (self.first,)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each chunk lives.

    `home[i]` is the tier of chunk i's lasting copy (the file always holds one more).  Chunks whose home is the
    compute tier are resident; the others stream through `slots` slots of `slot_bytes` in the compute tier.
    Chunks with home DISK on a machine with a device pass through `staging` host slots of the same size.
    `guests` are resident chunks that the first pass streams all the same: their memory is found beside the second,
    which waits for the disk anyway.
    `packed` are resident chunks whose homes hold them packed without loss (`ChunkTable.packed`): each comes through a
    slot.
    """

    compute_tier: Tier
    home: tuple[Tier, ...]
    slots: int
    slot_bytes: int
    staging: int
    lookahead: int
    guests: tuple[ChunkId, ...] = ()
    packed: frozenset[ChunkId] = frozenset()

    def resident(self, chunk: int) -> bool:
        """Whether the chunk stays in the compute tier after its first use; a guest after its second."""
        return self.home[chunk] is self.compute_tier

    def at_home(self, table: ChunkTable, chunk: ChunkId) -> Chunk:
        """The chunk in the form in which its home holds it."""
        return table.packed[chunk] if chunk in self.packed else table.chunks[chunk]


Attend = Literal["resident", "device", "host"]


@dataclass(frozen=True, slots=True)
class KvPlan:
    """Where the pages of the KV cache live, in which format, and where attention meets them.

    "resident": in the compute tier, where everything is computed.  Pages in host memory below a device either come
    up to it for every use ("device"), or are attended by the host where they are, queries going down and results up
    ("host").  `dtype` is a word of ModelSpec.dtype or "INT8"; None: the model's.
    """

    tier: Tier = Tier.HOST
    dtype: str | None = None
    attend: Attend = "resident"


@dataclass(frozen=True, slots=True)
class Workload:
    """What the plan is for: `batch` sequences at once, `prompt_len` tokens and `gen_len` to generate on average.

    `max_len` is the most tokens that one sequence may reach (None: prompt_len + gen_len), `lengths` the totals of
    single requests where they are known, largest first; `num_requests` how many there are in all (None: a queue
    without end).  A pass carries at most `prefill_rows` rows, in micro-batches of `micro_rows` (None: all at once),
    `logit_rows` of them with logits (None: one per sequence); `logit_share` is how many of a prompt's rows want theirs
    (0: the last one alone).  With `parks` what a waiting micro-batch holds lies in host memory below the device.
    `cache_tokens` is what the KV cache holds, all sequences together (None: each at its end).
    With `is_whole` the sequences are an encoder's texts, each read whole in one pass: nothing is generated or cached,
    and what the forecast says of decode passes and tokens it says of full passes and texts.
    """

    batch: int = 1
    prompt_len: int = 128
    gen_len: int = 128
    prefill_rows: int = 2048
    micro_rows: int | None = None
    num_requests: int | None = None
    max_len: int | None = None
    lengths: tuple[int, ...] = ()
    logit_rows: int | None = None
    cache_tokens: int | None = None
    kv: KvPlan = KvPlan()
    parks: bool = False
    is_whole: bool = False
    logit_share: float = 0.0

    @property
    def context(self) -> int:
        """The most tokens of one sequence."""
        return self.max_len or self.prompt_len + self.gen_len

    def joined(self, other: Workload) -> Workload:
        """One plan for both: this workload, which comes now, and `other`, which may come again."""
        lengths = tuple(sorted(self.lengths + other.lengths, reverse=True))
        return replace(
            self,
            batch=max(self.batch, other.batch),
            num_requests=None if None in (self.num_requests, other.num_requests) else self.num_requests,
            max_len=max(self.context, other.context),
            lengths=lengths[: max(len(self.lengths), len(other.lengths))],
            logit_rows=max(self.logit_rows or 0, other.logit_rows or 0) or None,
        )

    def logits_of(self, rows: int) -> int:
        """Of so many rows of prompts those that are scored."""
        return min(ceil(rows * self.logit_share), self.logit_rows or 0)

    @property
    def rows_at_once(self) -> int:
        """Rows of a full micro-batch."""
        return min(self.micro_rows or self.prefill_rows, self.prefill_rows)

    @property
    def num_micros(self) -> int:
        """Micro-batches of the fullest pass."""
        return -(-self.prefill_rows // self.rows_at_once)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes zinfer may hold in each memory tier, everything counted."""

    host: int
    device: int = 0


@dataclass(frozen=True, slots=True)
class TierUse:
    """What one memory tier holds at its peak, in bytes; the sum never exceeds `budget`."""

    tier: Tier
    budget: int
    resident: int
    slots: int
    staging: int
    kv: int
    activations: int
    locked: int = 0  # of these: page-locked for a device

    @property
    def total(self) -> int:
        """Bytes used at the peak."""
        return self.resident + self.slots + self.staging + self.kv + self.activations


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted before any weight is read.  Seconds, bytes per pass per link, and what binds."""

    first_token_s: float  # from the start of LLM() to the first token: load, prefill of one prompt, sample
    pass_s: float  # a steady decode pass
    prefill_s: float  # a prefill pass when the resident set is loaded
    tokens_per_s: float  # all sequences together, steady decode
    job_s: float  # every request to its end, the load included
    token_rows: int  # T*: rows of a pass at which computation begins to bind
    binding: str  # "disk" | "h2d" | "compute" | "overhead"
    bytes_per_pass: dict[str, int]  # link name -> bytes ("disk", "h2d")
    busy_s: dict[str, float]  # engine or link -> busy seconds in a steady pass
    full_rows: int = 0  # what a pass is filled to: T*, or more where that makes the job shorter

    @property
    def fill(self) -> float:
        """Times T* that a pass carries."""
        return max(self.full_rows / max(self.token_rows, 1), 1.0)
