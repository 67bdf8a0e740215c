// Rows times a matrix whose weights stay in blocks of 4- or 8-bit codes, or of floats, for x86 (openvino/vectors.hpp). Layout of
// the matrix: packed.py.
//
// In front of codes a row is rounded to 8 bits in groups of 32, each with a scale of its own, as llama.cpp does in front of the
// same blocks (Q8_1): products of codes are then exact in integers, and an instruction makes 32 or 64 of them instead of 8 or 16.
// Each row's result is the same to the bit whatever rows are beside it, and whatever the instructions are.
#pragma once

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "../openvino/vectors.hpp"

namespace d2sd {

constexpr size_t GROUP = 32;               // of a row's values that share a scale
constexpr size_t COLUMNS = 32;             // that rows, as many as a form's ROWS, are multiplied with at once
constexpr size_t TILES = COLUMNS / LANES;  // registers of them

// What rows are made of, [rows, depth] each: x itself; x normed, x / sqrt(mean(x²) + epsilon) · norm[depth] (RMSNorm); or x let
// through by a gate, gate · sigmoid(gate) · x (SwiGLU).
struct Given {
    const float *x, *norm, *gate;  // of the last two at most one
    float epsilon;

    bool plain() const { return !norm && !gate; }

    // A row's values, in `own` unless they lie somewhere.
    const float* row(size_t row, size_t depth, float* own) const {
        const float* from = x + row * depth;
        if (plain()) return from;
        if (norm) {
            Reals squares = zeros();
            for (size_t k = 0; k < depth; k += LANES) squares = multiply_add(load(from + k), load(from + k), squares);
            const Reals scale = all(1.0f / std::sqrt(total(squares) / static_cast<float>(depth) + epsilon));
            for (size_t k = 0; k < depth; k += LANES) store(own + k, load(from + k) * scale * load(norm + k));
        } else {
            for (size_t k = 0; k < depth; k += LANES) {
                const Reals open = load(gate + row * depth + k);
                store(own + k, open / (all(1.0f) + exponential(zeros() - open)) * load(from + k));
            }
        }
        return own;
    }
};

// of(first, last) for all rows, in parts where other threads are woken before one alone is done.
template <typename Of>
void over_rows(const Given& given, size_t rows, size_t depth, Of of) {
    if (rows * depth > (given.gate ? 6144 : 24576))
        tbb::parallel_for(tbb::blocked_range<size_t>(0, rows, 4), [&](const auto& range) { of(range.begin(), range.end()); });
    else
        of(0, rows);
}

// A matrix, and where the product with it goes: y[rows, columns], to which what was there before is added, if anything.
struct Matrix {
    const uint8_t* packed;
    size_t columns;
    float* y;
    const float* before;

    size_t parts() const { return (columns + COLUMNS - 1) / COLUMNS; }
};

// Rows as they are multiplied, from one of them and from one block on, and what a product of theirs needs beside them.
template <typename Code>
struct Rows {
    size_t depth;
    const Code* codes;
    const float *scales, *sums;  // of each group; sums are of the rounded values
    const int32_t* totals;       // of codes, of each half of a group

    size_t groups() const { return depth / GROUP; }

    Rows from(size_t row, size_t k) const {
        const size_t at = row * depth + k;
        if constexpr (std::is_same_v<Code, float>)
            return {depth, codes + at, nullptr, nullptr, nullptr};
        else
            return {depth, codes + at, scales + at / GROUP, sums + at / GROUP, totals + 2 * at / GROUP};
    }
};

INLINE __m256i in_order(__m256i packed) { return _mm256_permute4x64_epi64(packed, 0xD8); }  // undo packs' halves

INLINE void store(int16_t* to, __m256i first, __m256i second) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), second);
}

INLINE void store(int8_t* to, __m256i first, __m256i second) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), in_order(_mm256_packs_epi16(first, second)));
}

