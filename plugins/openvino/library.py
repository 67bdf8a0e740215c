"""The project's operators compiled for OpenVINO: shared libraries, by the machine's C++ compiler and OpenVINO's own headers.

There is one for each set of instructions, since a build can be served elsewhere. They are kept by what they were made from, so
that they are compiled once and not with every build.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent.parent
SOURCES = ("openvino/operators.cpp", "block_matmul/kernel.hpp", "cascade_attention/paged.hpp", "openvino/vectors.hpp")
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")  # two libraries may be loaded, of the same names
ADVICE = "OpenVINO's own operators serve instead, at about half the speed"


@dataclass(frozen=True)
class Instructions:
    """A set of instructions that the kernels are compiled for.

    Attributes:
        name: in the library's file name. needs: what a CPU must have, by Linux's names. lanes: floats in a register, as
            ``vectors.hpp`` has them.
    """

    name: str
    needs: tuple[str, ...]
    lanes: int

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(f"-m{feature.replace('_', '')}" for feature in self.needs)


AVX2 = Instructions("avx2", ("avx2", "fma", "f16c"), 8)
AVX512 = Instructions("avx512", (*AVX2.needs, "avx512f", "avx512bw", "avx512vl", "avx512_vnni"), 16)
ALL = (AVX512, AVX2)  # the better one first


@dataclass(frozen=True)
class Library:
    """The operators' kernels, compiled for a set of instructions."""

    path: Path
    instructions: Instructions


class CompileError(RuntimeError):
    """The library cannot be made here; the message says why, and what follows from it."""


def name(instructions: Instructions) -> str:
    """A library's file name, by all that it follows from."""
    import openvino

    sources = ((PLUGINS / source).read_bytes() for source in SOURCES)
    made_from = [openvino.__version__, platform.machine(), *OPTIONS, *instructions.options, *sources]
    return f"{instructions.name}-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}.so"


def compiled(cache: Path) -> list[Library]:
    """Those for ``ALL``, compiled if this is the first time that they are asked for: half a minute.

    Args:
        cache: the folder that they stay in.

    Raises:
        CompileError: this is no x86 machine, or has no C++ compiler that makes them.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise CompileError(f"the operators' kernels are for x86, not {platform.machine()}; {ADVICE}")
    libraries = [Library(cache / name(each), each) for each in ALL]
    missing = [library for library in libraries if not library.path.exists()]
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder, ThreadPoolExecutor() as workers:
            made = [Library(Path(folder) / library.path.name, library.instructions) for library in missing]
            list(workers.map(_compile, made))
            for each, library in zip(made, missing, strict=True):
                each.path.replace(library.path)
    return libraries


def _compile(library: Library) -> None:
    import openvino

    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CompileError(f"no C++ compiler (c++) is here, so {ADVICE}; on Debian and Ubuntu: apt install g++")
    package = Path(openvino.__file__).parent
    parts = [next((package / "libs").glob(pattern), None) for pattern in ("libopenvino.so.*", "libtbb.so.*")]
    if None in parts:
        raise CompileError(f"OpenVINO's package has no libraries in {package / 'libs'}, so {ADVICE}")
    # Both are loaded when this is, under their own names: the loader finds them without a path.
    command = [
        compiler,
        *OPTIONS,
        *library.instructions.options,
        "-DOV_THREAD=0",
        f"-I{package / 'include'}",
        str(PLUGINS / SOURCES[0]),
    ]
    run = subprocess.run([*command, "-o", str(library.path), *map(str, parts)], capture_output=True, text=True)
    if run.returncode:
        raise CompileError(f"{compiler} does not compile the operators, so {ADVICE}:\n{run.stderr.strip()[:1000]}")
