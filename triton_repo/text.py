"""Answers as text: what of a growing answer can be shown already."""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # what bytes decode to that are not UTF-8, or not yet


def shown(tokenizer: Tokenizer, ids: Sequence[int], stop_words: Sequence[str], final: bool) -> tuple[str, bool]:
    """Decode an answer up to the first stop word that it completes.

    While the answer grows, what might still change is held back: a character whose bytes are not all there, and the
    beginning of what could become a stop word. So each text is the beginning of the next, and the pieces between them
    make up exactly the final text.

    Args:
        ids: all of the answer so far. final: whether nothing follows.

    Returns:
        The text, special tokens left out, and whether a stop word ended it.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    found = [(place + len(word), place) for word in stop_words if (place := text.find(word)) >= 0]
    if found:
        return text[: min(found)[1]], True
    if not final:
        text = text.rstrip(REPLACEMENT)
        text = text[: len(text) - max((_overlap(text, word) for word in stop_words), default=0)]
    return text, False


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of the text that is a beginning of the word, the whole word aside."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
