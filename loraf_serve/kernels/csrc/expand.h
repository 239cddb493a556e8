// y[lane][offset_p + o] += Σ_t w[lane][t] · Σ_{nonzeros (o, j) of B_tp} value · z[p][j][lane], rounded once.
//
//     for each window of outputs of each part p, for each chunk of lanes:
//         sums[o][lanes] = 0
//         for each task t that a lane uses, for each slice of 16 outputs of its sheet:
//             16 sums in registers, lanes side by side; for each step: 16 × sum += value · z[j][lanes]
//             sums[o][lanes] += w[t][lanes] · sum
//         transpose the sums and add them to the rows of y
//
// Measured on one core of an Ice Lake server (both cores busy), nanoseconds a nonzero and 16 lanes: 1.3 with 16 lanes,
// 1.0 with 32, 0.9 with 64. Which rows are long is not guessed wrong to any effect: equal rows took 1.25, random ones
// 1.29. Values broadcast from a register (two shuffles each, as GCC likes to) instead of memory: 1.9. Columns read one
// by one instead of eight a word: 1.4 with 16 lanes, but 3 % less with 32 and 64.
#pragma once

#include "shrink.h"

namespace {

// What lanes ask of the tasks, laid out for vectors. One thread's scratch.
struct Wanted {
    float* weights;   // [chunk][task][lanes], zeros beyond the rows
    uint8_t* active;  // [chunk][task]: whether a lane has a weight

    static int64_t bytes(int64_t lanes, int64_t tasks) {
        int64_t padded = kRowsAtOnce + lanes;
        return round_up(padded * tasks * 4 + padded * tasks, 64);
    }

    void fill(const Call& call, int64_t chunks) const {
        int64_t lanes = call.lanes, tasks = call.layer->tasks;
        memset(active, 0, size_t(chunks * tasks));
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int64_t t = 0; t < tasks; t++)
                for (int64_t lane = 0; lane < lanes; lane++) {
                    int64_t row = chunk * lanes + lane;
                    float w = row < call.rows ? call.weights[row * tasks + t] : 0;
                    weights[(chunk * tasks + t) * lanes + lane] = w;
                    active[chunk * tasks + t] |= w != 0;
                }
    }
};

// A sheet's three arrays (layer.h).
struct Sheet {
    const uint8_t* row;
    const uint16_t* length;
    const char* steps;
    int64_t slices;

    Sheet(const char* at, int64_t outputs) {
        slices = outputs / kBlock;
        row = (const uint8_t*)at;
        length = (const uint16_t*)(at + outputs);
        steps = at + outputs + round_up(2 * slices, kUnit);
    }
};

// Sixteen values of a step, as float32 in memory: from there a broadcast costs nothing but the load.
template <int32_t value_kind>
LORAF_INLINE const float* widen(const char* step, float (&room)[kBlock]) {
    if constexpr (value_kind == kFloat32) return (const float*)step;
    typedef typename Format<value_kind>::Stored Stored;
#pragma GCC unroll 4
    for (int c = 0; c < kBlock; c += kWidth) store(room + c, Format<value_kind>::get((const Stored*)step + c));
    asm("" : "+m"(room));  // or the compiler keeps them in a register and shuffles
    return room;
}

// Sixteen columns of a step. Few lanes: read as words, for the loads are what is scarce. More lanes: one by one.
template <class Index, bool words>
struct Columns {
    static constexpr int kEach = 8 / int(sizeof(Index));
    const Index* from;
    uint64_t word[words ? kBlock / kEach : 1];

    LORAF_INLINE explicit Columns(const char* at) : from((const Index*)at) {
        if constexpr (words)
#pragma GCC unroll 4
            for (int i = 0; i < kBlock / kEach; i++) {
                word[i] = load<uint64_t>(at + 8 * i);
                asm("" : "+r"(word[i]));
            }
    }
    LORAF_INLINE int64_t operator[](int i) const {
        if constexpr (words) return Index(word[i / kEach] >> (8 * sizeof(Index) * (i % kEach)));
        return from[i];
    }
};

