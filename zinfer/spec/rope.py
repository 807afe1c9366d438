"""Rotary positions of a config.  In: rope_scaling or rope_parameters.  Out: one Rope, all defaults filled."""

from __future__ import annotations

import math

from zinfer.spec.families import Family
from zinfer.spec.keys import Keys, refuse
from zinfer.spec.records import Rope

MAX_CONTEXT = 2**28
MAX_THETA = 1e15
Parameters = dict[str, float | int | bool | tuple[float, ...]]


def read_rope(keys: Keys, family: Family, head_dim: int, max_context: int) -> Rope:
    """The rope of a config in transformers' 4 or 5 dialect.

    What is found in the nested object goes before what stands beside it, as in transformers.  Raises
    CheckpointError ZI-4202 to ZI-4206.
    """
    term = "rope_scaling" if keys.has("rope_scaling") else "rope_parameters"
    section = keys.section(term)
    if any(isinstance(value, dict) for value in section.values()):
        raise refuse("ZI-4205", f"{term} differs from layer to layer, which {family.name} models do not do")
    nested = Keys(section, prefix=f"{term}.")
    theta = nested.number("rope_theta", 2, MAX_THETA, keys.raw("rope_theta", 10_000.0))
    partial = nested.number("partial_rotary_factor", 0.0, 1.0, keys.raw("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise refuse(
            "ZI-4204", f"{rotary_dim} of {head_dim} dimensions would rotate, an even number was wanted"
        )
    kinds = {kind: kind for kind in family.rope_kinds} | dict(family.rope_aliases)
    kind = nested.word("rope_type" if nested.has("rope_type") else "type", kinds, "default")
    parameters = _parameters(kind, keys, nested, rotary_dim, max_context)
    return Rope(kind, theta, rotary_dim, parameters)  # type: ignore[arg-type]


def _parameters(kind: str, keys: Keys, nested: Keys, rotary_dim: int, max_context: int) -> Parameters:
    if kind == "default":
        return {}
    if kind == "longrope":
        return _longrope(keys, nested, rotary_dim, max_context)
    factor = nested.number("factor", 1e-3, 1e6)
    if kind == "dynamic":
        if rotary_dim < 4:
            raise refuse("ZI-4204", "dynamic rope needs at least 4 rotating dimensions")
        return {"factor": factor, "max_context": max_context}
    if kind == "yarn":
        return {"factor": factor} | _yarn(keys, nested, factor, max_context)
    if kind == "llama3":
        low = nested.number("low_freq_factor", 1e-3, 1e6)
        high = nested.number("high_freq_factor", 1e-3, 1e6)
        if high <= low:
            raise refuse(
                "ZI-4204", f"{nested.name('high_freq_factor')} is {high:g}, more than {low:g} was wanted"
            )
        original = _original_context(keys, nested, max_context)
        return {
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_context": original,
        }
    return {"factor": factor}


def _original_context(keys: Keys, nested: Keys, max_context: int) -> int:
    """The context a model was first trained for; Phi-3 writes it beside the section, which then goes first."""
    term = "original_max_position_embeddings"
    beside = keys.raw(term, None)
    where = nested if beside is None else keys
    return where.count(term, MAX_CONTEXT, max_context, least=2)


def _yarn(keys: Keys, nested: Keys, factor: float, max_context: int) -> Parameters:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.4): mscale as DeepSeek generalised it."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    above = nested.number("mscale", 0.0, 1e3, 0.0)
    below = nested.number("mscale_all_dim", 0.0, 1e3, 0.0)
    computed = mscale(above) / mscale(below) if above and below else mscale(1.0)
    return {
        "original_context": _original_context(keys, nested, max_context),
        "attention_factor": nested.number("attention_factor", 0.0, 1e3, computed),
        "beta_fast": nested.number("beta_fast", 1e-3, 1e6, 32.0),
        "beta_slow": nested.number("beta_slow", 1e-3, 1e6, 1.0),
        "truncate": nested.flag("truncate", True),
    }


def _longrope(keys: Keys, nested: Keys, rotary_dim: int, max_context: int) -> Parameters:
    """LongRoPE as published with Phi-3 (Ding et al. 2024, arXiv 2402.13753): two sets of factors, one scale."""
    original = _original_context(keys, nested, max_context)
    factor = nested.number("factor", 1e-3, 1e6, max_context / original)
    computed = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "short_factor": nested.numbers("short_factor", rotary_dim // 2),
        "long_factor": nested.numbers("long_factor", rotary_dim // 2),
        "original_context": original,
        "attention_factor": nested.number("attention_factor", 0.0, 1e3, computed),
    }
