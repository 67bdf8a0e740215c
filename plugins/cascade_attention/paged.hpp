// The operator over a pool of blocks, for x86: what a row sees of its sequence's past, and of the call's own rows.
// Bindings: export/paged_graph.py.
//
// Each (sequence, KV head) is walked block by block with the query rows of all heads that share it: once over keys, for scores and
// their maximum, once over values. A row's result is the same to the bit wherever the keys that it sees lie: keys that it does
// not see between them add nothing, values are summed key by key, and weights as integers, in whatever order. So a tree's rows
// are plain decoding's.
//
// Where the CPU multiplies pairs of bf16 numbers (AVX512_BF16), twice as many at once as floats, keys and values can lie in pairs.
// A pair's products are added one by one, so a row's result stays what it is.
#pragma once

#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../openvino/vectors.hpp"

namespace d2sd {

constexpr size_t KEYS = 32;      // of a block
constexpr size_t QUERIES = 16;   // rows that walk a block together, at most
constexpr float UNIT = 1 << 25;  // that weights are counted in, 32 of them in 32 bits
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// What keys and values are multiplied with, and how many of it are one.
template <typename Stored>
struct Kind {
    using Factor = float;
    static constexpr size_t NUMBERS = 1;
};
template <>
struct Kind<Brief> {
    using Factor = Pair;
    static constexpr size_t NUMBERS = 2;
};

template <typename Stored>
struct Attention {
    const float *q, *k, *v;  // [R, H · D], [R, Hkv · D]
    Stored *past_k, *past_v;  // [blocks, Hkv, 32, D]; in pairs k [.., D/2, 32, 2] and v [.., 16, D, 2], each second one first
    const int32_t *lengths, *begins, *blocks, *block_begins;
    const uint8_t* mask;
    const int32_t* mask_begins;
    const float *cosines, *sines;  // [R, D] of the rows' positions, or nullptr where queries and keys are turned already
    size_t sequences, heads, kv_heads, dim;
    float scale;
    float* out;  // [R, H · D]

    size_t rows(size_t sequence) const { return begins[sequence + 1] - begins[sequence]; }

    // A query or key of a row, turned by its position (RoPE): each half of it by the other.
    void turn(const float* from, size_t row, float* to) const {
        if (!cosines) {
            std::memcpy(to, from, dim * sizeof(float));
            return;
        }
        const float *c = cosines + row * dim, *s = sines + row * dim;
        const size_t half = dim / 2;
        for (size_t d = 0; d < half; d++) {
            to[d] = from[d] * c[d] - from[d + half] * s[d];
            to[d + half] = from[d + half] * c[d + half] + from[d] * s[d + half];
        }
    }

