import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests import tiny
from triton_repo.text import _BYTES, STOP_WORDS, Growing, StopWords, Vocabulary

any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
WORDS = ["the quick brown fox, jumps over the lazy dog. " * 20, "größer 日 🎉 don't"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(decoder):
    """Byte fallback as in SentencePiece: what the vocabulary lacks is said in single bytes."""
    base = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    base.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    base.decoder = decoder
    special = ["<unk>", "<s>", "</s>", *BYTES]
    base.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False))
    # Bytes are no special tokens, only in the vocabulary.
    fresh = Tokenizer(models.BPE(base.get_vocab(), [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fresh.normalizer, fresh.decoder = base.normalizer, decoder
    fresh.add_special_tokens(["<unk>", "<s>", "</s>"])
    return fresh


def unigram():
    base = Tokenizer(models.Unigram())
    base.pre_tokenizer = pre_tokenizers.Metaspace()
    base.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>", "<s>"], show_progress=False)
    base.train_from_iterator(WORDS, trainer)
    return base


def wordpiece():
    base = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    base.decoder = decoders.WordPiece()
    base.train_from_iterator(WORDS, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"], show_progress=False))
    return base


def suffixed():
    base = Tokenizer(models.BPE(unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    base.decoder = decoders.BPEDecoder()
    base.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=80, end_of_word_suffix="</w>", special_tokens=["<unk>"], show_progress=False)
    )
    return base


def undecoded():
    base = wordpiece()
    base.decoder = None
    return base


TOKENIZERS = {
    "byte level": tiny.tokenizer().backend_tokenizer,
    "byte fallback": sentencepiece(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
        )
    ),
    "byte fallback, metaspace": sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "spaces stripped": sentencepiece(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 3, 0)],
        )
    ),
    "metaspace": unigram(),
    "wordpiece": wordpiece(),
    "suffixes": suffixed(),
    "no decoder": undecoded(),
}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
BYTE_LEVEL, FALLBACK = VOCABULARIES["byte level"], VOCABULARIES["byte fallback"]


def byte(name, value):
    """The tokens of a single byte, if the tokenizer has one for it."""
    names = {f"<0x{value:02X}>", next(letter for letter, number in _BYTES.items() if number == value), "▁" * (value == 32)}
    return [id for token, id in TOKENIZERS[name].get_vocab().items() if token in names]


def stream(vocabulary, ids, stop_words=(), seed=None):
    """The pieces that responses of random numbers of tokens bring, and the answer."""
    rng = random.Random(seed)
    growing, pieces, start = Growing(vocabulary, StopWords(stop_words) if stop_words else None), [], 0
    while start < len(ids) and not growing.stopped:
        size = 1 if seed is None else rng.randint(1, 4)
        pieces.append(growing.add(ids[start : start + size], final=start + size >= len(ids)))
        start += size
    return pieces, growing


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(numbers=st.lists(st.integers(0, 2**20), max_size=60), seed=st.integers(0, 99))
def test_pieces_of_any_tokens_make_up_their_decoding(name, numbers, seed):
    """Random tokens are mostly not UTF-8: cut characters, stray bytes, special tokens."""
    vocabulary = VOCABULARIES[name]
    ids = [number % TOKENIZERS[name].get_vocab_size() for number in numbers]
    for pieces in (stream(vocabulary, ids, seed=seed)[0], stream(vocabulary, ids, ["never there \0"], seed)[0]):
        assert "".join(pieces) == TOKENIZERS[name].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.tuples(st.integers(0, 2**20) | st.sampled_from("\n \t\x80\xe6a"), st.integers(1, 40)), max_size=6),
    seed=st.integers(0, 99),
)
def test_pieces_of_repeated_tokens_make_up_their_decoding(name, numbers, seed):
    """Runs of one token, of white space and bytes above all, are longer than the window."""
    vocabulary, ids = VOCABULARIES[name], []
    for number, count in numbers:
        some = [number % TOKENIZERS[name].get_vocab_size()] if isinstance(number, int) else byte(name, ord(number))
        ids += some * count
    for pieces in (stream(vocabulary, ids, seed=seed)[0], stream(vocabulary, ids, ["never there \0"], seed)[0]):
        assert "".join(pieces) == TOKENIZERS[name].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=30, deadline=None)
@given(text=any_text, seed=st.integers(0, 99))
def test_pieces_of_a_text_make_up_its_decoding(name, text, seed):
    ids = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    pieces, _ = stream(VOCABULARIES[name], ids, seed=seed)
    assert "".join(pieces) == TOKENIZERS[name].decode(ids, skip_special_tokens=True)
    if name == "byte level":
        assert "".join(pieces) == text


@pytest.mark.parametrize("text", ["日本語", "🎉🎉", "ß", "a\u0301", "\U0001f468\u200d\U0001f469", "  spaces  kept ", "\ufffd"])
@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
def test_one_token_at_a_time(name, text):
    ids = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    assert "".join(stream(VOCABULARIES[name], ids)[0]) == text


