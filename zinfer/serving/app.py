"""The routes.  In: HTTP requests as ASGI has them.  Out: answers, refusals, numbers about both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zinfer import __version__
from zinfer.serving.asks import Kind
from zinfer.serving.body import ClientGone
from zinfer.serving.desk import GONE, Desk, Reply, broken
from zinfer.serving.metrics import CONTENT_TYPE, Meters
from zinfer.serving.openapi import description
from zinfer.serving.refusal import Refusal
from zinfer.serving.service import Service

_OPEN_PATHS = ("/health",)  # need no key: says only that the process lives


def make_app(service: Service) -> Guard:
    """The application of one server; `desk` counts what it does."""
    desk = Desk(service, Meters(service.model.num_students))
    routes = Routes(desk)
    table = [
        Route("/predict", routes.predict, methods=["POST"]),
        Route("/embed", routes.embed, methods=["POST"]),
        Route("/health", routes.health, methods=["GET"]),
        Route("/ready", routes.ready, methods=["GET"]),
        Route("/info", routes.info, methods=["GET"]),
        Route("/metrics", routes.metrics, methods=["GET"]),
        Route("/openapi.json", routes.openapi, methods=["GET"]),
    ]
    paths = [route.path for route in table]
    handlers: dict[Any, Callable[[Request, Any], Response]] = {
        Refusal: lambda _, error: refused(error),
        HTTPException: lambda request, error: refused(unrouted(request, error, paths)),
        Exception: lambda _, error: refused(broken(error)),
    }
    return Guard(Starlette(routes=table, exception_handlers=handlers), desk, paths)


class Guard:
    """Around every request: the key, and the counters however it ends."""

    def __init__(self, app: ASGIApp, desk: Desk, paths: list[str]) -> None:
        self.app, self.desk, self.service, self.paths = app, desk, desk.service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin_s, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.service.in_flight += 1
        try:
            self.check(scope)
            await self.app(scope, receive, noted)
        except Refusal as error:
            await refused(error)(scope, receive, noted)
        finally:
            self.service.in_flight -= 1
            self.count(scope["path"], status, time.perf_counter() - begin_s)

    def check(self, scope: Scope) -> None:
        """Raises Refusal 401 ZI-1174."""
        if scope["path"] not in _OPEN_PATHS:
            found = dict(scope["headers"]).get(b"authorization")
            self.service.check_key(None if found is None else found.decode("latin-1"))

    def count(self, path: str, status: int, seconds: float) -> None:
        """A path that there is not is counted as "other": strangers make no new time series."""
        self.desk.count(path if path in self.paths else "other", status, seconds)


class Routes:
    """What each path does."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.service = desk, desk.service
        self.description = description(self.service.limits)

    async def predict(self, request: Request) -> Response:
        """Labels with scores."""
        return await self._post(request, "predict")

    async def embed(self, request: Request) -> Response:
        """Vectors."""
        return await self._post(request, "embed")

    async def _post(self, request: Request, kind: Kind) -> Response:
        """Read, work, write; a client that leaves meanwhile ends its work."""
        self.service.check_open()
        self.service.check_kind(kind)
        self.service.check_room()
        try:
            async with self.desk.bodies.reading(request) as raw:
                return await self._unless_gone(request, self._answer(raw, kind))
        except ClientGone:
            return Response(status_code=GONE)

    async def _answer(self, raw: bytes, kind: Kind) -> Response:
        return as_response(await self.desk.answer(raw, kind))

    async def _unless_gone(self, request: Request, work: Any) -> Response:
        working = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(request.receive())  # after a whole body only a disconnect can come
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientGone
            response: Response = working.result()
            return response
        finally:
            working.cancel()
            gone.cancel()

    async def health(self, _: Request) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Whether a request would be taken."""
        if self.service.is_ready():
            return JSONResponse({"status": "ready"})
        self.service.check_open()
        raise Refusal(
            503, "ZI-2210", "the queue is full", remedy="ask another server, or later", retry_after_s=1
        )

    async def info(self, _: Request) -> Response:
        """TEI's fields, and who answers."""
        model, limits = self.service.model, self.service.limits
        names = {"id2label": {str(at): label for at, label in enumerate(model.labels)}}
        kind = {"classifier": names} if model.labels else {"embedding": {}}
        return JSONResponse(
            {
                "model_id": model.name,
                "model_type": kind,
                "max_input_length": model.max_tokens,
                "max_client_batch_size": limits.max_texts,
                "max_body_bytes": limits.max_body,
                "max_chars": limits.max_chars,
                "max_queue_tokens": limits.queue_tokens,
                "auto_truncate": True,
                "students": model.num_students,
                "adaptive": limits.adapt and model.num_students > 1,
                "objective_ms": limits.objective_ms,
                "version": __version__,
                **model.about(),
            }
        )

    async def metrics(self, _: Request) -> Response:
        """Prometheus text."""
        meters = self.desk.meters
        meters.asked(self.service.queue.stats(), self.service.in_flight)
        return Response(meters.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, _: Request) -> Response:
        """The description of all this."""
        return JSONResponse(self.description)


def refused(error: Refusal) -> Response:
    """A refusal as a response."""
    return as_response(Reply.refusing(error))


def as_response(reply: Reply) -> Response:
    """A reply as Starlette has it."""
    return Response(
        reply.body, status_code=reply.status, headers=dict(reply.headers), media_type="application/json"
    )


def unrouted(request: Request, error: HTTPException, paths: list[str]) -> Refusal:
    """404 ZI-1172 for a path that there is not, 405 ZI-1173 for a method it does not take."""
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "GET")
        return Refusal(405, "ZI-1173", f"{request.method} is not taken here", remedy=f"one of: {allowed}")
    return Refusal(
        error.status_code, "ZI-1172", "there is no such path", remedy="one of: " + ", ".join(paths)
    )
