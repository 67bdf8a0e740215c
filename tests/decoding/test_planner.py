"""What ``auto`` chooses: by costs that are staircases, and never at plain decoding's expense."""

import numpy as np
import pytest

from decoding import planner
from decoding.acceptance import Walk
from decoding.calibration import Calibration
from decoding.plan import Situation
from decoding.planner import BUDGET, RARELY, Planner
from decoding.sampling import Sampling
from decoding.sequence import Sequence
from tests.decoding.test_lossless import decoder, run
from tests.decoding.toys import VOCABULARY, ToyCosts


@pytest.fixture(autouse=True)
def calls_take_what_they_cost(monkeypatch):
    """The clock knows nothing of ``ToyCosts``: what it says of a cycle is not listened to."""
    monkeypatch.setattr(planner, "BESIDE_MEMORY", 0.0)


def situation(text, lags=0, **beside):
    text = np.array(text, float)
    batch = len(text)
    sequences = [Sequence([1], 100) for _ in range(batch)]
    return Situation(sequences, text, np.full((2, batch), lags), np.full(batch, 50), **beside)


def planned(costs, now, values=None, drafts=True):
    own = Planner(costs, 8, 4, drafts=drafts)
    plan = own.begin(now)
    own.finish(now, plan, now.text if values is None else np.array(values, float))
    return plan


def test_every_number_of_nodes_is_looked_at():
    """A step that does not pay by itself is taken if the one behind it does."""

    class Steps(ToyCosts):
        def target(self, rows, sequences, context):
            return np.where(rows < 2, 1.0, np.where(rows < 20, 2.0, 2.05))

    few, many = [[0.5] * 10 + [0.0] * 20], [[0.5] * 30]
    assert planned(Steps(), situation(few), drafts=False).nodes[0] > 5
    assert planned(Steps(), situation(many), drafts=False).nodes == [31]
    assert planned(Steps(), situation([[0.3] * 2 + [0.0] * 9]), drafts=False).nodes == [1]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_number_of_nodes_commits_more_a_second(seed):
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 5))
    table = 1 + np.cumsum(rng.random(512) * rng.integers(0, 2, 512) * rng.choice([0.05, 0.3]))

    class Steps(ToyCosts):
        def target(self, rows, sequences, context):
            return table[rows]

    text = -np.sort(-(rng.random((batch, 9)) ** 2), axis=1)
    own = Planner(Steps(), 8, 4, drafts=False)
    plan = own.begin(situation(text))
    own.finish(situation(text), plan, text)
    (kept, promised), beside = own.kept["text"], own.beside[batch]
    plain = table[batch] * beside["plain"]
    worth = [0.0, *np.cumsum(-np.sort(-text.reshape(-1))) * kept / promised]
    rates = [(batch + w) / max(plain, table[batch + n] * beside["text"]) for n, w in enumerate(worth)]
    rates[0] = batch / plain
    chosen = rates[sum(plan.nodes) - batch]
    margin = 1 + planner.MARGIN + planner.CROWD * (batch - 1)
    assert chosen == pytest.approx(max(rates) if max(rates) > rates[0] * margin else rates[0])


def test_who_comes_next_is_reckoned_by_its_own_context():
    class Contexts(ToyCosts):
        def target(self, rows, sequences, context):
            return 1.0 + 0.001 * context + 0.0 * rows

    own, before = Planner(Contexts(), 8, 4, drafts=False), situation([[0.5]])
    short = own.bar(1, 50, 0).seconds
    own.forget(before.sequences[0])
    assert own.bar(1, 1900, 0).seconds == pytest.approx(short * 2.9 / 1.05)


def test_rows_are_one_pool():
    costs = ToyCosts(base=1.0, step=0.5, width=4)
    plan = planned(costs, situation([[0.9, 0.8, 0.1, 0.1], [0.2, 0.1, 0.0, 0.0]]), drafts=False)
    assert plan.nodes == [3, 1]


def test_plain_decoding_is_what_it_costs():
    """Where neither text nor drafts pay, no row is added."""
    plan = planned(ToyCosts(base=0.0, step=1.0, width=1, first=5.0), situation([[0.3, 0.1]] * 3))
    assert (plan.drafted, plan.branches, plan.nodes) == ([], 0, [1, 1, 1])


