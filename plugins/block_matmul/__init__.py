"""``d2sd::BlockMatMul``: rows times a matrix whose weights stay in blocks, as a GGUF file has them, or are floats.

| binding | shape         | dtype           | meaning                                                              |
|---------|---------------|-----------------|----------------------------------------------------------------------|
| x       | [.., K]       | f32             | rows; a runtime may round them to 8 bits in front of codes           |
| codes   | [K, N]        | int4, int8, f32 | of the weights; or, alone, the weights                               |
| scales  | [K / size, N] | f32             | of blocks along K                                                    |
| minima  | [K / size, N] | f32             | optional: w = scale · code + minimum                                 |
| y       | [.., N]       | f32             | x · w                                                                |

Several matrices may meet the same x: the tensors of each follow, attribute ``tensors`` (ints) says how many they are, and each
has a y.

``kernel.hpp`` multiplies codes with codes, and floats with floats, on x86, ``reference.py`` says what products of
codes must give, ``packed.py`` in what order it takes the weights, and ``plugins/openvino`` compiles it into an operator of
OpenVINO's. Graphs have the operator only where OpenVINO reads them (``export/paged_graph.py``); every other runtime gets ONNX's
``DequantizeLinear`` and ``MatMul``.
"""
