"""Reading and writing the tensors of a request of one answer, in the Python backend."""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


def scalar(request: Any, name: str, default: Any = None) -> Any:
    """The one value of an optional input, strings decoded.

    Raises:
        ValueError: more or fewer values than one, or text that is not UTF-8.
    """
    values = strings(request, name) if _is_text(request, name) else _values(request, name)
    if values is None or len(values) == 0:
        return default
    if len(values) != 1:
        raise ValueError(f"{name}: found {len(values)} values, allowed: one")
    return values[0]


def strings(request: Any, name: str) -> list[str]:
    """The strings of an optional input, empty ones left out.

    Raises:
        ValueError: text that is not UTF-8.
    """
    values = _values(request, name)
    try:
        return [value.decode("utf-8") for value in values or [] if value]
    except UnicodeDecodeError:
        raise ValueError(f"{name}: found bytes that are not UTF-8 text") from None


def integers(request: Any, name: str) -> list[int]:
    """The numbers of an input."""
    return _values(request, name) or []


def output(name: str, value: Any, dtype: Any) -> Any:
    """An output tensor of one row."""
    return pb_utils.Tensor(name, np.array(value, dtype=dtype).reshape(1, -1))


def texts(name: str, values: list[str]) -> Any:
    """An output tensor of one row of strings."""
    return output(name, [value.encode("utf-8") for value in values], np.object_)


def invalid(error: Exception) -> Any:
    """The error that tells a client that its request is at fault."""
    return pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)


def _values(request: Any, name: str) -> list[Any] | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()


def _is_text(request: Any, name: str) -> bool:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return tensor is not None and tensor.as_numpy().dtype == np.object_
