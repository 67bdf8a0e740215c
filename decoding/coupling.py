"""What a request's own random numbers say of the tokens that the target will draw (docs/method.md §4).

The target draws the token of the largest probability / number, where each token's number is exponential and follows from the
request's seed, the token's place and the token alone (``decoding.engines.Pass.choose``). So the numbers are known before the
target is asked: a draft whose number is small is likelier to be drawn than its probability says, one whose number is large is
less likely. What is drawn does not change by it, only what is thought worth verifying; a seed's answer is the same without.
That a draft and its target draw by the same numbers is called coupling (Daliri, Musco and Suresh, arXiv 2408.07978).
"""

import math

from decoding.sequence import Sequence

# Were a source's probabilities exact, the numbers would tell almost everything. As they are, the odds of what sources propose
# change by a power of the number, which rises with the temperature: seen on sampled answers of the demo's target.
DOUBT = 1.2
USUAL = 2.2  # times a number that changes nothing
LAST = 17  # depths; deeper nodes are taken as they are
BITS = 2**64 - 1


class Coupling:
    """A sequence's numbers for its next tokens.

    Args:
        uniforms: of the next tokens, each in [0, 1). temperature: above 0.
    """

    def __init__(self, uniforms: list[float], temperature: float) -> None:
        self.streams = [_mix(int(uniform * 2.0**53)) for uniform in uniforms]
        self.power = temperature / math.hypot(temperature, math.sqrt(DOUBT))

    def factor(self, depth: int, token: int) -> float:
        """What the odds of a token are multiplied by. depth: 1 for the next token."""
        if depth > len(self.streams):
            return 1.0
        return (USUAL * exponential(self.streams[depth - 1], token)) ** -self.power

    def coupled(self, p: float, depth: int, token: int) -> float:
        """The probability of a token, by these numbers."""
        odds = p * self.factor(depth, token)
        return odds / (1 - p + odds)


def of(sequence: Sequence) -> Coupling | None:
    """None where the likeliest token is chosen."""
    sampling = sequence.sampling
    if sampling.temperature == 0 or sampling.top_k == 1:
        return None
    return Coupling(sequence.uniforms(LAST).tolist(), sampling.temperature)


def exponential(stream: int, token: int) -> float:
    """A token's number: SplitMix64's, as the engines' (``engines/sampling.py``); a test holds both together."""
    bits = _mix((stream + (token + 1) * 0x9E3779B97F4A7C15) & BITS)
    return -math.log(((bits >> 11) + 0.5) * 2.0**-53)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)
