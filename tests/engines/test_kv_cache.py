import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.kv_cache import SMALLEST, Buffer, KVCache, capacity_for, gather

COUNT, HEADS, DIM = 4, 2, 3


def allocate(sequences, capacity):
    arrays = [np.zeros((sequences, HEADS, capacity, DIM), np.float32) for _ in range(COUNT)]
    return [Buffer(array, array) for array in arrays]


def empty(sequences=1):
    return KVCache(sequences, capacity_for(0), allocate)


def rows(rng, sequences, count):
    return [rng.normal(size=(sequences, HEADS, count, DIM)).astype(np.float32) for _ in range(COUNT)]


def contents(cache, b):
    return [buffer.array[b, :, : cache.lengths[b]].copy() for buffer in cache.buffers]


def test_capacities():
    assert [capacity_for(n) for n in (0, 1, 256, 257, 512, 513)] == [256, 256, 256, 512, 512, 1024]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("join"), st.integers(0, 300)),
            st.tuples(st.just("leave"), st.integers(0, 9)),
            st.tuples(st.just("replace"), st.integers(0, 300)),
            st.tuples(st.just("append"), st.lists(st.integers(0, 11), max_size=8, unique=True)),
        ),
        max_size=12,
    )
)
def test_any_history_holds_what_a_list_would(history):
    rng = np.random.default_rng(0)
    cache, model = None, []
    for action, value in history:
        if action == "join":
            joining = empty().fitting(value)
            new = rows(rng, 1, value)
            joining.append(new, [range(value)])
            cache = joining if cache is None else gather([*((cache, b) for b in range(len(model))), (joining, 0)])
            model.append([part[0] for part in new])
        elif action == "leave" and model:
            gone = value % len(model)
            del model[gone]
            rest = [(cache, b) for b in range(len(model) + 1) if b != gone]
            cache = gather(rest) if rest else None
        elif action == "replace" and model:
            joining, place = empty().fitting(value), value % len(model)
            new = rows(rng, 1, value)
            joining.append(new, [range(value)])
            cache = cache.fitting(value)
            cache.replace(place, joining, 0)
            model[place] = [part[0] for part in new]
        elif action == "append" and model and value:
            new = rows(rng, len(model), 12)
            cache = cache.fitting(int(cache.lengths.max()) + len(value))
            chosen = [value[b % 3 :] for b in range(len(model))]
            cache.append(new, chosen)
            for b, value in enumerate(chosen):
                model[b] = [np.concatenate([had, part[b][:, value]], axis=1) for had, part in zip(model[b], new, strict=True)]
        for b, expected in enumerate(model):
            for found, wanted in zip(contents(cache, b), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
        if cache is not None:
            assert all(np.isfinite(buffer.array).all() for buffer in cache.buffers)
            assert cache.capacity >= cache.lengths.max()


def test_a_full_cache_grows_and_a_short_one_shrinks():
    rng = np.random.default_rng(1)
    cache = empty()
    cache.append(rows(rng, 1, SMALLEST), [range(SMALLEST)])
    assert cache.fitting(SMALLEST) is cache
    grown = cache.fitting(SMALLEST + 1)
    assert grown.capacity == 2 * SMALLEST
    np.testing.assert_array_equal(contents(grown, 0), contents(cache, 0))
    short = empty()
    short.append(rows(rng, 1, 3), [range(3)])
    both = gather([(grown, 0), (short, 0)])
    assert gather([(both, 1)]).capacity == SMALLEST
