"""What goes wrong, in OpenAI's shape."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from client import ServiceError

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP. message: of the form ``key: found X, allowed: Y`` where a value is at fault.
        param: the key. code: what a program may look for.
        retry_after: seconds after which trying again may help.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # Half of a surrogate pair can be written in JSON, but not sent.
        message = self.message[:1000].encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def from_service(error: ServiceError) -> ApiError:
    """What the service said: it refuses a request, is not there or has no room, or failed."""
    if error.status == "INVALID_ARGUMENT":
        key = str(error).partition(":")[0]
        too_long = key in ("prompt", "max_tokens") and "limits.length" in str(error)
        return ApiError(
            400,
            str(error),
            param=key if key.isidentifier() else None,
            code="context_length_exceeded" if too_long else "invalid_value",
        )
    if error.status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"):
        return ApiError(503, str(error), code="unavailable", retry_after=1)
    return ApiError(500, str(error), code="failed")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found: the first thing, by its path."""
    # Of a value that fits none of several types, pydantic tells what each lacks: a refusal, or what lies deepest, says most.
    error = min(errors, key=lambda e: (e["type"] != "refused", -len(e["loc"]), e["type"] in ("extra_forbidden", "missing")))
    path = ""
    for part in error["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("body", "str", "int", "float", "bool"):
            path += f".{part}" if path else part
    kind, found = error["type"], _short(error.get("input"))
    said = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}", code="invalid_json")
    if path.endswith("key"):  # a secret is not repeated
        return ApiError(400, f"{path}: allowed: {said}", param=path)
    if kind == "extra_forbidden":
        return ApiError(400, f"{path}: found {found}, which is no parameter known here", param=path, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{path or 'body'}: missing", param=path or None, code="missing_parameter")
    if kind == "refused":
        message = f"{path}: found {found}, allowed: {said}" if path else said
        return ApiError(400, message, param=path or None, code="unsupported_value")
    if kind == "value_error" and not path:
        return ApiError(400, said, code="invalid_value")
    return ApiError(400, f"{path or 'body'}: found {found}, allowed: {said}", param=path or None, code="invalid_value")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number too large"
    return text if len(text) <= 60 else text[:57] + "..."
