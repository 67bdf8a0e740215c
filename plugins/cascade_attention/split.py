"""The operator as two nodes, for a runtime whose operators launch one kernel each and get no scratch memory from it.

``CascadeStates`` is ``kernel.attend`` over the cut prefix, with the operator's inputs and its ``scale``; ``CascadeMerge`` is
``kernel.merge``. The states between them are the runtime's to keep.

| binding of CascadeStates | shape               | dtype    | meaning                                                    |
|--------------------------|---------------------|----------|------------------------------------------------------------|
| outs (output)            | [S+1, B, Hq, N, D]  | f32      | of each stretch; void where a row saw no key               |
| lses (output)            | [S+1, B, Hq, N]     | f32      | base-2 logarithm of the summed weights; -inf for no key    |

| binding of CascadeMerge  | shape               | dtype    | meaning                                                    |
|--------------------------|---------------------|----------|------------------------------------------------------------|
| outs, lses (inputs)      | as above            | f32      |                                                            |
| out (output)             | [B, Hq, N, D]       | f16/bf16 | the operator's                                             |

Attribute ``to`` of CascadeMerge (int): the type of ``out``, an ``onnx.TensorProto.DataType``, as of ``Cast``.
"""

import onnx

from plugins.cascade_attention import op

STATES, MERGE = "CascadeStates", "CascadeMerge"


def split_nodes(model: onnx.ModelProto, to: int) -> None:
    """Replace every node of the operator by the two, and drop its function body.

    Args:
        to: the type of the operator's output in this graph.
    """
    nodes = []
    for node in model.graph.node:
        if (node.domain, node.op_type) != (op.DOMAIN, op.NAME):
            nodes.append(node)
            continue
        (out,) = node.output
        states = [f"{out}_outs", f"{out}_lses"]
        scale = onnx.helper.get_node_attr_value(node, "scale")
        nodes.append(onnx.helper.make_node(STATES, node.input, states, f"{node.name}_states", domain=op.DOMAIN, scale=scale))
        nodes.append(onnx.helper.make_node(MERGE, states, [out], f"{node.name}_merge", domain=op.DOMAIN, to=to))
    del model.graph.node[:], model.functions[:]
    model.graph.node.extend(nodes)
