"""The exported graphs in ONNX Runtime against transformers and an independent PyTorch drafter, f32."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.nn import functional as F

from decoding.prefix_tree import merge
from export import checkpoints
from export.onnx_export import export_drafter, export_target
from export.target import Target
from tests import tiny

TOLERANCE = 1e-4


def feeds(session, *arguments):
    """Bind tensors, and a list of (K, V), to a session's inputs in order."""
    flat = [a for x in arguments for a in ([t for kv in x for t in kv] if isinstance(x, list) else [x])]
    return {value.name: a.numpy() for value, a in zip(session.get_inputs(), flat, strict=True)}


def outputs(session, *arguments):
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds(session, *arguments)), strict=True))


@pytest.fixture(scope="module", params=["llama", "qwen3", "llama-one-kv-head", "qwen3-no-groups"])
def exported_target(request, tmp_path_factory):
    architecture, _, variant = request.param.partition("-")
    heads = {"one-kv-head": 1, "no-groups": tiny.HEADS}.get(variant, tiny.KV_HEADS)
    model = tiny.target(architecture, num_key_value_heads=heads)
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_target(Target(tiny.target(architecture, num_key_value_heads=heads), tiny.LAYER_IDS), path)
    return model, ort.InferenceSession(path), heads


def reference_run(model, tokens):
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_hidden_states=True)
    return out.logits[0], torch.cat([out.hidden_states[i + 1][0] for i in tiny.LAYER_IDS], dim=-1)


def prefix_cache(session, sequences, lengths, capacity, kv_heads):
    """Caches holding the first tokens of each sequence, by a causal call of the graph itself; garbage beyond."""
    g = torch.Generator().manual_seed(9)
    shape = (len(sequences), kv_heads, capacity, tiny.HEAD_DIM)
    past = [tuple(torch.randn(shape, generator=g) for _ in "kv") for _ in range(tiny.LAYERS)]
    for b, (tokens, length) in enumerate(zip(sequences, lengths, strict=True)):
        if not length:
            continue
        empty = [tuple(torch.zeros(1, kv_heads, 1, tiny.HEAD_DIM) for _ in "kv") for _ in range(tiny.LAYERS)]
        ids = torch.tensor([tokens[:length]])
        mask = torch.ones(1, length, length, dtype=torch.bool).tril()
        new = outputs(session, ids, torch.arange(length)[None], mask, torch.tensor([0]), empty)
        for layer in range(tiny.LAYERS):
            for j, kind in enumerate("kv"):
                past[layer][j][b, :, :length] = torch.tensor(new[f"new_{kind}_{layer}"][0])
    return past


@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("lengths", [[0], [13], [0, 5, 13], [4, 4]])
def test_target_equals_transformers(exported_target, n, lengths):
    """Causal continuation of prefixes of different lengths, the cache empty, part full and full (13 of 13 rows)."""
    model, session, kv_heads = exported_target
    rng = np.random.default_rng(len(lengths) * 10 + n)
    sequences = [rng.integers(0, 300, length + n).tolist() for length in lengths]
    past = prefix_cache(session, sequences, lengths, 13, kv_heads)
    ids = torch.tensor([tokens[length:] for tokens, length in zip(sequences, lengths, strict=True)])
    positions = torch.tensor(lengths)[:, None] + torch.arange(n)
    mask = torch.ones(len(lengths), n, n, dtype=torch.bool).tril()
    found = outputs(session, ids, positions, mask, torch.tensor(lengths), past)
    for b, (tokens, length) in enumerate(zip(sequences, lengths, strict=True)):
        logits, features = reference_run(model, tokens)
        np.testing.assert_allclose(found["logits"][b], logits[length:], atol=TOLERANCE)
        np.testing.assert_allclose(found["features"][b], features[length:], atol=TOLERANCE)


