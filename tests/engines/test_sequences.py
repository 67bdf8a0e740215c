"""Sequences by number, on every runtime that is present: any of them run together, and each is as if it were alone."""

import numpy as np
import pytest
import torch

from decoding.sampling import Sampling
from export import checkpoints
from tests import tiny
from tests.export.test_graphs import IndependentDrafter

TOLERANCE = 1e-3
WIDTH = tiny.HIDDEN * len(tiny.LAYER_IDS)


@pytest.fixture
def target(served):
    engine = served[1][0]
    engine.reset()
    yield engine
    engine.reset()


def reference(model, tokens):
    """The likeliest token behind each, and its features, by transformers."""
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_hidden_states=True)
    return out.logits[0].argmax(-1).tolist(), torch.cat([out.hidden_states[i + 1][0] for i in tiny.LAYER_IDS], -1).numpy()


def text(rng, length):
    return rng.integers(0, 300, length).tolist()


def run(target, pieces, mask=None, depths=None):
    """The target's choice behind each token of pieces of sequences, one behind the other or under a mask; rubbish fills up."""
    counts = [len(tokens) for tokens in pieces.values()]
    batch, most = len(pieces), max(counts)
    ids, positions = np.full((batch, most), 7), np.full((batch, most), 3)
    masks = np.zeros((batch, most, most), bool)
    for b, (sequence, tokens) in enumerate(pieces.items()):
        n = len(tokens)
        ids[b, :n] = tokens
        positions[b, :n] = target.length(sequence) + (np.arange(n) if depths is None else depths)
        masks[b, :n, :n] = np.tri(n, dtype=bool) if mask is None else mask
    verified = target.forward(list(pieces), *map(target.send, (ids, positions, masks)), counts)
    uniforms = target.send(np.zeros(batch))
    chosen = []
    for node in range(most):
        nodes = np.where(node < np.array(counts), node, -1)
        chosen.append(target.read(verified.choose(target.send(nodes), [Sampling()] * batch, uniforms)))
    return [list(row[:n]) for row, n in zip(np.stack(chosen, 1), counts, strict=True)]


def check_features(target, sequence, expected):
    found = target.read(target.features(sequence, 0, target.length(sequence)))
    np.testing.assert_allclose(found, expected[: len(found)], atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(2))
def test_any_history_of_a_target_is_each_sequences_own(served, target, seed):
    """Opened, closed, run in any company and order, some of what was run kept: choices and features are transformers'."""
    model, rng = served[0], np.random.default_rng(seed)
    texts, expected = {}, {}
    for _ in range(20):
        numbers = list(texts)
        action = rng.random()
        if not texts or (len(texts) < 3 and action < 0.4):
            tokens = text(rng, 400)
            number = target.open(tokens, len(tokens))
            assert target.length(number) == 0
            texts[number], expected[number] = tokens, reference(model, tokens)
        elif action < 0.5:
            gone = int(rng.choice(numbers))
            target.close(gone)
            del texts[gone]
        else:
            company = rng.permutation(numbers)[: rng.integers(1, len(numbers) + 1)].tolist()
            pieces, spans = {}, {}
            for number in company:
                start = target.length(number)
                spans[number] = start, start + min(int(rng.choice([1, 3, 9, 70])), 400 - start - 1)
                pieces[number] = texts[number][slice(*spans[number])]
            for number, chosen in zip(company, run(target, pieces), strict=True):
                assert chosen == expected[number][0][slice(*spans[number])]
            kept = [int(rng.integers(0, len(tokens) + 1)) for tokens in pieces.values()]
            target.keep([range(count) for count in kept])
            assert [target.length(n) for n in company] == [spans[n][0] + k for n, k in zip(company, kept, strict=True)]
    for number in texts:
        check_features(target, number, expected[number][1])


def test_a_newcomer_takes_a_finished_ones_place(served, target):
    rng = np.random.default_rng(9)
    texts = [text(rng, 40) for _ in range(4)]
    expected = [reference(served[0], tokens)[0] for tokens in texts]
    a, b, c = (target.open(tokens, 40) for tokens in texts[:3])
    run(target, {a: texts[0][:5], b: texts[1][:9], c: texts[2][:7]})
    target.keep([range(5), range(9), range(7)])
    target.close(b)
    d = target.open(texts[3], 40)
    run(target, {d: texts[3][:20]})
    target.keep([range(20)])
    found = run(target, {a: texts[0][5:8], d: texts[3][20:21], c: texts[2][7:11]})
    assert found == [expected[0][5:8], expected[3][20:21], expected[2][7:11]]
    target.keep([range(3), range(1), range(4)])
    target.close(a)
    assert run(target, {d: texts[3][21:23], c: texts[2][11:12]}) == [expected[3][21:23], expected[2][11:12]]


