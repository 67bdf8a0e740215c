"""``d2sd::BlockMatMul``: rows times a matrix whose weights stay in blocks, as a GGUF file has them.

| binding | shape         | dtype       | meaning                                                    |
|---------|---------------|-------------|------------------------------------------------------------|
| x       | [.., K]       | f32         | rows; a runtime may round them to 8 bits in groups of 32   |
| codes   | [K, N]        | int4, int8  | of the weights                                             |
| scales  | [K / size, N] | f32         | of blocks along K                                          |
| minima  | [K / size, N] | f32         | optional: w = scale · code + minimum                       |
| y       | [.., N]       | f32         | x · w                                                      |

Several matrices may meet the same x: codes, scales and minima of each follow, attribute ``has_minima`` (ints) says of each
whether it has the last, and each has a y.

``kernel.hpp`` multiplies codes with codes on x86 with AVX2, ``reference.py`` says what it must give, ``packed.py`` in what
order it takes the weights, and ``plugins/openvino`` compiles it into an operator of OpenVINO's. Graphs have the operator only
where OpenVINO reads them (``export/paged_graph.py``); every other runtime gets ONNX's ``DequantizeLinear``.
"""
