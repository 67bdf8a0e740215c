"""Training on a toy target: what a student may see, what a kill changes, and that it learns."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from export import checkpoints
from export.config import TrainingSection
from export.drafter import masked_depth
from export.onnx_export import export_drafter
from tests import tiny
from training.blocks import lay_blocks
from training.corpus import Answer, read_corpus
from training.data import HELD_OUT, Data
from training.features import Features, cache_folder
from training.student import Student, draft_vocabulary, feature_scale
from training.train import Trainer
from training.validation import tree_gain

OPTIONS = {
    "target_layer_ids": tiny.LAYER_IDS,
    "layers": 2,
    "block_size": 4,
    "draft_vocabulary": 120,
    "blocks": 24,
    "anchors": 6,
    "learning_rate": 0.01,
    "average": 0.9,
}
CPU = torch.device("cpu")


def options(**changes) -> TrainingSection:
    return TrainingSection(**(OPTIONS | changes))


@pytest.fixture(scope="module")
def target():
    return tiny.target("qwen3", vocab_size=300)


def corpus(count=2 * HELD_OUT + 2, length=14):
    """Answers that count up from their prompt: easy to learn, impossible to guess."""
    return [
        Answer(f"{i}", "count", [i % 7, i % 20], [(i + k) % 20 for k in range(1, length)], 0.0 if i % 2 == 0 else 0.8)
        for i in range(count)
    ]


def trainer(target, output, first=None, start=None, minutes=None, **changes):
    chosen, answers = options(**changes), corpus()
    features = Features(answers, target, tiny.LAYER_IDS, None)
    torch.manual_seed(0)
    scale = feature_scale(torch.cat([features.batch([i])[0] for i in range(8)]))
    if start:
        student = Student.load(start, target, scale)
    else:
        student = Student.new(chosen, target, draft_vocabulary(answers, 300, chosen.draft_vocabulary), scale)
    output.mkdir(parents=True, exist_ok=True)
    loaded = Student.load(first, target) if first else None
    return Trainer(student, loaded, Data(answers, features, chosen), chosen, output, CPU, minutes)


def test_features_are_the_targets_hidden_states_on_the_fly_and_from_the_cache(target, tmp_path):
    answers = corpus(5)
    fresh, cached = (Features(answers, target, tiny.LAYER_IDS, place) for place in (None, tmp_path))
    first = cached.batch([0, 3])
    assert cached.known is not None
    assert cached.known.tolist() == [1, 0, 0, 1, 0]
    again = Features(answers, target, tiny.LAYER_IDS, tmp_path).batch([0, 3])
    assert torch.equal(first, again)
    assert torch.equal(first, fresh.batch([0, 3]))
    with torch.no_grad():
        hidden = target(torch.tensor([answers[3].tokens]), output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[i + 1][0] for i in tiny.LAYER_IDS], -1)
    torch.testing.assert_close(first[1].float(), expected, atol=0.05, rtol=0.01)


def test_a_grown_corpus_keeps_what_was_computed(target, tmp_path):
    first = Features(corpus(4), target, tiny.LAYER_IDS, tmp_path).batch([1, 2])
    grown = Features(corpus(9), target, tiny.LAYER_IDS, tmp_path)
    assert grown.known is not None
    assert grown.known.tolist() == [0, 1, 1] + [0] * 6
    assert torch.equal(grown.batch([1, 2]), first)
    assert grown.batch([8]).abs().sum() > 0


def test_a_grown_corpus_has_its_features_where_they_were_and_another_one_elsewhere():
    place = cache_folder("t", [0, 2], corpus(4))
    assert place == cache_folder("t", [0, 2], corpus(9))
    assert place not in {cache_folder("t", [0, 2], corpus(4)[1:]), cache_folder("t", [0], corpus(4))}


def test_no_leak_of_the_future(target, tmp_path):
    """Change every token and feature behind a place: what is said up to it does not move; before it: it does."""
    student = trainer(target, tmp_path).student.eval()
    tokens = torch.randint(0, 20, (1, 16), generator=torch.Generator().manual_seed(3))
    features = torch.randn(1, 16, student.dflash.fc.in_features)
    anchor, kept = 6, 1

    def said(tokens, features):
        blocks = lay_blocks(
            tokens, torch.tensor([16]), torch.tensor([[anchor]]), torch.tensor([[kept]]), 4, student.mask_id, 4.0
        )
        with torch.no_grad():
            return student.logits(features, blocks, torch.ones_like(blocks.ids, dtype=torch.bool))

    reference = said(tokens, features)
    later_tokens, later_features = tokens.clone(), features.clone()
    later_tokens[:, anchor + kept + 1 :] = 7
    later_features[:, anchor:] = 100
    assert torch.equal(said(later_tokens, later_features), reference)
    for change in (lambda t, f: t[:, anchor].fill_(59), lambda t, f: f[:, anchor - 1].fill_(3)):
        changed_tokens, changed_features = tokens.clone(), features.clone()
        change(changed_tokens, changed_features)
        assert not torch.equal(said(changed_tokens, changed_features), reference)


def test_an_epoch_shows_answers_as_often_as_their_task_asks(target):
    answers = corpus()  # answers of odd number are sampled
    features = Features(answers, target, tiny.LAYER_IDS, None)

    def shown(number=0, **changes):
        return [i for group in Data(answers, features, options(**changes)).epoch(number) for i in group]

    trained = [i for i in range(len(answers)) if i % HELD_OUT]
    assert sorted(shown()) == trained
    assert shown(shares={"count": 1.5}) == shown(shares={"count": 1.5})
    often = shown(shares={"count": 1.5})
    assert set(often) == set(trained)
    assert 1.3 * len(trained) < len(often) < 1.7 * len(trained)
    few = shown(sampled=0.3)
    assert [i for i in sorted(few) if i % 2 == 0] == [i for i in trained if i % 2 == 0]
    assert 0.1 < sum(i % 2 for i in few) / sum(i % 2 for i in trained) < 0.5
    assert set(few) != set(shown(1, sampled=0.3))
    with pytest.raises(ValueError, match=r"training.shares.other: found a task that no answer has, allowed: count"):
        shown(shares={"other": 0.5})
    with pytest.raises(ValueError, match=r"training.shares: found shares that show no answer, allowed: .*"):
        shown(shares={"count": 0.0})


def test_places_that_a_lookup_gets_right_weigh_less(target, tmp_path):
    """Answers that count in a circle are foreseen from the second round on."""
    answers = [Answer(f"{i}", "t", [i], [k % 4 for k in range(16)], 0.0) for i in range(8)]
    features = Features(answers, target, tiny.LAYER_IDS, None)
    made = trainer(target, tmp_path)
    batches = [Data(answers, features, options(foreseen=weight)).load([1, 2], "", CPU) for weight in (1.0, 0.0)]
    assert batches[0].foreseen is None
    made.options = options(foreseen=0.0)
    anchors = torch.tensor([[2, 9], [2, 9]])  # the second one's block is foreseen
    whole, easy = (float(made.loss(batches[1], a).detach()) for a in (anchors, anchors[:, :1]))
    assert whole == pytest.approx(easy, rel=1e-5)


def test_a_drafter_goes_on_with_another_block_size(target, tmp_path):
    trainer(target, tmp_path / "four", steps=1).run()
    longer = Student.load(tmp_path / "four", target, block_size=6)
    longer.save(tmp_path / "six")
    assert checkpoints.read_drafter(tmp_path / "six").block_size == 6
    assert Student.load(tmp_path / "four", target).config.block_size == 4


@pytest.mark.parametrize("loss", ["distribution", "mixed"])
def test_the_loss_looks_at_what_the_target_says_there(target, tmp_path, loss):
    made = trainer(target, tmp_path, loss=loss)
    batch = made.next_batch()
    anchors = torch.tensor([[4, 6]]).expand(len(batch.lengths), -1)
    blocks, banned = made.drafting.lay(batch, anchors, 0.0)
    labels = made.student.to_draft[blocks.labels]
    rows = (blocks.weights > 0) & (labels >= 0)
    wanted = made.wanted(batch, blocks, rows, labels[rows], banned[rows])
    with torch.no_grad():
        said = target(batch.tokens).logits[..., made.student.draft_ids].softmax(-1)
    s, place = rows.nonzero()[3].tolist()
    expected = said[s, blocks.positions[s, place] - 1]
    if loss == "mixed":
        expected = expected / 2
        expected[labels[s, place]] += 0.5
    torch.testing.assert_close(wanted[3], expected, atol=0.02, rtol=0)  # hidden states are kept in bf16


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("which", ["dflash", "vp"])
def test_a_killed_run_goes_on_to_the_same_weights(target, tmp_path, which, monkeypatch):
    monkeypatch.setattr("training.train.VALIDATE_EVERY", 3)
    extra = {}
    if which == "vp":
        trainer(target, tmp_path / "first", steps=2).run()
        extra = {"first": tmp_path / "first", "start": tmp_path / "first"}
    trainer(target, tmp_path / "whole", steps=7, accumulate=2, **extra).run()

    class Killed(Exception):
        pass

    victim = trainer(target, tmp_path / "killed", steps=7, accumulate=2, **extra)
    step = victim.train_step

    def train_step():
        if victim.step == 5:
            raise Killed
        return step()

    victim.train_step = train_step
    with pytest.raises(Killed):
        victim.run()
    resumed = trainer(target, tmp_path / "killed", steps=7, accumulate=2, **extra)
    resumed.run()
    assert resumed.step == 7
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for key in whole:
        assert torch.equal(whole[key], killed[key]), key
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert [record["step"] for record in log if "acceptance_length" in record] == [0, 3, 6, 7]


def test_a_run_of_so_many_minutes_finds_out_how_many_steps_that_is(target, tmp_path, monkeypatch):
    ticks = itertools.count()  # each step takes a second
    monkeypatch.setattr("training.train.time.monotonic", lambda: next(ticks))
    monkeypatch.setattr("training.train.TIMED", 4)
    made = trainer(target, tmp_path, steps=5000, blocks=6, minutes=0.5)
    made.run()
    assert made.step == made.steps == 30
    assert made.rate() < 0.01
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["blocks"] == made.blocks > log[-2]["blocks"] > 0
    again = trainer(target, tmp_path, steps=5000, blocks=6, minutes=99)
    again.run()
    assert (again.step, again.steps, again.blocks) == (30, 30, made.blocks)


def test_it_learns(target, tmp_path):
    """From next to nothing to most of a block, and a VP-Drafter adds to it where DFlash is wrong."""
    dflash = trainer(target, tmp_path / "dflash", steps=120, learning_rate=0.03)
    before = dflash.validate()["acceptance_length"]
    dflash.run()
    lengths = dflash.validate()
    after = lengths["acceptance_length"]
    assert before < 1.2
    assert after > before + 0.8
    assert lengths["tree_length"] >= after
    vp = trainer(target, tmp_path / "vp", steps=30, first=tmp_path / "dflash", start=tmp_path / "dflash")
    vp.run()
    assert vp.validate()["acceptance_length"] >= after


def test_a_tree_gains_what_its_rows_reach(target, tmp_path, monkeypatch):
    """One row holds the anchor, two the likeliest token; as many as there are paths hold whatever is a candidate."""
    made = trainer(target, tmp_path, steps=40, learning_rate=0.03)
    for _ in range(40):
        made.train_step()
    batch = made.data.load(made.data.held_out[:2], "tree", CPU)
    anchors = torch.tensor([[3, 7, -1], [12, 9, 2]])  # behind anchor 12 of 15 tokens there are two more
    accepted, _, draft = made.drafting.first_draft(batch, anchors, 3)
    monkeypatch.setattr("training.validation.TREE", 1)
    assert not tree_gain(batch, anchors, draft).any()
    monkeypatch.setattr("training.validation.TREE", 2)
    assert torch.equal(tree_gain(batch, anchors, draft), accepted.clamp(max=1))
    monkeypatch.setattr("training.validation.TREE", 1 + 3 + 9 + 27)
    truth = torch.nn.functional.pad(batch.tokens, (0, 3), value=-2).gather(1, anchors.clamp(min=0) + 1)
    first = (draft.candidates.view(2, 3, 3, 3)[:, :, 0] == truth[..., None]).any(-1)
    gain = tree_gain(batch, anchors, draft)
    assert torch.equal(gain > 0, first)
    assert (gain >= accepted).all()
    assert gain[1, 0] <= 2


def test_rejections_are_what_the_first_drafter_gets_wrong(target, tmp_path):
    first = trainer(target, tmp_path / "first", steps=10)
    first.run()
    vp = trainer(target, tmp_path / "vp", first=tmp_path / "first", start=tmp_path / "first")
    batch = vp.next_batch()
    anchors = torch.arange(2, 7).expand(len(batch.lengths), -1).contiguous()
    accepted, refused, draft = vp.drafting.first_draft(batch, anchors, 2)
    blocks, banned = vp.drafting.lay(batch, anchors, rejections=1.0)
    assert draft.candidates.shape == draft.probabilities.shape == (anchors.numel(), 3, 2)
    ids, banned = blocks.ids.view(*anchors.shape, 4), banned.view(*anchors.shape, 4)
    found = False
    for s, a in ((s, a) for s in range(anchors.shape[0]) for a in range(anchors.shape[1])):
        if refused[s, a] < 0:
            continue
        found = True
        place = int(accepted[s, a]) + 1
        truth = batch.tokens[s, anchors[s, a] + place]
        assert refused[s, a] != truth
        assert vp.student.draft_ids[banned[s, a, place]] == refused[s, a]
        assert (banned[s, a] >= 0).sum() == 1
        assert (ids[s, a, :place] != vp.student.mask_id).all()
        assert (ids[s, a, place:] == vp.student.mask_id).all()
    assert found


def test_a_saved_drafter_computes_the_same_in_the_exported_graph(target, tmp_path):
    import onnxruntime as ort

    saved = trainer(target, tmp_path / "drafter", steps=3)
    saved.run()
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    config["dflash_config"][checkpoints.TEMPERATURES] = [2.0, 0.5, 1.5]
    (tmp_path / "drafter" / "config.json").write_text(json.dumps(config))
    checkpoint = checkpoints.read_drafter(tmp_path / "drafter")
    embedding, head = target.get_input_embeddings().weight.detach(), target.get_output_embeddings().weight.detach()
    drafter, mask_id = checkpoints.build_drafter(checkpoint, target.config, embedding, head)
    export_drafter(drafter, checkpoint.config, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx")

    tokens = torch.randint(0, 60, (1, 12), generator=torch.Generator().manual_seed(1))
    features = torch.randn(1, 12, saved.student.dflash.fc.in_features, generator=torch.Generator().manual_seed(2)) * 3
    anchor = 8
    blocks = lay_blocks(tokens, torch.tensor([12]), torch.tensor([[anchor]]), torch.tensor([[1]]), 4, mask_id, 4.0)
    student = Student.load(tmp_path / "drafter", target)
    with torch.no_grad():
        logits = student.logits(features, blocks, torch.ones_like(blocks.ids, dtype=torch.bool))
    # One token is kept behind the anchor: the masked places are the third, whose temperature is 2, and the fourth.
    best = torch.softmax(logits / torch.tensor([2.0, 2.0, 2.0, 0.5])[:, None], -1).topk(16)
    empty = {f"past_{kind}_{layer}": torch.zeros(1, 2, 1, tiny.HEAD_DIM) for layer in range(2) for kind in "kv"}
    feeds = {
        "features": features[:, :anchor],
        "block_ids": blocks.ids,
        "positions": torch.cat([torch.arange(anchor)[None], blocks.positions], dim=1),
        "mask": torch.ones(1, 4, anchor + 4, dtype=torch.bool),
        "past_lengths": torch.zeros(1, dtype=torch.int64),
    } | empty
    tokens_said, confidences, *_ = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    torch.testing.assert_close(torch.tensor(confidences[0]), best.values, atol=1e-4, rtol=0)
    assert (torch.tensor(tokens_said[0, :, 0]) == student.draft_ids[best.indices[:, 0]]).all()


def test_the_temperature_of_a_place_counts_the_masks_before_it_in_its_block():
    """Two blocks in a row, as branches lie, and a row of another sequence."""
    masked = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0]]).bool()
    assert masked_depth(masked).tolist() == [[0, 1, 2, 3, 0, 0, 1, 2], [0, 0, 0, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("found", [[], [1.0, 0], ["1"], [float("inf")], 2.0])
def test_temperatures_that_are_none_are_refused(target, tmp_path, found):
    folder = tiny.save_drafter(tmp_path / "d", dflash_config={"target_layer_ids": [0, 2], checkpoints.TEMPERATURES: found})
    embedding = target.get_input_embeddings().weight.detach()
    with pytest.raises(checkpoints.CheckpointError, match=r"confidence_temperatures: found .*, allowed: a list of numbers"):
        checkpoints.build_drafter(checkpoints.read_drafter(folder), target.config, embedding, embedding)


def test_the_draft_vocabulary_is_what_answers_use_most():
    answers = [Answer("a", "t", [9], [5, 5, 5, 7, 7, 2], 0.0)]
    assert draft_vocabulary(answers, 10, 2).tolist() == [5, 7]
    assert draft_vocabulary(answers, 10, 4).tolist() == [0, 2, 5, 7]
    assert draft_vocabulary(answers, 10, None).tolist() == list(range(10))


def test_a_corpus_is_read_up_to_a_cut_line(tmp_path):
    line = json.dumps({"id": "a", "task": "t", "prompt_ids": [1], "response_ids": [2, 3], "temperature": 0.0})
    path = tmp_path / "corpus.jsonl"
    path.write_text(line + "\n" + line.replace('"a"', '"b"') + "\n" + line[:30])
    assert [answer.id for answer in read_corpus(path)] == ["a", "b"]
    path.write_text(line + "\n{}\n")
    with pytest.raises(ValueError, match=r"corpus.jsonl:2: not an answer"):
        read_corpus(path)
