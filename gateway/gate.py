"""What every request passes on its way in: an id, a key, a bound on its size; and its end, if its client goes away."""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import ApiError
from gateway.limits import Keys
from gateway.metrics import Metrics

log = logging.getLogger("gateway")
BODY_WITHIN = 60.0  # seconds
SANE = re.compile(r"[\w.:/+=@-]{1,128}")
GONE = 499  # nginx's word for a client that did not wait


class Gate:
    """An ASGI application around another one. It leaves ``account``, ``request_id`` and ``arrived`` in the request's state.

    Args:
        body_limit: bytes of a request's body, at most.
        at_once: requests that are answered at once, at most.
        paths: that metrics tell apart.
    """

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, body_limit: int, at_once: int, paths: set[str]) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics
        self.body_limit, self.at_once, self.paths = body_limit, at_once, paths
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if SANE.fullmatch(given) else uuid.uuid4().hex
        began, status = time.monotonic(), GONE

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        scope.setdefault("state", {}).update(request_id=request_id, arrived=began)
        self.metrics.in_flight.inc()
        self.in_flight += 1
        try:
            await self._pass(scope, headers, receive, answer)
        except ApiError as error:
            if error.status == 429:
                self.metrics.refused.labels(scope["state"]["account"].name).inc()
            await error.response()(scope, receive, answer)
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.dec()
            path, took = scope["path"] if scope["path"] in self.paths else "other", time.monotonic() - began
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(took)
            log.info("%s %s %s %d %.3f s", request_id, scope["method"], path, status, took)

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        account = self.keys.account(headers.get("authorization", ""))
        scope["state"]["account"] = account
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.in_flight > self.at_once:
            raise ApiError(503, f"found {self.at_once} requests being answered, which is all", code="busy", retry_after=1)
        body = await self._read(headers, receive)
        if body is not None:
            with account.request():
                await self._run(scope, body, receive, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away meanwhile."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            body, size = await asyncio.wait_for(self._receive(receive), BODY_WITHIN)
        except asyncio.TimeoutError:
            raise ApiError(408, f"body: found no end within {BODY_WITHIN:.0f} s", code="timeout") from None
        if size > self.body_limit:
            raise ApiError(413, f"body: found {size} bytes, allowed: up to {self.body_limit}", code="request_too_large")
        if body is not None and kind != "application/json":
            raise ApiError(400, f"Content-Type: found {kind or 'none'}, allowed: application/json", code="invalid_content_type")
        return body

    async def _receive(self, receive: Receive) -> tuple[bytes | None, int]:
        """A body and its size. One too large is read on for a while, as who is still sending does not listen."""
        parts, size, more = [], 0, True
        while more and size <= 16 * self.body_limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None, 0
            part = message.get("body", b"")
            size, more = size + len(part), message.get("more_body", False)
            if size <= self.body_limit:
                parts.append(part)
        return b"".join(parts), size

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Answer, until the client goes away: then what it asked for is dropped at once, whatever is being waited for."""
        gone = asyncio.ensure_future(receive())  # behind the body nothing comes but the end of the connection
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await asyncio.shield(gone)
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        work = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended = work.done()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if ended:
            work.result()
