"""Revise the plan while it runs.  In: an engine between passes.  Out: the engine, under a plan that suits it better."""

from __future__ import annotations

from zinfer.log import logger
from zinfer.plan.revise import revised
from zinfer.runtime.engine import Engine

_FIRST_LOOK = 8  # steady passes until what they show is trusted
_LOOK_EVERY = 64


def adapt(engine: Engine) -> bool:
    """Every so many passes: plan again with the rates that were seen, and follow that plan where it pays.

    Only the batch size is looked at: the same chunks stay or stream by what the cache leaves them.  Nothing is
    changed that the settings fix.  True when another plan is followed.
    """
    settings = engine.model.resolved.settings.runtime
    steady = len(engine.stats.passes) - 1
    is_time = steady == _FIRST_LOOK or (steady > 0 and steady % _LOOK_EVERY == 0)
    is_free = settings.max_batch == "auto" and settings.kv_tokens == "auto"
    if not (is_time and is_free and engine.can_adopt and settings.objective == "throughput"):
        return False
    scheduler, budget = engine.loop.scheduler, engine.loop.budget
    remaining = None if engine.plan.workload.num_requests is None else len(scheduler)
    if remaining is not None and remaining <= scheduler.num_running:
        return False  # nobody waits: another batch size would serve no one
    plan = revised(
        engine.model.spec,
        engine.plan,
        remaining=remaining,
        scale=budget.compute_scale,
        stream_scale=budget.stream_scale,
    )
    if plan is None:
        return False
    logger.info(
        "plan       revised after %d passes: %d sequences at once instead of %d",
        steady,
        plan.workload.batch,
        engine.plan.workload.batch,
    )
    engine.adopt(plan, is_corrected=True)
    return True
