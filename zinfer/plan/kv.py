"""Where the KV cache may live.  In: settings, a machine, a workload.  Out: the KvPlans worth a trial."""

from __future__ import annotations

from dataclasses import replace

from zinfer.config.machine import Machine
from zinfer.config.resolve import Resolved
from zinfer.plan.cost import far_attention_s, visible_keys
from zinfer.plan.forecast import decode_load
from zinfer.plan.records import KvPlan, Tier, Workload
from zinfer.spec.records import ModelSpec


def kv_plans(spec: ModelSpec, resolved: Resolved, machine: Machine, workload: Workload) -> list[KvPlan]:
    """In the compute tier, then in host memory below a device, attended on the cheaper side; fewer where the settings
    say which.  Pages are int8 only where that was asked for: it changes what comes out."""
    runtime = resolved.settings.runtime
    dtype = "INT8" if runtime.kv_dtype == "int8" else None
    if resolved.device == "cpu":
        return [KvPlan(Tier.HOST, dtype)]
    plans = []
    if runtime.kv != "host":
        plans.append(KvPlan(Tier.DEVICE, dtype))
    if runtime.kv != "device":
        plans.append(cheaper_side(spec, machine, workload, dtype, exact=resolved.settings.exact))
    return plans


def kv_reasons(resolved: Resolved, kv: KvPlan) -> dict[str, str]:
    """Why the cache lives where it does, where the settings left that open or could not be followed."""
    wanted = resolved.settings.runtime.kv
    if resolved.device == "cpu":
        return (
            {} if wanted == "auto" else {"runtime.kv": "not used: on cpu the cache lies beside the weights"}
        )
    if wanted != "auto":
        return {}
    if kv.attend == "resident":
        return {"runtime.kv": "auto: the device has room for it, or keeping it elsewhere would be slower"}
    side = "the host attends it there" if kv.attend == "host" else "its pages come up for every use"
    return {"runtime.kv": f"auto: below the device, so that weights have its room; {side}"}


def cheaper_side(
    spec: ModelSpec, machine: Machine, workload: Workload, dtype: str | None, *, exact: bool
) -> KvPlan:
    """Pages in host memory: attended there, or brought up, whichever takes less time in a decode pass."""

    def seconds(kv: KvPlan) -> float:
        load = decode_load(replace(workload, kv=kv))
        return sum(
            far_attention_s(spec, machine, load, visible_keys(spec, layer, load), exact=exact)
            for layer in range(spec.num_layers)
        )

    return min((KvPlan(Tier.HOST, dtype, "host"), KvPlan(Tier.HOST, dtype, "device")), key=seconds)
