"""Choices that hold for this machine.  In: a question and how to find the answer.  Out: the answer, found once.

Self-tests and timings are worth a few hundred milliseconds; their answers depend on processor, library and threads
alone.  They are kept beside the machine profile, under the same fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from zinfer.config.load import cache_folder
from zinfer.config.profiles import fingerprint

_FILE = "kernels.json"


def remembered(question: str, is_answer: Callable[[Any], bool], find: Callable[[], Any]) -> Any:
    """The answer that was found earlier, if `is_answer` accepts it; else what `find` says, from now on.

    A file that cannot be read is as good as none, one that cannot be written costs the time again.
    """
    answers = _answers()
    if not is_answer(answers.get(question)):
        answers[question] = find()
        _save(answers)
    return answers[question]


@cache
def _answers() -> dict[str, Any]:
    with suppress(OSError, ValueError):
        known = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
        if isinstance(known, dict) and known.get("machine") == fingerprint():
            return dict(known["answers"])
    return {}


def _save(answers: dict[str, Any]) -> None:
    path = cache_folder() / _FILE
    with suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"machine": fingerprint(), "answers": answers}), encoding="utf-8")
        partial.replace(path)