def test_every_path_of_a_tree_equals_that_path_alone(exported_target):
    model, session, kv_heads = exported_target
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 300, 6).tolist(), rng.integers(0, 300, 2).tolist()]
    branches = [[5, 6, 7, 8], [5, 6, 9, 1], [5, 11, 7, 8], [12, 2, 2, 5]]
    tree = merge(np.array([99]), np.array([branches]))
    tokens, parents, depths = (values[0].tolist() for values in (tree.tokens, tree.parents, tree.depths))
    n = len(tokens)
    past = prefix_cache(session, prompts, [6, 2], 8, kv_heads)
    ids = torch.tensor([tokens] * 2)
    positions = torch.tensor([[6], [2]]) + torch.tensor(depths)
    mask = torch.tensor(tree.mask).repeat(2, 1, 1)
    found = outputs(session, ids, positions, mask, torch.tensor([6, 2]), past)
    for node in range(n):
        path = [node]
        while (parent := parents[path[0]]) >= 0:
            path.insert(0, parent)
        for b, prompt in enumerate(prompts):
            logits, features = reference_run(model, prompt + [tokens[i] for i in path])
            np.testing.assert_allclose(found["logits"][b, node], logits[-1], atol=TOLERANCE)
            np.testing.assert_allclose(found["features"][b, node], features[-1], atol=TOLERANCE)


class IndependentDrafter:
    """DFlash written from its paper and its public checkpoint format alone: one block, no cache, no batch."""

    def __init__(self, weights, config, embedding, head):
        self.w, self.c, self.embedding, self.head = weights, config, embedding, head

    def norm(self, x, key):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.c.rms_norm_eps) * self.w[f"{key}.weight"]

    def rotate(self, x, positions):
        half = self.c.head_dim // 2
        angles = positions[:, None] * self.c.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    def logits(self, features, block_ids, start):
        """features ``[L, F]`` of positions 0 … L-1, then a block at ``start``: ``[γ, V]``."""
        context = self.norm(features @ self.w["fc.weight"].T, "hidden_norm")
        x = self.embedding[block_ids]
        positions = torch.cat([torch.arange(len(features)), start + torch.arange(len(block_ids))]).float()
        for i in range(self.c.num_hidden_layers):
            p = f"layers.{i}."
            y = self.norm(x, p + "input_layernorm")
            both = torch.cat([context, y])
            heads = lambda z, name: (z @ self.w[f"{p}self_attn.{name}.weight"].T).unflatten(-1, (-1, self.c.head_dim))  # noqa: B023, E731
            q = self.rotate(self.norm(heads(y, "q_proj"), p + "self_attn.q_norm").transpose(0, 1), positions[len(features) :])
            k = self.rotate(self.norm(heads(both, "k_proj"), p + "self_attn.k_norm").transpose(0, 1), positions)
            v = heads(both, "v_proj").transpose(0, 1)
            group = q.shape[0] // k.shape[0]
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            out = torch.softmax(q @ k.transpose(1, 2) / self.c.head_dim**0.5, -1) @ v
            x = x + out.transpose(0, 1).flatten(1) @ self.w[p + "self_attn.o_proj.weight"].T
            y = self.norm(x, p + "post_attention_layernorm")
            gate = F.silu(y @ self.w[p + "mlp.gate_proj.weight"].T) * (y @ self.w[p + "mlp.up_proj.weight"].T)
            x = x + gate @ self.w[p + "mlp.down_proj.weight"].T
        return self.norm(x, "norm") @ self.head.T


