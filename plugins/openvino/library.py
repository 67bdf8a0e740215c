"""The project's operators compiled for OpenVINO: a shared library, by the machine's C++ compiler and OpenVINO's own headers.

It is kept by what it was made from, so that it is compiled once and not with every build.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent.parent
SOURCES = ("openvino/operators.cpp", "block_matmul/kernel.hpp", "cascade_attention/paged.hpp", "openvino/avx2.hpp")
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared")
ADVICE = "OpenVINO's own operators serve instead, at about half the speed"


class CompileError(RuntimeError):
    """The library cannot be made here; the message says why, and what follows from it."""


def name() -> str:
    """The library's file name, by all that it follows from."""
    import openvino

    made_from = [openvino.__version__, platform.machine(), *OPTIONS, *((PLUGINS / source).read_bytes() for source in SOURCES)]
    return f"operators-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}.so"


def compiled(cache: Path) -> Path:
    """The library, compiled if this is the first time that it is asked for: a quarter of a minute.

    Args:
        cache: the folder that it stays in.

    Raises:
        CompileError: this is no x86 machine, or has no C++ compiler that makes it.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise CompileError(f"the operators' kernels are for x86, not {platform.machine()}; {ADVICE}")
    library = cache / name()
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / library.name
            _compile(made)
            made.replace(library)
    return library


def _compile(library: Path) -> None:
    import openvino

    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CompileError(f"no C++ compiler (c++) is here, so {ADVICE}; on Debian and Ubuntu: apt install g++")
    package = Path(openvino.__file__).parent
    parts = [next((package / "libs").glob(pattern), None) for pattern in ("libopenvino.so.*", "libtbb.so.*")]
    if None in parts:
        raise CompileError(f"OpenVINO's package has no libraries in {package / 'libs'}, so {ADVICE}")
    # Both are loaded when this is, under their own names: the loader finds them without a path.
    command = [compiler, *OPTIONS, "-DOV_THREAD=0", f"-I{package / 'include'}", str(PLUGINS / SOURCES[0])]
    run = subprocess.run([*command, "-o", str(library), *map(str, parts)], capture_output=True, text=True)
    if run.returncode:
        raise CompileError(f"{compiler} does not compile the operators, so {ADVICE}:\n{run.stderr.strip()[:1000]}")
