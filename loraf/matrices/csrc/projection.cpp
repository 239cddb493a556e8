// The frozen projection A (loraf/matrices/projection.py has the definition and the reference):
//
//     for each row i, for each block b of 8 columns:
//         w0, w1, w2, w3 = philox4x32_10(counter = (b, i, 0, 0), key)
//         for lane 0 … 7:  A[i, 8·b + lane] = table[16 bits of w(lane/2), lower half first] · scale
//
// in float32, then rounded to bfloat16 or float16 (to nearest, ties to even) as torch does.

#include <cstdint>
#include <cstring>

#include "api.h"
#include "isa.h"

namespace {

using loraf::Isa;

constexpr int kLanes = 8;    // 16-bit numbers in one Philox block
constexpr int kBlocks = 64;  // at a time: they fit the L1 cache, and are a multiple of every vector's width

enum Kind { kNone = 0, kBfloat16 = 1, kFloat16 = 2 };

LORAF_INLINE void philox(uint32_t row, uint32_t first, uint32_t key0, uint32_t key1, uint32_t (*words)[4]) {
    uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
    for (int b = 0; b < kBlocks; b++) {
        c0[b] = first + b;
        c1[b] = row;
        c2[b] = c3[b] = 0;
    }
    for (int round = 0; round < 10; round++) {
        for (int b = 0; b < kBlocks; b++) {
            uint64_t p0 = uint64_t(0xD2511F53) * c0[b], p1 = uint64_t(0xCD9E8D57) * c2[b];
            c0[b] = uint32_t(p1 >> 32) ^ c1[b] ^ key0;
            c1[b] = uint32_t(p1);
            c2[b] = uint32_t(p0 >> 32) ^ c3[b] ^ key1;
            c3[b] = uint32_t(p0);
        }
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    for (int b = 0; b < kBlocks; b++) {
        words[b][0] = c0[b];
        words[b][1] = c1[b];
        words[b][2] = c2[b];
        words[b][3] = c3[b];
    }
}

LORAF_INLINE uint16_t to_bfloat16(uint32_t bits) {  // of a finite number
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Of a finite number. Beyond 65,504 the result is infinity, below 2^-14 it is denormal, as in IEEE 754.
LORAF_INLINE uint16_t to_float16(uint32_t bits) {
    uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
    uint32_t normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    // A denormal result counts units of 2^-24: shift the significand, with its leading one, right by 126 - exponent.
    uint32_t exponent = magnitude >> 23;
    uint32_t shift = exponent < 126 - 31 ? 31 : 126 - exponent;
    uint32_t significand = (magnitude & 0x7FFFFF) | (exponent ? 0x800000 : 0);
    shift = exponent > 125 ? 1 : shift;
    uint32_t half = (1u << (shift - 1)) - 1, odd = (significand >> shift) & 1;
    uint32_t denormal = shift > 25 ? 0 : (significand + half + odd) >> shift;
    uint32_t result = magnitude < 0x38800000 ? denormal : normal;
    return uint16_t(sign | (magnitude >= 0x477FF000 ? 0x7C00 : result));
}

struct Job {
    const float* table;
    float scale;
    uint32_t key0, key1;
    int64_t row0, row1, column0, column1;
    float* out32;     // (rows, columns), or null
    uint16_t* out16;  // (rows, columns), or null
    int kind;         // of out16
};

LORAF_INLINE void run(const Job& job) {
    uint32_t words[kBlocks][4];
    float values[kBlocks * kLanes];
    const int64_t columns = job.column1 - job.column0;
    const int64_t first_block = job.column0 / kLanes;
    for (int64_t row = job.row0; row < job.row1; row++) {
        for (int64_t block = first_block; block * kLanes < job.column1; block += kBlocks) {
            philox(uint32_t(row), uint32_t(block), job.key0, job.key1, words);
            uint16_t lanes[kBlocks * kLanes];
            memcpy(lanes, words, sizeof lanes);  // little-endian: the lower half first (loraf/matrices/native.py checks that)
            for (int i = 0; i < kBlocks * kLanes; i++) values[i] = job.table[lanes[i]] * job.scale;
            // The part of this tile that lies in the slice.
            const int64_t start = block * kLanes < job.column0 ? job.column0 - block * kLanes : 0;
            const int64_t left = job.column1 - block * kLanes;
            const int64_t count = (left < kBlocks * kLanes ? left : kBlocks * kLanes) - start;
            const int64_t at = (row - job.row0) * columns + block * kLanes + start - job.column0;
            if (job.out32) memcpy(job.out32 + at, values + start, size_t(count) * sizeof(float));
            if (job.kind != kNone) {
                uint32_t bits[kBlocks * kLanes];
                memcpy(bits, values, sizeof values);
                uint16_t* out = job.out16 + at;
                if (job.kind == kBfloat16)
                    for (int64_t i = 0; i < count; i++) out[i] = to_bfloat16(bits[start + i]);
                else
                    for (int64_t i = 0; i < count; i++) out[i] = to_float16(bits[start + i]);
            }
        }
    }
}

void run_plain(const Job& job) { run(job); }
#ifdef LORAF_X86
LORAF_AVX2 void run_avx2(const Job& job) { run(job); }
LORAF_AVX512 void run_avx512(const Job& job) { run(job); }
#endif

}  // namespace

LORAF_API void loraf_projection(const float* table, float scale, uint32_t key0, uint32_t key1, int64_t row0,
                                int64_t row1, int64_t column0, int64_t column1, float* out32, uint16_t* out16,
                                int kind, int most) {
    const Job job{table, scale, key0, key1, row0, row1, column0, column1, out32, out16, kind};
#ifdef LORAF_X86
    switch (loraf::best_isa(most)) {
        case Isa::avx512: return run_avx512(job);
        case Isa::avx2: return run_avx2(job);
        case Isa::plain: break;
    }
#endif
    (void)most;
    run_plain(job);
}
