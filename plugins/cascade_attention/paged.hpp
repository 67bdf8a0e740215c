// The operator over a pool of blocks, for x86: what a row sees of its sequence's past, and of the call's own rows.
// Bindings: export/paged_graph.py.
//
// Each (sequence, KV head) is walked block by block with the query rows of all heads that share it: once over keys, for scores and
// their maximum, once over values. A row's result is the same to the bit wherever the keys that it sees lie: keys that it does
// not see between them add nothing, values are summed key by key, and weights as integers, in whatever order. So a tree's rows
// are plain decoding's.
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

constexpr size_t FLOATS = 8;  // in a register
constexpr size_t KEYS = 32;    // of a block
constexpr size_t QUERIES = 8;  // rows that walk a block together, at most
constexpr float UNIT = 1 << 25;  // that weights are counted in, 32 of them in 32 bits
constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Attention {
    const float *q, *k, *v;  // [R, H · D], [R, Hkv · D]
    float *past_k, *past_v;  // [blocks, Hkv, 32, D]
    const int32_t *lengths, *begins, *blocks, *block_begins;
    const uint8_t* mask;
    const int32_t* mask_begins;
    size_t sequences, heads, kv_heads, dim;
    float scale;
    float* out;  // [R, H · D]

    size_t rows(size_t sequence) const { return begins[sequence + 1] - begins[sequence]; }

    // Where a block's keys or values begin.
    size_t place(size_t sequence, size_t block, size_t head) const {
        return (static_cast<size_t>(blocks[block_begins[sequence] + block]) * kv_heads + head) * KEYS * dim;
    }
};

// exp, for x up to 0, to 2e-7: 2^n times a polynomial on half an octave (coefficients: Cephes' expf).
INLINE __m256 exponential(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-87.3f));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(next));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

