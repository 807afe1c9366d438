"""Settle what a pass carries.  In: the workload that was asked for and a budget.  Out: one that fits, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from zinfer.chunks.table import ChunkTable
from zinfer.config.resolve import Resolved
from zinfer.errors import BudgetError, InternalError, UsageError
from zinfer.plan.place import Reserve, place, size_flag, smallest_budget
from zinfer.plan.profile import KV_PAGE_TOKENS, reserve_for
from zinfer.plan.records import Budget, Tier, Workload
from zinfer.spec.records import ModelSpec

_MAX_ROWS = 16384
_TEXT_ROWS = 2048  # of an encoder, whose pass is one micro-batch
_MICRO_ROWS = 1024  # products are at their full rate there, and activations stay small
_CPU_MICRO_ROWS = (
    256  # likewise on a processor, whose caches hold no more; a prompt that is longer stays whole
)
_ACTIVATIONS_SHARE = 1 / 8  # of the budget: what rows beyond the batch may take from the weights


def asked_workload(
    spec: ModelSpec, resolved: Resolved, workload: Workload, compute_bytes: int
) -> tuple[Workload, dict[str, str]]:
    """Apply the settings to the wish; with max_rows "auto" a pass carries what costs little of the budget.

    Returns the workload and a reason for each "auto" that was settled.  Raises UsageError ZI-1012 for a context
    that the model does not have.
    """
    runtime, exact = resolved.settings.runtime, resolved.settings.exact
    reasons = {}
    if spec.encoder is not None:
        longest = workload.max_len or workload.prompt_len
        workload = replace(workload, gen_len=1, max_len=longest, lengths=(), is_whole=True)
    length = workload.context
    if runtime.context == "auto":
        length = min(length, spec.max_context)
        reasons["runtime.context"] = f"auto: {length} tokens per sequence are asked for"
    elif runtime.context > spec.max_context:
        raise UsageError(
            "ZI-1012",
            f"a context of {runtime.context} tokens was asked for, the model was made for {spec.max_context}",
            remedy=f"--set runtime.context={spec.max_context}",
        )
    else:
        length = runtime.context
    prompt_len = max(min(workload.prompt_len, length - 1), 1)
    batch = workload.batch if runtime.max_batch == "auto" else min(workload.batch, runtime.max_batch)
    lengths = tuple(min(one, length) for one in workload.lengths)
    num_requests = workload.num_requests
    if runtime.context != "auto" and runtime.max_batch != "auto":  # a plan for whatever may come
        batch, lengths, num_requests = runtime.max_batch, (), None
    most = _MAX_ROWS if spec.encoder is None else _TEXT_ROWS
    rows = min(batch * prompt_len, most) if runtime.max_rows == "auto" else runtime.max_rows
    least_rows = _least_rows(spec, batch, length)
    settled = replace(
        workload,
        batch=batch,
        prompt_len=prompt_len,
        gen_len=max(min(workload.gen_len, length - prompt_len), 1),
        max_len=length,
        lengths=lengths,
        num_requests=num_requests,
        prefill_rows=max(rows, least_rows),
        micro_rows=_micro_rows(resolved.device, length)
        if runtime.micro_rows == "auto"
        else runtime.micro_rows,
        cache_tokens=workload.cache_tokens if runtime.kv_tokens == "auto" else runtime.kv_tokens,
    )
    if runtime.max_rows == "auto":
        least = reserve_for(spec, replace(settled, prefill_rows=least_rows), exact=exact).activations
        for rows in _halves(settled.prefill_rows, least_rows):
            settled = replace(settled, prefill_rows=rows)
            extra = reserve_for(spec, settled, exact=exact).activations - least
            if extra <= compute_bytes * _ACTIVATIONS_SHARE:
                break
        reasons["runtime.max_rows"] = f"auto: {settled.prefill_rows} rows leave the budget to the weights"
    return _with_logit_rows(spec, settled, compute_bytes * _ACTIVATIONS_SHARE, exact=exact), reasons


def _micro_rows(device: str, longest: int) -> int:
    """Rows at once where the settings leave it open.  A prompt that is cut attends to its beginning through the cache,
    which takes longer than whole."""
    return _CPU_MICRO_ROWS if device == "cpu" and longest <= _CPU_MICRO_ROWS else _MICRO_ROWS


def _with_logit_rows(spec: ModelSpec, workload: Workload, share: float, *, exact: bool) -> Workload:
    """As many of the rows of logits that are wanted as `share` bytes hold, beside one per sequence."""
    if not workload.logit_rows:
        return workload
    least = reserve_for(spec, replace(workload, logit_rows=None), exact=exact).activations
    settled = workload
    for rows in _halves(min(workload.logit_rows, workload.prefill_rows), workload.batch):
        settled = replace(workload, logit_rows=rows)
        if reserve_for(spec, settled, exact=exact).activations - least <= share:
            break
    return settled


def shrunk_workload(
    spec: ModelSpec, resolved: Resolved, asked: Workload, least: ChunkTable, budget: Budget, tier: Tier
) -> tuple[Workload, dict[str, str]]:
    """The workload that needs the fewest passes of those that fit beside single ops (`least`).

    A streamed pass takes about as long whatever it carries.  Only what the settings leave to "auto" shrinks: the
    rows of a pass and the sequences at once.  Raises BudgetError ZI-2001 with the smallest change that works.
    """
    runtime = resolved.settings.runtime
    lookahead = 1 if runtime.lookahead == "auto" else runtime.lookahead
    batches = list(_halves(asked.batch, 1)) if runtime.max_batch == "auto" else [asked.batch]
    fitting = []
    need, reserve, workload = budget, Reserve(), asked
    for batch in batches:
        least_rows = _least_rows(spec, batch, asked.context)
        is_fixed = runtime.max_rows != "auto"
        rows = [asked.prefill_rows] if is_fixed else _halves(asked.prefill_rows, least_rows)
        for count in rows:
            logit_rows = asked.logit_rows and max(asked.logit_rows * count // asked.prefill_rows, batch)
            workload = replace(asked, batch=batch, prefill_rows=count, logit_rows=logit_rows)
            reserve = reserve_for(spec, workload, exact=resolved.settings.exact, device=resolved.device)
            need = smallest_budget(least, compute_tier=tier, reserve=reserve, lookahead=lookahead)
            if need.host <= budget.host and need.device <= budget.device:
                fitting.append(workload)
    if fitting:
        reason = f"cut from {asked.prefill_rows} rows a pass and {asked.batch} sequences: more do not fit"
        best = min(fitting, key=lambda candidate: _num_passes(candidate, asked.batch))
        return best, {"runtime.max_rows": reason, "runtime.max_batch": reason}
    try:  # the last one tried is the smallest
        place(least, budget, compute_tier=tier, reserve=reserve, lookahead=lookahead)
    except BudgetError as error:
        error.remedy = _remedy(spec, resolved, workload, need, budget, tier)
        raise
    raise InternalError("ZI-2093", "a plan was refused that can be placed")


def _least_rows(spec: ModelSpec, batch: int, longest: int) -> int:
    """The fewest rows a pass may carry: one per sequence, and of an encoder's texts the longest one whole."""
    return batch if spec.encoder is None else max(batch, longest)


