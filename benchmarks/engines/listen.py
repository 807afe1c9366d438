"""The bare HTTP server that outside baselines share.  In: what answers POST /predict.  Out: its url on stdout."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def serve(predict: Callable[[Request], Awaitable[Response]]) -> None:
    """Serve on a free port of this machine until a signal; one JSON line says where."""
    app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
    # With the protocol named asyncio sends small packets at once; socket.create_server leaves it out.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(2048)
    print(json.dumps({"url": f"http://127.0.0.1:{listening.getsockname()[1]}"}), flush=True)
    uvicorn.Server(uvicorn.Config(app, http="h11", log_level="critical", lifespan="off")).run([listening])
