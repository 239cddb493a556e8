// The library's interface: the variants, and a call that adds the delta of one layer with all threads.
//
//     choose the lanes of a chunk; for each block of rows that the scratch memory holds:
//         every thread: shrink its share;  wait;  expand its share;  wait

#include <cstdlib>

#include "layer.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#define LORAF_API extern "C" __attribute__((visibility("default")))

namespace loraf {

extern const Variant variant_plain;
extern const Variant variant_avx2;
extern const Variant variant_avx512;
extern const Variant variant_avx512bf16;

}  // namespace loraf

namespace {

using namespace loraf;

// From the slowest to the fastest; only those that the compiler supports.
const Variant* const kVariants[] = {
    &variant_plain,
#if defined(LORAF_WITH_avx2)
    &variant_avx2,
#endif
#if defined(LORAF_WITH_avx512)
    &variant_avx512,
#endif
#if defined(LORAF_WITH_avx512bf16)
    &variant_avx512bf16,
#endif
};
constexpr int kVariantCount = sizeof kVariants / sizeof kVariants[0];

// Memory that a thread keeps between calls. It grows as needed.
struct Buffer {
    char* bytes = nullptr;
    int64_t size = 0;

    char* at_least(int64_t required) {
        if (size < required) {
            free(bytes);
            bytes = nullptr;
            size = 0;
            void* fresh = nullptr;
            if (posix_memalign(&fresh, 64, size_t(required)) != 0) return nullptr;
            bytes = (char*)fresh;
            size = required;
        }
        return bytes;
    }
    ~Buffer() { free(bytes); }
};

thread_local Buffer z_buffer;        // of the calling thread
thread_local Buffer scratch_buffer;  // of every working thread

}  // namespace

LORAF_API int loraf_kernels_interface() { return 1; }
LORAF_API int loraf_kernels_variants() { return kVariantCount; }
LORAF_API const char* loraf_kernels_name(int variant) { return kVariants[variant]->name; }
LORAF_API int loraf_kernels_runs(int variant) { return kVariants[variant]->runs_here(); }

// Returns 0, or 1 if there is not enough memory. Some rows of y may have been changed then.
LORAF_API int loraf_kernels_add_delta(int which, const Layer* layer, char* y, int64_t y_stride, const char* x,
                                      int64_t x_stride, const int32_t* indices, const float* weights, int64_t rows) {
    if (rows <= 0) return 0;
    const Variant& variant = *kVariants[which];
    int64_t lanes = variant.lanes(layer, rows);
    int64_t most = rows < kRowsAtOnce ? rows : kRowsAtOnce;
    float* z = (float*)z_buffer.at_least((round_up(most, lanes) * layer->blocks * kBlock + kSlack) * 4);
    if (!z) return 1;
    int64_t scratch_size = variant.scratch(layer);
    int failed = 0;
    auto work = [&](int thread, int threads) {
        Scratch scratch = {scratch_buffer.at_least(scratch_size), scratch_size};
        if (!scratch.bytes) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
            int64_t count = rows - first < kRowsAtOnce ? rows - first : kRowsAtOnce;
            Call call = {layer,   y,     y_stride, x, x_stride, indices + first, weights + first * layer->tasks,
                         count, lanes, z};
            if (scratch.bytes) variant.shrink(&call, scratch, thread, threads);
#if defined(_OPENMP)
            if (threads > 1) {
#pragma omp barrier
            }
#endif
            if (__atomic_load_n(&failed, __ATOMIC_RELAXED)) continue;
            variant.expand(&call, scratch, thread, threads);
#if defined(_OPENMP)
            if (threads > 1 && first + kRowsAtOnce < rows) {
#pragma omp barrier
            }
#endif
        }
    };
#if defined(_OPENMP)
    if (omp_get_max_threads() > 1 && !omp_in_parallel()) {
#pragma omp parallel
        work(omp_get_thread_num(), omp_get_num_threads());
        return failed;
    }
#endif
    work(0, 1);
    return failed;
}