// One group: codes = round(x · 127 / max|x|), to even.
template <typename Code>
INLINE void round_group(const float* x, Code* codes, float* scale, float* sum, int32_t* totals) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 values[4], most = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) {
        values[i] = eight(x + EIGHT * i);
        most = _mm256_max_ps(most, _mm256_andnot_ps(sign, values[i]));
    }
    const float peak = largest(most);
    const __m256 inverse = _mm256_set1_ps(peak > 0 ? 127.0f / peak : 0.0f);
    __m256i numbers[4];
    for (int i = 0; i < 4; i++) numbers[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values[i], inverse));
    store(codes, in_order(_mm256_packs_epi32(numbers[0], numbers[1])), in_order(_mm256_packs_epi32(numbers[2], numbers[3])));
    *scale = peak / 127.0f;
    for (int half = 0; half < 2; half++) totals[half] = total(_mm256_add_epi32(numbers[2 * half], numbers[2 * half + 1]));
    *sum = *scale * static_cast<float>(totals[0] + totals[1]);
}

// Rounded rows: codes as bytes in front of 4-bit weights, as the instructions want them in front of 8-bit ones.
template <typename Code>
class Rounded {
public:
    Rounded(const Given& given, size_t rows, size_t depth)
        : depth(depth), codes(new Code[rows * depth]), numbers(new float[2 * rows * depth / GROUP]),
          totals(new int32_t[2 * rows * depth / GROUP]), sums(&numbers[rows * depth / GROUP]) {
        const size_t groups = depth / GROUP;
        over_rows(given, rows, depth, [&](size_t row, size_t last) {
            std::vector<float> own(given.plain() ? 0 : depth);
            for (; row < last; row++) {
                const float* x = given.row(row, depth, own.data());
                for (size_t at = row * groups; at < (row + 1) * groups; at++, x += GROUP)
                    round_group(x, &codes[at * GROUP], &numbers[at], sums + at, &totals[2 * at]);
            }
        });
    }

    Rows<Code> rows() const { return {depth, codes.get(), numbers.get(), sums, totals.get()}; }

private:
    const size_t depth;
    std::unique_ptr<Code[]> codes;
    std::unique_ptr<float[]> numbers;  // scales; sums
    std::unique_ptr<int32_t[]> totals;
    float* const sums;
};

INLINE Integers repeated(const void* four_bytes) {
    int bytes;
    std::memcpy(&bytes, four_bytes, 4);
    return all_integers(bytes);
}

template <bool Halves>
INLINE Reals numbers_of(const uint8_t* at) {
    if constexpr (Halves)
        return load(reinterpret_cast<const Half*>(at));
    else
        return load(reinterpret_cast<const float*>(at));
}

INLINE void put(Reals values, float* to, const float* before, size_t columns) {
    if (columns >= LANES) {
        store(to, before ? load(before) + values : values);
    } else {
        float some[LANES];
        store(some, values);
        for (size_t i = 0; i < columns; i++) to[i] = before ? before[i] + some[i] : some[i];
    }
}

// A block of 4-bit codes, 0 to 15, of a register's columns; their scales; their minima.
template <size_t Block, bool Halves>
struct FourBits {
    using Code = int8_t;
    static constexpr size_t CODES = LANES * Block / 2, WIDTH = LANES * (Halves ? 2 : 4), BYTES = CODES + 2 * WIDTH, ROWS = 4;

