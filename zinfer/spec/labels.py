"""What a classification head's rows mean.  In: config keys.  Out: the classes' names, and how scores become shares."""

from __future__ import annotations

from zinfer.spec.keys import Keys, refuse, shown

MAX_LABELS = 2**20


def read_labels(keys: Keys) -> tuple[str, ...]:
    """Names of the classes, by number; upstream's LABEL_0, LABEL_1, ... where a config names none.

    Raises CheckpointError ZI-4203, ZI-4204.
    """
    named = keys.raw("id2label", None)
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(keys.count("num_labels", MAX_LABELS, 2)))
    numbered = {str(number): name for number, name in named.items()} if isinstance(named, dict) else {}
    names = [numbered.get(str(number)) for number in range(len(numbered))]
    if not 0 < len(names) <= MAX_LABELS or not all(isinstance(name, str) for name in names):
        raise refuse("ZI-4203", f"id2label is {shown(named)}, names for 0, 1, 2, ... were wanted")
    return tuple(map(str, names))


def read_scoring(keys: Keys, num_labels: int) -> str:
    """How logits become scores, as upstream's pipelines do it: "softmax", "sigmoid" each, or "none" (a regression)."""
    problem = keys.raw("problem_type", None)
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or num_labels == 1 else "softmax"
