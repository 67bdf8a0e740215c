"""Ask a served pipeline, in plain or asynchronous Python, over gRPC or HTTP."""

import queue
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal

import httpx
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from client.request import (
    DECODER,
    ENSEMBLE,
    MODEL,
    Answer,
    Message,
    Options,
    Piece,
    ServiceError,
    fields_of,
    from_json,
    from_tensors,
    join,
    to_tensors,
)

__all__ = ["Answer", "AsyncClient", "Client", "Message", "Options", "Piece", "ServiceError"]

Protocol = Literal["grpc", "http"]
Prompt = str | Sequence[Message]
USUAL = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}
DEFAULTS = Options()
LEAVING = 5.0  # seconds for a service to hear that it has been left


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
                inputs = to_tensors(named, module)
                service.async_stream_infer(MODEL, inputs, request_id=request_id, enable_empty_final_response=True)
                begun = True
                while not ended:
                    result, error = arrived.get(timeout=self.timeout)
                    if error is not None:
                        ended = True
                        raise ServiceError(_message(error))
                    response = result.get_response()
                    ended = response.parameters["triton_final_response"].bool_param
                    if response.outputs:
                        yield from_tensors(result)
            except queue.Empty:
                silent = True
                raise ServiceError(f"no response from {self.address} within {self.timeout:g} s") from None
            except InferenceServerException as error:
                raise ServiceError(f"{self.address}: {_message(error)}") from None
            finally:
                # An ensemble does not hear that its client has left, so it is told; and a stream that has had its last
                # response is not cancelled, because Triton would wait for it to end for ever.
                if begun and not ended:
                    service.async_stream_infer(DECODER, to_tensors({"stop": True}, module), request_id=request_id)
                service.stop_stream(cancel_requests=silent)

    def _over_http(self, named: dict[str, Any]) -> Iterator[Piece]:
        url = f"http://{self.address}/v2/models/{MODEL}/generate{'_stream' if named['stream'] else ''}"
        try:
            with httpx.stream("POST", url, json=named, timeout=self.timeout) as response:
                if not named["stream"] or response.status_code != httpx.codes.OK:
                    yield from_json(response.read().decode().removeprefix("data: "))
                    return
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        yield from_json(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            raise ServiceError(f"{self.address}: {error}") from None


class AsyncClient:
    """An asynchronous client, with the arguments, methods and errors of ``Client``.

    One client serves many requests at once; as a context manager it closes its connection.
    """

    def __init__(self, address: str | None = None, protocol: Protocol = "grpc", timeout: float = 300.0) -> None:
        self.address, self.protocol, self.timeout = address or USUAL[protocol], protocol, timeout
        self._grpc: Any = None
        self._http: httpx.AsyncClient | None = None

    async def generate(self, prompt: Prompt, options: Options = DEFAULTS) -> Answer:
        """Return the whole answer to a text, or to chat messages."""
        return join([piece async for piece in self._responses(prompt, options, stream=False)])

    def stream(self, prompt: Prompt, options: Options = DEFAULTS) -> AsyncIterator[Piece]:
        """Yield the answer piece by piece, as it is committed."""
        return self._responses(prompt, options, stream=True)

    async def close(self) -> None:
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

    def _responses(self, prompt: Prompt, options: Options, stream: bool) -> AsyncIterator[Piece]:
        named = fields_of(prompt, options, stream)
        return self._over_grpc(named) if self.protocol == "grpc" else self._over_http(named)

    async def _over_grpc(self, named: dict[str, Any]) -> AsyncIterator[Piece]:
        module = tritonclient.grpc.aio
        self._grpc = self._grpc or module.InferenceServerClient(self.address)

        request_id, ended = uuid.uuid4().hex, False
        request = {"inputs": to_tensors(named, module), "request_id": request_id, "enable_empty_final_response": True}
        responses = self._grpc.stream_infer(_one({"model_name": MODEL, **request}), stream_timeout=self.timeout)
        try:
            async for result, error in responses:
                if error is not None:
                    ended = True
                    raise ServiceError(_message(error))
                response = result.get_response()
                ended = ended or response.parameters["triton_final_response"].bool_param
                if response.outputs:
                    yield from_tensors(result)
        except InferenceServerException as error:
            ended = True
            raise ServiceError(f"{self.address}: {_message(error)}") from None
        finally:  # as in ``Client``
            if not ended:
                responses.cancel()
                stop = {"model_name": DECODER, "inputs": to_tensors({"stop": True}, module), "request_id": request_id}
                async for _ in self._grpc.stream_infer(_one(stop), stream_timeout=LEAVING):
                    pass

    async def _over_http(self, named: dict[str, Any]) -> AsyncIterator[Piece]:
        self._http = self._http or httpx.AsyncClient(timeout=self.timeout)
        url = f"http://{self.address}/v2/models/{MODEL}/generate{'_stream' if named['stream'] else ''}"
        try:
            async with self._http.stream("POST", url, json=named) as response:
                if not named["stream"] or response.status_code != httpx.codes.OK:
                    yield from_json((await response.aread()).decode().removeprefix("data: "))
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        yield from_json(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            raise ServiceError(f"{self.address}: {error}") from None


async def _one(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request


def _message(error: InferenceServerException) -> str:
    return str(error.message()).removeprefix(ENSEMBLE)