    template <size_t R>
    INLINE static void add(const uint8_t* const (&w)[TILES], const Rows<Code>& x, Reals (&out)[R][TILES]) {
        Integers part[R][TILES];
        for (int g = 0; g < 4; g++) {
            Integers first[TILES], second[TILES];
            for (size_t t = 0; t < TILES; t++) {
                const Integers both = bytes(w[t] + 4 * LANES * g);
                first[t] = low_bits(both);
                second[t] = high_bits(both);
            }
            for (size_t r = 0; r < R; r++) {
                const Code* own = x.codes + r * x.depth + 4 * g;
                const Integers a = repeated(own), b = repeated(own + 16);
                for (size_t t = 0; t < TILES; t++)
                    part[r][t] = dot_bytes(dot_bytes(g ? part[r][t] : no_integers(), first[t], a), second[t], b);
            }
        }
        for (size_t t = 0; t < TILES; t++) {
            const Reals scale = numbers_of<Halves>(w[t] + CODES), minimum = numbers_of<Halves>(w[t] + CODES + WIDTH);
            for (size_t r = 0; r < R; r++) {
                out[r][t] = multiply_add(real(of_dots(part[r][t])) * scale, all(x.scales[r * x.groups()]), out[r][t]);
                out[r][t] = multiply_add(minimum, all(x.sums[r * x.groups()]), out[r][t]);
            }
        }
    }
};

// A block of 8-bit codes of a register's columns, as many of a column beside each other as 32 bits hold factors; their scales.
template <size_t Block, bool Halves>
struct EightBits {
    using Code = Factor;
    static constexpr size_t BYTES = LANES * (Block + (Halves ? 2 : 4)), ROWS = 4, STEP = 4 / sizeof(Code);

    template <size_t R>
    INLINE static void add(const uint8_t* const (&w)[TILES], const Rows<Code>& x, Reals (&out)[R][TILES]) {
        Integers part[R][TILES];
        UNROLLED for (size_t r = 0; r < R; r++) {
            const int32_t* totals = x.totals + 2 * r * x.groups();
            const Integers none = all_integers(-OFFSET * (Block == GROUP ? totals[0] + totals[1] : totals[0]));
            UNROLLED for (size_t t = 0; t < TILES; t++) part[r][t] = none;
        }
        for (size_t k = 0; k < Block; k += 2 * STEP) {
            Integers first[TILES], second[TILES];
            UNROLLED for (size_t t = 0; t < TILES; t++) {
                first[t] = eight_bits(w[t] + LANES * k);
                second[t] = eight_bits(w[t] + LANES * (k + STEP));
            }
            UNROLLED for (size_t r = 0; r < R; r++) {
                const Code* own = x.codes + r * x.depth + k;
                const Integers a = repeated(own), b = repeated(own + STEP);
                UNROLLED for (size_t t = 0; t < TILES; t++)
                    part[r][t] = dot_eight_bits(dot_eight_bits(part[r][t], first[t], a), second[t], b);
            }
        }
        for (size_t t = 0; t < TILES; t++) {
            const Reals scale = numbers_of<Halves>(w[t] + LANES * Block);
            for (size_t r = 0; r < R; r++)
                out[r][t] = multiply_add(real(part[r][t]) * scale, all(x.scales[r * x.groups()]), out[r][t]);
        }
    }
};

// A block of floats of a register's columns.
template <size_t Block, bool>
struct Floats {
    using Code = float;
    static constexpr size_t BYTES = LANES * Block * sizeof(float);
    static constexpr size_t ROWS = TILES == 2 ? 8 : 3;  // whose sums leave registers for what is read

    template <size_t R>
    INLINE static void add(const uint8_t* const (&w)[TILES], const Rows<Code>& x, Reals (&out)[R][TILES]) {
        Reals sums[R][TILES];  // of its own, or GCC writes them to memory in every step
        std::memcpy(sums, out, sizeof(sums));
        for (size_t k = 0; k < Block; k++) {
            Reals one[R];
            for (size_t r = 0; r < R; r++) one[r] = all(x.codes[r * x.depth + k]);
            for (size_t t = 0; t < TILES; t++) {
                const Reals weights = load(reinterpret_cast<const float*>(w[t]) + k * LANES);
                for (size_t r = 0; r < R; r++) sums[r][t] = multiply_add(weights, one[r], sums[r][t]);
            }
        }
        std::memcpy(out, sums, sizeof(sums));
    }
};

