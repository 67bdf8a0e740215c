"""A trace as the JSON text that its client gets (docs/triton.md)."""

import json
from typing import Any

from decoding.sources import ORIGINS
from decoding.trace import Cycle, Trace
from triton_repo.text import Growing, Vocabulary


def told(trace: Trace, vocabulary: Vocabulary) -> str:
    """The cycles so far, with the text that each added and what every token in them stands for."""
    cycles, growing = list(trace.cycles), Growing(vocabulary)  # another cycle may be running
    start = cycles[0].began if cycles else 0.0
    last = cycles[-1] if cycles and not trace.more_cycles else None
    told = [_cycle(cycle, start, growing, final=cycle is last) for cycle in cycles]
    ids = {token for cycle in cycles for token in (*cycle.tokens, *cycle.said)}
    return json.dumps(
        {
            "mode": trace.mode,
            "origins": ORIGINS,
            "cycles": told,
            "left_out": {"cycles": trace.more_cycles, "tokens": trace.more_tokens},
            "tokens": {token: vocabulary.piece(token) for token in sorted(ids)},
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def _cycle(cycle: Cycle, start: float, growing: Growing, *, final: bool) -> dict[str, Any]:
    choice = vars(cycle.choice) if cycle.choice else None
    changed = {
        "began": round(cycle.began - start, 7),
        "laps": [(stage, round(seconds, 7)) for stage, seconds in cycle.laps],
        "values": [round(value, 4) for value in cycle.values],
        "choice": choice and {name: round(x, 7) if isinstance(x, float) else x for name, x in choice.items()},
        "text": growing.add(cycle.said, final),
    }
    return vars(cycle) | changed
