"""The operator as two nodes: a graph so rewritten, run on the kernels in the interpreter, gives what the operator gives."""

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from export import tensorrt_build
from plugins.cascade_attention import kernel, op, reference, split
from tests.plugins.test_cascade_attention import inputs, operator_model


class CascadeStates(OpRun):
    """``kernel.attend`` as the plugin launches it."""

    op_domain = op.DOMAIN

    def _run(self, q, k_new, v_new, past_k, past_v, past_lengths, mask, scale):
        tensors = [torch.from_numpy(x.copy()) for x in (q, k_new, v_new, past_k, past_v, past_lengths, mask)]
        batch, heads, n, size = q.shape
        kv_heads, capacity = past_k.shape[1:3]
        config, group = kernel.configs(size, 4, 90)[1], heads // kv_heads
        tiles = -(-group * n // config.tile)
        states = kernel.stretches(batch, kv_heads, tiles, capacity) + 1
        outs = torch.full((states, *q.shape), torch.nan)  # what no kernel writes is void
        lses = torch.full(outs.shape[:-1], torch.nan)
        kernel.attend[(tiles, batch * kv_heads, states)](
            *tensors, n, k_new.shape[2], capacity, outs, lses, None,
            SCALE=scale, WINDOW=0, HEADS=kv_heads, GROUP=group, D=size, PAD=kernel.pad(size),
            TILE=config.tile, KEYS=config.keys, WHOLE=False,
        )  # fmt: skip
        return outs.numpy(), lses.numpy()


class CascadeMerge(OpRun):
    """``kernel.merge`` as the plugin launches it."""

    op_domain = op.DOMAIN

    def _run(self, outs, lses, to):
        assert to == onnx.TensorProto.FLOAT
        states, batch, heads, n, size = outs.shape
        out, rows = torch.empty(outs.shape[1:]), batch * heads * n
        kernel.merge[(-(-rows // kernel.MERGED),)](
            torch.from_numpy(outs.copy()), torch.from_numpy(lses.copy()), None, rows, states, n, out,
            QUERY_HEADS=heads, D=size, PAD=kernel.pad(size), TILE=kernel.MERGED,
        )  # fmt: skip
        return (out.numpy(),)


@pytest.mark.parametrize(("n", "capacity", "seed"), [(1, 300, 0), (1, 300, 1), (7, 140, 2), (30, 1000, 3)])
def test_the_two_nodes_are_the_operator(n, capacity, seed):
    arguments = inputs(seed, n=n, t=n, capacity=capacity, d=64)
    model = operator_model(arguments[-1])
    split.split_nodes(model, onnx.TensorProto.FLOAT)
    assert [node.op_type for node in model.graph.node] == [split.STATES, split.MERGE]
    assert not model.functions
    graph = ReferenceEvaluator(model, new_ops=[CascadeStates, CascadeMerge])
    feeds = {value.name: a.numpy() for value, a in zip(model.graph.input, arguments, strict=False)}
    (found,) = graph.run(None, feeds)
    np.testing.assert_allclose(found, reference.cascade_attention(*arguments).numpy(), atol=1e-5)


@pytest.mark.parametrize(("sequences", "nodes"), [(4, [split.STATES, split.MERGE]), (128, [op.NAME])])
def test_the_prefix_is_cut_unless_all_sequences_fill_a_gpu(tmp_path, sequences, nodes):
    """The graph's two KV heads take 256 programs for 128 sequences."""
    model = operator_model(0.1)
    for value in model.graph.input:
        value.name += "_0" * value.name.startswith("past_k")
    model.graph.node[0].input[3] = "past_k_0"
    model.graph.input[3].type.tensor_type.shape.dim[1].dim_value = 2
    onnx.save(model, tmp_path / "model.onnx")
    shapes = {"decode": {"B": (1, 1, sequences), "C": (256, 1024, 2048)}, "prefill": {"B": (1, 1, 1), "C": (256, 1024, 2048)}}
    parsed = onnx.load(tensorrt_build.split(tmp_path / "model.onnx", shapes))
    assert [node.op_type for node in parsed.graph.node] == nodes
    assert [value.name for value in parsed.graph.input] == [value.name for value in model.graph.input]
