"""``auto``: what to draft and how much to verify, so that most tokens are committed a second (docs/method.md §8).

A cycle commits a token and, of the nodes that it verifies, as many as their values sum to; it takes what its calls take
(``engines.Costs``). What is chosen is what commits most tokens a second in this very cycle, not what gains most at the rate of
all cycles: a text that is hard to foresee is so for a while, and a token there is worth the time that others take there. It is
chosen in steps, each when what it needs is known:

0. look at anything? Where the texts say too little for any number of rows and drafts did not pay a few cycles ago, plain
   decoding takes as long as it does without a planner;
1. draft at all, and for which sequences? By what drafts have brought, beside what the text proposes now, which costs nothing;
2. redraft, with how many branches? By what redrafts have brought, and where the first draft will probably be rejected;
3. verify which nodes? All of the batch are one pool, the most valuable first. Cost is a staircase: every number is looked at.

On a device values are known only when the cycle is over; there the same steps go by what the last cycles showed.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence as Many
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from decoding.engines import Costs
from decoding.plan import Bar, Plan, Situation
from decoding.sequence import Sequence

Curve = NDArray[np.float64]  # [N - 1]: the values of the 1st, 2nd, … node of a tree, most valuable first

NODES = 48  # of a tree, at most
MARGIN = 0.02  # a step must promise so much more tokens a second than doing without it
CROWD = 0.003  # and so much more for each further sequence: what a tree takes beside the pass errs most there
BUDGET = 0.01  # share of the time that may be spent on finding out what drafts are worth; of many sequences', over their number
REST = 30  # cycles for which nothing is reckoned anew, where drafts would not pay
# Of a plain cycle, what a look at the texts wins if nodes are verified because of it: before any was, of one sequence (of n the
# √n-th part), and at least; what is remembered of it; and cycles between two looks, at most.
WINS, WINS_LEAST, WINS_MEMORY, RARELY = 0.4, 0.01, 1 / 16, 32
HORIZON = 24  # cycles that a drafter's catching up pays for itself in
MEMORY = 1 / 32  # weight of a new cycle in what is remembered of drafts
PROBE_MEMORY = 1 / 8  # of one that was made to find out; there are few
# What is chosen for its promise keeps less of it than what is promised on average: tokens that came of those promised, to begin
# with, and how many promised ones that counts for. Both fade.
KEPT, KEPT_WEIGHT, KEPT_MEMORY = 0.8, 12.0, 1 / 64
LEVEL_MEMORY = 16.0  # tokens of a sequence's drafts that count as much as all that is known of others
# Of a tree with a first draft, before any was seen: the value of its 1st node, and of each further one to that before it, as
# the demo's drafters have it.
PRIOR = (0.33, 0.7), (0.54, 0.73), (0.9, 0.83)
# What cycles take, of what their engines' calls cost, before any was seen: trees are grown, walked and kept beside these.
BESIDE = {"plain": 1.03, "text": 1.1, "draft": 1.1, "redraft": 1.1}
BESIDE_MEMORY = 1 / 16
BESIDE_LEAST, BESIDE_MOST = 0.9, 1.5
PRIOR_REDRAFT = 0.15  # what a redraft adds to the sum of all values, before any was seen


class Planner:
    """Plans cycles, and learns from them.

    Args:
        costs: of the engines' calls here.
        block_size: γ. branches: K, at most; 0 where there is no second drafter.
        drafts: whether there is a first drafter.

    Attributes:
        chosen: cycles by what was done in them. expected, came: tokens. off: what the last cycles took, of what was
            predicted.
    """

    def __init__(self, costs: Costs, block_size: int, branches: int, *, drafts: bool) -> None:
        self.costs, self.block_size, self.drafts = costs, block_size, drafts
        self.branches = min(branches, block_size - 1)
        self.first: NDArray[np.float64] = np.array([start * ratio ** np.arange(NODES - 1) for start, ratio in PRIOR])
        self.more: Curve = PRIOR_REDRAFT * 0.2 * 0.8 ** np.arange(NODES - 1)
        self.levels: dict[Sequence, tuple[float, float]] = {}  # tokens that its drafts promised, and that others do
        self.beside: defaultdict[int, dict[str, float]] = defaultdict(BESIDE.copy)  # by sequences, and by what is done
        self.kept = dict.fromkeys(("text", "draft"), (KEPT * KEPT_WEIGHT, KEPT_WEIGHT))  # tokens that came, and promised
        self.credit = 0.0  # seconds that may be spent on finding out
        self.patience = {"draft": 1.0, "redraft": 1.0}  # what a probe counts for, in its price
        self.wins: dict[int, float] = {}  # by sequences
        self.vain = 0.0  # what looks have cost since one won, in such wins
        self.next_look = 0  # cycle
        self.awaited: dict[str, Sequence] = {}  # by what is probed: whose drafter catches up, for a probe that is paid for
        self.rest: dict[tuple[int, int], int] = {}  # cycles without a look at drafts, by ``_where``
        self.cycles = 0
        self.bars: dict[int, Bar] = {}  # by sequences
        self.reach = 16  # nodes of a tree that are worth a look
        self.chosen: Counter[str] = Counter()
        self.expected = self.came = 0.0
        self.off: deque[float] = deque(maxlen=4096)

    def bar(self, sequences: int, context: int, others: int) -> Bar:
        """What step 0 goes by; reckoned anew every few cycles.

        Args:
            context: tokens in the caches of all. others: as in ``Situation``.
        """
        bar = self.bars.get(sequences)
        if bar is None or bar.until <= self.cycles or bar.others != others:
            beside = self.beside[sequences]
            passes = self.costs.target(others + sequences + np.arange(NODES * sequences), sequences, context)
            plain = alone = float(passes[0]) * beside["plain"]
            if others:
                alone = float(self.costs.target(np.array([sequences]), sequences, context)[0]) * beside["plain"]
            kept, promised = self.kept["text"]
            least = sequences * ((passes[1:] * beside["text"] - plain) / alone + _margin(sequences))
            least *= promised / max(kept, 1e-6)
            node = float((least / np.arange(1, len(least) + 1)).min())
            bar = self.bars[sequences] = Bar(
                self.cycles + REST, sequences, others, plain, alone, passes.tolist(), least.tolist(), node
            )
        return bar

    def looks(self) -> bool:
        """Step 0: whether to look the texts up. Who says much does so for a while: as long as looks win it is done in every
        cycle, and each time that those in vain have cost as much as one wins, half as often."""
        return self.cycles >= self.next_look

    def hopeless(self, bar: Bar, worth: list[float]) -> bool:
        """Step 0: whether what texts propose pays in no number of nodes. worth: of all nodes, about
        (``Text.worth``, ``NGrams.worth``)."""
        total = 0.0
        for value, asked in zip(sorted(worth, reverse=True), bar.least, strict=False):
            total += value
            if total > asked:
                return False
        return True

    def rests(self, bar: Bar) -> Plan | None:
        """Step 0, where it is hopeless: the plan, if there is no need to think of drafts."""
        where = bar.sequences, 0
        if not self._rests(where):
            return None
        plan = Plan([], nodes=[1] * bar.sequences, where=where)
        plan.expected, plan.seconds, plan.calls, plan.pace = float(bar.sequences), bar.seconds, bar.passes[0], self.costs.pace
        return plan

    def begin(self, now: Situation) -> Plan:
        """Step 1: which sequences to draft for."""
        plan = Plan([], where=_where(now))
        if self._rests(plan.where):
            return plan
        plain = self._verify(now, now.text, 0.0)
        drafted = self._drafted(now)
        order = np.argsort(now.text.sum(1) - drafted.sum(1), kind="stable").tolist()
        best, chosen = plain.rate * (1 + _margin(len(order))), 0
        size = 1
        while size <= len(order):
            some = order[:size]
            values = now.text.copy()
            values[some] = drafted[some]
            rate = self._verify(now, values, self._drafting(now, some, 0)).rate
            if rate > best:
                best, chosen = rate, size
            size = min(2 * size, len(order)) if size < len(order) else size + 1
        if chosen:
            self.patience["draft"] = 1.0
            plan.drafted = sorted(order[:chosen])
        elif (awaited := self.awaited.get("draft")) in now.sequences:
            plan.drafted, plan.probing = [now.sequences.index(awaited)], True
        elif self._probes("draft", *(self._drafting(now, order[:1], 0, at_once=at_once) for at_once in (True, False))):
            plan.drafted, plan.probing = order[:1], True
        else:
            self.rest[plan.where] = REST
        return plan

    def redraft(self, now: Situation, plan: Plan, values: NDArray[np.float64], shares: NDArray[np.float64]) -> None:
        """Step 2: how many branches the second drafter fills.

        Args:
            values: ``[b, N - 1]``, of the nodes that there are without. shares: ``[K]``, how likely the rejection of a first
                draft is among the 1, 2, … likeliest boundaries, on average.
        """
        if not self.branches or not plan.drafted:
            return
        spent = self._drafting(now, plan.drafted, 0)
        best = self._verify(now, values, spent).rate * (1 + _margin(len(values)))
        branches = 1
        while branches <= self.branches:
            promised = self._redrafted(plan, values, shares[branches - 1])
            rate = self._verify(now, promised, spent + self._drafting(now, plan.drafted, branches), "redraft").rate
            if rate > best:
                best, plan.branches = rate, branches
            branches = min(2 * branches, self.branches) if branches < self.branches else branches + 1
        if plan.branches:
            self.patience["redraft"] = 1.0
        elif not plan.probing:
            prices = [self._drafting(now, plan.drafted, self.branches, at_once=at_once) for at_once in (True, False)]
            awaited = self.awaited.get("redraft") in [now.sequences[b] for b in plan.drafted]
            if awaited or self._probes("redraft", *prices):
                plan.branches, plan.probing = self.branches, True

    def finish(self, now: Situation, plan: Plan, values: NDArray[np.float64]) -> None:
        """Step 3: how many nodes each sequence verifies. values: ``[b, N - 1]``, of the nodes that there are."""
        plan.pace = self.costs.pace
        if not plan.drafted and not values.any():
            plan.nodes, plan.expected = [1] * len(values), float(len(values))
            bar = self._bar(now)
            plan.seconds, plan.calls = bar.seconds, bar.passes[0]
            return
        spent = self._drafting(now, plan.drafted, 0) if plan.drafted else 0.0
        spent += self._drafting(now, plan.drafted, plan.branches) if plan.branches else 0.0
        best = self._verify(now, values, spent, "redraft" if plan.branches else "draft")
        plan.nodes, plan.expected, plan.seconds, plan.promised = best.nodes, best.expected, best.seconds, best.promised
        plan.calls = plan.seconds / self.beside[len(values)][plan.kind]
        self.reach = min(NODES, max(self.reach - 1, 8, max(best.nodes) * 3 // 2 + 4))

    def learn(self, plan: Plan, came: int, seconds: float | None) -> None:
        """After a cycle. came: tokens committed. seconds: that it took, where that is known."""
        self.cycles += 1
        size = len(plan.nodes)
        if plan.looked and not plan.drafted and (bar := self.bars.get(size)):
            # What was chosen because of it took the time that it took; where nothing was, looking took its own.
            plain, wins = self.costs.pace * bar.seconds, self.wins.get(size, WINS / size**0.5)
            if plan.kind != "plain" and seconds:
                wins = self.wins[size] = wins + WINS_MEMORY * (came / size - seconds / plain - wins)
            won = plan.kind != "plain" and wins > 0
            self.vain = 0.0 if won else self.vain + plan.looked / plain / max(wins, WINS_LEAST)
            self.next_look = self.cycles + min(int(2 ** min(self.vain, RARELY)) - 1, RARELY)
        self.chosen[f"{plan.kind}, probing" if plan.probing else plan.kind] += 1
        if plan.promised:
            trusted = "draft" if plan.drafted else "text"
            kept, promised = self.kept[trusted]
            fading = 1 - KEPT_MEMORY
            self.kept[trusted] = kept * fading + came - len(plan.nodes), promised * fading + plan.promised
        if seconds is not None and plan.seconds:
            self.off.append(seconds / (plan.pace * plan.seconds))
            beside = self.beside[len(plan.nodes)]
            seen = min(max(seconds / (plan.pace * plan.calls), BESIDE_LEAST), BESIDE_MOST)
            beside[plan.kind] += BESIDE_MEMORY * (seen - beside[plan.kind])
        self.expected += plan.expected
        self.came += came
        self.credit = min(self.credit + BUDGET * plan.seconds / size, 8 * plan.seconds)

    def saw_drafts(self, now: Situation, plan: Plan, values: NDArray[np.float64]) -> None:
        """Take note of what first drafts are worth. values: ``[b, N - 1]``, without redrafts."""
        for b in plan.drafted:
            bucket, sequence = _bucket(now.text[b]), now.sequences[b]
            seen = np.zeros(NODES - 1)
            seen[: values.shape[1]] = values[b, : NODES - 1]
            expected = float(self.first[bucket, : values.shape[1]].sum())
            brought, usual = self.levels.get(sequence, (LEVEL_MEMORY, LEVEL_MEMORY))
            kept = 1 - MEMORY
            self.levels[sequence] = (brought * kept + float(seen.sum()), usual * kept + expected)
            self.first[bucket] += (PROBE_MEMORY if plan.probing else MEMORY) * (seen - self.first[bucket])

    def saw_redrafts(self, plan: Plan, before: NDArray[np.float64], after: NDArray[np.float64], share: float) -> None:
        """Take note of what redrafts added. before, after: ``[b, N - 1]``."""
        for b in plan.drafted:
            gained = np.zeros(NODES - 1)
            size = min(before.shape[1], after.shape[1], NODES - 1)
            gained[:size] = (after[b, :size] - before[b, :size]) / max(share, 0.1)
            self.more += MEMORY * (gained - self.more)

    def promised(self, now: Situation, plan: Plan) -> NDArray[np.float64]:
        """What the trees should be worth by what is known so far, ``[b, N - 1]``."""
        values = now.text.copy()
        if plan.drafted:
            values[plan.drafted] = self._drafted(now)[plan.drafted]
        return self._redrafted(plan, values, 1.0) if plan.branches else values

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended. Who comes in its place may have a context of another length."""
        self.levels.pop(sequence, None)
        self.awaited = {what: one for what, one in self.awaited.items() if one is not sequence}
        self.bars.clear()

    def _drafted(self, now: Situation) -> NDArray[np.float64]:
        """What first drafts would be worth, ``[b, N - 1]``; never less than the text alone."""
        curves = []
        for sequence, text in zip(now.sequences, now.text, strict=True):
            brought, usual = self.levels.get(sequence, (1.0, 1.0))
            curves.append(self.first[_bucket(text)] * (brought / usual))
        return np.maximum(np.minimum(np.array(curves), 1.0)[:, : now.text.shape[1]], now.text)

    def _redrafted(self, plan: Plan, values: NDArray[np.float64], share: float) -> NDArray[np.float64]:
        more = np.zeros_like(values)
        size = min(values.shape[1], NODES - 1)
        more[plan.drafted, :size] = self.more[:size] * share
        return np.clip(values + more, 0.0, 1.0)

    def _drafting(self, now: Situation, some: Many[int], branches: int, *, at_once: bool = False) -> float:
        """Seconds of a call of the second drafter, or with no branches of the first, for some of the sequences.

        What a drafter must catch up with beyond a usual cycle is shared among the cycles to come, unless ``at_once``.
        """
        cost = self.costs.second if branches else self.costs.first
        blocks = len(some) * self.block_size * max(branches, 1)
        lags = [now.lags[1 if branches else 0][b] for b in some]
        context = sum(now.contexts[b] for b in some)
        usually, all_of_it = blocks + sum(min(lag, self.block_size) for lag in lags), blocks + sum(lags)
        if at_once:
            return cost(all_of_it, len(some), context)
        seconds = cost(usually, len(some), context)
        if all_of_it == usually:
            return seconds
        left = np.mean([s.max_tokens - len(s.answer) for s in (now.sequences[b] for b in some)])
        beyond = max(0.0, cost(all_of_it, len(some), context) - seconds)
        return seconds + beyond / float(np.clip(left / 3, 1, HORIZON))

    def _verify(
        self, now: Situation, values: NDArray[np.float64], spent: float, drafting: Literal["draft", "redraft"] = "draft"
    ) -> "_Verified":
        """The nodes of all with which most tokens come a second, when ``spent`` seconds went before, on ``drafting``. What rows
        of others take is theirs.

        Args:
            values: ``[b, N - 1]``, falling.
        """
        bar = self._bar(now)
        beside = self.beside[len(values)][drafting if spent else "text"]
        pool = [(value, b) for b, own in enumerate(values.tolist()) for value in own if value > 1e-3]
        pool.sort(key=itemgetter(0), reverse=True)
        kept, promised = self.kept["draft" if spent else "text"]
        share = kept / promised
        total = promises = 0.0
        count, tokens, seconds = 0, float(len(values)), (spent + bar.passes[0]) * beside if spent else bar.seconds
        rate = tokens / (bar.alone + max(seconds - bar.seconds, 0.0))
        best = rate if spent else rate * (1 + _margin(len(values)))
        for nodes, ((value, _), pass_seconds) in enumerate(zip(pool, bar.passes[1:], strict=False), 1):
            total += value
            expected, takes = len(values) + share * total, (spent + pass_seconds) * beside
            better = expected / (bar.alone + max(takes - bar.seconds, 0.0))
            if better > best:
                best = rate = better
                count, promises, tokens, seconds = nodes, total, expected, takes
        nodes_of = [1] * len(values)
        for _, b in pool[:count]:
            nodes_of[b] += 1
        return _Verified(rate, nodes_of, promises, tokens, seconds)

    def _bar(self, now: Situation) -> Bar:
        return self.bar(len(now.sequences), now.context, now.others)

    def _rests(self, where: tuple[int, int]) -> bool:
        """Whether drafts need not be thought of: there are none, or they did not pay a few cycles ago."""
        left = self.rest.get(where, 0)
        self.rest[where] = max(0, left - 1)
        return left > 0 or not self.drafts

    def _probes(self, what: str, price: float, usual: float) -> bool:
        """Whether it is time to find out, at a price which is usually less; each time that it did not pay the next is further
        away."""
        if self.credit < price + usual * (self.patience[what] - 1):
            return False
        self.credit -= price + usual * (self.patience[what] - 1)
        self.patience[what] = min(2 * self.patience[what], 4.0)
        return True


@dataclass(frozen=True)
class _Verified:
    rate: float
    nodes: list[int]
    promised: float
    expected: float
    seconds: float


def _margin(sequences: int) -> float:
    return MARGIN + CROWD * (sequences - 1)


def _where(now: Situation) -> tuple[int, int]:
    """How many sequences there are, and how sure their texts are on average."""
    return len(now.sequences), _bucket(now.text[:, :1].sum(0) / len(now.sequences))


def _bucket(text: NDArray[np.float64]) -> int:
    """How sure the text is: it proposes nothing, something, or something likely."""
    likeliest = text[0] if len(text) else 0.0
    return 0 if likeliest < 0.05 else 1 if likeliest < 0.6 else 2
