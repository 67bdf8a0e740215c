"""The application: OpenAI's routes over the replicas of a service."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp

from client import Piece, ServiceError
from gateway.errors import ApiError, from_service, from_validation
from gateway.gate import Gate
from gateway.limits import Keys
from gateway.metrics import Metrics
from gateway.replicas import Replicas
from gateway.schema import ChatRequest, CompletionRequest
from gateway.translate import Ask, ChatReply, CompletionReply, Json, Reply, asks

log = logging.getLogger("gateway")
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
PASSED_ON = ("traceparent", "tracestate")
DONE = b"data: [DONE]\n\n"
# No line of an event ends there, but clients that split text where Unicode breaks lines think so.
BREAKS = {"\x85".encode(): b"\\u0085", "\u2028".encode(): b"\\u2028", "\u2029".encode(): b"\\u2029"}


@dataclass(frozen=True)
class Settings:
    """How a gateway is run.

    Attributes:
        models: the names by which the one model is asked for.
        body_limit: bytes of a request's body, at most.
        at_once: requests that are answered at once, at most.
    """

    models: Sequence[str] = ("d2sd",)
    body_limit: int = 4 * 2**20
    at_once: int = 1024


def create(replicas: Replicas, keys: Keys, settings: Settings = Settings()) -> ASGIApp:
    """The application that answers for these replicas."""
    metrics = Metrics()
    metrics.replicas.set_function(lambda: len(replicas.ready))
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with replicas.watched():
            yield

    app = FastAPI(title="D²SD gateway", lifespan=lifespan, docs_url=None, redoc_url=None)
    _explain_errors(app)

    async def answer(request: Request, reply: Reply, asked: list[Ask]) -> Response:
        if reply.model not in settings.models:
            allowed = ", ".join(settings.models)
            raise ApiError(404, f"model: found {reply.model!r}, allowed: {allowed}", param="model", code="model_not_found")
        state, path = request.state, request.url.path
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}

        def spend() -> None:
            usage = reply.tally.usage()
            state.account.spend(usage["total_tokens"])
            for kind in ("prompt", "completion"):
                metrics.tokens.labels(state.account.name, kind).inc(usage[f"{kind}_tokens"])

        if not reply.stream:
            try:
                waited = [replicas.generate(ask.prompt, ask.options, state.request_id, headers) for ask in asked]
                return _json(reply.whole(asked, await _all(waited)))
            finally:
                spend()
        pieces = _merge([replicas.stream(ask.prompt, ask.options, state.request_id, headers) for ask in asked])
        try:
            first = await anext(pieces)  # an error that comes instead still has a status
        except BaseException:
            await pieces.aclose()
            raise
        metrics.first.labels(path).observe(time.monotonic() - state.arrived)
        events = _events(reply, asked, first, pieces, spend)
        return StreamingResponse(events, media_type="text/event-stream", headers=UNBUFFERED)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await answer(request, ChatReply(body), asks(body))

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await answer(request, CompletionReply(body), asks(body))

    def model(name: str) -> Json:
        return {"id": name, "object": "model", "created": started, "owned_by": "d2sd-triton"}

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [model(name) for name in settings.models]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Json:
        if name not in settings.models:
            raise ApiError(404, f"model: found {name!r}, allowed: {', '.join(settings.models)}", code="model_not_found")
        return model(name)

    @app.get("/health/live")
    async def live() -> Json:
        return {"status": "live"}

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> Json:
        if not replicas.ready:
            raise ApiError(503, "no replica of the service is ready", code="unavailable", retry_after=1)
        return {"status": "ready", "replicas": len(replicas.ready)}

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    paths = {"/v1/chat/completions", "/v1/completions", "/v1/models"}
    return Gate(app, keys, metrics, settings.body_limit, settings.at_once, paths)


def _explain_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(ServiceError)
    async def served(_: Request, error: ServiceError) -> Response:
        return from_service(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        said = {404: f"{request.url.path}: not found", 405: f"{request.method}: not allowed for {request.url.path}"}
        return ApiError(error.status_code, said.get(error.status_code, str(error.detail))).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return ApiError(500, "the gateway failed", code="failed").response()


async def _events(
    reply: Reply, asked: Sequence[Ask], first: tuple[int, Piece], pieces: AsyncGenerator[tuple[int, Piece], None], spend: Any
) -> AsyncIterator[bytes]:
    """A stream of server-sent events; what goes wrong in its midst is its last one but the end."""
    try:
        async with aclosing(pieces):
            yield b"".join(_event(chunk) for chunk in reply.chunks(first[0], asked[first[0]], first[1]))
            async for index, piece in pieces:
                yield b"".join(_event(chunk) for chunk in reply.chunks(index, asked[index], piece))
        if (closing := reply.closing()) is not None:
            yield _event(closing)
    except ServiceError as error:
        yield _event(from_service(error).body())
    except Exception:
        log.exception("a stream failed")
        yield _event(ApiError(500, "the gateway failed", code="failed").body())
    finally:
        spend()
    yield DONE


async def _merge(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all streams as they come, each with its stream's number. All end with the first that fails."""
    if len(streams) == 1:  # the usual case, for which a task and a queue are a third of what a piece costs
        async with aclosing(streams[0]) as pieces:
            async for only in pieces:
                yield 0, only
        return
    arrived: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def drain(number: int, stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async for piece in stream:
                arrived.put_nowait((number, piece))
            arrived.put_nowait((number, None))
        except Exception as error:
            arrived.put_nowait((number, error))

    tasks = [asyncio.create_task(drain(number, stream)) for number, stream in enumerate(streams)]
    try:
        going = len(tasks)
        while going:
            number, piece = await arrived.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                going -= 1
            else:
                yield number, piece
    finally:
        await _drop(tasks)


async def _all(waited: Sequence[Any]) -> list[Any]:
    """What all of these return; with the first that fails the others are dropped."""
    tasks = [asyncio.ensure_future(one) for one in waited]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _drop(tasks)


async def _drop(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _event(value: Json) -> bytes:
    event = to_json(value)
    for mark, escaped in BREAKS.items():
        event = event.replace(mark, escaped)
    return b"data: " + event + b"\n\n"


def _json(value: Json) -> Response:
    return Response(to_json(value), media_type="application/json")
