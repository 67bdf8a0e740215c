"""Every mode's answer is the target's own: greedy and sampled, alone and in a batch, against a brute-force oracle."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.cycle import Decoder
from decoding.follower import CATCH_UP
from decoding.modes import MODES
from decoding.plan import Plan
from decoding.sampling import Sampling
from decoding.sequence import Sequence
from engines.sampling import distribution
from tests.decoding.toys import VOCABULARY, OnDevice, ToyCosts, ToyDrafter, ToyTarget, logits_after, ngrams


def decoder(mode="d2sd", *, vocabulary=VOCABULARY, costs=None, ragged=True, remembers=0, device=False, **options):
    target = ToyTarget(vocabulary, ragged, remembers=remembers)
    drafters = [ToyDrafter(target, noise, seed, remembers=remembers) for noise, seed in ((0.7, 1), (0.5, 2))]
    if device:
        target, *drafters = map(OnDevice, (target, *drafters))
    options = {"block_size": 5, "branches": 3, "ngrams": ngrams(vocabulary)} | options
    return Decoder(target, *drafters, mode=mode, vocabulary=vocabulary, costs=costs or ToyCosts(), **options)


def run(decoder, sequences, slots=1, piece=3):
    """Decode all; a slot that is free takes the next sequence, whose prompt comes in by pieces."""
    waiting, running = list(sequences), []
    while waiting or running:
        while waiting and len(running) < slots:
            assert decoder.room(waiting[0])
            decoder.open(waiting[0])
            running.append(waiting.pop(0))
        answering = [s for s in running if s.computed == s.position]
        pieces = [(s, min(piece, s.position - s.computed)) for s in running if s.computed < s.position]
        before = [len(s.answer) for s in answering]
        committed = decoder.cycle(answering, pieces)
        assert [len(s.answer) - n for s, n in zip(answering, before, strict=True)] == list(map(len, committed))
        assert all(committed)
        for sequence in [s for s in running if s.finish]:
            decoder.close(sequence)
            running.remove(sequence)
    for engine in (decoder.target, decoder.drafting.first.engine, decoder.drafting.second.engine):
        assert engine.caches == {}, "a sequence was not closed"
    return [sequence.answer for sequence in sequences]


def decode(sequences, mode, slots=1, **options):
    return run(decoder(mode, **options), sequences, slots)


def greedy_oracle(prompt, count, end_ids=frozenset()):
    answer = []
    while len(answer) < count and not (answer and answer[-1] in end_ids):
        answer.append(int(logits_after(prompt + answer).argmax()))
    return answer


prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=7)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(
    batch=st.lists(st.tuples(prompts, st.integers(1, 14)), min_size=1, max_size=4),
    block_size=st.integers(2, 6),
    branches=st.integers(1, 6),
    redraft=st.sampled_from(["exclusive", "free"]),
    selection=st.sampled_from(["confidence", "uniform"]),
    end=st.sets(st.integers(0, VOCABULARY - 1), max_size=1),
    ragged=st.booleans(),
    remembers=st.integers(0, 5),
    rows=st.integers(1, 20),
)
def test_greedy_answers_are_the_oracles(mode, batch, end, **options):
    sequences = [Sequence(prompt, count, end_ids=frozenset(end)) for prompt, count in batch]
    answers = decode(sequences, mode, 3, **options)
    assert answers == [greedy_oracle(prompt, count, end) for prompt, count in batch]
    for sequence in sequences:
        assert sequence.finish == ("end" if end and sequence.answer[-1] in end else "length")


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15, deadline=None)
@given(
    prompt=prompts,
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, VOCABULARY),
    top_p=st.floats(0.1, 1),
    seed=st.integers(0, 2**40),
)
def test_a_seed_gives_the_same_answer_in_every_mode(mode, prompt, temperature, top_k, top_p, seed):
    sampling = Sampling(temperature, top_k, top_p, seed)
    others = [Sequence([1, 2], 9, Sampling(1.0, seed=5)), Sequence(prompt, 12, sampling)]
    alone = decode([Sequence(prompt, 12, sampling)], "autoregressive")[0]
    assert decode(others, mode, slots=2)[1] == alone


@pytest.mark.parametrize("mode", MODES)
def test_sampled_answers_follow_the_targets_distribution(mode):
    """Chi-square of the first two tokens at T=1 against the exact probabilities, one request a seed."""
    vocabulary, count, prompt = 3, 500, [0, 2, 1]
    observed = dict.fromkeys(itertools.product(range(vocabulary), repeat=2), 0)
    sequences = [Sequence(prompt, 2, Sampling(1.0, seed=seed)) for seed in range(count)]
    for answer in decode(sequences, mode, slots=8, block_size=4, branches=2, vocabulary=vocabulary):
        observed[tuple(answer)] += 1

    def exact(context):
        return distribution(logits_after(context, vocabulary=vocabulary), Sampling(1.0))[1]

    expected = {(a, b): count * exact(prompt)[a] * exact([*prompt, a])[b] for a, b in observed}
    statistic = sum((observed[pair] - expected[pair]) ** 2 / expected[pair] for pair in observed)
    assert statistic < 26.1  # 99.9 % quantile of chi-square with 8 degrees of freedom


def test_drafting_saves_target_passes():
    """The comparison above would pass with drafts that are never accepted, too."""
    cycles = {}
    for mode in ("autoregressive", "dflash", "d2sd"):
        sequences = [Sequence([i % VOCABULARY, 1], 40) for i in range(8)]
        decode(sequences, mode, slots=4)
        cycles[mode] = sum(s.cycles for s in sequences)
    assert cycles["autoregressive"] == 8 * 40
    assert cycles["d2sd"] < cycles["dflash"] < cycles["autoregressive"]


@settings(max_examples=30, deadline=None)
@given(
    batch=st.lists(st.tuples(prompts, st.integers(1, 14), st.sampled_from(list(MODES))), min_size=2, max_size=6),
    ragged=st.booleans(),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_modes_run_side_by_side(batch, ragged, temperature):
    """Each sequence in its own mode, and the engines called no more often than for one of them."""

    def sequences(modes):
        return [
            Sequence(prompt, count, Sampling(temperature, seed=i), mode=mode)
            for i, ((prompt, count, _), mode) in enumerate(modes)
        ]

    plain = decode(sequences([(case, "autoregressive") for case in batch]), "d2sd", 3)
    made = decoder(ragged=ragged)
    assert run(made, sequences([(case, case[2]) for case in batch]), 4) == plain
    own = sequences([(case, case[2]) for case in batch])
    for sequence in own:
        made.open(sequence)
        while sequence.computed < sequence.position:
            made.cycle([], [(sequence, 1)])
    engines = [made.target, made.drafting.first.engine, made.drafting.second.engine]
    before = [len(engine.calls) for engine in engines]
    made.cycle(own)
    called = [len(engine.calls) - n for engine, n in zip(engines, before, strict=True)]
    modes = {case[2] for case in batch}
    first = any(MODES[mode].drafts for mode in modes) + ("dflash_twice" in modes)
    expected = [1, first, any(MODES[mode].redrafts for mode in modes)]
    assert called == expected or ("auto" in modes and called <= expected)  # which may do without


LOOKS = ("numpy", "tolist", "item", "cpu", "nonzero", "__array__", "__bool__", "__int__", "__index__", "__float__")


@pytest.mark.parametrize("mode", MODES)
def test_a_device_is_waited_for_once_a_cycle(mode, monkeypatch):
    """The host looks at no tensor but through ``read``, and the answer is the same."""
    expected = decode([Sequence([i, 1], 12, Sampling(i / 2, seed=i)) for i in range(3)], "autoregressive")
    made = decoder(mode, device=True)
    sequences = [Sequence([i, 1], 12, Sampling(i / 2, seed=i)) for i in range(3)]
    for name in LOOKS:
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"a tensor was asked for its {name}"))
    for sequence in sequences:
        made.open(sequence)
        made.cycle([], [(sequence, 1)])
    cycles = 0
    while running := [s for s in sequences if not s.finish]:
        made.cycle(running)
        cycles += 1
    assert made.target.reads == cycles
    assert [s.answer for s in sequences] == expected


@pytest.mark.parametrize("ragged", [False, True])
def test_pieces_of_prompts_ride_with_the_trees_of_a_ragged_target(ragged):
    made = decoder("dflash", ragged=ragged)
    answering, joining = Sequence([1], 20), Sequence([2, 0, 3, 1, 4], 5)
    made.open(answering)
    made.cycle([answering])
    made.open(joining)
    before = len(made.target.calls)
    made.cycle([answering], [(joining, 3)])
    assert made.target.calls[before:] == ([5 + 3] if ragged else [3, 5])
    assert joining.computed == 3
    made.cycle([answering], [(joining, 1)])
    made.cycle([answering, joining])
    assert answering.answer == greedy_oracle([1], len(answering.answer))
    assert joining.answer == greedy_oracle(joining.prompt, len(joining.answer))
    assert joining.answer


def test_a_drafter_is_caught_up_in_pieces():
    """A long prompt, which no drafter has seen when the first cycle begins: a cycle catches up by a call, and is plain."""
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, 600).tolist()
    made = decoder("d2sd")
    sequence, other = Sequence(prompt, 20), Sequence([1, 2], 20, mode="dflash")
    for one in (sequence, other):
        made.open(one)
        made.cycle([], [(one, len(one.prompt) - 1)])
    first, second = made.drafting.first, made.drafting.second
    assert first.lag(sequence) == second.lag(sequence) == 599
    for cycle in (1, 2):
        made.cycle([sequence, other])
        assert len(sequence.answer) == cycle
        assert first.engine.calls == [(1, 0), (1, 5)] * cycle  # the other one drafts meanwhile
        assert second.engine.calls == [(1, 0)] * cycle
    made.cycle([sequence, other])
    assert first.engine.calls[4:] == [(2, 5)]
    assert first.lag(sequence) == second.lag(sequence) == len(sequence.answer) - 2
    while running := [one for one in (sequence, other) if not one.finish]:
        made.cycle(running)
    assert [sequence.answer, other.answer] == [greedy_oracle(prompt, 20), greedy_oracle([1, 2], 20)]


def test_where_it_is_planned_a_drafter_is_caught_up_in_pieces_too(monkeypatch):
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, 600).tolist()
    made = decoder("auto")
    planner, drafting = made.planner, made.drafting
    monkeypatch.setattr(planner, "begin", lambda now: Plan([*range(len(now.sequences))]))
    monkeypatch.setattr(planner, "redraft", lambda now, plan, *_: setattr(plan, "branches", 2 if plan.drafted else 0))
    sequence, other = Sequence(prompt, 20), Sequence([1, 2], 20)
    for one in (sequence, other):
        made.open(one)
        made.cycle([], [(one, len(one.prompt) - 1)])
    seen = []
    while running := [one for one in (sequence, other) if not one.finish]:
        calls = [len(f.engine.calls) for f in (drafting.first, drafting.second)]
        timed = len(planner.off)
        made.cycle(running)
        if len(running) == 2:
            calls = [len(f.engine.calls) - n for f, n in zip((drafting.first, drafting.second), calls, strict=True)]
            lags = [f.lag(sequence) > CATCH_UP for f in (drafting.first, drafting.second)]
            seen.append((*drafting.auto.plan.drafted, drafting.auto.plan.branches, *calls, *lags, len(planner.off) - timed))
    # The other one drafts meanwhile; what a cycle took is learned of where all was planned.
    assert seen[:2] == [(1, 2, 2, 1, True, True, 0), (1, 2, 2, 1, False, True, 0)]
    assert seen[2:5] == [(0, 1, 0, 1, 1, False, True, 0), (0, 1, 0, 1, 1, False, False, 0), (0, 1, 2, 1, 1, False, False, 1)]
    assert [sequence.answer, other.answer] == [greedy_oracle(prompt, 20), greedy_oracle([1, 2], 20)]


@pytest.mark.parametrize("what", ["draft", "redraft"])
def test_a_probe_that_waits_for_its_drafter_is_paid_for_once(what, monkeypatch):
    made = decoder("auto", costs=ToyCosts(base=0.0, step=1.0, width=1, first=3.0, second=3.0), ngrams=None)
    planner, paid = made.planner, []
    if what == "redraft":
        monkeypatch.setattr(planner, "begin", lambda now: Plan([0]))
    monkeypatch.setattr(planner, "_probes", lambda probed, *_: probed == what and not paid and not paid.append(probed))
    sequence = Sequence(np.random.default_rng(0).integers(0, VOCABULARY, 600).tolist(), 60)
    made.open(sequence)
    made.cycle([], [(sequence, len(sequence.prompt) - 1)])
    while not planner.chosen[f"{what}, probing"]:
        made.cycle([sequence])
        assert not sequence.finish
    follower = made.drafting.first if what == "draft" else made.drafting.second
    assert [blocks > 0 for _, blocks in follower.engine.calls] == [False, False, True]
    assert paid == [what]
    assert not planner.awaited


def test_what_an_engine_remembers_of_a_prompt_is_not_computed_again():
    made = decoder("d2sd", remembers=4)
    prompt = [1, 2, 3, 4, 0, 1]
    run(made, [Sequence(prompt, 8)])
    again = Sequence(prompt, 8)
    made.open(again)
    assert again.computed == 4
    made.close(again)
    assert run(made, [Sequence(prompt, 8)]) == [greedy_oracle(prompt, 8)]


def test_a_mode_without_drafters_opens_none():
    made = decoder("autoregressive")
    sequence = Sequence([1], 5)
    made.open(sequence)
    made.cycle([sequence])
    assert made.drafting.first.engine.opened == 0


def test_a_reset_forgets_all():
    made = decoder("d2sd")
    made.open(Sequence([1, 2], 5))
    made.reset()
    assert run(made, [Sequence([1, 2], 9)]) == [greedy_oracle([1, 2], 9)]


@pytest.mark.parametrize("count", [0, -1])
def test_a_request_for_no_tokens_is_refused(count):
    with pytest.raises(ValueError, match=f"max_tokens: found {count}, allowed: 1 or more"):
        Sequence([1], count)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt: found no token"):
        Sequence([], 1)


def test_logits_of_the_toy_differ():
    assert not np.allclose(logits_after([1, 2]), logits_after([2, 1]))