// R rows by COLUMNS. Each of the groups of rows that are multiplied with these columns fetches a part of the next columns'
// weights: memory alone would be waited for as long again as some rows take.
template <typename Form, size_t Block, size_t R>
void tile(const Matrix& matrix, const Rows<typename Form::Code>& x, size_t row, size_t column, size_t shares) {
    const size_t blocks = x.depth / Block;
    Reals out[R][TILES];
    for (auto& sums : out)
        for (auto& sum : sums) sum = zeros();
    const uint8_t* w[TILES];
    for (size_t t = 0; t < TILES; t++) w[t] = matrix.packed + (column / LANES + t) * blocks * Form::BYTES;
    const size_t share = TILES * Form::BYTES / shares;
    const uint8_t* next = w[0] + (TILES * Form::BYTES + row / Form::ROWS * share) * blocks;
    for (size_t block = 0; block < blocks; block++) {
        for (size_t i = 0; i < share; i += LINE) __builtin_prefetch(next + i, 0, 2);
        next += share;
        Form::template add<R>(w, x.from(row, block * Block), out);
        for (auto& at : w) at += Form::BYTES;
    }
    for (size_t r = 0; r < R; r++)
        for (size_t t = 0; t < TILES; t++) {
            const size_t at = column + t * LANES, place = (row + r) * matrix.columns + at;
            if (at < matrix.columns)
                put(out[r][t], matrix.y + place, matrix.before ? matrix.before + place : nullptr, matrix.columns - at);
        }
}

template <typename Form, size_t Block>
void multiply_rows(const Rows<typename Form::Code>& x, size_t rows, const std::vector<Matrix>& matrices) {
    size_t parts = 0;
    for (const auto& matrix : matrices) parts += matrix.parts();
    tbb::parallel_for(size_t{0}, parts, [&](size_t part) {
        auto matrix = matrices.begin();
        for (; part >= matrix->parts(); matrix++) part -= matrix->parts();
        const size_t column = part * COLUMNS, shares = (rows + Form::ROWS - 1) / Form::ROWS;
        some_at_a_time<Form::ROWS>(rows, [&](size_t row, auto n) { tile<Form, Block, n>(*matrix, x, row, column, shares); });
    });
}

template <template <size_t, bool> class Bits, size_t Block, bool Halves>
void multiply_as(const Given& given, size_t rows, size_t depth, const std::vector<Matrix>& matrices) {
    using Form = Bits<Block, Halves>;
    if constexpr (std::is_same_v<typename Form::Code, float>) {
        std::unique_ptr<float[]> own(given.plain() ? nullptr : new float[rows * depth]);
        if (own)
            over_rows(given, rows, depth, [&](size_t row, size_t last) {
                for (; row < last; row++) given.row(row, depth, &own[row * depth]);
            });
        multiply_rows<Form, Block>({depth, own ? own.get() : given.x, nullptr, nullptr, nullptr}, rows, matrices);
    } else {
        const Rounded<typename Form::Code> rounded(given, rows, depth);
        multiply_rows<Form, Block>(rounded.rows(), rows, matrices);
    }
}

// y[rows, columns] = x[rows, depth] · W for matrices of one form. Blocks are of 32 with 4 bits or 32, of 32 or 16 with 8; half:
// scales and minima are f16.
inline void multiply(const Given& given, size_t rows, size_t depth, const std::vector<Matrix>& matrices, int64_t bits,
                     int64_t block, bool half) {
    // Floats could be taken in blocks of any size: small ones spread what is fetched over what is multiplied.
    const auto as = bits == 32    ? multiply_as<Floats, 2, false>
                    : bits == 4   ? (half ? multiply_as<FourBits, 32, true> : multiply_as<FourBits, 32, false>)
                    : block == 32 ? (half ? multiply_as<EightBits, 32, true> : multiply_as<EightBits, 32, false>)
                                  : (half ? multiply_as<EightBits, 16, true> : multiply_as<EightBits, 16, false>);
    as(given, rows, depth, matrices);
}

}  // namespace d2sd
