"""What a text foresees of itself: tokens that the target says and a lookup proposes anyway need no drafter."""

from decoding.text import SIZES, TextIndex
from training.corpus import Answer

LEAST = 2  # tokens of a match that is more often right than wrong


def foreseen(answer: Answer) -> list[int]:
    """For each token of prompt and answer, how many of those behind it the text up to there foresees: its likeliest
    continuation says them. 0 before the prompt's last token."""
    text, sizes = list(answer.prompt_ids), [size for size in SIZES if size >= LEAST]
    index, runs = TextIndex(text), [0] * (len(text) - 1)
    for said, token in enumerate(answer.response_ids):
        found = index.lookup(said, sizes)
        run, ahead = 0, answer.response_ids[said:]
        while found and run < min(len(ahead), len(found[0].tokens)) and found[0].tokens[run] == ahead[run]:
            run += 1
        runs.append(run)
        text.append(token)
    return [*runs, 0]
