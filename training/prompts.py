"""Prompts that the target invents itself, and none that overlaps what it is evaluated on."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from export.prompts import Prompt

OVERLAP = 13  # words in a row that a training prompt may not share with an evaluation prompt

# How a user's message begins, by task; the target writes on from there. No space at the end: it belongs to the next token.
OPENINGS: dict[str, Sequence[str]] = {
    "chat": ("", "What", "How can I", "Why", "Tell me about", "Write a story about", "Compose an email to"),
    "qa": ("Who", "When", "Where", "What is the", "Which", "How many", "How long"),
    "math": ("A train", "If", "How many", "There are", "Calculate", "Solve"),
    "code": ("Write a Python function that", "Write a program that", "Fix this code:\n", "```python\ndef"),
    "rewriting": ("Rewrite the following text", "Make this more concise:", "Paraphrase:"),
    "extraction": ("Extract", "List all names in this text:", "Based on the passage, answer the question.\n"),
    "summarization": ("Summarize:", "Summarize the following article in one sentence.\n"),
    "translation": ("Translate German to English:", "Translate to French:", "Translate this into Spanish:"),
}


def grams(text: str) -> set[tuple[str, ...]]:
    """All runs of ``OVERLAP`` words of a text, case folded."""
    words = text.casefold().split()
    return {tuple(words[i : i + OVERLAP]) for i in range(len(words) - OVERLAP + 1)}


def without_overlap(prompts: Iterable[Prompt], evaluation: Iterable[Prompt]) -> list[Prompt]:
    """Drop prompts that share ``OVERLAP`` words in a row with an evaluation prompt, or say all that one says."""
    evaluated = list(evaluation)
    forbidden = {gram for prompt in evaluated for turn in prompt.turns for gram in grams(turn)}
    whole = {" ".join(turn.casefold().split()) for prompt in evaluated for turn in prompt.turns}
    return [
        prompt
        for prompt in prompts
        if not any(grams(turn) & forbidden or " ".join(turn.casefold().split()) in whole for turn in prompt.turns)
    ]


def opening_ids(tokenizer: PreTrainedTokenizerBase, opening: str) -> list[int]:
    """Token ids of a conversation that breaks off in the user's first message, behind its opening words."""
    mark = "\u2063mark\u2063"
    messages = [{"role": "user", "content": mark}]
    before, _, _ = str(tokenizer.apply_chat_template(messages, tokenize=False)).partition(mark)
    return tokenizer(before + opening, add_special_tokens=False)["input_ids"]