def test_catching_up_is_in_the_price():
    costs = ToyCosts(base=1.0, step=0.1, width=16, first=0.3)
    assert planned(costs, situation([[0.0] * 40])).drafted == [0]
    assert planned(costs, situation([[0.0] * 40], lags=30_000)).drafted == []


def test_rows_of_others_move_the_staircase():
    costs = ToyCosts(base=1.0, step=1.0, width=8)
    text = [[0.15] * 7]
    assert planned(costs, situation(text), drafts=False).nodes == [8]
    assert planned(costs, situation(text, others=7), drafts=False).nodes == [8]
    assert planned(costs, situation(text, others=4), drafts=False).nodes == [4]


COSTS = {
    "rows for nothing": ToyCosts(base=1.0, step=0.0, first=0.1, second=0.1),
    "rows for what they are": ToyCosts(base=0.0, step=1.0, width=1, first=0.5),
    "dear drafters": ToyCosts(base=1.0, step=0.05, width=8, first=3.0, second=3.0),
    "as on a CPU": ToyCosts(base=1.0, step=0.4, width=8, first=0.2, second=0.2),
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("slots", [1, 3])
def test_it_is_never_slower_than_plain_decoding(name, slots):
    """By the clock of the costs: what all calls took, probes and catching up too."""
    costs = COSTS[name]
    costs.observed.clear()
    made = decoder("auto", costs=costs)
    sequences = [Sequence([i % VOCABULARY, 1, 3], 60, Sampling(0.5, seed=i)) for i in range(9)]
    run(made, sequences, slots, piece=1000)
    took = sum(getattr(costs, e)(max(r, n), n, c) for e, r, n, c in costs.observed if e != "target")
    took += sum(float(costs.target(np.array([r]), n, c)[0]) for e, r, n, c in costs.observed if e == "target")
    committed = sum(len(s.answer) for s in sequences)
    plain = committed / slots * float(costs.target(np.array([slots]), slots, 0)[0])
    assert took < plain * (1 + 4 * BUDGET) + 5 * slots
    own = made.drafting.auto.planner
    assert sum(own.chosen.values()) > 0
    assert own.came == committed
    if name == "rows for nothing":
        assert took < 0.7 * plain
    if name in ("rows for what they are", "dear drafters"):
        calls = sum(e != "target" for e, *_ in costs.observed)
        assert calls < 0.1 * sum(e == "target" for e, *_ in costs.observed)


def test_what_is_expected_comes():
    """Toy drafters are sure of the wrong things; what they say is corrected."""
    made = decoder("auto", costs=COSTS["rows for nothing"])
    own = made.drafting.auto.planner
    run(made, [Sequence([i % VOCABULARY, 1, 3], 150, Sampling(0.5, seed=i)) for i in range(6)], 3)
    expected, came = own.expected, own.came
    run(made, [Sequence([i % VOCABULARY, 2, 3], 150, Sampling(0.5, seed=i)) for i in range(6)], 3)
    assert own.expected - expected == pytest.approx(own.came - came, rel=0.15)


def test_drafting_comes_back():
    """A bad stretch, in which drafts are worth nothing, does not end speculation for good."""
    costs = ToyCosts(base=1.0, step=0.2, width=8, first=0.2, second=0.2)
    made = decoder("auto", costs=costs, ngrams=None)
    own = made.drafting.auto.planner
    own.first[:] = 0.0
    sequence = Sequence([1, 2], 1500)
    made.open(sequence)
    made.cycle([], [(sequence, 1)])
    while not sequence.finish:
        made.cycle([sequence])
    assert own.chosen["draft, probing"] > 0
    assert own.chosen["draft"] + own.chosen["redraft"] > own.chosen["draft, probing"]


def test_probabilities_are_corrected_by_what_comes():
    calibration = Calibration()
    rng = np.random.default_rng(0)
    p = 0.5
    for _ in range(3000):
        hit = rng.random() < 0.8
        calibration.learn(Walk(None, [0, 1] if hit else [0], [], [4, 5], [-1, 0], [0, 1], [0, 1], [1.0, p]))
        factor = calibration.factors[1][1]
        p = 0.5 * factor / (0.5 + 0.5 * factor)
    assert p == pytest.approx(0.8, abs=0.08)
    assert {row[2] for row in calibration.factors} == {1.0}
    for _ in range(3000):
        calibration.learn(Walk(None, [0], [], [4, 5], [-1, 0], [0, 1], [0, 1], [1.0, 0.9]))
    assert min(map(min, calibration.factors)) >= np.exp(-1.51)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_hopeless_would_not_have_been_verified(seed):
    """The first glance at texts turns nothing away that the planner would have chosen."""
    rng = np.random.default_rng(seed)
    costs = ToyCosts(base=rng.uniform(0.1, 2), step=rng.uniform(0.01, 1), width=int(rng.integers(1, 9)))
    text = -np.sort(-rng.uniform(0, rng.uniform(0.1, 1), (int(rng.integers(1, 5)), 20)), axis=1)
    now, own = situation(text), Planner(costs, 8, 4, drafts=False)
    bar = own.bar(len(text), now.context, 0)
    hopeless = own.hopeless(bar, text.reshape(-1).tolist())
    plan = own.begin(now)
    own.finish(now, plan, now.text)
    assert not hopeless or plan.kind == "plain"
    if hopeless:
        at_once = own.rests(bar)
        assert (at_once.nodes, at_once.where[0], at_once.kind) == (plan.nodes, plan.where[0], "plain")
        assert at_once.seconds == pytest.approx(plan.seconds)


def test_texts_are_looked_up_seldom_where_that_costs_more_than_it_wins():
    costs = ToyCosts(base=1.0, step=0.1, width=4)
    own, looked = Planner(costs, 8, 4, drafts=False), []

    def cycle(text, came, seconds):
        bar, now = own.bar(1, 50, 0), situation([text])
        looked.append(own.looks())
        plan = own.begin(now) if looked[-1] else own.rests(bar)
        if looked[-1]:
            own.finish(now, plan, now.text)
            plan.looked = 0.05
        own.learn(plan, came if plan.kind == "text" else 1, seconds)

    for _ in range(200):
        cycle([0.01] * 3, 1, 1.2)
    assert all(looked[:5]), "a few looks in vain are soon made up for"
    assert 0 < 0.05 * sum(looked[100:]) <= BUDGET * 100 * 1.2, "in vain"
    for _ in range(2 * RARELY):
        cycle([0.9, 0.8, 0.7], 3, 1.4)
    assert all(looked[-RARELY:]), "it pays"
    for _ in range(600):
        cycle([0.9, 0.8, 0.7], 1, 1.4)
    assert sum(looked[-100:]) < 60, "what is promised does not come"


@pytest.mark.parametrize(("won", "always"), [(0.4, True), (0.05, True), (-0.03, False)])
def test_what_looks_win_is_what_cycles_took(won, always):
    """Whatever was promised of them."""
    costs = ToyCosts(base=1.0, step=0.01, width=4)
    own, looked = Planner(costs, 8, 4, drafts=False), []
    text = [[0.9, 0.8, 0.7]] * 8
    for _ in range(400):
        now = situation(text)
        bar = own.bar(8, now.context, 0)
        looked.append(own.looks())
        plan = own.begin(now) if looked[-1] else own.rests(bar)
        if looked[-1]:
            own.finish(now, plan, now.text)
            plan.looked = 0.01
        tree = plan.kind == "text"
        own.learn(plan, 16 if tree else 8, bar.seconds * (2 - won if tree else 1))
    if always:
        assert all(looked[100:])
    else:
        assert 0 < sum(looked[100:]) <= 300 / RARELY + 2


def test_what_cycles_take_beside_their_calls_is_learned(monkeypatch):
    monkeypatch.undo()
    costs = ToyCosts(base=1.0, step=0.1, width=4)
    own, now = Planner(costs, 8, 4, drafts=False), situation([[0.9, 0.8, 0.7]])
    plans = []
    for took in [1.0] * 100 + [1.3] * 100:
        plan = own.begin(now)
        own.finish(now, plan, now.text)
        own.learn(plan, 3, took * float(costs.target(np.array([sum(plan.nodes)]), 1, 50)[0]))
        plans.append(plan)
    assert plans[0].kind == "text"
    for plan, took in ((plans[99], 1.0), (plans[199], 1.3)):
        assert plan.seconds == pytest.approx(took * float(costs.target(np.array([sum(plan.nodes)]), 1, 50)[0]), rel=0.02)
    own.learn(plan, 3, 1e6)
    assert own.beside[1]["text"] < 1.5, "one stall is no rule"
    assert own.beside[8]["text"] == planner.BESIDE["text"], "a batch of another size is another matter"