def _num_passes(workload: Workload, num_sequences: int) -> int:
    waves = ceil((workload.num_requests or num_sequences) / workload.batch)
    return waves * (ceil(workload.batch * workload.prompt_len / workload.prefill_rows) + workload.gen_len)


def _remedy(
    spec: ModelSpec, resolved: Resolved, workload: Workload, need: Budget, budget: Budget, tier: Tier
) -> str:
    """The smallest change that works: a larger budget where the machine has it, else a shorter context."""
    flags = []
    is_granted = True
    for name, have, wanted, limit in (
        (Tier.DEVICE, budget.device, need.device, resolved.device_limit_bytes),
        (Tier.HOST, budget.host, need.host, resolved.host_limit_bytes),
    ):
        if wanted > have:
            flags.append(size_flag(name, wanted))
            is_granted = is_granted and wanted <= limit
    if is_granted:
        return " ".join(flags)
    missing = (
        need.device - resolved.device_limit_bytes
        if tier is Tier.DEVICE
        else need.host - resolved.host_limit_bytes
    )
    length = workload.context
    token_bytes = spec.kv_token_bytes(workload.kv.dtype or spec.dtype)
    excess = -(-missing // max(workload.batch * token_bytes, 1))
    context = (length - excess) // KV_PAGE_TOKENS * KV_PAGE_TOKENS
    if context > 0:
        return f"--set runtime.context={context}"
    return f"a machine with more memory; this model needs at least {' '.join(flags)}"


def _halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        yield value
        value //= 2
    yield least
