"""How a request wants its tokens chosen."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Greedy, or a draw at a temperature within top-k and then top-p.

    Attributes:
        temperature: 0 is greedy; else the logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: then keep the fewest likeliest tokens whose probabilities reach p; 1 keeps all.
        seed: of the request's random numbers.

    Raises:
        ValueError: a value out of its range, NaN included.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < math.inf):
            raise ValueError(f"temperature: found {self.temperature}, allowed: 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k: found {self.top_k}, allowed: 0 (all tokens) or a positive integer")
        if not (0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p: found {self.top_p}, allowed: above 0 and at most 1")
        if self.seed < 0:
            raise ValueError(f"seed: found {self.seed}, allowed: 0 or a positive integer")
