"""The least that a request costs over HTTP: a bare Starlette that reads a body and sends back so many bytes.

usage: serve_echo.py BYTES      prints one JSON line with its url when it listens
"""

from __future__ import annotations

import json
import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def main() -> None:
    """Serve until a signal."""
    body = b'"' + b"x" * (int(sys.argv[1]) - 2) + b'"'

    async def predict(request: Request) -> Response:
        await request.body()
        return Response(body, media_type="application/json")

    app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
    # With the protocol named asyncio sends small packets at once; socket.create_server leaves it out.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(2048)
    print(json.dumps({"url": f"http://127.0.0.1:{listening.getsockname()[1]}"}), flush=True)
    uvicorn.Server(uvicorn.Config(app, http="h11", log_level="critical", lifespan="off")).run([listening])


if __name__ == "__main__":
    main()