// Adds one task's part to a window's sums.
template <int kVectors, class Index, int32_t value_kind>
void add_sheet(float* sums, const char* at, int64_t outputs, const float* z, int64_t, const float* weight) {
    constexpr int kRows = kSums / kVectors;  // outputs whose sums stand in registers
    constexpr int64_t kLanes = kVectors * kWidth;
    constexpr int64_t kValues = kBlock * int64_t(sizeof(typename Format<value_kind>::Stored));
    constexpr int64_t kStep = kValues + kBlock * int64_t(sizeof(Index));
    Sheet sheet(at, outputs);
    Floats w[kVectors];
    for (int q = 0; q < kVectors; q++) w[q] = load<Floats>(weight + q * kWidth);
    for (int64_t s = 0; s < sheet.slices; s++) {
        const char* stop = sheet.steps + sheet.length[s] * kStep;
        for (int first = 0; first < kBlock; first += kRows) {
            Floats sum[kRows][kVectors];
#pragma GCC unroll 16
            for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
                for (int q = 0; q < kVectors; q++) sum[i][q] = Floats{};
            for (const char* step = sheet.steps; step < stop; step += kStep) {
                if (first == 0) __builtin_prefetch(step + kAhead);
                alignas(64) float room[kBlock];
                const float* value = widen<value_kind>(step, room) + first;
                Columns<Index, kVectors == 1> j(step + kValues);
#pragma GCC unroll 16
                for (int i = 0; i < kRows; i++) {
                    const float* line = z + j[first + i] * kLanes;
#pragma GCC unroll 4
                    for (int q = 0; q < kVectors; q++) sum[i][q] += load<Floats>(line + q * kWidth) * value[i];
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < kRows; i++) {
                float* to = sums + int64_t(sheet.row[s * kBlock + first + i]) * kLanes;
#pragma GCC unroll 4
                for (int q = 0; q < kVectors; q++)
                    store(to + q * kWidth, load<Floats>(to + q * kWidth) + w[q] * sum[i][q]);
            }
        }
        sheet.steps = stop;
    }
}

// y[lane][o] += sums[o][lane], rounded once.
template <int32_t kind>
void add_to_rows(const Call& call, int64_t first, int64_t rows, int64_t column, int64_t outputs, const float* sums) {
    typedef Format<kind> F;
    typedef typename F::Stored Stored;
    int64_t lanes = call.lanes;
    const int32_t* indices = call.indices + first;
    Stored* y = (Stored*)call.y + column;
    int64_t o = 0;
    for (; o + kWidth <= outputs; o += kWidth)
        for (int64_t lane0 = 0; lane0 < rows; lane0 += kWidth) {
            Floats square[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; i++) square[i] = load<Floats>(sums + (o + i) * lanes + lane0);
            transpose(square);
            alignas(64) float turned[kWidth][kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; i++) store(turned[i], square[i]);
            int64_t count = least(kWidth, rows - lane0);
            for (int64_t i = 0; i < count; i++) {
                Stored* to = y + indices[lane0 + i] * call.y_stride + o;
                F::put(to, F::get(to) + load<Floats>(turned[i]));
            }
        }
    for (; o < outputs; o++)
        for (int64_t lane = 0; lane < rows; lane++) {
            Stored* to = y + indices[lane] * call.y_stride + o;
            *to = F::put(F::get(*to) + sums[o * lanes + lane]);
        }
}

// Asks for the beginning of the sheet that comes after number `current`: its rows and lengths break the stream.
LORAF_INLINE void prefetch_next(const uint32_t* sheets, const char* b, int64_t current, int64_t t, int64_t count,
                                int64_t tasks, const uint8_t* active) {
    for (int64_t next = current + 1; next < count; next++) {
        t = t + 1 < tasks ? t + 1 : 0;
        if (!active[t] || sheets[next] == sheets[next + 1]) continue;
        const char* from = b + int64_t(sheets[next]) * kUnit;
        for (int64_t at = 0; at < kAhead; at += 64) __builtin_prefetch(from + at);
        return;
    }
}

// Windows of all parts count through, and for each the chunks: a window's part of B stays in the cache for all chunks.
// `way` says how one chunk is done: its lanes, how a sheet is added, how the sums get to y.
template <class Way>
void expand_by(const Call& call, char* scratch, int thread, int threads) {
    const Layer& layer = *call.layer;
    int64_t windows = 0, tasks = layer.tasks, lanes = call.lanes;
    for (int64_t p = 0; p < layer.parts; p++) windows += windows_of(layer.part[p].d_out);
    int64_t chunks = (call.rows + lanes - 1) / lanes;
    Range mine = share(windows * chunks, thread, threads);
    float* sums = (float*)scratch;
    Wanted wanted;
    wanted.weights = sums + kWindow * lanes;
    wanted.active = (uint8_t*)(wanted.weights + chunks * tasks * lanes);
    wanted.fill(call, chunks);
    int64_t item = 0;
    for (int64_t p = 0; p < layer.parts; p++) {
        const Part& part = layer.part[p];
        const uint32_t* sheets = (const uint32_t*)((const char*)&layer + part.sheets);
        const char* b = (const char*)&layer + part.b;
        int64_t count = windows_of(part.d_out);
        auto add = Way::sheet_adder(part);
        for (int64_t window = 0; window < count; window++) {
            int64_t outputs = least(kWindow, part.d_out - window * kWindow), padded = round_up(outputs, kBlock);
            for (int64_t chunk = 0; chunk < chunks; chunk++, item++) {
                if (item < mine.begin || item >= mine.end) continue;
                int64_t first = chunk * lanes, rows = least(lanes, call.rows - first);
                const float* z = Way::z_of(call, part, chunk);
                const uint8_t* active = wanted.active + chunk * tasks;
                bool touched = false;
                for (int64_t t = 0; t < tasks; t++) {
                    int64_t sheet = window * tasks + t;
                    if (!active[t] || sheets[sheet] == sheets[sheet + 1]) continue;
                    if (chunks == 1) prefetch_next(sheets, b, sheet, t, count * tasks, tasks, active);
                    if (!touched) memset(sums, 0, size_t(kWindow * lanes) * 4);
                    touched = true;
                    const float* weight = wanted.weights + (chunk * tasks + t) * lanes;
                    add(sums, b + int64_t(sheets[sheet]) * kUnit, padded, z, layer.blocks * kBlock, weight);
                }
                if (!touched) continue;
                int64_t column = part.offset + window * kWindow;
                if (layer.kind == kBfloat16) Way::template add<kBfloat16>(call, first, rows, column, outputs, sums);
                else if (layer.kind == kFloat16) Way::template add<kFloat16>(call, first, rows, column, outputs, sums);
                else Way::template add<kFloat32>(call, first, rows, column, outputs, sums);
            }
        }
    }
}

// z_stride: between lanes, where they do not stand side by side.
typedef void (*AddSheet)(float* sums, const char* at, int64_t outputs, const float* z, int64_t z_stride,
                         const float* weight);

// Rows of the batch in the lanes of vectors.
template <int kVectors>
struct Wide {
    static const float* z_of(const Call& call, const Part& part, int64_t chunk) {
        return call.z + (chunk * call.layer->blocks + part.first_block) * kBlock * call.lanes;
    }
    static AddSheet sheet_adder(const Part& part) {
        bool bytes = part.index_bytes == 1;
        if (part.value_kind == kBfloat16)
            return bytes ? add_sheet<kVectors, uint8_t, kBfloat16> : add_sheet<kVectors, uint16_t, kBfloat16>;
        return bytes ? add_sheet<kVectors, uint8_t, kFloat32> : add_sheet<kVectors, uint16_t, kFloat32>;
    }
    template <int32_t kind>
    static void add(const Call& call, int64_t first, int64_t rows, int64_t column, int64_t outputs, const float* sums) {
        add_to_rows<kind>(call, first, rows, column, outputs, sums);
    }
};

}  // namespace
