"""The kernel compiled ahead of time, without a GPU: to PTX, and what ptxas makes of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from plugins.cascade_attention import kernel

CAPABILITIES = (80, 86, 89, 90, 100, 120)
DTYPES = {"bfloat16": "bf16", "float16": "fp16"}  # PyTorch's and ONNX's name, Triton's


@dataclass(frozen=True)
class Compiled:
    """A kernel for one kind of device.

    Attributes:
        name: of the entry in ``ptx``. threads: a block's. shared: bytes of dynamic shared memory that a launch must ask for.
    """

    name: str
    ptx: str
    threads: int
    shared: int


@dataclass(frozen=True)
class Resources:
    """What a thread, and a block, take of a multiprocessor: registers, bytes spilled, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def attend(
    capability: int,
    dtype: str,
    head_size: int,
    group: int,
    kv_heads: int,
    scale: float,
    config: kernel.Config,
    *,
    whole: bool,
    window: int = 0,
) -> Compiled:
    """Compile ``kernel.attend`` without sinks. Its parameters: the operator's inputs, N, T, C, ``outs``, and ``lses`` if cut.

    Args:
        capability: of the device, as in sm_90. dtype: bfloat16 or float16. group: G, query heads a KV head.
    """
    element = "*" + DTYPES[dtype]
    types: dict[str, str | None] = dict.fromkeys(("q", "k_new", "v_new", "past_k", "past_v"), element)
    types |= {"past_lengths": "*i64", "mask": "*i1", "N": "i32", "T": "i32", "C": "i32"}
    types |= {"outs": element if whole else "*fp32", "lses": None if whole else "*fp32", "sinks": None}
    constants = {
        "SCALE": scale,
        "WINDOW": window,
        "HEADS": kv_heads,
        "GROUP": group,
        "D": head_size,
        "PAD": kernel.pad(head_size),
        "TILE": config.tile,
        "KEYS": config.keys,
        "WHOLE": whole,
    }
    return _compile(kernel.attend, types, constants, capability, config.warps, config.stages)


def merge(capability: int, dtype: str, head_size: int, query_heads: int) -> Compiled:
    """Compile ``kernel.merge`` without sinks. Its parameters: ``outs``, ``lses``, rows, states, N, ``out``.

    Args:
        capability: of the device, as in sm_90. dtype: of ``out``, bfloat16 or float16.
    """
    types = {"outs": "*fp32", "lses": "*fp32", "sinks": None, "rows": "i32", "states": "i32", "N": "i32"}
    types["out"] = "*" + DTYPES[dtype]
    constants = {"QUERY_HEADS": query_heads, "D": head_size, "PAD": kernel.pad(head_size), "TILE": kernel.MERGED}
    return _compile(kernel.merge, types, constants, capability, warps=4, stages=1)


def _compile(
    function: Any, types: dict[str, str | None], constants: dict[str, Any], capability: int, warps: int, stages: int
) -> Compiled:
    """Compile a kernel whose parameters are ``types``, those of None left out, and ``constants``, in this order."""
    passed = {name: kind or "constexpr" for name, kind in types.items()}
    absent = {name: None for name, kind in types.items() if kind is None}
    # Tensors start at multiples of 16 bytes, as every allocator's do; their rows then do so too.
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(passed.values()) if kind.startswith("*")}
    source = ASTSource(function, passed | dict.fromkeys(constants, "constexpr"), constants | absent, aligned)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it names folders of this machine
        target = GPUTarget("cuda", capability, 32)
        built = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    name = built.metadata.name
    ptx = _without_scratch(built.asm["ptx"], name, len(types) - len(absent))
    return Compiled(name, ptx, 32 * warps, built.metadata.shared)


def _without_scratch(ptx: str, name: str, used: int) -> str:
    """Drop the parameters behind the kernel's own: pointers to scratch memory, which only Triton's launcher passes.

    Raises:
        ValueError: the kernel reads one of them.
    """
    numbers = map(int, re.findall(rf"^\s*\.param .*{name}_param_(\d+)", ptx, re.MULTILINE))
    for number in [number for number in numbers if number >= used]:
        if f"[{name}_param_{number}]" in ptx:
            raise ValueError("the kernel needs scratch memory, which no one but Triton's launcher gives it")
        ptx = re.sub(rf",\s*\.param [^,\n]*{name}_param_{number}\b", "", ptx)
    return ptx


def resources(compiled: Compiled, capability: int) -> Resources:
    """Assemble the PTX with the ptxas that Triton brings, and read what it reports.

    Raises:
        subprocess.CalledProcessError: ptxas refuses it.
    """
    nvidia = triton.knobs.nvidia
    ptxas = (nvidia.ptxas if capability < 100 else nvidia.ptxas_blackwell).path
    architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.ptx, encoding="utf-8")
        command = [ptxas, "-v", f"--gpu-name={architecture}", str(path), "-o", str(path.with_suffix(".cubin"))]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = {
        name: re.search(pattern, report) for name, pattern in (("r", r"Used (\d+) reg"), ("s", r"(\d+) bytes spill stores"))
    }
    assert found["r"] is not None
    assert found["s"] is not None
    return Resources(int(found["r"][1]), int(found["s"][1]), compiled.shared)
