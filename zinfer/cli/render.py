"""Lines for people.  In: plans and stats.  Out: short aligned lines; GiB for memory, GB for links."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from zinfer.plan.explain import with_store
from zinfer.plan.make import Plan
from zinfer.runtime.model import Model
from zinfer.runtime.stats import Stats
from zinfer.spec.lossless import LOSSLESS
from zinfer.spec.stored import PUBLISHED
from zinfer.units import Bytes, rate_text, seconds_text

_LONG_S = 0.1  # a pass: below that nobody waits
_WORTH = 0.9  # of its time: less is not worth writing the model again
WHY = {
    "disk": "the disk's read rate",
    "h2d": "the host-to-device link",
    "peer": "the link between two devices",
    "compute": "computation",
    "overhead": "the fixed cost of many small steps",
}


def forecast_line(plan: Plan) -> str:
    """One line before the work starts: where the weights will be and what a pass will take."""
    where = ", ".join(f"{Bytes(use.resident)} of weights in {use.tier}" for use in plan.uses)
    published, taken = map(Bytes, plan.packed_bytes)
    where += f" ({published} packed into {taken})" if published else ""
    streamed = plan.forecast.bytes_per_pass
    read = " + ".join(f"{Bytes(count)} over {link}" for link, count in streamed.items() if count)
    forecast = plan.forecast
    return (
        f"plan       {where}; {read or 'nothing'} streamed per pass; first token "
        f"{seconds_text(forecast.first_token_s)}, then {forecast.tokens_per_s:.1f} tokens/s, bound by "
        f"{forecast.binding}"
    )


def tip_lines(model: Model, plan: Plan) -> Iterator[str]:
    """Of passes that wait long for the disk: the store that shortens them and changes no bit of a weight."""
    pass_s = plan.forecast.pass_s
    if pass_s < _LONG_S or plan.forecast.binding != "disk" or model.spec.weights != PUBLISHED:
        return
    found = with_store(model.spec, plan, LOSSLESS)
    if found is not None and found.pass_s is not None and found.pass_s < _WORTH * pass_s:
        yield (
            f"tip        zinfer shard {shlex.quote(str(model.folder))} --out DIR --weights lossless: "
            f"{seconds_text(found.pass_s)} per pass instead of {seconds_text(pass_s)}, every bit of a weight the same"
        )


def stats_lines(stats: Stats) -> Iterator[str]:
    """What a run took beside what was predicted, and a warning when it was far slower."""
    if stats.pass_s is None:
        yield f"stats      {stats.num_tokens} tokens in {len(stats.passes)} passes"
        return
    predicted_s = stats.forecast.pass_s
    moved = ", ".join(
        f"{link} {Bytes(int(count))}/pass at {rate_text(count / stats.pass_s)}"
        for link, count in stats.bytes_per_pass.items()
        if count
    )
    # A pass that beats the limit says that the machine was busy when it was measured, nothing else.
    share = stats.limit_s / stats.pass_s
    limit = f"{share:.0%} of the limit" if share <= 1 else "faster than the profile allows (zinfer doctor)"
    yield (
        f"stats      {stats.num_tokens} tokens; {seconds_text(stats.pass_s)} per pass, predicted "
        f"{seconds_text(predicted_s)}; {moved or 'nothing streamed'}; {limit}"
    )
    peaks = ", ".join(f"{tier} {Bytes(count)}" for tier, count in stats.peak_bytes.items())
    yield f"memory     at most {peaks}"
    if stats.is_slow():
        binding = stats.forecast.binding.partition(":")[0]  # of several devices: "h2d:1"
        yield (
            f"warning    {predicted_s / stats.pass_s:.0%} of the predicted speed: {WHY[binding]} is what binds, and "
            "something else is using it, or it changed since it was measured (zinfer doctor)"
        )
