import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from triton_repo.text import shown

TOKENIZER = tiny.tokenizer().backend_tokenizer
any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


def stream(ids, stop_words, sizes):
    """The pieces that responses of the given numbers of tokens would bring, and the final text."""
    pieces, before, start = [], 0, 0
    while start < len(ids):
        start += next(sizes)
        final = start >= len(ids)
        now, stopped = shown(TOKENIZER, ids[:start], stop_words, final or _stops(ids[:start], stop_words))
        then, _ = shown(TOKENIZER, ids[:before], stop_words, final=False)
        assert now.startswith(then)
        pieces.append(now[len(then) :])
        before = start
        if stopped:
            break
    return pieces


def _stops(ids, stop_words):
    return shown(TOKENIZER, ids, stop_words, final=True)[1]


def sizes(seed):
    rng = random.Random(seed)
    while True:
        yield rng.randint(1, 4)


@settings(max_examples=200, deadline=None)
@given(any_text, st.integers(0, 99))
def test_pieces_of_a_text_make_up_the_text(text, seed):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert "".join(stream(ids, [], sizes(seed))) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=40), st.integers(0, 99))
def test_pieces_of_any_tokens_make_up_their_decoding(ids, seed):
    """Random tokens are mostly not UTF-8: cut characters, stray bytes, special tokens."""
    assert "".join(stream(ids, [], sizes(seed))) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from("abc日🎉"), max_size=24).map("".join),
    st.lists(st.lists(st.sampled_from("abc日🎉"), min_size=1, max_size=4).map("".join), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_a_stop_word_ends_the_text_and_is_never_shown(text, stop_words, seed):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    found = [(text.find(word) + len(word), text.find(word)) for word in stop_words if word in text]
    expected = text[: min(found)[1]] if found else text
    assert "".join(stream(ids, stop_words, sizes(seed))) == expected


@pytest.mark.parametrize("text", ["日本語", "🎉🎉", "ß", "a\u0301", "\U0001f468\u200d\U0001f469", "  spaces  kept ", "\ufffd"])
def test_one_token_at_a_time(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert "".join(stream(ids, [], iter([1] * 99))) == text
