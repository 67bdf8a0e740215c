"""The runtime for TensorRT engines as far as it goes without a GPU; what it decodes: ``test_conformance.py``."""

import inspect
import pickle

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.sampling import Sampling
from engines import sampling
from engines.engine import EngineError, GraphInfo, HostPass
from engines.kv_cache import KVCache
from engines.tensorrt import ALIGNMENT, DeviceKVCache, DevicePass, TensorRTEngine, draw
from tests.engines import tensorrt_double

INFO = GraphInfo(layers=1, kv_heads=3, head_dim=8, feature_width=4, vocabulary=7)
PROFILES = {
    "decode": {"B": (1, 1, 2), "N": (1, 1, 1), "C": (256, 256, 512)},
    "verify": {"B": (1, 1, 2), "N": (1, 8, 8), "C": (256, 256, 512)},
    "prefill": {"B": (1, 1, 1), "N": (1, 16, 16), "C": (256, 256, 512)},
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A graph that hands its new rows and the rows in its cache through, as an engine of the double: its file and record."""
    folder = tmp_path_factory.mktemp("double")
    make, FLOAT, INT = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    inputs = [
        ("x", FLOAT, ["B", 3, "N", 8]),
        ("past_lengths", INT, ["B"]),
        ("past_k_0", FLOAT, ["B", 3, "C", 8]),
        ("past_v_0", FLOAT, ["B", 3, "C", 8]),
    ]
    outputs = [("new_k_0", FLOAT, ["B", 3, "N", 8]), ("new_v_0", FLOAT, ["B", 3, "N", 8])]
    outputs += [("kept", FLOAT, ["B", 3, "C", 8]), ("lengths", INT, ["B"])]
    nodes = [
        make.make_node("Identity", ["x"], ["new_k_0"]),
        make.make_node("Neg", ["x"], ["new_v_0"]),
        make.make_node("Sub", ["past_k_0", "past_v_0"], ["kept"]),
        make.make_node("Identity", ["past_lengths"], ["lengths"]),
    ]
    values = [[make.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    onnx.save(
        make.make_model(make.make_graph(nodes, "g", *values), opset_imports=[make.make_opsetid("", 20)]), folder / "model.onnx"
    )
    return folder, tensorrt_double.compile_engine(folder / "model.onnx", folder / "model.engine", PROFILES)


def engine(compiled, kind=TensorRTEngine):
    folder, record = compiled
    return kind(folder / "model.engine", INFO, record, tensorrt_double, "cpu")


def rows(b, n, seed=0):
    return np.random.default_rng(seed).normal(size=(b, 3, n, 8)).astype(np.float32)


def test_the_double_has_the_names_of_the_real_library():
    """So that what runs against the double calls the real one rightly: every method, and every argument by its name."""
    for name, double in inspect.getmembers(tensorrt_double, inspect.isclass):
        if double.__module__ != tensorrt_double.__name__ or name == "Logger":
            continue
        real = getattr(tensorrt_rtx_bindings, name)
        for method, function in inspect.getmembers(double, lambda member: inspect.isfunction(member) or not callable(member)):
            if method.startswith("_"):
                continue
            assert hasattr(real, method), f"{name}.{method}"
            signature = (getattr(real, method).__doc__ or "").partition("\n")[0]
            if inspect.isfunction(function) and "*args" not in signature:
                assert all(f"{given}: " in signature for given in list(inspect.signature(function).parameters)[1:]), signature
    assert hasattr(tensorrt_rtx_bindings.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(tensorrt_rtx_bindings.Logger, "WARNING")
    assert hasattr(tensorrt_rtx_bindings.ICudaEngine, "num_io_tensors")


def test_rows_go_through_the_cache_by_address(compiled):
    """Kept rows are what the next call reads, in every layer's place, through growth and a second sequence."""
    one = engine(compiled)
    numbers = [one.open([], 0), one.open([], 0)]
    first, second = rows(1, 5, 1), rows(1, 5, 2)
    for number, value in zip(numbers, (first, second), strict=True):
        one.run([number], {"x": value})
        one.keep([range(5)])
    given = rows(2, 8, 3)
    one.run(numbers, {"x": given})
    one.keep([[0, 2, 7], []])
    one.keep([[], [5]])
    found = one.run(numbers, {"x": rows(2, 1)})
    kept = found["kept"].numpy()
    np.testing.assert_array_equal(kept[0, :, :8], 2 * np.concatenate([first[0], given[0][:, [0, 2, 7]]], 1))
    np.testing.assert_array_equal(kept[1, :, :6], 2 * np.concatenate([second[0], given[1][:, [5]]], 1))
    assert found["lengths"].tolist() == [8, 6]
    for _ in range(249):
        one.keep([[0], []])
    grown = one.run(numbers, {"x": rows(2, 1)})["kept"].numpy()
    assert grown.shape[2] == 512
    np.testing.assert_array_equal(grown[0, :, :8], kept[0, :, :8])
    np.testing.assert_array_equal(grown[1], np.pad(kept[1], ((0, 0), (0, 256), (0, 0))))


def test_each_layers_new_rows_lie_where_they_may_be_bound(compiled):
    one = engine(compiled)
    one.run([one.open([], 0)], {"x": rows(1, 3)})
    (call,) = one._calls.values()
    assert call.new.shape == (2, 1, 3, 3, 8)
    assert call.new.stride(0) * 4 % ALIGNMENT == 0
    assert call.new[0].is_contiguous()


def test_a_call_takes_the_first_profile_that_it_fits_into(compiled):
    one = engine(compiled)
    sizes = [{"B": 1, "N": 1}, {"B": 2, "N": 1}, {"B": 2, "N": 2}, {"B": 1, "N": 9}]
    assert [one._profile(size | {"C": 256}) for size in sizes] == [0, 0, 1, 2]
    with pytest.raises(EngineError, match="no call of B = 2, N = 9, C = 256; raise limits"):
        one._profile({"B": 2, "N": 9, "C": 256, 3: 3})


def test_there_is_room_for_as_many_as_every_profile_takes(compiled):
    one = engine(compiled)
    assert one.room(1)
    one.open([], 1)
    assert not one.room(1)


def test_calls_of_a_cache_that_is_gone_are_dropped(compiled):
    one = engine(compiled)
    a, b = one.open([], 0), one.open([], 0)
    one.run([a], {"x": rows(1, 1)})
    one.run([a, b], {"x": rows(2, 1)})
    one.run([a, b], {"x": rows(2, 2)})
    assert {id(call.cache) for call in one._calls.values()} == {id(one._places[a][0])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "9.9"}, "was built by double 9.9, this is double double; build again"),
        ({"bytes": 12}, r"found \d+ bytes, the build wrote 12; build again"),
        ({"bindings": {"past_k_0": {"dtype": "FLOAT"}}}, r"bindings are not those .*new_k_0"),
    ],
)
def test_a_stale_or_foreign_engine_is_refused(compiled, change, message):
    folder, record = compiled
    with pytest.raises(EngineError, match=message):
        engine((folder, record | change))


