// y[lane][offset_p + o] += Σ_t w[lane][t] · Σ_{nonzeros (o, j) of B_tp} value · z[p][j][lane], rounded once.
//
//     for each window of outputs of each part p, for each chunk of lanes:
//         sums[o][lanes] = 0
//         for each task t that a lane uses, for each slice of 16 outputs of its sheet:
//             16 sums in registers, each with the lanes of a vector; for each step: 16 × sum += value · z[j][lanes]
//             sums[o][lanes] += w[t][lanes] · sum
//         transpose the sums and add them to the rows of y
//
// Measured on one core of an Ice Lake server (both cores busy), nanoseconds per nonzero and 16 lanes: 1.3 with 16
// lanes, 1.0 with 32, 0.9 with 64. Mispredicted slice lengths hardly matter: rows of equal length took 1.25, of random
// length 1.29. Broadcasting values from a register (GCC's choice, two shuffles each) instead of memory took 1.9.
// Reading columns one by one instead of eight per word took 1.4 with 16 lanes, but 3 % less with 32 and 64.
#pragma once

#include "shrink.h"

namespace {

// The lanes' task weights, laid out for vectors. One thread's scratch.
struct LaneWeights {
    float* weights;   // [chunk][task][lanes], zeros beyond the last row
    uint8_t* active;  // [chunk][task]: whether any lane's weight is not zero

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

// Returns sixteen values of a step as float32 in memory, where a broadcast is just a load.
template <int32_t value_kind>
LORAF_INLINE const float* widen(const char* step, float (&room)[kBlock]) {
    if constexpr (value_kind == kFloat32) return (const float*)step;
    typedef typename Format<value_kind>::Stored Stored;
#pragma GCC unroll 4
    for (int c = 0; c < kBlock; c += kWidth) store(room + c, Format<value_kind>::get((const Stored*)step + c));
    asm("" : "+m"(room));  // keeps the compiler from shuffling registers instead
    return room;
}

// Sixteen columns of a step. With few lanes they are read as words, because loads are the bottleneck; else one by one.
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

// Adds one task's sheet to a window's sums.
template <int kVectors, class Index, int32_t value_kind>
void add_sheet(float* sums, const char* at, int64_t outputs, const float* z, int64_t, const float* weight) {
    constexpr int kRows = kSums / kVectors;  // outputs whose sums are kept in registers
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
            alignas(64) float transposed[kWidth][kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; i++) store(transposed[i], square[i]);
            int64_t count = least(kWidth, rows - lane0);
            for (int64_t i = 0; i < count; i++) {
                Stored* to = y + indices[lane0 + i] * call.y_stride + o;
                F::put(to, F::get(to) + load<Floats>(transposed[i]));
            }
        }
    for (; o < outputs; o++)
        for (int64_t lane = 0; lane < rows; lane++) {
            Stored* to = y + indices[lane] * call.y_stride + o;
            *to = F::put(F::get(*to) + sums[o * lanes + lane]);
        }
}

// Prefetches the beginning of the next sheet after `current`, where its rows and lengths interrupt the stream of steps.
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

// Work items are windows of all parts, and within a window its chunks, so that a window of B stays cached for all
// chunks. `Lanes` defines how a chunk is computed: what its lanes hold, how a sheet is added, and how the sums are
// added to y.
template <class Lanes>
void expand_by(const Call& call, char* scratch, int thread, int threads) {
    const Layer& layer = *call.layer;
    int64_t windows = 0, tasks = layer.tasks, lanes = call.lanes;
    for (int64_t p = 0; p < layer.parts; p++) windows += windows_of(layer.part[p].d_out);
    int64_t chunks = (call.rows + lanes - 1) / lanes;
    Range mine = share(windows * chunks, thread, threads);
    float* sums = (float*)scratch;
    LaneWeights lane_weights;
    lane_weights.weights = sums + kWindow * lanes;
    lane_weights.active = (uint8_t*)(lane_weights.weights + chunks * tasks * lanes);
    lane_weights.fill(call, chunks);
    int64_t item = 0;
    for (int64_t p = 0; p < layer.parts; p++) {
        const Part& part = layer.part[p];
        const uint32_t* sheets = (const uint32_t*)((const char*)&layer + part.sheets);
        const char* b = (const char*)&layer + part.b;
        int64_t count = windows_of(part.d_out);
        auto add = Lanes::sheet_adder(part);
        for (int64_t window = 0; window < count; window++) {
            int64_t outputs = least(kWindow, part.d_out - window * kWindow), padded = round_up(outputs, kBlock);
            for (int64_t chunk = 0; chunk < chunks; chunk++, item++) {
                if (item < mine.begin || item >= mine.end) continue;
                int64_t first = chunk * lanes, rows = least(lanes, call.rows - first);
                const float* z = Lanes::z_of(call, part, chunk);
                const uint8_t* active = lane_weights.active + chunk * tasks;
                bool touched = false;
                for (int64_t t = 0; t < tasks; t++) {
                    int64_t sheet = window * tasks + t;
                    if (!active[t] || sheets[sheet] == sheets[sheet + 1]) continue;
                    if (chunks == 1) prefetch_next(sheets, b, sheet, t, count * tasks, tasks, active);
                    if (!touched) memset(sums, 0, size_t(kWindow * lanes) * 4);
                    touched = true;
                    const float* weight = lane_weights.weights + (chunk * tasks + t) * lanes;
                    add(sums, b + int64_t(sheets[sheet]) * kUnit, padded, z, layer.blocks * kBlock, weight);
                }
                if (!touched) continue;
                int64_t column = part.offset + window * kWindow;
                if (layer.kind == kBfloat16) Lanes::template add<kBfloat16>(call, first, rows, column, outputs, sums);
                else if (layer.kind == kFloat16) Lanes::template add<kFloat16>(call, first, rows, column, outputs, sums);
                else Lanes::template add<kFloat32>(call, first, rows, column, outputs, sums);
            }
        }
    }
}

// z_stride: between lanes, if they are not adjacent.
typedef void (*AddSheet)(float* sums, const char* at, int64_t outputs, const float* z, int64_t z_stride,
                         const float* weight);

// The lanes of a vector hold rows of the batch.
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
