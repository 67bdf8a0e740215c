"""Ask a served pipeline, in plain or asynchronous Python, over gRPC or HTTP."""

import asyncio
import queue
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal

import grpc
import httpx
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from client.request import (
    DECODER,
    ENSEMBLE,
    MODEL,
    Answer,
    Events,
    Message,
    Options,
    Piece,
    Prompt,
    ServiceError,
    fields_of,
    from_json,
    from_tensors,
    join,
    status_of,
    to_outputs,
    to_tensors,
)

__all__ = ["Answer", "AsyncClient", "Client", "Message", "Options", "Piece", "ServiceError"]

Protocol = Literal["grpc", "http"]
USUAL = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}
DEFAULTS = Options()
LEAVING = 5.0  # seconds for a service to hear that it has been left
Headers = Mapping[str, str]
NONE: Headers = {}
# A service that comes back is found again within a second.
CHANNEL = [("grpc.max_reconnect_backoff_ms", 1000), ("grpc.max_receive_message_length", -1)]


class Client:
    """A blocking client.

    Args:
        address: host:port of the protocol (default: the usual one on this machine).
        protocol: ``grpc`` or ``http``.
        timeout: seconds to wait for the next response.

    Its methods raise ServiceError when the service refuses a request or cannot be reached. Whoever leaves a stream before its
    end (``close``, or a ``break`` out of the loop) ends the request.
    """

    def __init__(self, address: str | None = None, protocol: Protocol = "grpc", timeout: float = 300.0) -> None:
        self.address, self.protocol, self.timeout = address or USUAL[protocol], protocol, timeout

    def generate(self, prompt: Prompt, options: Options = DEFAULTS) -> Answer:
        """Return the whole answer to a text, or to chat messages."""
        return join(list(self._responses(prompt, options, stream=False)))

    def stream(self, prompt: Prompt, options: Options = DEFAULTS) -> Iterator[Piece]:
        """Yield the answer piece by piece, as it is committed."""
        return self._responses(prompt, options, stream=True)

    def _responses(self, prompt: Prompt, options: Options, stream: bool) -> Iterator[Piece]:
        named = fields_of(prompt, options, stream)
        return self._over_grpc(named) if self.protocol == "grpc" else self._over_http(named)

    def _over_grpc(self, named: dict[str, Any]) -> Iterator[Piece]:
        """A decoupled model answers over a stream only, even if once."""
        module = tritonclient.grpc
        arrived: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        request_id, begun, ended, silent = uuid.uuid4().hex, False, False, False
        with module.InferenceServerClient(self.address) as service:
            try:
                if not service.is_server_live():
                    raise ServiceError(f"{self.address}: the service is not live")
                service.start_stream(lambda result, error: arrived.put((result, error)))
                service.async_stream_infer(
                    MODEL,
                    to_tensors(named, module),
                    outputs=to_outputs(named, module),
                    request_id=request_id,
                    enable_empty_final_response=True,
                )
                begun = True
                while not ended:
                    result, error = arrived.get(timeout=self.timeout)
                    if error is not None:
                        ended, message = True, _message(error)
                        raise ServiceError(message, status_of(message))
                    response = result.get_response()
                    ended = response.parameters["triton_final_response"].bool_param
                    if response.outputs:
                        yield from_tensors(response)
            except queue.Empty:
                silent = True
                raise ServiceError(f"no response from {self.address} within {self.timeout:g} s") from None
            except InferenceServerException as error:
                raise ServiceError(f"{self.address}: {_message(error)}") from None
            finally:
                # An ensemble does not hear that its client has left, so d2sd is told; and a stream that has had its last
                # response is not cancelled, because Triton would wait for it to end for ever.
                if begun and not ended:
                    service.async_stream_infer(DECODER, to_tensors({"stop": True}, module), request_id=request_id)
                service.stop_stream(cancel_requests=silent)

    def _over_http(self, named: dict[str, Any]) -> Iterator[Piece]:
        request_id, ended = uuid.uuid4().hex, False
        url, asked = _url(self.address, MODEL, named["stream"]), named | {"id": request_id}
        try:
            with httpx.stream("POST", url, json=asked, timeout=self.timeout) as response:
                if not named["stream"] or response.status_code != httpx.codes.OK:
                    told, ended = response.read().decode(), True
                    yield from_json(told.removeprefix("data: "))
                    return
                events = Events()
                for said in (said for chunk in response.iter_bytes() for said in events.take(chunk)):
                    ended = True  # by an error
                    piece = from_json(said)
                    ended = bool(piece.finish_reason)
                    yield piece
        except httpx.HTTPError as error:
            raise ServiceError(f"{self.address}: {error}") from None
        finally:
            if not ended:  # nobody hears that a client of HTTP has left
                with suppress(httpx.HTTPError):
                    httpx.post(_url(self.address, DECODER), json={"id": request_id, "stop": True}, timeout=LEAVING)


