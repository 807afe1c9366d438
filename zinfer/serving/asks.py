"""What a request asks for.  In: the bytes of a body.  Out: texts and options, or a refusal that names the field.

The models below are the description that /openapi.json shows and the check that every request passes: one thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zinfer.checkpoint.strict_json import parse_object, shown
from zinfer.config.schema import Serve, closest
from zinfer.serving.refusal import Refusal
from zinfer.tokenizer import Text

One: TypeAlias = Annotated[list[str], Field(min_length=1, max_length=1)]
Pair: TypeAlias = Annotated[list[str], Field(min_length=2, max_length=2)]
Batch: TypeAlias = Annotated[list[One | Pair], Field(min_length=1)]
Strings: TypeAlias = Annotated[list[str], Field(min_length=1)]
Kind = Literal["predict", "embed"]


class _Ask(BaseModel):
    """Fields that every request may have."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    truncate: bool | None = Field(
        None, description="false: refuse what is longer than the model takes; else it is cut"
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] = Field(
        "Right", description="Left or Right: the end that is cut off"
    )

    @property
    def given(self) -> list[Text]:
        """The texts, in order."""
        raise AssertionError("each form of a request has its own")

    @property
    def is_plain(self) -> bool:
        """Whether the answer is one object with a result per text, and not TEI's bare list."""
        return False

    @property
    def is_one(self) -> bool:
        """Whether one text was given, and not a list of texts."""
        return False


class _Texts(_Ask):
    texts: Annotated[list[str | Pair], Field(min_length=1)] = Field(
        description="a list of texts and of pairs [a, b]; nothing in it is ever read as anything else"
    )

    @property
    def given(self) -> list[Text]:
        return [as_text(item) for item in self.texts]

    @property
    def is_plain(self) -> bool:
        return True


class PredictInputs(_Ask):
    """TEI's /predict: a list of two strings is a pair, a list of lists a batch."""

    inputs: str | Pair | Batch = Field(
        description='"text", a pair ["a", "b"], or a batch [["a"], ["b", "c"]]'
    )
    raw_scores: bool = Field(False, description="true: logits and no probabilities")

    @property
    def given(self) -> list[Text]:
        return [as_text(item) for item in self.inputs] if self._is_batch else [as_text(self.inputs)]

    @property
    def is_one(self) -> bool:
        return not self._is_batch

    @property
    def _is_batch(self) -> bool:
        return isinstance(self.inputs, list) and isinstance(self.inputs[0], list)


class PredictTexts(_Texts):
    """The form that cannot be misread: every item of `texts` has a result."""

    raw_scores: bool = Field(False, description="true: logits and no probabilities")
    top_k: Annotated[int, Field(ge=1)] | None = Field(None, description="so many labels, likeliest first")


class EmbedInputs(_Ask):
    """TEI's /embed: a string, or a list of strings, each a text of its own."""

    inputs: str | Strings = Field(description='"text" or a list of texts')
    normalize: bool = Field(True, description="true: vectors of length 1")

    @property
    def given(self) -> list[Text]:
        return [self.inputs] if isinstance(self.inputs, str) else list(self.inputs)


class EmbedTexts(_Texts):
    """The form that cannot be misread: every item of `texts` has a vector."""

    normalize: bool = Field(True, description="true: vectors of length 1")


Ask: TypeAlias = PredictInputs | PredictTexts | EmbedInputs | EmbedTexts
FORMS: dict[Kind, tuple[type[Ask], type[Ask]]] = {
    "predict": (PredictInputs, PredictTexts),
    "embed": (EmbedInputs, EmbedTexts),
}


def as_text(item: str | Sequence[Any]) -> Text:
    """A string, [a] or [a, b] as the tokenizer takes it."""
    if isinstance(item, str):
        return item
    return str(item[0]) if len(item) == 1 else (str(item[0]), str(item[1]))


def read_ask(raw: bytes, kind: Kind, limits: Serve) -> Ask:
    """Parse and check one body.

    Raises Refusal 400 ZI-1176 for what is not JSON of UTF-8 (NaN, a key twice and half surrogate pairs included),
    422 ZI-1177 for another shape, 413 ZI-1179 for too many texts and ZI-1180 for one that is too long.
    """
    try:
        tree = parse_object(raw)
    except ValueError as error:
        at = f"byte {error.start}: " if isinstance(error, UnicodeDecodeError) else ""
        raise Refusal(
            400, "ZI-1176", f"the body is no JSON object: {at}{error}", remedy='send {"texts": ["a text"]}'
        ) from None
    form = FORMS[kind]["texts" in tree]
    try:
        ask = form.model_validate(tree)
    except ValidationError as error:
        raise _misshapen(form, error.errors(include_url=False)[0]) from None
    _check_size(ask.given, limits)
    return ask


def _misshapen(form: type[Ask], fault: Any) -> Refusal:
    name, known = str(fault["loc"][0]), form.model_fields
    wanted = known[name].description if name in known else ""
    if fault["type"] == "missing":
        message = f"{name} is missing: {wanted}"
    elif fault["type"] == "extra_forbidden":
        guess = closest(name, list(known))
        message = f"unknown field {shown(name)}" + (f": did you mean {guess!r}?" if guess else "")
    else:
        message = f"{name} is not what was wanted ({fault['msg'].lower()}): {wanted}"
    return Refusal(422, "ZI-1177", message, remedy="the fields are: " + ", ".join(known))


def _check_size(texts: Sequence[Text], limits: Serve) -> None:
    if len(texts) > limits.max_texts:
        raise Refusal(
            413,
            "ZI-1179",
            f"{len(texts)} texts in one request, at most {limits.max_texts} are taken",
            remedy=f"send them {limits.max_texts} at a time, or serve with --set serve.max_texts={len(texts)}",
        )
    for number, text in enumerate(texts):
        longest = len(text) if isinstance(text, str) else max(map(len, text))
        if longest > limits.max_chars:
            raise Refusal(
                413,
                "ZI-1180",
                f"text {number} has {longest} characters, at most {limits.max_chars} are taken",
                remedy=f"cut it, or serve with --set serve.max_chars={longest}",
            )