def test_an_engine_that_the_library_cannot_load_is_refused(compiled, tmp_path):
    _, record = compiled
    (tmp_path / "model.engine").write_bytes(b"\0" * record["bytes"])
    with pytest.raises(EngineError, match="double cannot load it on this GPU"):
        engine((tmp_path, record))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 999),
    size=st.integers(1, 300),
    rows=st.lists(
        st.tuples(
            st.builds(
                Sampling,
                temperature=st.floats(0.1, 4) | st.just(0.0),
                top_k=st.integers(0, 320),
                top_p=st.floats(0.05, 1.0) | st.just(1.0),
            ),
            st.floats(0, 1, exclude_max=True),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_a_choice_on_the_device_is_that_on_the_host(seed, size, rows):
    how, uniforms = [each for each, _ in rows], np.array([uniform for _, uniform in rows])
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(len(rows), 3, size)).astype(np.float32)
    nodes = rng.integers(0, 3, len(rows))
    expected = HostPass(logits).choose(nodes, how, uniforms)
    one = DevicePass(torch.tensor(logits))
    found = one.choose(torch.tensor(nodes), how, torch.tensor(uniforms)).tolist()
    for b, (each, uniform) in enumerate(rows):
        if found[b] != expected[b]:  # two tokens tie within a rounding
            tokens, odds = sampling.distribution(logits[b, nodes[b]], each)
            scores = dict(zip(tokens, odds / sampling.exponentials(np.float64(uniform), tokens), strict=True))
            assert scores[found[b]] == pytest.approx(scores[expected[b]], rel=1e-9)


def test_only_tokens_with_a_probability_are_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(200, 1)
    uniforms = torch.linspace(0, np.nextafter(1, 0), 200, dtype=torch.float64)[:, None]
    one, zero = torch.ones(200, 1).double(), torch.zeros(200, 1).double()
    for cut in (None, (zero, one)):
        assert set(draw(logits, one, cut, uniforms).tolist()) == {1, 2}


def test_a_walk_that_has_ended_may_ask_on():
    one = DevicePass(torch.randn(2, 5, 30))
    nodes, uniforms = torch.tensor([3, -2]), torch.zeros(2).double()
    assert one.choose(nodes, [Sampling()] * 2, uniforms)[0] == one._logits[0, 3].argmax()
    one.choose(nodes, [Sampling(1.0), Sampling()], uniforms)


def test_device_caches_are_one_tensor(compiled):
    one = engine(compiled)
    cache, _ = one._places[one.open([], 0)]
    assert isinstance(cache, DeviceKVCache)
    assert isinstance(cache, KVCache)
    (buffer,) = cache.buffers
    assert buffer.array.shape == (2, 1, 3, 256, 8)
    assert buffer.value["past_v_0"].data_ptr() == buffer.array[1].data_ptr()
    assert pickle.loads(compiled[0].joinpath("model.engine").read_bytes())[1] == PROFILES
