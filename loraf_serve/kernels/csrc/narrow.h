// expand for one to four rows of a batch. Lanes that hold rows would mostly be idle, so the lanes of a vector are the
// 16 outputs of a slice instead, and z, at most 128 numbers per part, is kept in registers.
//
//     for each slice: sum[16 outputs] = 0;  for each step: sum += value[16] · lookup(z[lane], j[16])
//
// A lookup among 64 numbers is two permutations of two registers each, and a blend. A gather instruction would do the
// same from memory, but mitigations of processor vulnerabilities have made it slow.
//
// Sums are added in the same order and rounded the same way, so a row's result does not depend on the number of rows.
//
// Measured as in shrink.h, expand alone, four tasks of 90 % sparsity at rank 64, milliseconds per step: one row 0.6
// (2.3 with rows in the lanes), two rows 1.0 (2.5), four rows 1.4 (2.5).
#pragma once

#include "expand.h"

#if defined(__AVX512F__)
#define LORAF_NARROW 1

namespace {

constexpr int64_t kNarrowRows = 4;
constexpr int64_t kNarrowRank = kSlack;

// Returns z[j[i]] for 16 indices. `kTables` registers hold z.
template <int kTables>
LORAF_INLINE Floats look_up(const Floats (&z)[kTables], __m512i j) {
    Floats result = _mm512_permutex2var_ps(z[0], j, z[1]);
    if constexpr (kTables == 4) {
        __mmask16 upper = _mm512_test_epi32_mask(j, _mm512_set1_epi32(32));
        result = _mm512_mask_blend_ps(upper, result, _mm512_permutex2var_ps(z[2], j, z[3]));
    } else if constexpr (kTables == 8) {
        __mmask16 odd = _mm512_test_epi32_mask(j, _mm512_set1_epi32(32));
        __mmask16 upper = _mm512_test_epi32_mask(j, _mm512_set1_epi32(64));
        result = _mm512_mask_blend_ps(odd, result, _mm512_permutex2var_ps(z[2], j, z[3]));
        Floats high = _mm512_permutex2var_ps(z[4], j, z[5]);
        high = _mm512_mask_blend_ps(odd, high, _mm512_permutex2var_ps(z[6], j, z[7]));
        result = _mm512_mask_blend_ps(upper, result, high);
    }
    return result;
}

// Adds one task's sheet to a window's sums [lane][kWindow].
template <int kRows, int kTables, int32_t value_kind>
void add_narrow_sheet(float* sums, const char* at, int64_t outputs, const float* z, int64_t z_stride,
                      const float* weight) {
    typedef typename Format<value_kind>::Stored Stored;
    constexpr int64_t kValues = kBlock * int64_t(sizeof(Stored)), kStep = kValues + kBlock;
    Sheet sheet(at, outputs);
    Floats table[kRows][kTables];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < kTables; i++) table[r][i] = load<Floats>(z + r * z_stride + i * kWidth);
    for (int64_t s = 0; s < sheet.slices; s++) {
        const char* stop = sheet.steps + sheet.length[s] * kStep;
        Floats sum[kRows]{};
        for (const char* step = sheet.steps; step < stop; step += kStep) {
            __builtin_prefetch(step + kAhead);
            Floats value = Format<value_kind>::get((const Stored*)step);
            __m512i j = _mm512_maskz_cvtepu8_epi32(0xFFFF, load<__m128i>(step + kValues));
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) sum[r] += value * look_up<kTables>(table[r], j);
        }
        sheet.steps = stop;
        const uint8_t* row = sheet.row + s * kBlock;
        for (int r = 0; r < kRows; r++) {
            alignas(64) float transposed[kBlock];
            store(transposed, sum[r]);
            asm("" : "+m"(transposed));
            float w = weight[r];
#pragma GCC unroll 16
            for (int i = 0; i < kBlock; i++) {  // the same fused operation as in expand.h
                float& to = sums[r * kWindow + row[i]];
                to = __builtin_fmaf(w, transposed[i], to);
            }
        }
    }
}

template <int kRows>
struct Narrow {
    static const float* z_of(const Call& call, const Part& part, int64_t) {
        return call.z + part.first_block * kBlock;
    }
    template <int32_t value_kind>
    static AddSheet adder_for(int64_t rank) {
        if (rank <= 32) return add_narrow_sheet<kRows, 2, value_kind>;
        if (rank <= 64) return add_narrow_sheet<kRows, 4, value_kind>;
        return add_narrow_sheet<kRows, 8, value_kind>;
    }
    static AddSheet sheet_adder(const Part& part) {
        return part.value_kind == kBfloat16 ? adder_for<kBfloat16>(part.rank) : adder_for<kFloat32>(part.rank);
    }
    template <int32_t kind>
    static void add(const Call& call, int64_t first, int64_t rows, int64_t column, int64_t outputs, const float* sums) {
        typedef Format<kind> F;
        typedef typename F::Stored Stored;
        for (int64_t lane = 0; lane < rows; lane++, sums += kWindow) {
            Stored* y = (Stored*)call.y + call.indices[first + lane] * call.y_stride + column;
            int64_t o = 0;
            for (; o + kWidth <= outputs; o += kWidth) F::put(y + o, F::get(y + o) + load<Floats>(sums + o));
            for (; o < outputs; o++) y[o] = F::put(F::get(y[o]) + sums[o]);
        }
    }
};

bool suits_narrow(const Layer* layer, int64_t rows) { return rows <= kNarrowRows && layer->rank <= kNarrowRank; }

}  // namespace
#endif
