"""Why a request is not answered.  In: a typed error.  Out: a status, headers, and the body of the answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from zinfer.errors import UsageError, ZinferError

ERROR_TYPES = ("Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer")  # TEI's
_TYPE_OF = {429: "Overloaded", 424: "Backend", 500: "Backend", 503: "Unhealthy"}


class Refusal(ZinferError):  # noqa: N818  # as the status is, so is its name
    """A request that gets `status` and no answer; with `retry_after_s`, when to come again.

    `closes` the connection too where the server ends.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        remedy: str,
        retry_after_s: float | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(code, message, remedy=remedy)
        self.status = status
        self.retry_after_s = retry_after_s
        self.closes = closes

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, rounded up, at least 1, as HTTP has it."""
        found = {"connection": "close"} if self.closes else {}
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found

    def body(self) -> bytes:
        """The error's own fields beside TEI's `error` and `error_type`."""
        more = {} if self.retry_after_s is None else {"retry_after_s": round(self.retry_after_s, 3)}
        return error_body(self, self.status, more)


def error_body(error: ZinferError, status: int, more: Mapping[str, Any] | None = None) -> bytes:
    """{code, message, remedy, error, error_type} of any typed error."""
    kind = "Tokenizer" if error.code in ("ZI-1131", "ZI-1132") else _TYPE_OF.get(status, "Validation")
    fields = {"code": error.code, "message": error.message, "remedy": error.remedy}
    fields |= {"error": error.message, "error_type": kind}
    return json.dumps(fields | dict(more or {}), ensure_ascii=False).encode()


def as_refusal(error: BaseException) -> Refusal:
    """What any failure of an answer is to the one who asked: their text's fault, or ours, without its inner words."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UsageError):
        return Refusal(422, error.code, error.message, remedy=error.remedy)
    code = error.code if isinstance(error, ZinferError) else "ZI-5353"
    return Refusal(
        424, code, "the model failed on this request", remedy="ask again; the server's own output says more"
    )