def test_accepted_nodes_of_a_tree_are_kept_as_if_they_had_been_said(served, target):
    rng = np.random.default_rng(4)
    tokens = text(rng, 14)
    choices, features = reference(served[0], tokens)
    other, sequence = text(rng, 14), target.open(tokens, 14)
    mask = np.zeros((5, 5), bool)  # 0 → 1 → 2 → 4, 1 → 3, of which 0, 1, 3 are the text
    for node, path in enumerate([[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 2, 4]]):
        mask[node, path] = True
    run(target, {sequence: tokens[:8]})
    target.keep([range(8)])
    drafted = [*tokens[8:10], other[0], tokens[10], other[1]]
    (found,) = run(target, {sequence: drafted}, mask, np.array([0, 1, 2, 2, 3]))
    assert [found[i] for i in (0, 1, 3)] == choices[8:11]
    target.keep([[0, 1, 3]])
    assert run(target, {sequence: tokens[11:14]}) == [choices[11:14]]
    target.keep([range(3)])
    check_features(target, sequence, features)


def test_features_of_many_pieces(served, target):
    """Across the growth of a cache, and asked for in part."""
    tokens = text(np.random.default_rng(5), 420)
    _, expected = reference(served[0], tokens)
    sequence, start = target.open(tokens, 420), 0
    for size in (256, 1, 128, 30, 5):
        run(target, {sequence: tokens[start : start + size]})
        target.keep([range(size)])
        start += size
    check_features(target, sequence, expected)
    part = target.read(target.features(sequence, 250, 391))
    np.testing.assert_allclose(part, expected[250:391], atol=TOLERANCE)
    assert target.features(sequence, 420, 420).shape == (0, WIDTH)


def test_there_is_room_again_after_a_reset(target):
    numbers = [target.open([n], 300) for n in range(2)]
    assert target.room(300)
    target.reset()
    assert target.room(300)
    assert target.open([5], 300) not in numbers
    with pytest.raises(KeyError):
        target.length(numbers[0])


@pytest.fixture(scope="session")
def plain(pipeline):
    """The drafters, without cache and batch."""
    file, model = pipeline
    embedding, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    made = []
    for name in ("first", "second"):
        checkpoint = checkpoints.read_drafter(file.parent / name)
        drafter, _ = checkpoints.build_drafter(checkpoint, model.config, embedding, head)
        independent = IndependentDrafter(checkpoint.weights, checkpoint.config, drafter.embedding.weight, drafter.head.weight)
        made.append((independent, drafter.draft_ids))
    return made


@pytest.mark.parametrize("which", [0, 1])
def test_a_drafter_that_catches_up_knows_all_features(served, plain, which):
    """Without a block, with blocks of one or two branches, by more or fewer rows or none, in any company."""
    rng, drafter = np.random.default_rng(6), served[1][1 + which]
    independent, draft_ids = plain[which]
    drafter.reset()
    features = rng.normal(size=(3, 400, WIDTH)).astype(np.float32)
    a, b, c = numbers = [drafter.open([0], 400) for _ in range(3)]
    for company, fresh, blocks in [
        ((a, b), (256, 3), 0),
        ((c,), (1,), 1),
        ((a, b, c), (80, 0, 8), 1),
        ((b, a), (0, 0), 2),
        ((c, b, a), (3, 5, 1), 2),
        ((b,), (200,), 1),
    ]:
        starts = [drafter.length(number) for number in company]
        stops = [start + count for start, count in zip(starts, fresh, strict=True)]
        rows = [features[numbers.index(n), i:j] for n, i, j in zip(company, starts, stops, strict=True)]
        ids = np.full((len(company), blocks, 6), drafter.mask_id)
        ids[:, :, 0] = rng.integers(0, 299, (len(company), blocks))
        positions = np.add.outer(stops, np.tile(np.arange(6), blocks)).astype(np.int64)
        mask = np.kron(np.eye(blocks, dtype=bool), np.ones((6, 6), bool))
        mask = np.broadcast_to(mask, (len(company), *mask.shape))
        flat = ids.reshape(len(company), -1)
        made = drafter.forward(list(company), [drafter.send(own) for own in rows], flat, positions, mask)
        candidates, probabilities = map(drafter.read, made)
        assert candidates.shape[:2] == probabilities.shape[:2] == (len(company), 6 * blocks)
        assert [drafter.length(number) for number in company] == stops
        for b_, (number, stop) in enumerate(zip(company, stops, strict=True)):
            seen = torch.tensor(features[numbers.index(number), :stop])
            for j in range(blocks):
                logits = independent.logits(seen, torch.tensor(ids[b_, j]), stop)
                # The anchor, then five masked places; the first drafter has no temperatures, the second three.
                temperatures = torch.tensor([[1.0] * 6, [0.8, 0.8, 1.0, 1.3, 1.3, 1.3]][which])
                odds = torch.softmax(logits / temperatures[:, None], -1)
                place = slice(6 * j, 6 * j + 6)
                np.testing.assert_allclose(probabilities[b_, place], odds.topk(16).values, atol=TOLERANCE)
                tokens = torch.tensor(candidates[b_, place])
                index = tokens if draft_ids is None else torch.searchsorted(draft_ids, tokens)
                np.testing.assert_allclose(odds.gather(1, index), probabilities[b_, place], atol=TOLERANCE)
    drafter.reset()
