"""Where the time of a cycle goes, by stage."""

import time
from collections import defaultdict
from typing import Literal

Stage = Literal["prompts", "tree", "first_draft", "redraft", "target", "commit"]


class Clock:
    """Told at the end of each stretch of a cycle what it was spent on.

    A device's calls come back before they are done: what they take shows where the cycle waits for them, in ``commit``.

    Attributes:
        began: ``time.perf_counter()`` of the cycle's beginning. laps: its stretches so far in seconds, without gaps.
        seconds: of all cycles, by stage.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.start()

    @property
    def cycle(self) -> float:
        """Seconds since the cycle's beginning, without passes over prompts alone."""
        return time.perf_counter() - self.began - sum(took for stage, took in self.laps if stage == "prompts")

    def start(self) -> None:
        """Begin a cycle."""
        self.began = self._last = time.perf_counter()
        self.laps: list[tuple[Stage, float]] = []

    def mark(self, stage: Stage) -> None:
        """The time since the last mark was this stage's."""
        now = time.perf_counter()
        self.laps.append((stage, now - self._last))
        self.seconds[stage] += now - self._last
        self._last = now