    // Where a block's keys or values begin.
    size_t place(size_t sequence, size_t block, size_t head) const {
        return (static_cast<size_t>(blocks[block_begins[sequence] + block]) * kv_heads + head) * KEYS * dim;
    }
};

// Numbers in a register: GCC would read them from memory again for every use.
template <typename Register>
INLINE Register held(Register values) {
    asm("" : "+v"(values));
    return values;
}

// A block's keys or values of a head, into the second cache: it lies where no hardware looks ahead.
template <typename Stored>
INLINE void fetch(const Stored* block, size_t dim) {
    for (size_t i = 0; i < KEYS * dim; i += LINE / sizeof(Stored)) __builtin_prefetch(block + i, 0, 2);
}

// Scores of Count queries, one behind the other, with the 32 keys of a block: a key that is read once is multiplied as often.
// Each score is added up as if its query were alone. (Registers of 16 lose here in adding up what they win in multiplying.)
template <size_t Count, typename Stored>
INLINE void score(const float* q, const Stored* keys, size_t dim, float* scores, size_t width) {
    constexpr size_t SOME = 4;  // keys
    for (size_t group = 0; group < KEYS; group += SOME, keys += SOME * dim) {
        __m256 products[Count][SOME];
        UNROLLED for (size_t i = 0; i < Count; i++)
            UNROLLED for (size_t key = 0; key < SOME; key++) products[i][key] = _mm256_setzero_ps();
        for (size_t d = 0; d < dim; d += EIGHT) {
            __m256 parts[Count];
            UNROLLED for (size_t i = 0; i < Count; i++) parts[i] = eight(q + i * dim + d);
            UNROLLED for (size_t key = 0; key < SOME; key++) {
                const __m256 own = held(eight(keys + key * dim + d));
                UNROLLED for (size_t i = 0; i < Count; i++)
                    products[i][key] = _mm256_fmadd_ps(parts[i], own, products[i][key]);
            }
        }
        UNROLLED for (size_t i = 0; i < Count; i += 2) {
            const __m256 both = sums(products[i], products[i + 1 < Count ? i + 1 : i]);
            _mm_storeu_ps(scores + i * width + group, _mm256_castps256_ps128(both));
            if (i + 1 < Count) _mm_storeu_ps(scores + (i + 1) * width + group, _mm256_extractf128_ps(both, 1));
        }
    }
}

// out += weights · values of a block's keys, for Registers of the dimensions, of Count queries.
template <size_t Count, size_t Registers, typename Stored>
INLINE void gather(const float (*weights)[KEYS], const Stored* values, size_t dim, size_t keys, float* const* out, size_t d) {
    Reals total[Count][Registers];
    UNROLLED for (size_t i = 0; i < Count; i++)
        UNROLLED for (size_t r = 0; r < Registers; r++) total[i][r] = load(out[i] + d + r * LANES);
    for (size_t key = 0; key < keys; key++) {
        Reals weight[Count];
        UNROLLED for (size_t i = 0; i < Count; i++) weight[i] = all(weights[i][key]);
        UNROLLED for (size_t r = 0; r < Registers; r++) {
            const Reals value = held(load(values + key * dim + d + r * LANES));
            UNROLLED for (size_t i = 0; i < Count; i++) total[i][r] = multiply_add(weight[i], value, total[i][r]);
        }
    }
    UNROLLED for (size_t i = 0; i < Count; i++)
        UNROLLED for (size_t r = 0; r < Registers; r++) store(out[i] + d + r * LANES, total[i][r]);
}

// Weights of some of a query's scores, of which highest is the greatest.
INLINE Reals weights_of(const float* scores, Reals highest) {
    const Reals own = load(scores);
    return where_not(own, NEVER, exponential(own - highest));
}

// The same as what values are multiplied with; returns what they come to, in units.
INLINE Integers weigh(const float* scores, Reals highest, float* weights) {
    const Reals own = weights_of(scores, highest);
    store(weights, own);
    return integers(own * all(UNIT));
}

#ifdef __AVX512VNNI__

template <size_t Count>
INLINE void score(const Pair* q, const Brief* keys, size_t dim, float* scores, size_t width) {
    const size_t pairs = dim / 2;
    const Pair* each = reinterpret_cast<const Pair*>(keys);
    Reals low[Count], high[Count];  // keys
    UNROLLED for (size_t i = 0; i < Count; i++) low[i] = high[i] = zeros();
    for (size_t pair = 0; pair < pairs; pair++, each += KEYS) {
        const Integers lower = load(each), upper = load(each + LANES);
        UNROLLED for (size_t i = 0; i < Count; i++) {
            const Integers part = all_integers(q[i * pairs + pair]);
            low[i] = add_products(low[i], part, lower);
            high[i] = add_products(high[i], part, upper);
        }
    }
    UNROLLED for (size_t i = 0; i < Count; i++) {
        store(scores + i * width, low[i]);
        store(scores + i * width + LANES, high[i]);
    }
}

template <size_t Count, size_t Registers>
INLINE void gather(const Pair (*weights)[KEYS / 2], const Brief* values, size_t dim, size_t keys, float* const* out, size_t d) {
    const Pair* each = reinterpret_cast<const Pair*>(values) + d;
    Reals total[Count][Registers];
    UNROLLED for (size_t i = 0; i < Count; i++)
        UNROLLED for (size_t r = 0; r < Registers; r++) total[i][r] = load(out[i] + d + r * LANES);
    for (size_t pair = 0; 2 * pair < keys; pair++, each += dim) {
        Integers value[Registers];
        UNROLLED for (size_t r = 0; r < Registers; r++) value[r] = load(each + r * LANES);
        UNROLLED for (size_t i = 0; i < Count; i++) {
            const Integers weight = all_integers(weights[i][pair]);
            UNROLLED for (size_t r = 0; r < Registers; r++) total[i][r] = add_products(total[i][r], weight, value[r]);
        }
    }
    UNROLLED for (size_t i = 0; i < Count; i++)
        UNROLLED for (size_t r = 0; r < Registers; r++) store(out[i] + d + r * LANES, total[i][r]);
}

// In pairs of which each second one is first. They are counted as they are rounded.
INLINE Integers weigh(const float* scores, Reals highest, Pair* weights) {
    const Integers pairs = brief(weights_of(scores, highest), weights_of(scores + LANES, highest));
    store(weights, swapped(pairs));
    return sum(integers(lower(pairs) * all(UNIT)), integers(upper(pairs) * all(UNIT)));
}

#endif

template <size_t Count, typename Stored, typename Weights>
INLINE void gather_all(const Weights* weights, const Stored* values, size_t dim, size_t keys, float* const* out) {
    constexpr size_t REGISTERS = LANES == 8 && Count == 1 ? 8 : 4;
    size_t d = 0;
    for (; d + REGISTERS * LANES <= dim; d += REGISTERS * LANES) gather<Count, REGISTERS>(weights, values, dim, keys, out, d);
    for (; d < dim; d += LANES) gather<Count, 1>(weights, values, dim, keys, out, d);
}

constexpr size_t TOGETHER = LANES == 16 ? 4 : 2;  // queries, as there are registers for; of pairs twice as many look at keys

// A query as what keys are multiplied with.
INLINE void ask(const float* query, size_t dim, float* asked) { std::memcpy(asked, query, dim * sizeof(float)); }
INLINE void ask(const float* query, size_t dim, Pair* asked) {
    for (size_t pair = 0; pair < dim / 2; pair++)
        asked[pair] = brief(query[2 * pair]).bits | static_cast<Pair>(brief(query[2 * pair + 1]).bits) << 16;
}

// What rows of a sequence ask of a KV head, with all query heads that share it.
struct Work {
    size_t sequence, kv_head;
    const std::vector<size_t>* asking;  // rows, in order
    size_t first, count;                // of (query head, row), head by head

