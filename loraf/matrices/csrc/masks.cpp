// Checks the masks of one module (loraf/matrices/sparse.py has the definition and the reference):
//
//     for each task t, for each of its positions p, in stored order:
//         row[p] in 0 … d_out-1,  column[p] in 0 … rank-1
//         (row[p], column[p]) > (row[p-1], column[p-1])      sorted by row then column, and so unique
//         value[p] is finite
//     no position is owned by two tasks
//
// Coordinates and values are read once, as they are stored. A position is marked only after a check that it lies inside
// the matrix, so no content of a file can cause a write outside of it.

#include <cstdint>
#include <cstring>

#include "api.h"
#include "isa.h"

namespace {

using loraf::Isa;

constexpr int64_t kBlock = 2048;  // positions per block; their coordinates stay in the L1 cache

enum Fault : uint32_t { kRow = 1, kColumn = 2, kOrder = 4, kValue = 8 };  // loraf/matrices/sparse.py has their messages

// Whether one of `n` values has all bits of `exponent` set: NaN or infinity.
template <typename Bits>
LORAF_INLINE bool has_nonfinite(const void* values, int64_t start, int64_t n, Bits exponent) {
    const Bits* bits = static_cast<const Bits*>(values) + start;
    Bits bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= Bits((bits[i] & exponent) == exponent);
    return bad;
}

// Index types are unsigned, so that a negative int32 is larger than any matrix. d_out · rank is at most 2^32.
template <typename Row, typename Column>
LORAF_INLINE uint32_t check(const Row* rows, const Column* columns, const void* values, int value_kind, int64_t n,
                            uint32_t d_out, uint32_t rank, uint8_t* owned) {
    uint32_t faults = 0;
    uint32_t at[kBlock + 1] = {};  // positions row · rank + column, after the last one of the previous block
    for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t count = n - start < kBlock ? n - start : kBlock;
        const Row* r = rows + start;
        const Column* c = columns + start;
        Row last_row = 0;
        for (int64_t i = 0; i < count; i++) last_row = r[i] > last_row ? r[i] : last_row;
        Column last_column = 0;
        for (int64_t i = 0; i < count; i++) last_column = c[i] > last_column ? c[i] : last_column;
        faults |= (last_row >= d_out) * kRow | (last_column >= rank) * kColumn;
        // Outside the matrix a position may wrap around. Its order is then meaningless, and not reported.
        for (int64_t i = 0; i < count; i++) at[i + 1] = uint32_t(r[i]) * rank + c[i];
        uint32_t bad_order = 0;
        for (int64_t i = start == 0 ? 1 : 0; i < count; i++) bad_order |= at[i + 1] <= at[i];
        const bool bad_value = value_kind == 0   ? has_nonfinite<uint32_t>(values, start, count, 0x7F800000)
                               : value_kind == 1 ? has_nonfinite<uint16_t>(values, start, count, 0x7F80)
                                                 : has_nonfinite<uint16_t>(values, start, count, 0x7C00);
        faults |= bad_order * kOrder | bad_value * kValue;
        if (owned && !(faults & (kRow | kColumn)))
            for (int64_t i = 1; i <= count; i++) owned[at[i]] = 1;
        at[0] = at[count];
    }
    return faults;
}

// One task's mask: `Mask` in loraf/matrices/native.py. `value_kind`: 0 float32, 1 bfloat16, 2 float16.
struct Mask {
    const void *rows, *columns, *values;
    int64_t n;
    int64_t value_kind;
};

struct Job {
    const Mask* masks;
    int64_t count;
    int row_bytes, column_bytes;  // 1, 2 or 4
    uint32_t d_out, rank;
    uint8_t* owned;    // d_out · rank bytes, or null to skip the check for overlaps
    uint32_t* faults;  // for each mask the sum of its Fault bits
};

template <typename Row, typename Column>
LORAF_INLINE void check_all(const Job& job) {
    for (int64_t t = 0; t < job.count; t++) {
        const Mask& mask = job.masks[t];
        job.faults[t] = check(static_cast<const Row*>(mask.rows), static_cast<const Column*>(mask.columns), mask.values,
                              int(mask.value_kind), mask.n, job.d_out, job.rank, job.owned);
    }
}

template <typename Row>
LORAF_INLINE void by_column(const Job& job) {
    if (job.column_bytes == 1) return check_all<Row, uint8_t>(job);
    if (job.column_bytes == 2) return check_all<Row, uint16_t>(job);
    check_all<Row, uint32_t>(job);
}

LORAF_INLINE void by_type(const Job& job) {
    if (job.row_bytes == 1) return by_column<uint8_t>(job);
    if (job.row_bytes == 2) return by_column<uint16_t>(job);
    by_column<uint32_t>(job);
}

LORAF_INLINE int64_t ones(const uint8_t* bytes, int64_t n) {
    int64_t total = 0;
    for (int64_t start = 0; start < n; start += 1 << 16) {  // 32-bit sums vectorise better, and cannot overflow here
        uint32_t sum = 0;
        for (int64_t i = start; i < n && i < start + (1 << 16); i++) sum += bytes[i];
        total += sum;
    }
    return total;
}

// Whether two masks share a position. Meaningful only if no mask has a fault.
LORAF_INLINE bool run(const Job& job) {
    const int64_t size = int64_t(job.d_out) * job.rank;
    if (job.owned) memset(job.owned, 0, size_t(size));
    by_type(job);
    if (!job.owned) return false;
    int64_t positions = 0;
    for (int64_t t = 0; t < job.count; t++) positions += job.masks[t].n;
    return ones(job.owned, size) != positions;
}

bool run_plain(const Job& job) { return run(job); }
#ifdef LORAF_X86
LORAF_AVX2 bool run_avx2(const Job& job) { return run(job); }  // AVX-512 gained nothing here
#endif

}  // namespace

LORAF_API int loraf_check_masks(const Mask* masks, int64_t count, int row_bytes, int column_bytes, uint32_t d_out,
                                uint32_t rank, uint8_t* owned, uint32_t* faults, int most) {
    const Job job{masks, count, row_bytes, column_bytes, d_out, rank, owned, faults};
#ifdef LORAF_X86
    if (loraf::best_isa(most) != Isa::plain) return run_avx2(job);
#endif
    (void)most;
    return run_plain(job);
}
