"""What a model answers and what its passes take.  In: a folder, texts.  Out: logits by number of students, seconds.

usage: encoder_facts.py JOB.json RESULT.json     job: {"model": DIR, "texts": [...], "pass_texts": 16, "repeats": 5}
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from zinfer import Classifier


def main() -> None:
    """Run every text through every prefix; time passes of one text and of `pass_texts`."""
    job = json.loads(Path(sys.argv[1]).read_text())
    with Classifier(job["model"], device="cpu", exact=False) as classifier:  # as it is served
        engine = classifier.engine
        encoded = classifier.encode(job["texts"])
        found: dict[str, Any] = {"labels": list(classifier.labels), "logits": {}, "seconds": {}}
        found["tokens"] = [len(one.ids) for one in encoded]
        for students in range(1, engine.num_students + 1):
            _, logits_SC = engine.answer(encoded, students)
            assert logits_SC is not None, "a model with a classification head was wanted"
            found["logits"][students] = logits_SC.tolist()
            found["seconds"][students] = {}
            for texts in (1, job["pass_texts"]):
                seconds = []
                for at in range(job["repeats"]):
                    some = [encoded[(at * texts + one) % len(encoded)] for one in range(texts)]
                    begin = time.perf_counter()
                    engine.answer(some, students)
                    seconds.append(time.perf_counter() - begin)
                found["seconds"][students][texts] = median(seconds)
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
