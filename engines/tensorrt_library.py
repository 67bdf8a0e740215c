"""TensorRT's Python module, and TensorRT-RTX's, which share an API."""

import importlib
from types import ModuleType

from engines.engine import EngineError

# Where each backend's module is found: as NVIDIA's packages name it, and its bindings alone.
MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
HINTS = {
    "tensorrt": "pip install d2sd-triton[tensorrt] fetches it from NVIDIA's own index, and NVIDIA's Triton container has it "
    "(docs/engines.md); backend tensorrt_rtx or onnxruntime needs neither",
    "tensorrt_rtx": "pip install d2sd-triton[tensorrt-rtx]",
}


def library(backend: str) -> ModuleType:
    """The backend's Python module.

    Raises:
        EngineError: it is not installed; says what to install.
    """
    for name in MODULES[backend]:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):
            continue
    raise EngineError(f"engine.backend: found {backend}, which is not installed here; {HINTS[backend]}")
