// The fused delta of one layer. This file is compiled once for each instruction set.
//
//     for each chunk of `lanes` rows of the batch:                    # in the lanes of vectors
//         shrink:  z[p][j][lane] = Σ_k A_p[j][k] · x[lane][k]         # once for all tasks            shrink.h
//         expand:  for each window of outputs of each part p:                                         expand.h
//                      sum[o][lane] = 0
//                      for each task t that some lane uses:
//                          sum[o][lane] += w[lane][t] · Σ_{nonzeros (o, j) of B_tp} value · z[p][j][lane]
//                      y[lane][offset_p + o] = round(y[lane][offset_p + o] + sum[o][lane])
//
// A nonzero costs one broadcast of its value and one fused multiply-add with a row of z for all lanes. A task's weight
// is applied to its sum over a row. So no table of z times weights is needed, and a task that no lane uses is skipped
// without reading it. For up to four rows of a batch narrow.h has another expand, on processors with enough registers.

#include "expand.h"
#include "narrow.h"

#ifndef LORAF_VARIANT
#define LORAF_VARIANT plain
#endif
#define LORAF_TEXT_(name) #name
#define LORAF_TEXT(name) LORAF_TEXT_(name)
#define LORAF_JOIN_(a, b) a##b
#define LORAF_JOIN(a, b) LORAF_JOIN_(a, b)

namespace {

bool runs_here() {
#if defined(__AVX512BF16__) && !defined(LORAF_EMULATE_BF16)
    if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return true;
#endif
}

constexpr int64_t kLanesMost = 4 * kWidth;

int64_t lanes_for(const Layer* layer, int64_t rows) {
#if defined(LORAF_NARROW)
    if (suits_narrow(layer, rows)) return rows;
#endif
    (void)layer;
    return rows <= kWidth ? kWidth : rows <= 2 * kWidth ? 2 * kWidth : kLanesMost;
}

int64_t scratch_for(const Layer* layer) {
    int64_t shrink = 4 * (kLanesMost * kStride + layer->blocks * kLanesMost * kBlock);
    int64_t expand = 4 * kWindow * kLanesMost + LaneWeights::bytes(kLanesMost, layer->tasks);
    return shrink > expand ? shrink : expand;
}

void shrink(const Call* call, Scratch scratch, int thread, int threads) {
    float* floats = (float*)scratch.bytes;
    if (call->layer->kind == kBfloat16) shrink_kind<kBfloat16>(*call, floats, thread, threads);
    else if (call->layer->kind == kFloat16) shrink_kind<kFloat16>(*call, floats, thread, threads);
    else shrink_kind<kFloat32>(*call, floats, thread, threads);
}

void expand(const Call* call, Scratch scratch, int thread, int threads) {
    switch (call->lanes) {
#if defined(LORAF_NARROW)
        case 1: return expand_by<Narrow<1>>(*call, scratch.bytes, thread, threads);
        case 2: return expand_by<Narrow<2>>(*call, scratch.bytes, thread, threads);
        case 3: return expand_by<Narrow<3>>(*call, scratch.bytes, thread, threads);
        case 4: return expand_by<Narrow<4>>(*call, scratch.bytes, thread, threads);
#endif
        case kWidth: return expand_by<Wide<1>>(*call, scratch.bytes, thread, threads);
        case 2 * kWidth: return expand_by<Wide<2>>(*call, scratch.bytes, thread, threads);
        default: return expand_by<Wide<4>>(*call, scratch.bytes, thread, threads);
    }
}

}  // namespace

namespace loraf {
extern const Variant LORAF_JOIN(variant_, LORAF_VARIANT);
const Variant LORAF_JOIN(variant_, LORAF_VARIANT) = {LORAF_TEXT(LORAF_VARIANT), runs_here, lanes_for, scratch_for,
                                                     shrink, expand};
}  // namespace loraf
