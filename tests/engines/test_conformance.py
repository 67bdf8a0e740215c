"""One suite for every runtime that is present: decoding over compiled graphs gives transformers' own greedy answers."""

import numpy as np
import pytest
import torch

from decoding.cycle import PREFILL_CHUNK, Decoder
from decoding.modes import MODES
from decoding.sampling import Sampling
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from engines import onnxruntime
from engines.build_directory import BuildDirectory
from engines.engine import SIZES, Drafter, GraphInfo, Target, pad, padded
from engines.kv_cache import KVCache
from engines.tensorrt import TensorRTEngine
from export.build import build
from export.config import load
from export.tensorrt_build import profiles
from tests import tiny
from tests.engines import tensorrt_double

RUNTIMES = [provider for provider in ("cpu", "openvino", "cuda") if onnxruntime.available(provider)]
RUNTIMES += ["tensorrt_rtx" if torch.cuda.is_available() else "tensorrt-double"]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pipeline(request, tmp_path_factory):
    """A tiny pipeline's file, and its build for ONNX Runtime: one for all of its providers."""
    root = tmp_path_factory.mktemp(request.param)
    file = tiny.save_pipeline(root, request.param)
    build(load(file), root / "build")
    return request.param, file, BuildDirectory.open(root / "build")


@pytest.fixture(scope="module", params=RUNTIMES)
def served(request, pipeline):
    architecture, file, directory = pipeline
    if request.param == "tensorrt-double":
        return tiny.target(architecture), double(directory)
    if request.param == "tensorrt_rtx":
        options = load(file).engine.model_copy(update={"backend": "tensorrt_rtx"})
        build(load(file).model_copy(update={"engine": options}), file.parent / "compiled")
        return tiny.target(architecture), BuildDirectory.open(file.parent / "compiled").load()
    directory.manifest["engine"]["providers"] = [request.param]
    return tiny.target(architecture), directory.load()


class HostWritten(TensorRTEngine):
    """Without the kernel that writes the cache, which crawls in the interpreter; ``test_cache_write.py`` compares the two."""

    cache = KVCache


def double(directory, kind=HostWritten):
    """Our TensorRT runtime over a build for ONNX Runtime, TensorRT itself stood in for."""
    engines = []
    for graph, recorded in directory.manifest["graphs"].items():
        folder = directory.path / "engines" / graph
        shapes = profiles(graph, block_size=6, branches=3, sequences=3, length=512)
        record = tensorrt_double.compile_engine(folder / "model.onnx", folder / "model.engine", shapes)
        info = GraphInfo(**recorded["info"])
        engines.append(kind(folder / "model.engine", info, record, tensorrt_double, "cpu"))
    target, first, second = engines
    return Target(target), Drafter(first), Drafter(second)


def scheduler(engines, mode, slots=3):
    return Scheduler(Decoder(*engines, block_size=6, branches=3, vocabulary=300), slots, mode)


def generate(model, prompt, count):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


PROMPTS = [
    np.random.default_rng(n).integers(0, 300, n).tolist() for n in (1, 2, 30, PREFILL_CHUNK, PREFILL_CHUNK + 1, 255, 300)
]


@pytest.mark.parametrize("mode", MODES)
def test_greedy_answers_are_transformers(served, mode):
    """Prompts on both sides of every border: a chunk of the prefill, the smallest cache, and its growth in mid-answer."""
    model, engines = served
    running = scheduler(engines, mode)
    sequences = [Sequence(prompt, 24) for prompt in PROMPTS]
    for sequence in sequences:
        running.add(sequence)
    while running:
        running.step()
    assert [s.answer for s in sequences] == [generate(model, prompt, 24) for prompt in PROMPTS]


def test_a_seed_gives_one_answer_in_every_mode_and_batch(served):
    _, engines = served
    answers = set()
    for mode in MODES:
        for slots in (1, 3):
            running = scheduler(engines, mode, slots)
            sequences = [Sequence(PROMPTS[2], 24, Sampling(0.8, 50, 0.95, seed)) for seed in range(3)]
            for sequence in sequences:
                running.add(sequence)
            while running:
                running.step()
            answers.add(tuple(tuple(s.answer) for s in sequences))
    assert len(answers) == 1


