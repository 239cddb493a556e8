// z[row][j] = Σ_k A[j][k] · x[row][k], for all parts of the layer at once.
//
//     for each tile of kDepth columns:
//         copy a tile of x in float32 (or as pairs of bfloat16)
//         for 8 rows and 2 blocks of 16 j, or 4 and 4, as the registers allow:
//             sums[rows][j] += A[j][k] · x[row][k]     # a vector is 16 j at one k, x is broadcast
//
// Measured on one core of an Ice Lake server (AVX-512, both cores busy), 8 layers, 4.5 M numbers in A. 16 rows with one
// block took 2.1 ms; 8 rows with two blocks took 1.5 ms, because of fewer loads per product. One row with four blocks
// took 0.38 ms; with one block and four sums along k it took 0.44 ms. A in tiles, prefetched 1 KiB ahead: 3.5 → 2.2 ms.
#pragma once

#include "vectors.h"

#if defined(__AVX512BF16__) || defined(LORAF_EMULATE_BF16)
#define LORAF_PAIRS 1
#endif

namespace {

constexpr int64_t kStride = kDepth + kWidth;  // of a row of the tile, so that rows use different cache sets
constexpr int kParts = kBlock / kWidth;       // vectors in a block of A
constexpr int kRowsMost = kWidth == 16 ? 8 : kSums / kParts;  // rows of x that share a load of A
constexpr int64_t kAhead = 1024;              // prefetch distance for A and B, in bytes

struct Range {
    int64_t begin, end;
};

LORAF_INLINE Range share(int64_t items, int thread, int threads) {
    return {items * thread / threads, items * (thread + 1) / threads};
}

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(LORAF_PAIRS)
// Returns sum[i] + a[2i]·b[2i] + a[2i+1]·b[2i+1] of bfloat16 pairs: AVX-512-BF16's VDPBF16PS, or its emulation in
// tests.
LORAF_INLINE Floats multiply_pairs(Floats sum, Words a, Words b) {
#if defined(LORAF_EMULATE_BF16)
    sum += (Floats)(a & 0xFFFF0000u) * (Floats)(b & 0xFFFF0000u);
    return sum + (Floats)(a << 16) * (Floats)(b << 16);
#else
    return _mm512_dpbf16_ps(sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#endif
}
#endif

// The format of x in a tile: float32, or pairs of bfloat16 in 32-bit words.
template <int32_t kind>
struct Tile {
#if defined(LORAF_PAIRS)
    static constexpr bool pairs = kind == kBfloat16;
#else
    static constexpr bool pairs = false;
#endif
};

// Copies columns k0 … k0 + depth − 1 of rows of x. Pads rows, and an odd number of columns, with zeros.
template <int32_t kind>
void fill_tile(float* tile, const Call& call, int64_t first, int64_t rows, int64_t padded, int64_t k0, int64_t depth) {
    typedef Format<kind> F;
    typedef typename F::Stored Stored;
    int64_t room = depth_of(depth, kind);
    for (int64_t i = 0; i < padded; i++) {
        float* to = tile + i * kStride;
        if (i >= rows) {
            memset(to, 0, size_t(room) * 4);
            continue;
        }
        const Stored* from = (const Stored*)call.x + call.indices[first + i] * call.x_stride + k0;
        if constexpr (Tile<kind>::pairs) {
            memcpy(to, from, size_t(depth) * 2);
            if (room > depth) ((uint16_t*)to)[depth] = 0;
        } else {
            int64_t k = 0;
            for (; k + kWidth <= depth; k += kWidth) store(to + k, F::get(from + k));
            for (; k < depth; k++) to[k] = F::get(from[k]);
            if (room > depth) to[depth] = 0;
        }
    }
}

// sums[block][row][16 j] += Σ_k a[block][k][16 j] · tile[row][k] for kRows rows and kBlocks blocks. A vector of A
// serves all rows and a broadcast of x all blocks. Few rows are combined with several blocks, for enough independent
// sums.
template <int32_t kind, int kRows, int kBlocks>
LORAF_INLINE void multiply(float* sums, int64_t sums_stride, const typename Format<kind>::Stored* a, int64_t a_stride,
                           const float* tile, int64_t depth) {
    constexpr int64_t kStepBytes = kBlock * (kind == kFloat16 ? 2 : 4);
    constexpr int kVectors = kBlocks * kParts;
    Floats sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++)
            sum[r][v] = load<Floats>(sums + v / kParts * sums_stride + r * kBlock + v % kParts * kWidth);
    int64_t steps = kind == kBfloat16 ? (depth + 1) / 2 : depth;
    for (int64_t k = 0; k < steps; k++) {
        Floats column[kVectors];
        Words pair[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) {
            const char* from = (const char*)(a + v / kParts * a_stride) + k * kStepBytes;
            if (v % kParts == 0) __builtin_prefetch(from + kAhead);
            from += v % kParts * (kStepBytes / kParts);
            if constexpr (kind == kBfloat16) pair[v] = load<Words>(from);
            else column[v] = Format<kind>::get((const typename Format<kind>::Stored*)from);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) {
            const float* x = tile + r * kStride + (kind == kBfloat16 && !Tile<kind>::pairs ? 2 * k : k);
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; v++) {
                if constexpr (kind != kBfloat16) {
                    sum[r][v] += column[v] * x[0];
                } else {
#if defined(LORAF_PAIRS)
                    sum[r][v] = multiply_pairs(sum[r][v], pair[v], Words{} + load<uint32_t>(x));
#else
                    sum[r][v] += (Floats)(pair[v] << 16) * x[0];
                    sum[r][v] += (Floats)(pair[v] & 0xFFFF0000u) * x[1];
#endif
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++)
            store(sums + v / kParts * sums_stride + r * kBlock + v % kParts * kWidth, sum[r][v]);
}

// Multiplies `count` blocks, `kernel` rows at a time, a power of two up to kRowsMost.
template <int32_t kind, int kRows = kRowsMost>
void multiply_blocks(int kernel, float* sums, int64_t sums_stride, const typename Format<kind>::Stored* a,
                     int64_t a_stride, int64_t count, const float* tile, int64_t rows, int64_t depth) {
    if constexpr (kRows > 1)
        if (kernel < kRows)
            return multiply_blocks<kind, kRows / 2>(kernel, sums, sums_stride, a, a_stride, count, tile, rows, depth);
    constexpr int kBlocks = int(least(4, kSums / (kRows * kParts)));
    int64_t b = 0;
    for (; b + kBlocks <= count; b += kBlocks)
        for (int64_t r = 0; r < rows; r += kRows)
            multiply<kind, kRows, kBlocks>(sums + b * sums_stride + r * kBlock, sums_stride, a + b * a_stride, a_stride,
                                           tile + r * kStride, depth);
    for (; b < count; b++)
        for (int64_t r = 0; r < rows; r += kRows)
            multiply<kind, kRows, 1>(sums + b * sums_stride + r * kBlock, sums_stride, a + b * a_stride, a_stride,
                                     tile + r * kStride, depth);
}

// Work items are the blocks of A of all parts, for each chunk. A thread takes a contiguous share of them.
template <int32_t kind>
void shrink_kind(const Call& call, float* tile, int thread, int threads) {
    typedef typename Format<kind>::Stored Stored;
    const Layer& layer = *call.layer;
    const Stored* a = (const Stored*)((const char*)&layer + layer.a);
    int64_t blocks = layer.blocks;
    int64_t lanes = call.lanes, chunks = (call.rows + lanes - 1) / lanes;
    float* sums = tile + round_up(lanes, kRowsMost) * kStride;  // [block][lane][16 j]
    Range mine = share(chunks * blocks, thread, threads);
    for (int64_t item = mine.begin; item < mine.end;) {
        int64_t chunk = item / blocks, first_block = item % blocks;
        int64_t count = least(blocks - first_block, mine.end - item);
        int64_t rows = least(lanes, call.rows - chunk * lanes);
        int kernel = 1;  // rows at a time: a power of two
        while (kernel < rows && kernel < kRowsMost) kernel *= 2;
        int64_t padded = round_up(rows, kernel);
        int64_t height = lanes < padded ? padded : lanes;
        memset(sums, 0, size_t(count * height * kBlock) * 4);
        for (int64_t k0 = 0; k0 < layer.d_in; k0 += kDepth) {
            int64_t depth = least(kDepth, layer.d_in - k0);
            fill_tile<kind>(tile, call, chunk * lanes, rows, padded, k0, depth);
            const Stored* from = a + (k0 * blocks + first_block * depth_of(depth, kind)) * kBlock;
            multiply_blocks<kind>(kernel, sums, height * kBlock, from, depth_of(depth, kind) * kBlock, count, tile, padded,
                                  depth);
        }
        for (int64_t b = 0; b < count; b++)
            for (int64_t lane = 0; lane < lanes; lane++) {
                const float* from = sums + (b * height + lane) * kBlock;
                if (lanes < kWidth) {
                    memcpy(call.z + (lane * blocks + first_block + b) * kBlock, from, kBlock * sizeof *from);
                    continue;
                }
                float* to = call.z + (chunk * blocks + first_block + b) * kBlock * lanes + lane;
                for (int64_t j = 0; j < kBlock; j++) to[j * lanes] = from[j];
            }
        item += count;
    }
}

}  // namespace
