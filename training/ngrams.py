"""``python -m training.ngrams pipeline.yaml``: count what the target says behind its last tokens, in its corpus.

Makes the table of ``decoding/ngrams.py``, to be named in ``decoding.ngrams``. What follows a context counts once an answer: the
text knows what an answer repeats. Counts of shorter contexts are mixed in by Witten and Bell's rule (1991): a context that
has been followed by many different tokens knows less of the next one.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from decoding.ngrams import NGrams, key
from export import checkpoints
from export.config import UserError, load
from export.files import replacing
from training.corpus import Answer, read_corpus
from training.data import HELD_OUT

ORDER = 4  # tokens of a context, where a vocabulary is small enough
LEAST = 2  # times that a context must have been followed by something, once an answer and token
WIDTH = 4  # options of a context
DOUBT = 3  # what a kind of token that followed counts for; with less too much is promised of texts unlike the corpus

Options = list[tuple[int, float]]


def count(answers: Iterable[Answer], vocabulary: int, order: int = ORDER, least: int = LEAST, width: int = WIDTH) -> NGrams:
    """The table of some answers.

    Args:
        vocabulary: V. order: tokens of a context, at most. least: times that a context is followed
            by something, the same token once an answer. width: options of each.

    Raises:
        ValueError: there is nothing to count, or contexts of such a vocabulary have no numbers.
    """
    if least < 1 or width < 1:
        raise ValueError(f"--least, --options: found {least} and {width}, allowed: 1 or more")
    if order > longest(vocabulary, order):
        raise ValueError(f"--order: found {order}, allowed with a vocabulary of {vocabulary}: fewer")
    seen: list[defaultdict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(order + 1)]
    for answer in answers:
        tokens, start = answer.tokens, len(answer.prompt_ids)
        own = {
            (tuple(tokens[place - size : place]), tokens[place])
            for place in range(start, len(tokens))
            for size in range(min(order, place) + 1)
        }
        for context, token in own:
            seen[len(context)][context][token] += 1
    if not seen[0]:
        raise ValueError("found no answer, allowed: one at least")
    mixed: dict[tuple[int, ...], Options] = {(): _mixed(seen[0][()], [], width)}
    for contexts in seen[1:]:
        for context, counts in contexts.items():
            if counts.total() >= least:
                mixed[context] = _mixed(counts, mixed[context[1:]], width)
    options = np.zeros((len(mixed), width), np.int32)
    probabilities = np.zeros(options.shape, np.float16)
    order_of = sorted(mixed, key=lambda context: key(context, vocabulary))
    for row, context in enumerate(order_of):
        for option, (token, probability) in enumerate(mixed[context]):
            options[row, option], probabilities[row, option] = token, probability
    keys = np.array([key(context, vocabulary) for context in order_of], np.int64)
    return NGrams(vocabulary, order, keys, options, probabilities)


def _mixed(counts: Counter[int], shorter: Options, width: int) -> Options:
    """The likeliest tokens, with what a shorter context says."""
    total, kinds = counts.total(), DOUBT * len(counts) if shorter else 0
    # What is no option of the shorter one is less likely there than any that is: nothing, to keep it simple.
    mixed = {token: probability * kinds / (total + kinds) for token, probability in shorter}
    for token, times in counts.most_common(2 * width):
        mixed[token] = mixed.get(token, 0.0) + times / (total + kinds)
    return sorted(mixed.items(), key=lambda each: -each[1])[:width]


def longest(vocabulary: int, most: int = ORDER) -> int:
    """Tokens of a context, ``most`` or as many as contexts of such a vocabulary have numbers for."""
    return max(order for order in range(most + 1) if (vocabulary + 1) ** order < 2**63)


def hits(table: NGrams, answers: Sequence[Answer]) -> tuple[float, float]:
    """How often the likeliest token, and one of the options, was what the target said."""
    first = any_of_them = places = 0
    for answer in answers:
        tokens, start = answer.tokens, len(answer.prompt_ids)
        for place in range(start, len(tokens)):
            options = [token for _, token, _ in table.options(tuple(tokens[max(0, place - table.order) : place]))]
            first += options[:1] == [tokens[place]]
            any_of_them += tokens[place] in options
            places += 1
    return first / max(places, 1), any_of_them / max(places, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.ngrams", description=__doc__.split("\n\n")[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--output", type=Path, default=Path("build/training/ngrams.npz"), help="(default: %(default)s)")
    parser.add_argument(
        "--order",
        type=int,
        choices=range(1, 6),
        help=f"tokens of a context (default: {ORDER}, or as many as contexts of the vocabulary have numbers for)",
    )
    parser.add_argument(
        "--least",
        type=int,
        default=LEAST,
        help="times that something must have followed a context (default: %(default)s)",
    )
    parser.add_argument("--options", type=int, default=WIDTH, help="tokens kept behind each (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        pipeline = load(args.pipeline)
        folder = checkpoints.open_target(checkpoints.locate(pipeline.target.checkpoint, pipeline.target.revision))
        config = checkpoints.read_json(folder / "config.json", f"target {folder}")
        vocabulary = int(config["vocab_size"])
        how = vocabulary, args.order or longest(vocabulary), args.least, args.options
        answers = read_corpus(Path(pipeline.training.corpus))
        held_out, others = answers[::HELD_OUT], [a for i, a in enumerate(answers) if i % HELD_OUT]
        if others:
            first, any_of_them = hits(count(others, *how), held_out)
            print(f"of {len(held_out)} answers that were not counted: {first:.1%} of tokens are the likeliest option, ", end="")
            print(f"{any_of_them:.1%} one of {args.options}", flush=True)
        table = count(answers, *how)
        with replacing(args.output) as partial:
            table.write(partial)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = args.output.stat().st_size / 1e6
    print(f"{args.output}: {len(table.keys)} contexts of {len(answers)} answers, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
