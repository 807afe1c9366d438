"""Revise the plan while it runs.  In: an engine between passes.  Out: the engine, under a plan that suits it better."""

from __future__ import annotations

from dataclasses import replace

from zinfer.log import logger
from zinfer.plan.records import Workload
from zinfer.plan.revise import rebudget, revised
from zinfer.runtime.engine import Engine

_FIRST_LOOK = 8  # steady passes until what they show is trusted
_LOOK_EVERY = 64
_OTHER_BALANCE = 2.0  # times more, or fewer, tokens to generate per prompt token: another batch size may suit


def adapt(engine: Engine) -> bool:
    """Every so many passes: plan again with the rates that were seen, and follow that plan where it pays.

    Only the batch size is looked at: the same chunks stay or stream by what the cache leaves them.  Nothing is
    changed that the settings fix.  True when another plan is followed: at once where a plan packs weights that cannot
    be packed.
    """
    if engine.loop.executor.cannot_pack:
        return _unpack(engine)
    steady = len(engine.stats.passes) - 1
    is_time = steady == _FIRST_LOOK or (steady > 0 and steady % _LOOK_EVERY == 0)
    scheduler = engine.loop.scheduler
    # Where nobody waits another batch size would serve no one.
    is_wanted = engine.plan.workload.num_requests is None or len(scheduler) > scheduler.num_running
    return (
        is_time
        and len(scheduler) > 0
        and is_wanted
        and _may_revise(engine)
        and _revise(engine, is_begun=True)
    )


def suit(engine: Engine) -> bool:
    """Before the first pass for requests that the plan covers and its batch size was not settled for: as `adapt`.

    Prompts alone take as long in small passes as in large ones, say, and decode does not.
    """
    planned, scheduler = engine.plan.workload, engine.loop.scheduler
    # Others may have carried them out meanwhile: then nobody is there to ask for anything.
    if planned.num_requests is None or len(scheduler) <= planned.batch or not _may_revise(engine):
        return False
    asked = _asked(engine)
    settled = engine.settled_for or engine.plan.workload
    balance = asked.gen_len / asked.prompt_len * settled.prompt_len / settled.gen_len
    is_other = max(balance, 1 / balance) > _OTHER_BALANCE
    is_longer = settled.num_requests is not None and len(scheduler) > settled.num_requests
    return (is_other or is_longer) and _revise(engine, is_begun=scheduler.num_running > 0)


def _may_revise(engine: Engine) -> bool:
    settings = engine.model.resolved.settings.runtime
    is_free = settings.max_batch == "auto" and settings.kv_tokens == "auto"
    return is_free and engine.can_adopt and settings.objective == "throughput"


def _asked(engine: Engine) -> Workload:
    """What has not ended, as a workload; of a queue without end what is there now tells the lengths."""
    planned, scheduler = engine.plan.workload, engine.loop.scheduler
    prompt_len, gen_len = scheduler.mean_lengths
    num_requests = None if planned.num_requests is None else len(scheduler)
    return replace(planned, num_requests=num_requests, prompt_len=prompt_len, gen_len=gen_len)


def _unpack(engine: Engine) -> bool:
    """The same plan with nothing packed, and none that packs from now on."""
    plan, engine.model = engine.plan, engine.model.without_packing()
    engine.loop.executor.cannot_pack = False
    engine.adopt(
        rebudget(engine.model.spec, replace(plan, table=replace(plan.table, packed={})), plan.budget)
    )
    return True


def _revise(engine: Engine, *, is_begun: bool) -> bool:
    budget, asked = engine.loop.budget, _asked(engine)
    engine.settled_for = asked
    plan = revised(
        engine.model.spec,
        engine.plan,
        asked,
        scale=budget.compute_scale,
        stream_scale=budget.stream_scale,
        is_begun=is_begun,
    )
    if plan is None:
        return False
    logger.info(
        "plan       revised after %d passes: %d sequences at once instead of %d",
        len(engine.stats.passes),
        plan.workload.batch,
        engine.plan.workload.batch,
    )
    engine.adopt(plan, is_corrected=True)
    return True
