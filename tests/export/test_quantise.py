"""Weights rounded at build time: each form builds and answers, says what it costs, and is refused where it costs too much."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import DynamicCache

from decoding.cycle import Decoder
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from engines import openvino_operators
from engines.build_directory import BuildDirectory
from engines.cpu import has
from engines.openvino_operators import MULTIPLIES_BYTES, usable
from export import checkpoints, quantise
from export.blocks import BlockEmbedding, BlockLinear
from export.build import main
from export.quantise import HeldOut, in_blocks
from export.sources import HELD_OUT
from plugins.block_matmul.reference import rounded
from tests import tiny
from tests.export.test_checkpoints import gguf_shards

# Widths that blocks of 32 divide.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
OPTIONS = "limits: {length: 512}\ntraining: {target_layer_ids: [0]}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("wide") / "target"
    return tiny.save_target(place, initializer_range=0.2, num_hidden_layers=1, **WIDE)


def made(root, text):
    """The build of a pipeline whose drafters and engine are told, and what it keeps of its graphs."""
    (root / "pipeline.yaml").write_text(text + OPTIONS)
    assert main([str(root / "pipeline.yaml"), "--output", str(root / "build")]) == 0
    directory = BuildDirectory.open(root / "build")
    return directory, directory.manifest["graphs"]


def answer(engines, mode, prompt, count=16):
    scheduler = Scheduler(Decoder(*engines, mode=mode, block_size=6, branches=3, vocabulary=300), 1)
    sequence = Sequence(prompt, count)
    scheduler.add(sequence)
    while scheduler:
        scheduler.step()
    return sequence.answer


class HalfCache(DynamicCache):
    """K/V in f16, as beside rounded weights."""

    def update(self, key_states, value_states, *more, **named):
        return super().update(key_states.half().float(), value_states.half().float(), *more, **named)


def greedy(model, prompt, cache):
    ids, options = torch.tensor([prompt]), {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **options)
    return made[0, len(prompt) :].tolist()


def unfolded(folder, weights):
    """Transformers' target with the rounded weights in f32."""
    rounded, _ = in_blocks(folder, None, weights, [HELD_OUT])
    dense = quantise.load_target(folder)
    for name, module in rounded.named_modules():
        into = dense.get_submodule(name) if name else None
        if isinstance(module, BlockLinear):
            codes = getattr(module, module.name).float()
            weight = codes * module.scales.repeat_interleave(module.size, 0)
            if module.minima is not None:
                weight += module.minima.repeat_interleave(module.size, 0)
            into.weight = torch.nn.Parameter(weight.T.contiguous())
        elif isinstance(module, BlockEmbedding):
            into.weight = torch.nn.Parameter(module(torch.arange(len(module.rows))))
    return dense


def round_rows(model):
    """Every product rounds its rows as the operator does; the embedding multiplies nothing."""

    def rounding(_module, given):
        return (torch.from_numpy(rounded(given[0].numpy()).astype(np.float32)),)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounding)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_rounded_build_says_what_its_weights_say(folder, tmp_path, weights, capsys, monkeypatch):
    directory, graphs = made(tmp_path, f"target: {{checkpoint: {folder}}}\nengine: {{weights: {weights}, precision: f32}}\n")
    kept = graphs["target"]["weights"]
    said = capsys.readouterr().out
    assert f"weights in {weights}: KL from f32 {kept['kl']:.2g} nats a token" in said
    assert kept["form"] == weights
    assert kept["kl"] > 0
    assert kept["tokens"] > 100

    dense = unfolded(folder, weights)
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(directory.path / "engines" / "target" / "model.onnx", options)
    given = {"token_ids": ids, "positions": torch.arange(20)[None], "past_lengths": torch.tensor([0])}
    given["mask"] = torch.ones(1, 20, 20, dtype=torch.bool).tril()
    feeds = {name: tensor.numpy() for name, tensor in given.items()}
    empty = np.zeros((1, tiny.KV_HEADS, 1, 16), np.float32)
    feeds |= {value.name: empty for value in session.get_inputs() if value.name.startswith("past_") and value.name not in feeds}
    (logits,) = session.run(["logits"], feeds)
    with torch.no_grad():
        expected = dense(ids).logits
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    own = usable(directory.path / "operators")
    if own:
        round_rows(dense)
        monkeypatch.setattr(openvino_operators, "keeps", lambda *_, rounded: "f16")  # of pairs: test_paged_attention.py
    if own or not any(map(has, MULTIPLIES_BYTES)):  # there OpenVINO rounds rows as it sees fit
        cache = HalfCache() if own else DynamicCache()
        assert answer(directory.load(), "autoregressive", ids[0].tolist()) == greedy(dense, ids[0].tolist(), cache)


def test_trees_change_no_answer_of_rounded_weights(folder, tmp_path):
    """To the token, and nodes that are accepted move in the cache, whatever K/V are kept in."""
    directory, _ = made(tmp_path, f"target: {{checkpoint: {folder}}}\nengine: {{weights: int4, precision: f32}}\n")
    engines, moved = directory.load(), []
    move = engines[0].graph.move
    engines[0].graph.move = lambda *rows: (moved.append(rows), move(*rows))
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(2, 12, 60).tolist()
        assert answer(engines, "lookup", prompt, 150) == answer(engines, "autoregressive", prompt, 150)
    assert moved