    size_t row(size_t i) const { return (*asking)[(first + i) % asking->size()]; }
    size_t head(size_t i) const { return (first + i) / asking->size(); }
};

template <typename Stored>
void attend(const Attention<Stored>& a, const Work& work) {
    const size_t sequence = work.sequence, kv_head = work.kv_head, count = work.count;
    const size_t n = a.rows(sequence), group = a.heads / a.kv_heads, dim = a.dim;
    const size_t past = a.lengths[sequence], begin = a.begins[sequence];
    using Factor = typename Kind<Stored>::Factor;
    constexpr size_t NUMBERS = Kind<Stored>::NUMBERS;
    std::vector<float> query(dim);
    std::vector<Factor> queries(count * dim / NUMBERS);
    float* out[QUERIES];
    size_t seen = past;  // keys, of which the mask hides some
    for (size_t i = 0; i < count; i++) {
        const size_t at = ((begin + work.row(i)) * a.heads + kv_head * group + work.head(i)) * dim;
        a.turn(a.q + at, begin + work.row(i), query.data());
        for (size_t d = 0; d < dim; d++) query[d] *= a.scale;
        ask(query.data(), dim, &queries[i * dim / NUMBERS]);
        out[i] = a.out + at;
        seen = std::max(seen, past + work.row(i) + 1);  // no row sees a later one
    }
    const size_t blocks = (seen + KEYS - 1) / KEYS, width = blocks * KEYS;
    std::vector<float> scores(count * width);
    Reals most[QUERIES];
    for (auto& each : most) each = all(NEVER);
    for (size_t block = 0; block < blocks; block++) {
        const size_t start = block * KEYS;
        const Stored* keys = a.past_k + a.place(sequence, block, kv_head);
        fetch(block + 1 < blocks ? a.past_k + a.place(sequence, block + 1, kv_head) : a.past_v + a.place(sequence, 0, kv_head), dim);
        some_at_a_time<TOGETHER * NUMBERS>(count, [&](size_t i, auto n) {
            score<n>(&queries[i * dim / NUMBERS], keys, dim, &scores[i * width + start], width);
        });
        for (size_t i = 0; i < count; i++) {
            float* own = &scores[i * width + start];
            if (start + KEYS > past) {  // what is behind the past, the mask decides; what is behind the end is nobody's
                const uint8_t* sees = a.mask + a.mask_begins[sequence] + work.row(i) * n;
                for (size_t key = 0; key < KEYS; key++)
                    if (start + key >= past && (start + key >= seen || !sees[start + key - past])) own[key] = NEVER;
            }
            for (size_t g = 0; g < KEYS; g += LANES) most[i] = larger(most[i], load(own + g));
        }
    }
    Reals highest[QUERIES];
    int64_t whole[QUERIES] = {};
    for (size_t i = 0; i < count; i++) highest[i] = all(largest(most[i]));
    for (size_t block = 0; block < blocks; block++) {
        const size_t start = block * KEYS, keys = std::min(KEYS, seen - start);
        const Stored* values = a.past_v + a.place(sequence, block, kv_head);
        if (block + 1 < blocks) fetch(a.past_v + a.place(sequence, block + 1, kv_head), dim);
        alignas(64) Factor weights[QUERIES][KEYS / NUMBERS];
        for (size_t i = 0; i < count; i++) {
            Integers units = no_integers();
            for (size_t g = 0; g < KEYS; g += LANES * NUMBERS)
                units = sum(units, weigh(&scores[i * width + start + g], highest[i], weights[i] + g / NUMBERS));
            whole[i] += total(units);
        }
        some_at_a_time<TOGETHER>(count, [&](size_t i, auto n) { gather_all<n>(weights + i, values, dim, keys, out + i); });
    }
    for (size_t i = 0; i < count; i++) {
        const float share = whole[i] > 0 ? UNIT / static_cast<float>(whole[i]) : 0.0f;
        for (size_t d = 0; d < dim; d++) out[i][d] *= share;
    }
}

// A key's or value's place in its block is key.
template <typename Stored>
INLINE void put(const float* k, const float* v, size_t key, size_t dim, Stored* keys, Stored* values) {
    for (size_t d = 0; d < dim; d += EIGHT) {
        store(keys + key * dim + d, eight(k + d));
        store(values + key * dim + d, eight(v + d));
    }
}
INLINE void put(const float* k, const float* v, size_t key, size_t dim, Brief* keys, Brief* values) {
    for (size_t d = 0; d < dim; d++) {
        keys[(d / 2 * KEYS + key) * 2 + d % 2] = brief(k[d]);
        values[(key / 2 * dim + d) * 2 + 1 - key % 2] = brief(v[d]);
    }
}

// K/V of the call's rows into the pool, behind what their sequences hold.
template <typename Stored>
void append(const Attention<Stored>& a) {
    std::vector<float> key(a.dim);
    for (size_t sequence = 0; sequence < a.sequences; sequence++)
        for (size_t row = 0; row < a.rows(sequence); row++) {
            const size_t at = a.lengths[sequence] + row;
            for (size_t head = 0; head < a.kv_heads; head++) {
                const size_t from = ((a.begins[sequence] + row) * a.kv_heads + head) * a.dim;
                const size_t to = a.place(sequence, at / KEYS, head);
                a.turn(a.k + from, a.begins[sequence] + row, key.data());
                put(key.data(), a.v + from, at % KEYS, a.dim, a.past_k + to, a.past_v + to);
            }
        }
}

// The operator. D is a multiple of LANES. A row that sees no row of the call asks for nothing, and gets zeros.
template <typename Stored>
void attention(const Attention<Stored>& a) {
    append(a);
    const size_t rows = a.begins[a.sequences], group = a.heads / a.kv_heads;
    std::memset(a.out, 0, rows * a.heads * a.dim * sizeof(float));
    std::vector<std::vector<size_t>> asking(a.sequences);
    size_t looks = 0;  // at keys, one for each query and each of its keys
    for (size_t sequence = 0; sequence < a.sequences; sequence++) {
        const size_t n = a.rows(sequence);
        const uint8_t* sees = a.mask + a.mask_begins[sequence];
        for (size_t row = 0; row < n; row++, sees += n)
            if (std::memchr(sees, 1, n)) asking[sequence].push_back(row);
        looks += asking[sequence].size() * a.heads * (a.lengths[sequence] + n);
    }
    // Each thread gets as much; a KV head's block is read once for as many queries as that leaves together.
    const size_t share = std::max<size_t>(1, looks / tbb::this_task_arena::max_concurrency());
    std::vector<Work> works;
    size_t given = 0;
    for (size_t sequence = 0; sequence < a.sequences; sequence++)
        for (size_t kv_head = 0; kv_head < a.kv_heads; kv_head++)
            for (size_t first = 0, every = asking[sequence].size() * group; first < every; first += works.back().count) {
                const size_t keys = a.lengths[sequence] + a.rows(sequence), left = (share - given % share + keys - 1) / keys;
                works.push_back({sequence, kv_head, &asking[sequence], first, std::min({left, QUERIES, every - first})});
                given += works.back().count * keys;
            }
    tbb::parallel_for(size_t{0}, works.size(), [&](size_t i) { attend(a, works[i]); });
}

}  // namespace d2sd
