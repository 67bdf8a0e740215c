"""The operator on blocks against its plain reference: every form, odd sizes, single rows; and OpenVINO's own products."""

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest

from engines import openvino_operators
from plugins.block_matmul import packed, reference
from plugins.openvino import library

FORMS = [(4, 32), (8, 32), (8, 16)]
SIZES = [(32, 1), (96, 41), (576, 192)]  # K, N
ROWS = [1, 2, 3, 4, 5, 8, 33]


def matrix(rng, bits, block, depth, columns, minima=False, half=True):
    codes = rng.integers(-8, 8, (depth, columns)) if bits == 4 else rng.integers(-128, 128, (depth, columns))
    scales = rng.normal(size=(depth // block, columns)).astype(np.float16).astype(np.float32)
    least = rng.normal(size=scales.shape).astype(np.float16).astype(np.float32) + 8 * scales if minima else None
    if not half:
        scales *= np.float32(1.001)
    return codes.astype(np.int8), scales, least


def product(factory, lanes, matrices, bits):
    """The operator, compiled over matrices; x ``[1, R, K]``."""
    x = op.parameter([1, -1, len(matrices[0][0])], np.float32)
    all_packed = [packed.pack(*each, bits=bits, lanes=lanes) for each in matrices]
    model = ov.Model(openvino_operators._in_one(op, factory, x, all_packed), [x])
    request = ov.Core().compile_model(model, "CPU").create_infer_request()
    return lambda rows: [request.infer([rows[None]])[i][0] for i in range(len(matrices))]


@pytest.mark.parametrize("half", [True, False], ids=["f16", "f32"])
@pytest.mark.parametrize("minima", [False, True], ids=["", "minima"])
@pytest.mark.parametrize(("bits", "block"), FORMS)
def test_the_operator_is_its_reference(factory, instructions, bits, block, minima, half):
    rng = np.random.default_rng(bits + block)
    for depth, columns in SIZES:
        one = matrix(rng, bits, block, depth, columns, minima, half)
        if bits == 8 and minima:
            assert packed.pack(*one, bits=bits, lanes=8) is None, "no type has them"
            continue
        assert packed.pack(*one, bits=bits, lanes=8).half == half
        run = product(factory, instructions.lanes, [one], bits)
        for rows in ROWS:
            x = rng.normal(size=(rows, depth)).astype(np.float32) * 10.0 ** rng.integers(-3, 3, (rows, 1))
            x = x.astype(np.float32)
            expected = reference.block_matmul(x, *one)
            error = np.abs(run(x)[0] - expected).max(-1) / np.abs(expected).max(-1).clip(1e-9)
            assert error.max() < 1e-5


@pytest.mark.parametrize(("bits", "block"), FORMS)
def test_a_row_is_the_same_beside_any_others(factory, instructions, bits, block):
    rng = np.random.default_rng(1)
    run = product(factory, instructions.lanes, [matrix(rng, bits, block, 192, 70)], bits)
    rows = rng.normal(size=(37, 192)).astype(np.float32)
    whole = run(rows)[0].copy()
    for start, count in ((0, 1), (3, 2), (10, 7), (36, 1)):
        np.testing.assert_array_equal(run(rows[start : start + count])[0], whole[start : start + count])


def test_floats(factory, instructions):
    """No row is rounded, and each is the same beside any others."""
    rng = np.random.default_rng(4)
    for depth, columns in SIZES:
        weights = rng.normal(size=(depth, columns)).astype(np.float32)
        x = op.parameter([1, -1, depth], np.float32)
        made = openvino_operators._in_one(
            op, factory, x, [packed.pack_floats(each, lanes=instructions.lanes) for each in (weights, -weights)]
        )
        request = ov.Core().compile_model(ov.Model(made, [x]), "CPU").create_infer_request()
        rows = rng.normal(size=(max(ROWS), depth)).astype(np.float32)
        whole = request.infer([rows[None]])[0][0].copy()
        np.testing.assert_allclose(whole, rows.astype(np.float64) @ weights, atol=1e-4 * depth**0.5)
        for n in ROWS:
            found = request.infer([rows[None, :n]])
            np.testing.assert_array_equal(found[0][0], whole[:n])
            np.testing.assert_array_equal(found[1][0], -whole[:n])
    assert packed.pack_floats(np.zeros((33, 8), np.float32), lanes=8) is None, "blocks are of 32"


def test_floats_that_a_graph_turns():
    """A head that shares its weights with the embedding: packed by us, and as OpenVINO's own operators take it."""
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(41, 64)).astype(np.float32)
    turned = op.transpose(op.constant(weights), op.constant(np.array([1, 0])))
    assert np.array_equal(openvino_operators._packed(ov, 8, turned.output(0)).data, packed.pack_floats(weights.T, lanes=8).data)
    x, rows = op.parameter([1, -1, 64], np.float32), rng.normal(size=(1, 5, 64)).astype(np.float32)
    made = openvino_operators._in_own_operators(op, x, turned.output(0))
    (given,) = ov.Core().compile_model(ov.Model([made], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([rows]).values()
    np.testing.assert_allclose(given, rows @ weights.T, atol=1e-4)


def test_matrices_that_share_rows(factory, instructions):
    rng = np.random.default_rng(2)
    matrices = [matrix(rng, 4, 32, 64, columns, minima=True) for columns in (33, 1, 64)]
    x = rng.normal(size=(5, 64)).astype(np.float32)
    for given, expected in zip(product(factory, instructions.lanes, matrices, 4)(x), matrices, strict=True):
        np.testing.assert_allclose(given, reference.block_matmul(x, *expected), atol=1e-3)


def test_the_largest_codes_and_no_values_at_all(factory, instructions):
    """Sixteen bits hold the sums that they must, and a group of zeros has no scale to divide by."""
    codes, ones = np.full((64, 8), 7, np.int8), np.ones((2, 8), np.float32)
    run = product(factory, instructions.lanes, [(codes, ones, 8 * ones)], 4)
    x = np.stack([np.full(64, 3.0), np.full(64, -3.0), np.zeros(64)]).astype(np.float32)
    np.testing.assert_allclose(run(x)[0], reference.block_matmul(x, codes, ones, 8 * ones), rtol=1e-6)
    eight = product(factory, instructions.lanes, [(np.full((64, 8), -128, np.int8), ones, None)], 8)
    np.testing.assert_allclose(eight(x)[0], reference.block_matmul(x, np.full((64, 8), -128), ones, None), rtol=1e-6)


@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize(("bits", "minima"), [(4, True), (4, False), (8, False)])
def test_openvinos_own_products_are_the_matrix(monkeypatch, bits, minima, vnni):
    monkeypatch.setattr(openvino_operators, "has", lambda *_: vnni)
    rng = np.random.default_rng(3)
    codes, scales, least = matrix(rng, bits, 32, 96, 41, minima)
    kind = ov.Type.i4 if bits == 4 else ov.Type.i8
    held = ov.Tensor(kind, ov.Shape(codes.shape))
    low, high = codes.reshape(-1)[0::2], codes.reshape(-1)[1::2]
    held.data[:] = ((low & 15) | (high << 4)).reshape(held.data.shape) if bits == 4 else codes
    x = op.parameter([1, -1, 96], np.float32)
    tensors = [op.constant(held), *(op.constant(each) for each in (scales, least) if each is not None)]
    made = openvino_operators._in_own_operators(op, x, *(each.output(0) for each in tensors))
    rows = rng.normal(size=(1, 5, 96)).astype(np.float32)
    exact = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}
    (given,) = ov.Core().compile_model(ov.Model([made], [x]), "CPU", exact)([rows]).values()
    weights = codes * scales.repeat(32, 0) + (0 if least is None else least.repeat(32, 0))
    np.testing.assert_allclose(given, rows @ weights, atol=2e-3)
    np.testing.assert_array_equal(openvino_operators._codes(ov, tensors[0].output(0)), codes)


def test_a_machine_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(library.shutil, "which", lambda _: None)
    with pytest.raises(library.CompileError, match=r"no C\+\+ compiler .* apt install g\+\+$"):
        library.compiled(tmp_path)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(library.CompileError, match=r"^false does not compile the operators, so OpenVINO's own"):
        library.compiled(tmp_path)
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    with pytest.raises(library.CompileError, match="for x86, not aarch64"):
        library.compiled(tmp_path)
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("bits", [4, 8])
def test_all_instructions_give_the_same_to_the_bit(compiled, bits):
    """Products of codes are exact, and what they are multiplied with comes in one order: answers do not depend on the CPU."""
    rng = np.random.default_rng(6)
    one, x = matrix(rng, bits, 32, 192, 70, minima=bits == 4), rng.normal(size=(7, 192)).astype(np.float32)
    first, *others = (product(compiled(each), each.lanes, [one], bits)(x)[0].copy() for each in library.ALL)
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_a_library_of_another_machine_is_left_alone(monkeypatch, tmp_path, capsys):
    cpus = {
        "old": (),
        "avx2": library.AVX2.needs,
        "vnni alone": (*library.AVX2.needs, "avx_vnni"),
        "server": library.AVX512.needs,
    }
    for kind, features in cpus.items():
        monkeypatch.setattr(openvino_operators, "has", lambda *asked, features=features: set(asked) <= set(features))
        assert openvino_operators.usable(tmp_path) is None, kind
        assert capsys.readouterr().out == "", "a build without any has said so itself"
        (tmp_path / "of-another-version.so").touch()
        assert openvino_operators.usable(tmp_path) is None
        said = f"operators: those in {tmp_path} are of another version; OpenVINO's own serve"
        assert capsys.readouterr().out.startswith(said) == (kind in ("avx2", "server"))
        (tmp_path / "of-another-version.so").unlink()
    broken = tmp_path / library.name(library.AVX512)
    broken.write_bytes(b"no library")
    assert openvino_operators.usable(tmp_path) is None
    said = capsys.readouterr().out
    assert said.startswith(f"operators: {broken}: ")
    assert said.endswith("OpenVINO's own serve, at half the speed, until the build is made again here\n")


@pytest.mark.parametrize("of", ["x", "norm", "gate"])
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_what_rows_are_made_of_and_what_is_added(factory, instructions, bits, of):
    """Norm, gate and sum inside the operator are those beside it; a row is the same beside any others."""
    rng = np.random.default_rng(7)
    depth, columns = 96, 41
    x, gate = (rng.normal(size=(33, depth)).astype(np.float32) * 20 for _ in range(2))
    norm, before = rng.normal(size=depth).astype(np.float32), rng.normal(size=(33, columns)).astype(np.float32)
    gate[0, :3] = -200, 200, 0  # shut, open, and neither
    if bits == 32:
        weights = rng.normal(size=(depth, columns)).astype(np.float32)
        one = packed.pack_floats(weights, lanes=instructions.lanes)
    else:
        given = matrix(rng, bits, 32, depth, columns, minima=bits == 4)
        one = packed.pack(*given, bits=bits, lanes=instructions.lanes)
    more = {"x": [], "norm": [norm], "gate": [gate]}[of]
    inputs = [
        op.parameter([-1, depth], np.float32),
        *(op.parameter([-1] * (each.ndim - 1) + [depth], np.float32) for each in more),
    ]
    last = op.parameter([-1, columns], np.float32)
    about = {"columns": [columns], "bits": bits, "block": 32, "half": one.half, "of": of, "epsilon": 0.5, "adds": True}
    node = factory.create("BlockMatMul", [*inputs, op.constant(one.data), last], about)
    request = ov.Core().compile_model(ov.Model([node.output(0)], [*inputs, last]), "CPU").create_infer_request()

    def run(rows):
        return request.infer([x[rows], *(each[rows] if each.ndim == 2 else each for each in more), before[rows]])[0].copy()

    wide = x.astype(np.float64)
    if of == "norm":
        wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.5) * norm
    elif of == "gate":
        wide = gate / (1 + np.exp(-gate.astype(np.float64))) * wide
    rows = wide.astype(np.float32)
    expected = before + (rows @ weights if bits == 32 else reference.block_matmul(rows, *given))
    whole = run(slice(None))
    # A value at the border of two codes may fall to the other one: a code of 127 in a row.
    np.testing.assert_allclose(whole, expected, atol=np.abs(expected).max() * (1e-5 if bits == 32 else 2e-2))
    assert np.median(np.abs(whole - expected)) < 1e-5 * np.abs(expected).max()
    for start, count in ((0, 1), (3, 2), (10, 7), (32, 1)):
        np.testing.assert_array_equal(run(slice(start, start + count)), whole[start : start + count])