def test_fewer_bits_cost_more(folder):
    kept = {weights: in_blocks(folder, None, weights, [HELD_OUT])[1] for weights in ("int8", "int4")}
    assert 0 < kept["int8"]["kl"] < 0.1 * kept["int4"]["kl"] < 1
    assert kept["int8"]["agreement"] > kept["int4"]["agreement"] > 0


def test_the_cost_is_the_distributions_own(folder):
    """Against KL taken answer by answer, without padding."""
    model = quantise.load_target(folder)
    held_out = HeldOut(model, folder, [HELD_OUT])
    assert held_out.cost(model) == quantise.Cost(0.0, 1.0, held_out.cost(model).tokens)
    other, _ = in_blocks(folder, None, "int4", [HELD_OUT])
    kl = []
    with torch.no_grad():
        for ids, start in zip(held_out._sequences, held_out._starts, strict=True):
            p, q = (torch.log_softmax(m(ids[None]).logits[0, start - 1 : -1].double(), -1) for m in (model, other))
            kl += torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).tolist()
    assert held_out.cost(other).kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert held_out.cost(other).tokens == len(kl)


def test_auto_takes_int8_up_to_the_limit(folder, monkeypatch, capsys):
    cost = in_blocks(folder, None, "int8", [HELD_OUT])[1]["kl"]
    monkeypatch.setattr(quantise, "LIMIT", cost * 1.1)
    assert in_blocks(folder, None, "auto", [HELD_OUT])[1]["form"] == "int8"
    monkeypatch.setattr(quantise, "LIMIT", cost * 0.9)
    capsys.readouterr()
    model, kept = in_blocks(folder, None, "auto", [HELD_OUT])
    assert kept == {"form": "f32"}
    assert not [m for m in model.modules() if isinstance(m, BlockLinear | BlockEmbedding)]
    said = capsys.readouterr().out
    assert said.startswith("weights in f32: in int8 KL from f32 ")
    assert said.count("\n") == 1
    assert in_blocks(folder, None, "int8", [HELD_OUT])[1]["form"] == "int8", "who asks for it by name gets it"


def test_widths_that_blocks_do_not_divide_stay(tmp_path, capsys):
    narrow = tiny.save_target(tmp_path / "target")
    model, kept = in_blocks(narrow, None, "int8", [HELD_OUT])
    assert kept == {"form": "f32"}
    assert not [m for m in model.modules() if isinstance(m, BlockLinear | BlockEmbedding)]
    assert "weights in f32: blocks of 32 divide none" in capsys.readouterr().out


def test_prompts_that_cannot_be_read_end_a_build_in_one_line(folder, tmp_path, capsys):
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"target: {{checkpoint: {folder}}}\nlimits: {{length: 512}}\ntraining: {{evaluation_prompts: [none.jsonl]}}\n"
    )
    assert main([str(file), "--output", str(tmp_path / "build")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: none.jsonl: cannot be read")


@pytest.mark.parametrize(
    ("stored", "weights", "form", "said"),
    [
        ("Q4_1", "auto", "Q4_1", ""),
        ("Q4_1", "int8", "int8", "requantised to int8: Q4_1\n"),
        ("Q8_0", "int4", "int4", "requantised to int4: Q8_0\n"),
        ("Q5_1", "auto", "int8", "requantised to int8: Q5_1\n"),
        ("F32", "auto", "int8", ""),
    ],
)
def test_a_gguf_file_of_another_type(tmp_path, monkeypatch, capsys, stored, weights, form, said):
    monkeypatch.setenv("D2SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantise, "LIMIT", 1.0)
    file, _ = gguf_shards(tmp_path, 1, hidden=64, wide=96, heads=8, kind=stored)
    _, kept = in_blocks(checkpoints.open_target(file), file, weights, [HELD_OUT])
    assert kept["form"] == form
    out = capsys.readouterr().out
    assert ("requantised" in out) == bool(said)
    assert said in out


@pytest.mark.slow
def test_drafters_are_rounded_by_the_same_code(folder, tmp_path):
    options = {"target_layer_ids": [0], "mask_token_id": 299}
    for seed, name in enumerate(("first", "second"), 1):
        tiny.save_drafter(tmp_path / name, seed, learned_mask=False, num_hidden_layers=1, dflash_config=options, **WIDE)
    directory, graphs = made(
        tmp_path,
        f"target: {{checkpoint: {folder}}}\ndrafters: {{first: {tmp_path}/first, second: {tmp_path}/second}}\n"
        "engine: {weights: f32, drafter_weights: int4, precision: f32}\n",
    )
    assert [graph["weights"]["form"] for graph in graphs.values()] == ["f32", "int4", "int4"]
    model = onnx.load(directory.path / "engines" / "first" / "model.onnx", load_external_data=False)
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph.node) == 9  # 7 of a layer, fc, head
    assert answer(directory.load(), "d2sd", [5, 6, 7]) == greedy(quantise.load_target(folder), [5, 6, 7], DynamicCache())
