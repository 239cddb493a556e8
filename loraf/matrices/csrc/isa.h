// Compiles one loop for several instruction sets and selects the best one at run time.
//
// A kernel is written once, as a plain loop in an always-inlined template, and instantiated inside functions that carry
// a target attribute, so that the compiler vectorises each for its instruction set. All arithmetic is on integers or a
// single float32 multiplication, so every variant computes the same bits.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LORAF_X86 1
#define LORAF_AVX2 __attribute__((target("avx2")))
#define LORAF_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif

#define LORAF_INLINE inline __attribute__((always_inline))

namespace loraf {

enum class Isa { plain, avx2, avx512 };

// The best instruction set of this processor, up to `most` (0 plain, 1 AVX2, 2 AVX-512), which tests lower.
inline Isa best_isa(int most) {
#ifdef LORAF_X86
    if (most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return Isa::avx512;
    if (most >= 1 && __builtin_cpu_supports("avx2")) return Isa::avx2;
#endif
    (void)most;
    return Isa::plain;
}

}  // namespace loraf