@pytest.fixture(scope="module", params=[{"draft_vocabulary": 200}, {"learned_mask": False}], ids=["ours", "public"])
def exported_drafter(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("drafter")
    checkpoint = checkpoints.read_drafter(tiny.save_drafter(root / "drafter", **request.param))
    model = tiny.target()
    embedding, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    drafter, mask_id = checkpoints.build_drafter(checkpoint, model.config, embedding, head)
    export_drafter(drafter, checkpoint.config, root / "model.onnx")
    independent = IndependentDrafter(checkpoint.weights, checkpoint.config, drafter.embedding.weight, drafter.head.weight)
    return ort.InferenceSession(root / "model.onnx"), independent, drafter, mask_id


@pytest.mark.parametrize("lengths", [[0], [1], [9], [0, 4, 9]])
@pytest.mark.parametrize("fresh", [0, 3])
def test_drafter_equals_the_independent_one(exported_drafter, lengths, fresh):
    """K redraft branches at once, behind prefixes of different lengths of which the last rows are not cached yet."""
    session, independent, drafter, mask_id = exported_drafter
    g = torch.Generator().manual_seed(5)
    gamma, branches, capacity, width = 6, 3, 9, tiny.HIDDEN * len(tiny.LAYER_IDS)
    features = [torch.randn(length, width, generator=g) for length in lengths]
    cached = [max(0, length - fresh) for length in lengths]
    m = max(1, max(length - done for length, done in zip(lengths, cached, strict=True)))
    new, past = torch.zeros(len(lengths), m, width), _drafter_cache(session, features, cached, capacity)
    valid = torch.zeros(len(lengths), m, dtype=torch.bool)
    for b, (rows, done) in enumerate(zip(features, cached, strict=True)):
        new[b, : len(rows) - done] = rows[done:]
        valid[b, : len(rows) - done] = True
    blocks = torch.full((len(lengths), branches, gamma), mask_id)
    for b in range(len(lengths)):
        for j in range(branches):
            blocks[b, j, : j + 1] = torch.randint(0, 299, (j + 1,), generator=g)
    owner = torch.arange(branches).repeat_interleave(gamma)
    own = (owner[:, None] == owner).expand(len(lengths), -1, -1)
    mask = torch.cat([valid[:, None].expand(-1, branches * gamma, -1), own], dim=2)
    positions = torch.tensor(lengths)[:, None] + torch.arange(gamma).repeat(branches)
    committed = torch.tensor(cached)[:, None] + torch.arange(new.shape[1])
    positions = torch.cat([committed, positions], dim=1)
    found = outputs(session, new, blocks.flatten(1), positions, mask, torch.tensor(cached), past)
    for b, length in enumerate(lengths):
        for j in range(branches):
            logits = independent.logits(features[b], blocks[b, j], length)
            probabilities = torch.softmax(logits, -1)
            best = probabilities.topk(16)
            rows = slice(j * gamma, (j + 1) * gamma)
            np.testing.assert_allclose(found["confidences"][b, rows], best.values, atol=TOLERANCE)
            tokens = torch.tensor(found["tokens"][b, rows])
            if drafter.draft_ids is not None:
                assert torch.isin(tokens, drafter.draft_ids).all()
                tokens = torch.searchsorted(drafter.draft_ids, tokens)
            np.testing.assert_allclose(probabilities.gather(1, tokens), best.values, atol=TOLERANCE)


def _drafter_cache(session, features, cached, capacity):
    g = torch.Generator().manual_seed(2)
    past = [tuple(torch.randn(len(features), 2, capacity, 8, generator=g) for _ in "kv") for _ in range(2)]
    for b, (rows, done) in enumerate(zip(features, cached, strict=True)):
        if not done:
            continue
        empty = [tuple(torch.zeros(1, 2, 1, 8) for _ in "kv") for _ in range(2)]
        one = torch.zeros(1, 1, dtype=torch.int64)
        mask = torch.ones(1, 1, done + 1, dtype=torch.bool)
        positions = torch.arange(done + 1)[None]
        new = outputs(session, rows[None, :done], one, positions, mask, torch.tensor([0]), empty)
        for layer in range(2):
            for j, kind in enumerate("kv"):
                past[layer][j][b, :, :done] = torch.tensor(new[f"new_{kind}_{layer}"][0])
    return past


def test_weights_lie_beside_the_graph(tmp_path):
    """Whatever their size, so that a graph above protobuf's 2 GB is no special case."""
    export_target(Target(tiny.target(), tiny.LAYER_IDS), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    large = [t for t in model.graph.initializer if np.prod(t.dims) > 256]
    assert large
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in large)
    assert (tmp_path / "model.onnx.data").stat().st_size >= 4 * sum(np.prod(t.dims) for t in large)
    assert b"/site-packages/" not in (tmp_path / "model.onnx").read_bytes(), "paths of this machine"
