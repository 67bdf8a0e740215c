import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

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
        ({"block_size": None}, "not a DFlash checkpoint"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention layers are not built"),
        ({"dflash_config": {"target_layer_ids": [0], "attention_mode": "mla"}}, "attention_mode"),
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
    torch.testing.assert_close(built.embedding[300], load_file(drafter / "model.safetensors")["mask_embedding"])


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