class AsyncClient:
    """An asynchronous client, with the arguments, methods and errors of ``Client``.

    One client serves many requests at once; as a context manager it closes its connection. A request may carry an id, with
    which the one begins that the server's own log and traces show, and headers (``traceparent`` for one), which reach it as
    they are.
    """

    def __init__(self, address: str | None = None, protocol: Protocol = "grpc", timeout: float = 300.0) -> None:
        self.address, self.protocol, self.timeout = address or USUAL[protocol], protocol, timeout
        self._grpc: Any = None
        self._http: httpx.AsyncClient | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    async def generate(
        self, prompt: Prompt, options: Options = DEFAULTS, request_id: str = "", headers: Headers = NONE
    ) -> Answer:
        """Return the whole answer to a text, to chat messages or to token ids."""
        return join([piece async for piece in self._responses(prompt, options, False, request_id, headers)])

    def stream(
        self, prompt: Prompt, options: Options = DEFAULTS, request_id: str = "", headers: Headers = NONE
    ) -> AsyncGenerator[Piece, None]:
        """Yield the answer piece by piece, as it is committed."""
        return self._responses(prompt, options, True, request_id, headers)

    async def ready(self, timeout: float = 2.0) -> bool:
        """Whether the service takes requests; False too if it says nothing for ``timeout`` seconds."""
        try:
            if self.protocol == "grpc":
                return bool(await self._stub().is_server_ready(client_timeout=timeout))
            answer = await self._session().get(f"http://{self.address}/v2/health/ready", timeout=timeout)
            return answer.status_code == httpx.codes.OK
        except (InferenceServerException, httpx.HTTPError):
            return False

    async def close(self) -> None:
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=LEAVING)
        if self._grpc is not None:
            await self._grpc.close()
        if self._http is not None:
            await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _responses(
        self, prompt: Prompt, options: Options, stream: bool, request_id: str, headers: Headers
    ) -> AsyncGenerator[Piece, None]:
        named = fields_of(prompt, options, stream)
        # Of its own, whoever else asks under the same name: what is told to stop is this one.
        request_id = f"{request_id}-{uuid.uuid4().hex}".removeprefix("-")
        return (self._over_grpc if self.protocol == "grpc" else self._over_http)(named, request_id, headers)

    def _stub(self) -> Any:
        self._grpc = self._grpc or tritonclient.grpc.aio.InferenceServerClient(self.address, channel_args=CHANNEL)
        return self._grpc

    def _session(self) -> httpx.AsyncClient:
        # Who has to wait, waits in the service, where it can be told to stop.
        self._http = self._http or httpx.AsyncClient(timeout=self.timeout, limits=httpx.Limits(max_connections=None))
        return self._http

    async def _over_grpc(self, named: dict[str, Any], request_id: str, headers: Headers) -> AsyncGenerator[Piece, None]:
        module = tritonclient.grpc.aio
        tensors = {"inputs": to_tensors(named, module), "outputs": to_outputs(named, module)}
        asked = _one({"model_name": MODEL, **tensors, "request_id": request_id, "enable_empty_final_response": True})
        responses = self._stub().stream_infer(asked, stream_timeout=self.timeout, headers=headers)
        arrived: asyncio.Queue[Piece | ServiceError | None] = asyncio.Queue()
        # Read in a task of its own, because to cancel a read is to cancel the stream: a stream is read to its end.
        reading = asyncio.create_task(self._read(responses, arrived))
        failure: ServiceError | None = None
        ended = False
        try:
            while (piece := await arrived.get()) is not None:
                if isinstance(piece, ServiceError):
                    failure, ended = piece, True
                else:
                    ended = bool(piece.finish_reason)
                    yield piece
            ended = True
            await reading
        finally:
            if not ended:  # as in ``Client``
                await self._leave(request_id)
            await asyncio.wait([reading], timeout=LEAVING)
            responses.cancel()  # a service that says nothing; one that has ended its stream does not hear of it
        if failure is not None:
            raise failure

    async def _read(self, responses: Any, arrived: asyncio.Queue[Piece | ServiceError | None]) -> None:
        """Hand on the pieces of a stream, or the error that ends it; and that it has ended."""
        try:
            async for result, error in responses:
                if error is not None:
                    message = _message(error)
                    arrived.put_nowait(ServiceError(message, status_of(message)))
                elif (response := result.get_response()).outputs:
                    arrived.put_nowait(from_tensors(response))
        except grpc.aio.AioRpcError as error:
            status, message = error.code().name, str(error.details()).removeprefix(ENSEMBLE)
            said = f"{self.address}: {message}" if status == "UNAVAILABLE" else message
            arrived.put_nowait(ServiceError(said, status))
        finally:
            arrived.put_nowait(None)

    async def _over_http(self, named: dict[str, Any], request_id: str, headers: Headers) -> AsyncGenerator[Piece, None]:
        ended = False
        url, asked = _url(self.address, MODEL, named["stream"]), named | {"id": request_id}
        try:
            async with self._session().stream("POST", url, json=asked, headers=dict(headers)) as response:
                if not named["stream"] or response.status_code != httpx.codes.OK:
                    told, ended = (await response.aread()).decode(), True
                    yield from_json(told.removeprefix("data: "))
                    return
                events = Events()
                async for chunk in response.aiter_bytes():
                    for said in events.take(chunk):
                        ended = True  # as in ``Client``
                        piece = from_json(said)
                        ended = bool(piece.finish_reason)
                        yield piece
        except httpx.HTTPError as error:
            raise ServiceError(f"{self.address}: {error}", "UNAVAILABLE") from None
        finally:
            if not ended:
                await self._leave(request_id)

    async def _leave(self, request_id: str) -> None:
        """Tell the service, also if whoever leaves is cancelled again before it has heard."""
        telling = asyncio.create_task(self._stop(request_id))
        self._leaving.add(telling)
        telling.add_done_callback(self._leaving.discard)
        await asyncio.shield(telling)

    async def _stop(self, request_id: str) -> None:
        with suppress(Exception):  # a service that is not there, or a client that is closed
            if self.protocol == "http":
                stop = {"id": request_id, "stop": True}
                await self._session().post(_url(self.address, DECODER), json=stop, timeout=LEAVING)
                return
            tensors = to_tensors({"stop": True}, tritonclient.grpc.aio)
            asked = _one({"model_name": DECODER, "inputs": tensors, "request_id": request_id})
            async for _ in self._stub().stream_infer(asked, stream_timeout=LEAVING):
                pass


async def _one(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request


def _url(address: str, model: str, stream: bool = False) -> str:
    return f"http://{address}/v2/models/{model}/generate{'_stream' if stream else ''}"


def _message(error: InferenceServerException) -> str:
    return str(error.message()).removeprefix(ENSEMBLE)