def test_engines_start_afresh_after_a_reset(served):
    model, engines = served
    running = scheduler(engines, "d2sd")
    running.add(Sequence(PROMPTS[5], 20))
    running.step()
    running.reset()
    again = Sequence(PROMPTS[1], 8)
    running.add(again)
    while running:
        running.step()
    assert again.answer == generate(model, PROMPTS[1], 8)


LOOKS = ("numpy", "tolist", "item", "cpu", "nonzero", "__array__", "__bool__", "__int__", "__index__", "__float__")


@pytest.mark.parametrize("mode", MODES)
def test_a_cycle_waits_for_its_runtime_once(served, monkeypatch, mode):
    """The host looks at no tensor but through ``read``, and that is called once a cycle, for what was accepted."""
    _, engines = served
    running = scheduler(engines, mode)
    for sampling in (Sampling(), Sampling(0.8, 50, 0.95, 1), Sampling(0.8)):
        running.add(Sequence(PROMPTS[2], 24, sampling))
    running.step()  # prompts are taken in, shapes bound
    usual = {name: getattr(torch.Tensor, name) for name in LOOKS}
    shapes, read = [], engines[0].engine.read

    def counted(array):
        shapes.append(tuple(array.shape))
        with monkeypatch.context() as allowed:
            for name, way in usual.items():
                allowed.setattr(torch.Tensor, name, way)
            return read(array)

    monkeypatch.setattr(engines[0], "read", counted)
    for name in LOOKS:
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"a tensor was asked for its {name}"))
    for _ in range(3):
        running.step()
    assert shapes == [(2, 3, 1 if mode == "autoregressive" else 6)] * 3
    running.reset()


def test_the_cache_is_handed_over_without_a_copy(served):
    """What is written into the cache's own memory is what the next call reads."""
    _, (target, *_) = served
    engine = target.engine
    engine.reset()
    target.prefill(np.array([[5, 6, 7]]), np.arange(3)[None], np.tri(3, dtype=bool)[None])
    target.join(None)
    one = (np.array([[8]]), np.array([[3]]), np.ones((1, 1, 1), bool))
    logits = lambda: engine.read(target.forward(*one)._logits).copy()  # noqa: E731
    before = logits()
    np.testing.assert_array_equal(logits(), before)
    call = next(reversed(engine._calls.values()))
    for buffer in engine.running.buffers:
        buffer.array[..., :3, :] = 0
    assert np.abs(logits() - before).max() > 1e-3
    assert next(reversed(engine._calls.values())) is call, "the call was bound anew"
    engine.reset()


def test_sizes():
    assert [padded(n) for n in (1, 2, 5, 9, 128, 129, 300)] == [1, 4, 8, 16, 128, 256, 384]
    assert list(SIZES) == sorted(SIZES)
    assert pad(np.ones((2, 3, 1)), 4, 2).sum() == 6


def test_a_provider_that_is_not_there(monkeypatch):
    monkeypatch.setattr(onnxruntime, "available", lambda provider: provider == "cpu")
    assert onnxruntime.choose(["cuda", "openvino", "cpu"], "auto") == ("cpu", "f32")
    with pytest.raises(onnxruntime.EngineError, match="none of cuda, openvino is installed here"):
        onnxruntime.choose(["cuda", "openvino"], "auto")
    with pytest.raises(onnxruntime.EngineError, match="found bf16, allowed with the cpu provider: f32"):
        onnxruntime.choose(["cpu"], "bf16")


@pytest.mark.parametrize("amx", [False, True])
def test_auto_precision_follows_the_hardware(monkeypatch, amx):
    monkeypatch.setattr(onnxruntime, "available", lambda provider: True)
    monkeypatch.setattr(onnxruntime, "_has_amx", lambda: amx)
    assert onnxruntime.choose(["openvino"], "auto") == ("openvino", "bf16" if amx else "f32")
    assert onnxruntime.choose(["openvino"], "f32") == ("openvino", "f32")
