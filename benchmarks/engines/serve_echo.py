"""The least that a request costs over HTTP: a bare Starlette that reads a body and sends back so many bytes.

usage: serve_echo.py BYTES      prints one JSON line with its url when it listens
"""

from __future__ import annotations

import sys

from listen import serve
from starlette.requests import Request
from starlette.responses import Response


def main() -> None:
    """Serve until a signal."""
    body = b'"' + b"x" * (int(sys.argv[1]) - 2) + b'"'

    async def predict(request: Request) -> Response:
        await request.body()
        return Response(body, media_type="application/json")

    serve(predict)


if __name__ == "__main__":
    main()
