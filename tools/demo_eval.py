"""The two figures the demo model is held to: held-out bits per byte, and the share that tokenises as Python.

Enters: a model folder with `heldout.txt`.  Leaves: the figures, printed as JSON.

    python tools/demo_eval.py zinfer/assets/demo

Bits per byte.  The whole slice is encoded as one text, `<|endoftext|>` before it.  Windows of CONTEXT tokens
move on by STRIDE; every token is scored exactly once, in the first window that holds it, so with at least
CONTEXT - STRIDE tokens before it (except in the first window).  The figure is the sum of the negative log
probabilities in bits over the number of bytes of the slice.

Share that tokenises.  A prompt is a piece of the held-out text that begins at a line start, at an unindented
statement, ends at a line end, is PROMPT_BYTES long at most, and tokenises by itself.  Of all such prompts
(the longest for each line end), 200 are drawn with a seed.  The model continues each by at most 64 tokens,
sampled with a seed of its own.  The continuation is cut after its last newline, so only complete lines remain
(at `<|endoftext|>` the text ends and what stands before it counts as complete).  Prompt and complete lines
together are then given to `tokenize.generate_tokens`; `judge` says what is a pass.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_corpus import end_of_text_id
from demo_model import Cache, DemoModel, load_folder
from tokenizers import Tokenizer
from torch import Tensor

CONTEXT = 1024
STRIDE = 512
PROMPTS = 200
NEW_TOKENS = 64
PROMPT_BYTES = 800
TEMPERATURE = 0.8
TOP_P = 0.95
SEED = 20240


def bits_per_byte(logits_of: Callable[[Tensor], Tensor], ids: list[int], size: int) -> float:
    """Score `ids` (`<|endoftext|>` first) in sliding windows; return bits per byte of `size` bytes."""
    nats = 0.0
    done = 1
    start = 0
    while done < len(ids):
        window = torch.tensor(ids[start : start + CONTEXT])
        with torch.no_grad():
            logits = logits_of(window[None])[0].float()
        first = done - start
        nats += float(F.cross_entropy(logits[first - 1 : -1], window[first:], reduction="sum"))
        done = start + len(window)
        start += STRIDE
    return nats / math.log(2) / size


@dataclass(frozen=True)
class Verdict:
    """`strict`: tokenises and nothing is left open.  `whole_lines`: as strict, or something is left open."""

    strict: bool
    whole_lines: bool


def judge(text: str) -> Verdict:
    """Tokenise `text`.

    A failure of both kinds: an ERRORTOKEN (a character that begins no token, a quote never closed on its
    line), a dedent to no open level, or any other tokenizer error.  A bracket or triple-quoted string that is
    still open where the text was cut fails `strict` only.
    """
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.ERRORTOKEN:
                return Verdict(False, False)
    except tokenize.TokenError as error:
        still_open = "EOF in multi-line" in str(error) or "unterminated triple-quoted" in str(error)
        return Verdict(False, still_open)
    except SyntaxError:
        return Verdict(False, False)
    return Verdict(True, True)


def prompts_of(text: str, seed: int = SEED, count: int = PROMPTS) -> list[str]:
    """Draw `count` prompts from the held-out text as the module's docstring says."""
    lines = text.splitlines(keepends=True)[:-1]
    candidates = []
    for end in range(1, len(lines)):
        best = ""
        size = 0
        for begin in range(end - 1, -1, -1):
            size += len(lines[begin])
            if size > PROMPT_BYTES:
                break
            if lines[begin][0].isalpha() or lines[begin][0] == "@":
                piece = "".join(lines[begin:end])
                best = piece if judge(piece).strict else best
        if best:
            candidates.append(best)
    return random.Random(seed).sample(candidates, count)


def _pick(logits: Tensor, generator: torch.Generator) -> int:
    """Sample an id at TEMPERATURE from the nucleus of TOP_P."""
    probabilities, order = torch.softmax(logits.float() / TEMPERATURE, dim=-1).sort(descending=True)
    probabilities[probabilities.cumsum(dim=-1) - probabilities >= TOP_P] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def continue_prompt(model: DemoModel, prompt: list[int], seed: int) -> list[int]:
    """Sample NEW_TOKENS ids after the prompt."""
    generator = torch.Generator().manual_seed(seed)
    cache: Cache = []
    ids = list(prompt)
    fed = 0
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([ids[fed:]]), cache)[0, -1]
            fed = len(ids)
            ids.append(_pick(logits, generator))
    return ids[len(prompt) :]


def complete_lines(tokenizer: Tokenizer, ids: list[int], end_id: int) -> str:
    """Return the continuation's complete lines: up to its last newline, or all that stands before the end."""
    if end_id in ids:
        return tokenizer.decode(ids[: ids.index(end_id)])
    text: str = tokenizer.decode(ids)
    return text[: text.rfind("\n") + 1]


def share_that_tokenises(
    model: DemoModel, tokenizer: Tokenizer, heldout: str, count: int = PROMPTS
) -> tuple[float, float]:
    """Return the shares, of the first `count` continuations, that are `strict` and that are `whole_lines`.

    Each has a seed of its own (SEED + its number).  One without a complete line fails.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a token at a time: a second thread would only wait
    end_id = end_of_text_id(tokenizer)
    strict = whole_lines = 0
    for number, prompt in enumerate(prompts_of(heldout)[:count]):
        ids = continue_prompt(model, tokenizer.encode(prompt).ids, SEED + number)
        lines = complete_lines(tokenizer, ids, end_id)
        if lines.strip():
            verdict = judge(prompt + lines)
            strict += verdict.strict
            whole_lines += verdict.whole_lines
    torch.set_num_threads(threads)
    return strict / count, whole_lines / count


def evaluate(folder: Path) -> dict[str, float]:
    """Return both figures for a model folder."""
    model = load_folder(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw = (folder / "heldout.txt").read_bytes()
    text = raw.decode("utf-8")
    bits = bits_per_byte(model, tokenizer.encode(text).ids, len(raw))
    strict, whole_lines = share_that_tokenises(model, tokenizer, text)
    return {
        "heldout_bits_per_byte": round(bits, 4),
        "share_tokenises": strict,
        "share_tokenises_open_at_cut_allowed": whole_lines,
    }


def main() -> None:
    """Print the figures of the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    torch.set_num_threads(2)
    print(json.dumps(evaluate(parser.parse_args().folder), indent=2))


if __name__ == "__main__":
    main()
