"""Every mode's answer is the target's own: greedy and sampled, alone and in a batch, against a brute-force oracle."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.cycle import Decoder
from decoding.modes import MODES
from decoding.sampling import Sampling
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from engines.sampling import distribution
from tests.decoding.toys import VOCABULARY, ToyDrafter, ToyTarget, logits_after


def decode(
    sequences,
    mode,
    slots=1,
    block_size=5,
    branches=3,
    redraft="exclusive",
    selection="confidence",
    vocabulary=VOCABULARY,
):
    target = ToyTarget(vocabulary)
    decoder = Decoder(
        target,
        ToyDrafter(target, noise=0.7, seed=1),
        ToyDrafter(target, noise=0.5, seed=2),
        block_size=block_size,
        branches=branches,
        vocabulary=vocabulary,
        redraft=redraft,
        selection=selection,
    )
    scheduler = Scheduler(decoder, slots, mode)
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler:
        scheduler.step()
    assert target.running == []
    return [sequence.answer for sequence in sequences]


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
)
def test_greedy_answers_are_the_oracles(mode, batch, block_size, branches, redraft, selection, end):
    sequences = [Sequence(prompt, count, end_ids=frozenset(end)) for prompt, count in batch]
    answers = decode(sequences, mode, 3, block_size, branches, redraft, selection)
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
    vocabulary, count, prompt = 3, 1200, [0, 2, 1]
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


def test_a_sequence_dropped_from_outside_leaves_the_others_alone():
    target = ToyTarget()
    decoder = Decoder(
        target, ToyDrafter(target, 0.5, 1), ToyDrafter(target, 0.5, 2), block_size=4, branches=2, vocabulary=VOCABULARY
    )
    scheduler = Scheduler(decoder, 3, "d2sd")
    sequences = [Sequence([i, 1], 20) for i in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.step()
    scheduler.drop(sequences[1], "cancelled")  # running
    scheduler.drop(sequences[3], "cancelled")  # waiting
    while scheduler:
        scheduler.step()
    assert [s.finish for s in sequences] == ["length", "cancelled", "length", "cancelled"]
    assert sequences[3].answer == []
    for kept in (0, 2):
        assert sequences[kept].answer == greedy_oracle([kept, 1], 20)


def test_sequences_of_another_mode_wait():
    target = ToyTarget()
    decoder = Decoder(
        target, ToyDrafter(target, 0.5, 1), ToyDrafter(target, 0.5, 2), block_size=4, branches=2, vocabulary=VOCABULARY
    )
    scheduler = Scheduler(decoder, 4, "d2sd")
    modes = [None, "autoregressive", "d2sd", "dflash"]
    sequences = [Sequence([i, 2], 7, mode=mode) for i, mode in enumerate(modes)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.step()
    assert scheduler.running == sequences[:1]
    while scheduler:
        scheduler.step()
    assert [s.answer for s in sequences] == [greedy_oracle([i, 2], 7) for i in range(4)]


@pytest.mark.parametrize("count", [0, -1])
def test_a_request_for_no_tokens_is_refused(count):
    with pytest.raises(ValueError, match=f"max_tokens: found {count}, allowed: 1 or more"):
        Sequence([1], count)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt: found no token"):
        Sequence([], 1)


def test_logits_of_the_toy_differ():
    assert not np.allclose(logits_after([1, 2]), logits_after([2, 1]))
