"""The operator as a TensorRT plugin: ``kernel.attend`` as PTX that the engine carries, so that it needs no Python of ours.

A plugin of ``tensorrt.plugin`` launches one kernel and has no scratch memory, so a program takes its tile of queries through
all of their keys: the prefix is not cut. The kernel's parameters are the operator's inputs, then N, T and C, then the output:
the order in which TensorRT passes them. Tactics are the kernel's configurations; TensorRT times them as it builds.
"""

# mypy: ignore-errors
# The annotations are classes of TensorRT's, which are found at run time and which it checks.

from types import ModuleType

import triton

from plugins.cascade_attention import compiled, kernel, op

PLUGIN = f"{op.DOMAIN}::{op.NAME}"
TYPES = {"BF16": "bfloat16", "HALF": "float16"}  # TensorRT's data types that the kernel is compiled for
INPUTS = 7


def register(trtp: ModuleType, capability: int | None = None) -> None:
    """Register the plugin; a second call does nothing.

    Args:
        trtp: the module ``tensorrt.plugin``.
        capability: of the GPU that engines are built for, as in sm_90; left out: this machine's.
    """
    if hasattr(getattr(trtp.op, op.DOMAIN, None), op.NAME):
        return
    device = capability or triton.runtime.driver.active.get_current_target().arch
    Desc = trtp.TensorDesc

    def describe(
        q: Desc, k_new: Desc, v_new: Desc, past_k: Desc, past_v: Desc, past_lengths: Desc, mask: Desc, scale: float
    ) -> Desc:
        return q.like()

    def formats(
        q: Desc,
        k_new: Desc,
        v_new: Desc,
        past_k: Desc,
        past_v: Desc,
        past_lengths: Desc,
        mask: Desc,
        outputs: tuple[Desc],
    ) -> list[trtp.AutoTuneCombination]:
        tactics = [1 + index for index, _ in enumerate(kernel.configs(_constant(q, 3), 2, device))]
        either = "BF16|FP16"
        types = ", ".join([either] * (INPUTS - 2) + ["INT64", "BOOL", either])
        return [trtp.AutoTuneCombination(types, "LINEAR", tactics)]

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
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        head_size, kv_heads = _constant(q, 3), _constant(past_k, 1)
        group = _constant(q, 1) // kv_heads
        config = kernel.configs(head_size, 2, device)[tactic - 1]
        built = compiled.attend(device, TYPES[q.dtype.name], head_size, group, kv_heads, scale, config, whole=True)
        n = q.shape_expr[2]
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(n * group, config.tile)
        launch.grid_y = q.shape_expr[0] * kv_heads
        launch.block_x, launch.shared_mem = built.threads, built.shared
        sizes = trtp.SymIntExprs(3)
        for place, size in enumerate((n, k_new.shape_expr[2], past_k.shape_expr[2])):
            sizes[place] = trtp.SymInt32(size)
        return built.name, built.ptx, launch, sizes

    trtp.register(PLUGIN)(describe)
    trtp.autotune(PLUGIN)(formats)
    trtp.aot_impl(PLUGIN)(implement)


def _constant(desc, axis: int) -> int:
    """An extent that the graph fixes: a number of heads, or the head size."""
    return int(desc.shape_expr[axis].constant_value())
