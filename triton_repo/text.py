"""A growing answer as text: what of it can be shown already, and the stop word that ends it.

Work for a token does not grow with the answer's length (a window of it is decoded, whatever it says), nor with the number of
stop words (one automaton knows them all).
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # what bytes decode to that are not UTF-8, or not yet
STOP_WORDS = 16_384  # characters of a request's stop words together
SPAN = 8  # tokens, at least, that stay when the window is cut: they tell which bytes at its end are no character yet
WINDOW = 3 * SPAN  # tokens of which it is cut
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# How byte-level BPE writes bytes: those that are printable in Latin-1 as themselves, the others from U+0100 on (GPT-2's
# encoder.py).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(0x100 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}


class Vocabulary:
    """What a tokenizer's tokens are as text.

    Attributes:
        hidden: the text of each special token, which no answer shows.
        bytes: tokens that stand for a single byte. A run of them is decoded whole or not at all, so none of it is shown
            before it has ended.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.hidden = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        falls_back = '"ByteFallback"' in json.dumps(json.loads(tokenizer.to_str())["decoder"])
        vocabulary = tokenizer.get_vocab() if falls_back else {}
        self.bytes = frozenset(id for token, id in vocabulary.items() if _BYTE.fullmatch(token))
        # Behind another token: alone, decoders of SentencePiece's kind leave out the space that a token begins with.
        self._before = next((ids for letter in "x.0" if (ids := tokenizer.encode(letter, add_special_tokens=False).ids)), [])

    def text_of(self, token: int) -> str:
        """A token alone, special ones too; of half a character what stands for such."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def piece(self, token: int) -> str | list[int]:
        """What a token adds to a text; where it holds part of a character, and the tokenizer works on bytes, its bytes."""
        if token in self.hidden:
            return self.hidden[token]
        text = self.decode([*self._before, token])[len(self.decode(self._before)) :]
        if REPLACEMENT not in text:
            return text
        name = self.tokenizer.id_to_token(token) or ""
        if _BYTE.fullmatch(name):
            return [int(name[3:5], 16)]
        known = [_BYTES.get(character) for character in name]
        return text if None in known else [byte for byte in known if byte is not None]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class StopWords:
    """The automaton of Aho and Corasick (1975): a step a character, however many words there are.

    A state is a beginning of some word: the longest one that the text so far ends with.

    Attributes:
        depth: length of each state's beginning. ended: length of the longest word that ends there, or 0.

    Raises:
        ValueError: the words together are too long.
    """

    def __init__(self, words: Iterable[str]) -> None:
        words = list(words)
        if (size := sum(map(len, words))) > STOP_WORDS:
            raise ValueError(f"stop_words: found {size} characters together, allowed: up to {STOP_WORDS}")
        self._next: list[dict[str, int]] = [{}]
        self.depth, self.ended = [0], [0]
        for word in words:
            state = 0
            for character in word:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self.depth.append(self.depth[state] + 1)
                    self.ended.append(0)
                    self._next.append({})
                state = self._next[state][character]
            self.ended[state] = len(word)
        self._shorter = [0] * len(self._next)  # the state of the longest end of a state's beginning that is one itself
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, longer in self._next[state].items():
                self._shorter[longer] = self.step(self._shorter[state], character)
                self.ended[longer] = self.ended[longer] or self.ended[self._shorter[longer]]
                queue.append(longer)

    def step(self, state: int, character: str) -> int:
        while character not in self._next[state] and state:
            state = self._shorter[state]
        return self._next[state].get(character, 0)


class Growing:
    """An answer that grows by tokens, shown as it does.

    What might still change is held back: a character whose bytes are not all there, and the beginning of what could become
    a stop word. So the pieces make up exactly the text that the tokenizer decodes from all tokens, up to the first stop word
    that they complete. A stop word may hold the text of special tokens.

    Attributes:
        tokens: of the answer, up to the one that completes a stop word.
        stopped: whether a stop word has ended it.
    """

    def __init__(self, vocabulary: Vocabulary, stop_words: StopWords | None = None) -> None:
        self.vocabulary, self._words = vocabulary, stop_words
        self.tokens, self.stopped = 0, False
        self._window: list[int] = []  # tokens that are decoded, the last ones of the answer
        self._run: list[int] = []  # byte tokens behind it: how they read is open until they end, however many there are
        self._decoded = 0  # characters of the window's text that were taken
        self._state = 0
        self._held: list[tuple[str, bool]] = []  # characters that a stop word could take back, and whether they are shown

    def add(self, ids: Sequence[int], final: bool = False) -> str:
        """The text that more tokens add, or that is left if ``final``. What follows a stop word is left out."""
        if self._words is None:
            self.tokens += len(ids)
            for token in ids:
                if token not in self.vocabulary.hidden:
                    self._take(token)
            return self._decode(final)
        pieces = []
        for token in ids:
            self.tokens += 1
            if token in self.vocabulary.hidden:
                pieces.append(self._match(self.vocabulary.hidden[token], shown=False))
            else:
                self._take(token)
                pieces.append(self._match(self._decode(final=False), shown=True))
            if self.stopped:
                return "".join(pieces)
        if final:
            pieces.append(self._match(self._decode(final=True), shown=True))
            pieces += [character for character, shown in self._held if shown]
            self._held = []
        return "".join(pieces)

    def _take(self, token: int) -> None:
        self._run.append(token)
        if token not in self.vocabulary.bytes:
            self._end_run()

    def _end_run(self) -> None:
        self._window += self._run
        self._run = []

    def _decode(self, final: bool) -> str:
        """The characters that the window has more than were taken."""
        if final:
            self._end_run()
        text = self.vocabulary.decode(self._window) if final else self._text(self._window)
        new = text[self._decoded :]
        self._decoded = max(self._decoded, len(text))
        if len(self._window) >= WINDOW:
            self._shorten()
        return new

    def _shorten(self) -> None:
        """Keep the last tokens of the window, on which alone it depends what later ones add; and letters before them, because
        decoders treat the first token, and the first spaces, in other ways than the rest. Of a long run of white space the
        middle is left out."""
        span = SPAN
        while not (text := self._text(self._window[-span:])).strip() and span < len(self._window):
            span *= 2
        shorter = self._window[-span:]
        if span > SPAN:  # its second half is white space
            shorter = self._window[-span : -span // 2] + self._window[-SPAN:]
            text = self._text(shorter)
        if text:
            self._window, self._decoded = shorter, len(text)

    def _text(self, ids: Sequence[int]) -> str:
        """What they say, without what later bytes can still change: of a character up to three stand before its last one."""
        text = self.vocabulary.decode(ids)
        return text[: max(len(text.rstrip(REPLACEMENT)), len(text) - 3)]

    def _match(self, text: str, shown: bool) -> str:
        """Take characters in; returns those that no stop word can take back any more."""
        assert self._words is not None
        released = []
        for character in text:
            self._state = self._words.step(self._state, character)
            self._held.append((character, shown))
            if ended := self._words.ended[self._state]:
                self.stopped = True
                released += self._held[:-ended]
                self._held = []
                break
            free = len(self._held) - self._words.depth[self._state]
            released += self._held[:free]
            del self._held[:free]
        return "".join(character for character, visible in released if visible)
