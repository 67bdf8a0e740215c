"""A trace holds what was committed and the very trees that it was committed from; time is lost to no stage."""

import json
import time
from dataclasses import asdict

import pytest

from decoding import trace
from decoding.clock import Clock
from decoding.modes import MODES
from decoding.sampling import Sampling
from decoding.sequence import Sequence
from decoding.sources import FIRST, NGRAMS, SECOND, TEXT
from decoding.trace import Trace
from tests.decoding.test_lossless import decoder, greedy_oracle, run
from tests.decoding.toys import ToyCosts
from tests.decoding.toys import ngrams as table

PROMPT = [1, 2, 3, 1, 2]
TABLE = table()
CHEAP = ToyCosts(width=64, first=0.01, second=0.01)  # drafts and redrafts pay


def traced(mode, count=30, device=False, others=0, costs=CHEAP, ngrams=TABLE, **sampling):
    """A trace, its sequence, and each cycle's walk and laps as the decoder left them."""
    made = decoder(mode, costs=costs, device=device, ngrams=ngrams)
    sequence = Sequence(PROMPT, count, Sampling(**sampling), trace=Trace(mode))
    seen, cycle = [], made.cycle

    def watched(sequences, pieces=()):
        said = cycle(sequences, pieces)
        seen.extend((walk, list(made.clock.laps), len(sequences)) for walk in made.walks if walk.sequence is sequence and said)
        return said

    made.cycle = watched
    run(made, [sequence, *(Sequence([4, b], count, mode="dflash") for b in range(others))], slots=1 + others)
    return sequence.trace, sequence, seen


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
def test_a_trace_is_what_was_committed_and_from_what(mode, device):
    found, sequence, seen = traced(mode, device=device, others=1, temperature=0.8, seed=5)
    assert [token for cycle in found.cycles for token in cycle.said] == sequence.answer
    assert (len(found.cycles), found.more_cycles, found.more_tokens) == (sequence.cycles, 0, 0)
    text = list(PROMPT)
    for cycle, (walk, laps, batch) in zip(found.cycles, seen, strict=True):
        count = len(cycle.tokens)
        assert cycle.tokens[0] == text[-1]
        assert cycle.parents[0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(cycle.parents[1:], 1))
        assert walk.parents[count:] == [-1] * (len(walk.parents) - count)
        assert (cycle.origins, cycle.accepted, cycle.said) == (walk.origins[:count], walk.accepted, walk.said)
        assert [cycle.parents[node] for node in cycle.accepted] == [-1, *cycle.accepted[:-1]]
        # What an accepted node says was said behind the one before it; the last token is the target's own.
        assert [cycle.tokens[node] for node in cycle.accepted[1:]][: len(cycle.said)] == cycle.said[: len(cycle.accepted) - 1]
        assert (cycle.laps, cycle.batch) == (laps, batch)
        text += cycle.said
    assert text[len(PROMPT) :] == sequence.answer
    json.dumps(asdict(found))


@pytest.mark.parametrize("mode", ["d2sd", "uniform_prefixes", "first_second", "pooled"])
def test_nodes_of_a_redraft_name_the_boundary_that_it_is_behind(mode):
    found, _, _ = traced(mode)
    redrafted = set()
    for cycle in found.cycles:
        drafted = [0]  # the first draft's own path, as far as it is in the tree
        for node in range(1, len(cycle.tokens)):
            if cycle.parents[node] == drafted[-1] and cycle.origins[node] & FIRST:
                drafted.append(node)
        for node, boundary in enumerate(cycle.boundaries):
            assert (boundary >= 0) == bool(cycle.origins[node] & SECOND)
            if boundary >= 0:
                path = [node]
                while path[-1]:
                    path.append(cycle.parents[path[-1]])
                kept = path[::-1][: boundary + 1]
                assert kept == drafted[: boundary + 1]
                assert not cycle.origins[path[::-1][boundary + 1]] & FIRST
                redrafted.add(boundary)
    assert len(redrafted) > 1


def test_who_proposes_what():
    origins = {mode: {o for c in traced(mode)[0].cycles for o in c.origins[1:]} for mode in MODES if mode != "auto"}
    assert origins["autoregressive"] == set()
    assert origins["lookup"] == {TEXT}
    assert origins["ngrams"] == {NGRAMS}
    assert {TEXT, NGRAMS} < origins["free"]
    for mode in ("dflash", "runner_up", "naive_samples", "dflash_twice", "ddtree"):
        assert origins[mode] == {FIRST}
    assert origins["random_redraft"] == origins["fixed_redraft"] == {FIRST, 0}
    assert origins["d2sd"] == origins["first_second"] == {FIRST, SECOND}
    assert {FIRST, SECOND, TEXT} < origins["pooled"]
    assert {bit for bit in (FIRST, SECOND, TEXT, NGRAMS) for origin in origins["all"] if origin & bit} == {1, 2, 4, 8}


def test_what_auto_chose():
    dear = ToyCosts(first=3.0, second=3.0)
    cycles = [
        c
        for costs in (CHEAP, ToyCosts(width=64, first=0.05, second=3.0), dear)
        for c in traced("auto", costs=costs, ngrams=None)[0].cycles
    ]
    assert {cycle.choice.kind for cycle in cycles} >= {"redraft", "draft", "plain"}
    for cycle in cycles:
        choice = cycle.choice
        assert choice.rows == len(cycle.tokens)
        assert choice.came == len(cycle.said) >= 1
        assert choice.drafted == (choice.kind in ("draft", "redraft"))
        assert bool(choice.branches) == (choice.kind == "redraft")
        # It expects what the nodes' values sum to, or as much less as promises have proved too high.
        promised = sum(cycle.values[1:])
        assert 0.5 * promised <= choice.expected - 1 <= promised + 1e-4
        stages = [stage for stage, _ in cycle.laps]
        assert ("first_draft" in stages, "redraft" in stages) == (choice.drafted, bool(choice.branches))
    assert traced("dflash")[0].cycles[0].choice is None


def test_later_cycles_are_counted_and_no_more(monkeypatch):
    monkeypatch.setattr(trace, "CYCLES", 7)
    found, sequence, _ = traced("pooled", count=40)
    assert len(found.cycles) == 7
    assert 7 + found.more_cycles == sequence.cycles
    assert sum(len(cycle.said) for cycle in found.cycles) + found.more_tokens == 40


def test_whoever_does_not_ask_has_none():
    made, sequence = decoder("pooled"), Sequence(PROMPT, 9)
    assert run(made, [sequence]) == [greedy_oracle(PROMPT, 9)]
    assert sequence.trace is None


def test_a_clock_loses_nothing():
    clock = Clock()
    for _ in range(3):
        clock.start()
        for stage in ("tree", "first_draft", "tree"):
            time.sleep(0.001)
            clock.mark(stage)
        took = time.perf_counter() - clock.began
    assert [stage for stage, _ in clock.laps] == ["tree", "first_draft", "tree"]
    assert sum(seconds for _, seconds in clock.laps) == pytest.approx(took, abs=1e-3)
    assert clock.seconds["tree"] >= 0.006
    assert clock.seconds["first_draft"] >= 0.003
    assert set(clock.seconds) == {"tree", "first_draft"}