def test_a_character_is_shown_as_soon_as_it_is_whole():
    ids = TOKENIZERS["byte level"].encode("日本x").ids
    pieces, _ = stream(BYTE_LEVEL, ids)
    assert len(ids) > 3
    assert [piece for piece in pieces if piece] == ["日", "本", "x"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from("abc日🎉"), max_size=24).map("".join),
    st.lists(st.lists(st.sampled_from("abc日🎉"), min_size=1, max_size=4).map("".join), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_a_stop_word_ends_the_text_and_is_never_shown(text, stop_words, seed):
    ids = TOKENIZERS["byte level"].encode(text, add_special_tokens=False).ids
    found = [(text.find(word) + len(word), text.find(word)) for word in stop_words if word in text]
    pieces, answer = stream(BYTE_LEVEL, ids, stop_words, seed)
    assert "".join(pieces) == (text[: min(found)[1]] if found else text)
    assert answer.stopped == bool(found)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abc日"), max_size=30).map("".join), st.sampled_from(["ab", "c", "日b", "bca"]))
def test_an_answer_counts_as_many_tokens_however_it_came(text, word):
    """Up to the token that completes the stop word, though a cycle committed more."""
    ids = TOKENIZERS["byte level"].encode(text, add_special_tokens=False).ids
    answers = [stream(BYTE_LEVEL, ids, [word], seed)[1] for seed in (None, 1, 2)]
    upto = next((n for n in range(len(ids) + 1) if word in TOKENIZERS["byte level"].decode(ids[:n])), len(ids))
    assert [answer.tokens for answer in answers] == [upto] * 3


@pytest.mark.parametrize("word", ["<s>", "fox<s>", "fox<s> the"])
def test_a_stop_word_of_special_tokens(word):
    ids = TOKENIZERS["byte level"].encode("quick fox<s> the lazy").ids
    assert 0 in ids
    pieces, answer = stream(BYTE_LEVEL, ids, [word], seed=3)
    assert (answer.stopped, "".join(pieces)) == (True, "quick fox<s> the lazy".partition(word)[0])
    assert "".join(stream(BYTE_LEVEL, ids, ["never"], seed=3)[0]) == "quick fox the lazy"


def test_what_could_become_a_stop_word_is_shown_at_the_end():
    ids = TOKENIZERS["byte level"].encode("a fo").ids
    assert "".join(stream(BYTE_LEVEL, ids, ["fox"])[0]) == "a fo"


def test_stop_words_that_are_too_long():
    StopWords(["x" * STOP_WORDS])
    with pytest.raises(ValueError, match="stop_words: found 16385 characters together, allowed: up to 16384"):
        StopWords(["x" * STOP_WORDS, "y"])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stop_words", [[], ["never there"]])
@pytest.mark.parametrize("text", ["the quick brown fox jumps, größer 日本語 " * 100, "a" + "\n" * 1000, "a" + " " * 1000, None])
def test_the_decoded_window_does_not_grow(monkeypatch, name, stop_words, text):
    vocabulary, work, widest = Vocabulary(TOKENIZERS[name]), 0, 0
    ids = vocabulary.tokenizer.encode(text).ids if text else byte(name, 0x80) * 1000

    def decode(some):
        nonlocal work
        work += len(some)
        return Vocabulary.decode(vocabulary, some)

    monkeypatch.setattr(vocabulary, "decode", decode)
    growing, pieces = Growing(vocabulary, StopWords(stop_words) if stop_words else None), []
    for token in ids:
        pieces.append(growing.add([token]))
        widest = max(widest, len(growing._window))
    pieces.append(growing.add([], final=True))
    assert "".join(pieces) == vocabulary.tokenizer.decode(ids)
    assert len(ids) > 900 or name in ("metaspace", "wordpiece", "suffixes", "no decoder"), "which leave white space out"
    assert widest <= 64
    assert work <= 64 * (len(ids) + 1)


def test_a_thousand_stop_words_cost_what_one_costs():
    ids = TOKENIZERS["byte level"].encode("the quick brown fox " * 100).ids

    def seconds(words):
        automaton = StopWords(words)
        best = float("inf")
        for _ in range(5):
            growing, began = Growing(BYTE_LEVEL, automaton), time.perf_counter()
            for token in ids:
                growing.add([token])
            best = min(best, time.perf_counter() - began)
        return best

    one, thousand = seconds(["never there"]), seconds([f"fox {n}" for n in range(1000)])
    assert thousand < 3 * one


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "byte fallback, metaspace"])
def test_pieces_are_the_text_even_where_a_character_is_split(name):
    vocabulary = VOCABULARIES[name]
    text = "the quick größer 日本 🎉 fox"
    pieces = [vocabulary.piece(token) for token in vocabulary.tokenizer.encode(text, add_special_tokens=False).ids]
    assert any(isinstance(piece, list) for piece in pieces)
    joined = b"".join(bytes(piece) if isinstance(piece, list) else piece.encode() for piece in pieces)
    assert joined.decode().strip() == text


def test_special_tokens_are_pieces_by_name():
    assert BYTE_LEVEL.piece(1) == "</s>"
