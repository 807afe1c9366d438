"""ONNX Runtime behind the same HTTP: one request at a time, its texts padded to the longest.

usage: serve_onnx.py MODEL_FOLDER FILE.onnx      prints one JSON line with its url when it is warm
"""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers
from listen import serve
from starlette.requests import Request
from starlette.responses import JSONResponse


class Runner:
    """A session and a tokenizer, used by one thread."""

    def __init__(self, folder: Path, graph: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.labels = [config["id2label"][str(at)] for at in range(len(config["id2label"]))]
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(config["max_position_embeddings"])
        self.tokenizer.enable_padding()
        self.session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    def __call__(self, raw: bytes) -> dict[str, Any]:
        """Raw scores of the texts of one body."""
        texts = json.loads(raw)["texts"]
        found = self.tokenizer.encode_batch(texts)
        feeds = {"ids": [one.ids for one in found], "types": [one.type_ids for one in found]}
        feeds["mask"] = [one.attention_mask for one in found]
        (logits_SC,) = self.session.run(
            None, {name: np.array(rows, dtype=np.int64) for name, rows in feeds.items()}
        )
        rows = [
            {
                "labels": [{"label": self.labels[c], "score": float(row[c])} for c in np.argsort(-row)],
                "students": 1,
            }
            for row in logits_SC
        ]
        return {"results": rows}


def main() -> None:
    """Serve until a signal."""
    runner = Runner(Path(sys.argv[1]), Path(sys.argv[2]))
    runner(b'{"texts": ["warm"]}')
    pool = ThreadPoolExecutor(1)

    async def predict(request: Request) -> JSONResponse:
        raw = await request.body()
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(pool, runner, raw))

    serve(predict)


if __name__ == "__main__":
    main()
