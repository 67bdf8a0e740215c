"""What probabilities are worth: corrected by what the target said, for each origin and depth (docs/method.md §4)."""

import math

from decoding.acceptance import Walk
from decoding.sources import ORIGINS, TEXT

DEPTHS = 17  # deeper nodes are corrected as the deepest of these
RATE = 0.03  # of a step along the gradient of the log-loss
SHARED = 0.5  # of a step is taken for the origin as a whole
TEXT_PRIOR = -0.2  # where the text has a say; seen with the demo's target: sources that agree know less than two would
LIMIT = 1.5  # of a correction, in logits


class Calibration:
    """Corrections of the logit of a node's probability, its parent being accepted: of an origin, and of one at a depth."""

    def __init__(self) -> None:
        origins = 1 << len(ORIGINS)
        self.shared = [TEXT_PRIOR if origin & TEXT else 0.0 for origin in range(origins)]
        self.own = [[0.0] * DEPTHS for _ in range(origins)]
        self._factors = [[1.0] * origins for _ in range(DEPTHS)]
        self._stale = set(range(origins))

    @property
    def factors(self) -> list[list[float]]:
        """``[DEPTHS][origins]``, what the odds of a node are multiplied by; the last row for deeper ones, too; the same
        lists each time."""
        for origin in self._stale:
            shared = self.shared[origin]
            for depth, own in enumerate(self.own[origin]):
                self._factors[depth][origin] = math.exp(_limited(shared + own))
        self._stale.clear()
        return self._factors

    def corrected(self, values: list[float], origin: int) -> list[float]:
        """Values as one origin's first nodes are corrected."""
        if not values:
            return []
        factor = self.factors[1][origin]
        return [value * factor / (1 - value + value * factor) for value in values]

    def learn(self, walk: Walk) -> None:
        """Compare a tree with the walk through it: every child of an accepted node was put to the test."""
        accepted = set(walk.accepted)
        for node in range(1, len(walk.parents)):
            parent = walk.parents[node]
            if parent in accepted and walk.values[node] > 0:
                step = RATE * ((node in accepted) - walk.values[node] / walk.values[parent])
                origin, depth = walk.origins[node], min(walk.depths[node], DEPTHS - 1)
                self._stale.add(origin)
                self.shared[origin] = _limited(self.shared[origin] + SHARED * step)
                self.own[origin][depth] = _limited(self.own[origin][depth] + (1 - SHARED) * step)


def _limited(logit: float) -> float:
    return max(-LIMIT, min(logit, LIMIT))