// Sums of eight registers, in one.
INLINE __m256 sums(const __m256 (&x)[8]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// Eight numbers, in a register: GCC would read them from memory again for every use.
INLINE __m256 held(const float* at) {
    __m256 values = _mm256_loadu_ps(at);
    asm("" : "+x"(values));
    return values;
}

// Scores of a query with the 32 keys of a block.
INLINE void score(const float* q, const float* keys, size_t dim, float* scores) {
    for (size_t group = 0; group < KEYS; group += FLOATS) {
        __m256 products[FLOATS];
        for (auto& product : products) product = _mm256_setzero_ps();
        for (size_t d = 0; d < dim; d += FLOATS) {
            const __m256 part = _mm256_loadu_ps(q + d);
            for (size_t key = 0; key < FLOATS; key++)
                products[key] = _mm256_fmadd_ps(part, _mm256_loadu_ps(keys + (group + key) * dim + d), products[key]);
        }
        _mm256_storeu_ps(scores + group, sums(products));
    }
}

// Of two queries: a key that is read once is multiplied twice. Each score is added up as if its query were alone.
INLINE void score(const float* q, const float* keys, size_t dim, float* scores, float* others) {
    for (size_t group = 0; group < KEYS; group += FLOATS / 2) {
        __m256 products[FLOATS];  // of the first query with four keys, and of the second
        for (auto& product : products) product = _mm256_setzero_ps();
        for (size_t d = 0; d < dim; d += FLOATS) {
            const __m256 part = _mm256_loadu_ps(q + d), other = _mm256_loadu_ps(q + dim + d);
            for (size_t key = 0; key < FLOATS / 2; key++) {
                const __m256 own = held(keys + (group + key) * dim + d);
                products[key] = _mm256_fmadd_ps(part, own, products[key]);
                products[FLOATS / 2 + key] = _mm256_fmadd_ps(other, own, products[FLOATS / 2 + key]);
            }
        }
        const __m256 both = sums(products);
        _mm_storeu_ps(scores + group, _mm256_castps256_ps128(both));
        _mm_storeu_ps(others + group, _mm256_extractf128_ps(both, 1));
    }
}

// out += weights · values of a block's keys, for Registers · 8 of the dimensions, of Count queries.
template <size_t Count, size_t Registers>
INLINE void gather(const float (*weights)[KEYS], const float* values, size_t dim, size_t keys, float* const* out, size_t d) {
    __m256 total[Count][Registers];
    for (size_t i = 0; i < Count; i++)
        for (size_t r = 0; r < Registers; r++) total[i][r] = _mm256_loadu_ps(out[i] + d + r * FLOATS);
    for (size_t key = 0; key < keys; key++) {
        __m256 weight[Count];
        for (size_t i = 0; i < Count; i++) weight[i] = _mm256_set1_ps(weights[i][key]);
        for (size_t r = 0; r < Registers; r++) {
            const __m256 value = held(values + key * dim + d + r * FLOATS);
            for (size_t i = 0; i < Count; i++) total[i][r] = _mm256_fmadd_ps(weight[i], value, total[i][r]);
        }
    }
    for (size_t i = 0; i < Count; i++)
        for (size_t r = 0; r < Registers; r++) _mm256_storeu_ps(out[i] + d + r * FLOATS, total[i][r]);
}

template <size_t Count, size_t Registers>
INLINE void gather_all(const float (*weights)[KEYS], const float* values, size_t dim, size_t keys, float* const* out) {
    size_t d = 0;
    for (; d + Registers * FLOATS <= dim; d += Registers * FLOATS) gather<Count, Registers>(weights, values, dim, keys, out, d);
    for (; d < dim; d += FLOATS) gather<Count, 1>(weights, values, dim, keys, out, d);
}

// What rows of a sequence ask of a KV head, with all query heads that share it.
struct Work {
    size_t sequence, kv_head;
    const std::vector<size_t>* asking;  // rows, in order
    size_t first, count;                // of (query head, row), head by head

    size_t row(size_t i) const { return (*asking)[(first + i) % asking->size()]; }
    size_t head(size_t i) const { return (first + i) / asking->size(); }
};

inline void attend(const Attention& a, const Work& work) {
    const size_t sequence = work.sequence, kv_head = work.kv_head, count = work.count;
    const size_t n = a.rows(sequence), group = a.heads / a.kv_heads, dim = a.dim;
    const size_t past = a.lengths[sequence], begin = a.begins[sequence];
    std::vector<float> queries(count * dim);
    float* out[QUERIES];
    size_t seen = past;  // keys, of which the mask hides some
    for (size_t i = 0; i < count; i++) {
        const size_t at = ((begin + work.row(i)) * a.heads + kv_head * group + work.head(i)) * dim;
        for (size_t d = 0; d < dim; d++) queries[i * dim + d] = a.q[at + d] * a.scale;
        out[i] = a.out + at;
        seen = std::max(seen, past + work.row(i) + 1);  // no row sees a later one
    }
    const size_t blocks = (seen + KEYS - 1) / KEYS, width = blocks * KEYS;
    std::vector<float> all(count * width);
    __m256 most[QUERIES];
    for (auto& each : most) each = _mm256_set1_ps(NEVER);
    for (size_t block = 0; block < blocks; block++) {
        const size_t start = block * KEYS;
        const float* keys = a.past_k + a.place(sequence, block, kv_head);
        for (size_t i = 0; i < count; i += 2) {
            float* scores = &all[i * width + start];
            if (i + 1 < count)
                score(&queries[i * dim], keys, dim, scores, scores + width);
            else
                score(&queries[i * dim], keys, dim, scores);
        }
        for (size_t i = 0; i < count; i++) {
            float* scores = &all[i * width + start];
            if (start + KEYS > past) {  // what is behind the past, the mask decides; what is behind the end is nobody's
                const uint8_t* sees = a.mask + a.mask_begins[sequence] + work.row(i) * n;
                for (size_t key = 0; key < KEYS; key++)
                    if (start + key >= past && (start + key >= seen || !sees[start + key - past])) scores[key] = NEVER;
            }
            for (size_t g = 0; g < KEYS; g += FLOATS) most[i] = _mm256_max_ps(most[i], _mm256_loadu_ps(scores + g));
        }
    }
    float highest[QUERIES];
    int64_t whole[QUERIES] = {};
    for (size_t i = 0; i < count; i++) highest[i] = largest(most[i]);
    for (size_t block = 0; block < blocks; block++) {
        const size_t start = block * KEYS, keys = std::min(KEYS, seen - start);
        const float* values = a.past_v + a.place(sequence, block, kv_head);
        alignas(32) float weights[QUERIES][KEYS];
        for (size_t i = 0; i < count; i++) {
            __m256i units = _mm256_setzero_si256();
            for (size_t g = 0; g < KEYS; g += FLOATS) {
                const __m256 scores = _mm256_loadu_ps(&all[i * width + start + g]);
                const __m256 sees = _mm256_cmp_ps(scores, _mm256_set1_ps(NEVER), _CMP_NEQ_OQ);
                const __m256 weight = _mm256_and_ps(exponential(_mm256_sub_ps(scores, _mm256_set1_ps(highest[i]))), sees);
                _mm256_store_ps(weights[i] + g, weight);
                units = _mm256_add_epi32(units, _mm256_cvtps_epi32(_mm256_mul_ps(weight, _mm256_set1_ps(UNIT))));
            }
            whole[i] += total(units);
        }
        for (size_t i = 0; i < count; i += 2) {
            if (i + 1 < count)
                gather_all<2, 4>(weights + i, values, dim, keys, out + i);
            else
                gather_all<1, 8>(weights + i, values, dim, keys, out + i);
        }
    }
    for (size_t i = 0; i < count; i++) {
        const float share = whole[i] > 0 ? UNIT / static_cast<float>(whole[i]) : 0.0f;
        for (size_t d = 0; d < dim; d++) out[i][d] *= share;
    }
}

// K/V of the call's rows into the pool, behind what their sequences hold.
inline void append(const Attention& a) {
    for (size_t sequence = 0; sequence < a.sequences; sequence++)
        for (size_t row = 0; row < a.rows(sequence); row++) {
            const size_t at = a.lengths[sequence] + row;
            for (size_t head = 0; head < a.kv_heads; head++) {
                const size_t from = ((a.begins[sequence] + row) * a.kv_heads + head) * a.dim;
                const size_t to = a.place(sequence, at / KEYS, head) + at % KEYS * a.dim;
                std::memcpy(a.past_k + to, a.k + from, a.dim * sizeof(float));
                std::memcpy(a.past_v + to, a.v + from, a.dim * sizeof(float));
            }
        }
}

// The operator. D is a multiple of 8. A row that sees no row of the call asks for nothing, and gets zeros.
inline void attention(const Attention& a) {
    append(a);
    const size_t rows = a.begins[a.sequences], group = a.heads / a.kv_heads;
    std::memset(a.out, 0, rows * a.heads * a.dim * sizeof(float));
    std::vector<std::vector<size_t>> asking(a.sequences);
    size_t all = 0;
    for (size_t sequence = 0; sequence < a.sequences; sequence++) {
        const size_t n = a.rows(sequence);
        const uint8_t* sees = a.mask + a.mask_begins[sequence];
        for (size_t row = 0; row < n; row++, sees += n)
            if (std::memchr(sees, 1, n)) asking[sequence].push_back(row);
        all += asking[sequence].size() * a.heads;
    }
    const size_t threads = tbb::this_task_arena::max_concurrency();
    const size_t most = std::clamp(all / (4 * threads), size_t{1}, QUERIES);  // few rows are spread over the threads
    std::vector<Work> works;
    for (size_t sequence = 0; sequence < a.sequences; sequence++)
        for (size_t kv_head = 0; kv_head < a.kv_heads; kv_head++)
            for (size_t first = 0, every = asking[sequence].size() * group; first < every; first += most)
                works.push_back({sequence, kv_head, &asking[sequence], first, std::min(most, every - first)});
    tbb::parallel_for(size_t{0}, works.size(), [&](size_t i) { attend(a, works[i]); });
}

}  // namespace d2sd
