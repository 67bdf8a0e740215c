"""The operator as TensorRT plugins: the kernels as PTX that the engine carries, so that it needs no Python of ours.

A plugin of ``tensorrt.plugin`` launches one kernel and has no scratch memory. Under the operator's own name a program takes its
tile of queries through all of their keys. Where that leaves a GPU idle, the prefix is cut by the two nodes of ``split.py``.
TensorRT passes a kernel its inputs, then the sizes that it asks for, then its outputs. Tactics are the kernel's configurations;
TensorRT times them as it builds. It reads a plugin's tensors off the signatures, so each function spells them out.
"""

# mypy: ignore-errors
# The annotations are classes of TensorRT's, which are found at run time and which it checks.

import importlib

import onnx
import triton

from plugins.cascade_attention import compiled, kernel, op, split

TYPES = {"BF16": "bfloat16", "HALF": "float16"}  # TensorRT's data types that the kernels are compiled for
EITHER = "BF16|FP16"
INPUTS = [EITHER] * 5 + ["INT64", "BOOL"]
ROWS = 64  # of the tiles that the cutting reckons with: a plugin's shapes may not follow from its tactic


def register(capability: int | None = None) -> None:
    """Register the plugins with TensorRT; a second call does nothing.

    Args:
        capability: of the GPU that engines are built for, as in sm_90; left out: this machine's.
    """
    trt, trtp = importlib.import_module("tensorrt"), importlib.import_module("tensorrt.plugin")
    if hasattr(getattr(trtp.op, op.DOMAIN, None), op.NAME):
        return
    device = capability or triton.runtime.driver.active.get_current_target().arch
    Desc = trtp.TensorDesc
    Kernel = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]

    def combinations(types: list[str], tactics: int) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR", list(range(1, tactics + 1)))]

    def launch(built: compiled.Compiled, grid: list, sizes: list) -> Kernel:
        parameters = trtp.KernelLaunchParams()
        parameters.grid_x, parameters.grid_y, parameters.grid_z = [*grid, 1, 1][:3]
        parameters.block_x, parameters.shared_mem = built.threads, built.shared
        passed = trtp.SymIntExprs(len(sizes))
        for place, size in enumerate(sizes):
            passed[place] = trtp.SymInt32(size)
        return built.name, built.ptx, parameters, passed

    def attend(q: Desc, k_new: Desc, past_k: Desc, scale: float, tactic: int, stretches: list) -> Kernel:
        """``kernel.attend``; the grid's last extent is left out where the prefix is whole."""
        batch, heads, n, size = q.shape_expr
        kv_heads = _constant(past_k.shape_expr[1])
        group = _constant(heads) // kv_heads
        config = kernel.configs(_constant(size), 2, device)[tactic - 1]
        kind, whole = TYPES[q.dtype.name], not stretches
        built = compiled.attend(device, kind, _constant(size), group, kv_heads, scale, config, whole=whole)
        grid = [trtp.cdiv(n * group, config.tile), batch * kv_heads, *stretches]
        return launch(built, grid, [n, k_new.shape_expr[2], past_k.shape_expr[2]])

    @trtp.register(f"{op.DOMAIN}::{op.NAME}")
    def describe(
        q: Desc, k_new: Desc, v_new: Desc, past_k: Desc, past_v: Desc, past_lengths: Desc, mask: Desc, scale: float
    ) -> Desc:
        return q.like()

    @trtp.autotune(f"{op.DOMAIN}::{op.NAME}")
    def formats(
        q: Desc, k_new: Desc, v_new: Desc, past_k: Desc, past_v: Desc, past_lengths: Desc, mask: Desc, outputs: tuple[Desc]
    ) -> list[trtp.AutoTuneCombination]:
        return combinations([*INPUTS, EITHER], tactics=2)

    @trtp.aot_impl(f"{op.DOMAIN}::{op.NAME}")
    def implement(
        q: Desc,
        k_new: Desc,
        v_new: Desc,
        past_k: Desc,
        past_v: Desc,
        past_lengths: Desc,
        mask: Desc,
        scale: float,
        outputs: tuple[Desc],
        tactic: int,
    ) -> Kernel:
        return attend(q, k_new, past_k, scale, tactic, stretches=[])

    @trtp.register(f"{op.DOMAIN}::{split.STATES}")
    def describe_states(
        q: Desc, k_new: Desc, v_new: Desc, past_k: Desc, past_v: Desc, past_lengths: Desc, mask: Desc, scale: float
    ) -> tuple[Desc, Desc]:
        batch, heads, n, size = q.shape_expr
        tiles = trtp.cdiv(heads // past_k.shape_expr[1] * n, ROWS)
        # kernel.stretches, in symbols
        programs = batch * past_k.shape_expr[1] * tiles
        most = trtp.cdiv(past_k.shape_expr[2], kernel.SHORTEST)
        states = trtp.max(trtp.min(trtp.cdiv(kernel.PROGRAMS, programs), most), 1) + 1
        return (
            trtp.from_shape_expr((states, batch, heads, n, size), trt.DataType.FLOAT),
            trtp.from_shape_expr((states, batch, heads, n), trt.DataType.FLOAT),
        )

    @trtp.autotune(f"{op.DOMAIN}::{split.STATES}")
    def formats_of_states(
        q: Desc,
        k_new: Desc,
        v_new: Desc,
        past_k: Desc,
        past_v: Desc,
        past_lengths: Desc,
        mask: Desc,
        outputs: tuple[Desc, Desc],
    ) -> list[trtp.AutoTuneCombination]:
        return combinations([*INPUTS, "FP32", "FP32"], tactics=2)

    @trtp.aot_impl(f"{op.DOMAIN}::{split.STATES}")
    def implement_states(
        q: Desc,
        k_new: Desc,
        v_new: Desc,
        past_k: Desc,
        past_v: Desc,
        past_lengths: Desc,
        mask: Desc,
        scale: float,
        outputs: tuple[Desc, Desc],
        tactic: int,
    ) -> Kernel:
        return attend(q, k_new, past_k, scale, tactic, stretches=[outputs[1].shape_expr[0]])

    @trtp.register(f"{op.DOMAIN}::{split.MERGE}")
    def describe_merge(outs: Desc, lses: Desc, to: int) -> Desc:
        kind = {onnx.TensorProto.BFLOAT16: trt.DataType.BF16, onnx.TensorProto.FLOAT16: trt.DataType.HALF}[to]
        _, batch, heads, n, size = outs.shape_expr
        return trtp.from_shape_expr((batch, heads, n, size), kind)

    @trtp.autotune(f"{op.DOMAIN}::{split.MERGE}")
    def formats_of_merge(outs: Desc, lses: Desc, outputs: tuple[Desc]) -> list[trtp.AutoTuneCombination]:
        return combinations(["FP32", "FP32", EITHER], tactics=1)

    @trtp.aot_impl(f"{op.DOMAIN}::{split.MERGE}")
    def implement_merge(outs: Desc, lses: Desc, to: int, outputs: tuple[Desc], tactic: int) -> Kernel:
        states, batch, heads, n, size = outs.shape_expr
        built = compiled.merge(device, TYPES[outputs[0].dtype.name], _constant(size), _constant(heads))
        rows = batch * heads * n
        return launch(built, [trtp.cdiv(rows, kernel.MERGED)], [rows, states, n])


def _constant(extent) -> int:
    """An extent that the graph fixes: a number of heads, or the head size."""
    return int(extent.constant_value())
