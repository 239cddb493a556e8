// Packs A and the coordinates of B of each task into the block of memory that layer.h describes.
//
//     measure:  for each part and task, find where each row of B ends among the coordinates: the size of every sheet
//     pack:     write the head, A in blocks, every sheet
//
// Coordinates are sorted by row, then column, and lie inside the matrix. Python checked this when it read them.

#include <cstring>

#include "layer.h"

#define LORAF_API extern "C" __attribute__((visibility("default")))

using namespace loraf;

// The same structures are declared in loraf_serve/kernels/cpu_kernel.py.
struct TaskSource {
    const void* rows;
    const void* cols;
    const void* values;
    int64_t count;
    int32_t row_bytes, col_bytes;  // 1, 2 or 4
    int32_t value_kind;
    int32_t reserved;
};

struct PartSource {
    const void* a;
    int64_t rank, first_row, stop_row, offset;
    const TaskSource* tasks;
    int64_t* ends;  // scratch (tasks, stop_row − first_row + 1): row o begins at ends[o] and ends before ends[o + 1]
};

struct LayerSource {
    int64_t d_in, tasks, parts;
    int32_t kind;
    int32_t reserved;
    const PartSource* part;
};

namespace {

int64_t index_at(const void* indices, int32_t bytes, int64_t i) {
    if (bytes == 1) return ((const uint8_t*)indices)[i];
    if (bytes == 2) return ((const uint16_t*)indices)[i];
    return ((const int32_t*)indices)[i];
}

int64_t first_not_below(const TaskSource& task, int64_t row) {
    int64_t low = 0, high = task.count;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (index_at(task.rows, task.row_bytes, middle) < row) low = middle + 1;
        else high = middle;
    }
    return low;
}

// The loop only stores. Counting instead would have to wait for the previous count.
template <class Row>
void mark_ends(const Row* rows, int64_t begin, int64_t end, int64_t first_row, int64_t* ends) {
    for (int64_t i = begin; i < end; i++) ends[int64_t(rows[i]) - first_row + 1] = i + 1;
}

void find_ends(const TaskSource& task, int64_t first_row, int64_t stop_row, int64_t* ends) {
    int64_t d_out = stop_row - first_row;
    int64_t begin = first_not_below(task, first_row), end = first_not_below(task, stop_row);
    memset(ends, 0, size_t(d_out + 1) * sizeof *ends);
    ends[0] = begin;
    if (task.row_bytes == 1) mark_ends((const uint8_t*)task.rows, begin, end, first_row, ends);
    else if (task.row_bytes == 2) mark_ends((const uint16_t*)task.rows, begin, end, first_row, ends);
    else mark_ends((const int32_t*)task.rows, begin, end, first_row, ends);
    for (int64_t o = 1; o <= d_out; o++)
        if (ends[o] == 0) ends[o] = ends[o - 1];  // an empty row
}

// A window's rows, sorted by their number of nonzeros, most first.
struct Order {
    uint8_t row[kWindow];
    uint16_t length[kWindow / kBlock];
    int64_t slices, steps, entries;
};

// A counting sort. `place`: scratch of rank + 2 zeros, zero again afterwards.
void sort_window(const int64_t* ends, int64_t outputs, uint32_t* place, Order& order) {
    int64_t padded = round_up(outputs, kBlock), most = 0;
    order.slices = padded / kBlock;
    order.entries = ends[outputs] - ends[0];
    for (int64_t o = 0; o < outputs; o++) {
        int64_t count = ends[o + 1] - ends[o];
        place[count + 1]++;
        if (count > most) most = count;
    }
    place[1] += uint32_t(padded - outputs);  // padding rows have no nonzeros
    // Turns place[c + 1] from the number of rows with c nonzeros into where those rows begin, the longest rows first.
    uint32_t before = 0;
    for (int64_t c = most; c >= 0; c--) {
        uint32_t rows = place[c + 1];
        place[c + 1] = before;
        before += rows;
    }
    uint16_t sorted[kWindow];
    for (int64_t o = 0; o < padded; o++) {
        int64_t count = o < outputs ? ends[o + 1] - ends[o] : 0;
        uint32_t at = place[count + 1]++;
        order.row[at] = uint8_t(o);
        sorted[at] = uint16_t(count);
    }
    memset(place, 0, size_t(most + 2) * sizeof *place);
    order.steps = 0;
    for (int64_t s = 0; s < order.slices; s++) {
        order.length[s] = sorted[s * kBlock];
        order.steps += order.length[s];
    }
}

struct Shape {
    int32_t value_kind, index_bytes;
    int64_t step;  // bytes
};

Shape shape_of(const PartSource& part, int64_t tasks) {
    bool bfloat16 = true;
    for (int64_t t = 0; t < tasks; t++) bfloat16 &= part.tasks[t].value_kind == kBfloat16;
    int32_t index_bytes = part.rank <= 256 ? 1 : 2;
    return {bfloat16 ? kBfloat16 : kFloat32, index_bytes, kBlock * ((bfloat16 ? 2 : 4) + index_bytes)};
}

int64_t sheet_bytes(const Order& order, const Shape& shape) {
    if (order.entries == 0) return 0;
    return order.slices * kBlock + round_up(2 * order.slices, kUnit) + order.steps * shape.step;
}

float float_of(const void* values, int32_t kind, int64_t i) {
    if (kind == kFloat32) return ((const float*)values)[i];
    uint32_t half = ((const uint16_t*)values)[i], word;
    float value;
    if (kind == kBfloat16) {
        word = half << 16;
        memcpy(&value, &word, 4);
        return value;
    }
    word = (half & 0x7FFF) << 13;  // float16, finite: see vectors.h
    memcpy(&value, &word, 4);
    value *= 0x1p112f;
    return half & 0x8000 ? -value : value;
}

template <class Index, class Value, class Col, class Get>
void write_steps(char* steps, const Order& order, const int64_t* ends, const Col* cols, int64_t outputs, Get get) {
    constexpr int64_t kStep = kBlock * int64_t(sizeof(Value) + sizeof(Index));
    memset(steps, 0, size_t(order.steps * kStep));
    for (int64_t s = 0; s < order.slices; s++) {
        for (int64_t i = 0; i < kBlock; i++) {
            int64_t o = order.row[s * kBlock + i];
            if (o >= outputs) continue;
            char* at = steps;
            for (int64_t e = ends[o]; e < ends[o + 1]; e++, at += kStep) {
                Value value = get(e);
                Index index = Index(cols[e]);
                memcpy(at + i * sizeof(Value), &value, sizeof value);
                memcpy(at + kBlock * sizeof(Value) + i * sizeof(Index), &index, sizeof index);
            }
        }
        steps += order.length[s] * kStep;
    }
}

template <class Index, class Col>
void write_values(char* steps, const Order& order, const int64_t* ends, const TaskSource& task, int64_t outputs,
                  const Shape& shape) {
    const Col* cols = (const Col*)task.cols;
    const uint16_t* halves = (const uint16_t*)task.values;
    if (shape.value_kind == kBfloat16)
        return write_steps<Index, uint16_t>(steps, order, ends, cols, outputs, [=](int64_t e) { return halves[e]; });
    const void* values = task.values;
    int32_t kind = task.value_kind;
    write_steps<Index, float>(steps, order, ends, cols, outputs,
                              [=](int64_t e) { return float_of(values, kind, e); });
}

void write_sheet(char* to, const Order& order, const int64_t* ends, const TaskSource& task, int64_t outputs,
                 const Shape& shape) {
    memcpy(to, order.row, size_t(order.slices * kBlock));
    to += order.slices * kBlock;
    int64_t lengths = round_up(2 * order.slices, kUnit);
    memset(to, 0, size_t(lengths));
    memcpy(to, order.length, size_t(2 * order.slices));
    to += lengths;
    if (shape.index_bytes == 1) {  // rank ≤ 256: columns come as uint8
        if (task.col_bytes == 1) write_values<uint8_t, uint8_t>(to, order, ends, task, outputs, shape);
        else if (task.col_bytes == 2) write_values<uint8_t, uint16_t>(to, order, ends, task, outputs, shape);
        else write_values<uint8_t, int32_t>(to, order, ends, task, outputs, shape);
    } else if (task.col_bytes == 1) {
        write_values<uint16_t, uint8_t>(to, order, ends, task, outputs, shape);
    } else if (task.col_bytes == 2) {
        write_values<uint16_t, uint16_t>(to, order, ends, task, outputs, shape);
    } else {
        write_values<uint16_t, int32_t>(to, order, ends, task, outputs, shape);
    }
}

// Writes A (rank, d_in) of one part into its blocks of every tile. An Element is a number, or a pair of bfloat16.
template <class Element>
void write_a(Element* to, const PartSource& part, int64_t first_block, int64_t blocks, int64_t d_in, int32_t kind) {
    const int64_t row_bytes = d_in * size_of(kind), pair = int64_t(sizeof(Element)) / size_of(kind);
    for (int64_t k0 = 0; k0 < d_in; k0 += kDepth) {
        int64_t depth = d_in - k0 < kDepth ? d_in - k0 : kDepth;
        int64_t columns = (depth + pair - 1) / pair, whole = depth / pair;
        for (int64_t row = 0; row < blocks_of(part.rank) * kBlock; row++) {
            Element* column = to + (k0 / pair * blocks + (first_block + row / kBlock) * columns) * kBlock + row % kBlock;
            if (row >= part.rank) {
                for (int64_t k = 0; k < columns; k++) column[k * kBlock] = 0;
                continue;
            }
            const char* from = (const char*)part.a + row * row_bytes + k0 * size_of(kind);
            for (int64_t k = 0; k < whole; k++) memcpy(column + k * kBlock, from + k * sizeof(Element), sizeof(Element));
            if (whole < columns) {  // an odd last bfloat16, paired with a zero
                Element last = 0;
                memcpy(&last, from + whole * sizeof(Element), size_t(size_of(kind)));
                column[whole * kBlock] = last;
            }
        }
    }
}

// Lays out the arrays and, if `to` is set, writes them. Returns the size in bytes, or −1 if B is too large for its
// offsets.
int64_t lay_out(const LayerSource& source, uint32_t* place, char* to) {
    int64_t head = int64_t(sizeof(Layer)) + (source.parts - 1) * int64_t(sizeof(Part));
    int64_t at = round_up(head, 64);
    Layer* layer = (Layer*)to;
    int64_t blocks = 0, rank = 0;
    for (int64_t p = 0; p < source.parts; p++) {
        blocks += blocks_of(source.part[p].rank);
        if (rank < source.part[p].rank) rank = source.part[p].rank;
    }
    if (to) *layer = Layer{0, source.d_in, source.tasks, source.parts, blocks, rank, at, source.kind, 0, {}};
    char* a = to + at;
    at += blocks * kBlock * depth_of(source.d_in, source.kind) * size_of(source.kind);
    int64_t first_block = 0;
    for (int64_t p = 0; p < source.parts; p++) {
        const PartSource& from = source.part[p];
        int64_t d_out = from.stop_row - from.first_row, windows = windows_of(d_out);
        Shape shape = shape_of(from, source.tasks);
        Part part = {from.rank, first_block, d_out, from.offset, 0, 0, shape.value_kind, shape.index_bytes};
        part.sheets = at = round_up(at, 64);
        at += (windows * source.tasks + 1) * 4;
        part.b = at = round_up(at, 64);
        if (to) {
            if (source.kind == kFloat16) write_a((uint16_t*)a, from, first_block, blocks, source.d_in, source.kind);
            else write_a((uint32_t*)a, from, first_block, blocks, source.d_in, source.kind);
            (&layer->part[0])[p] = part;
        }
        uint32_t* sheets = to ? (uint32_t*)(to + part.sheets) : nullptr;
        Order order;
        for (int64_t window = 0; window < windows; window++) {
            int64_t first = window * kWindow, outputs = d_out - first < kWindow ? d_out - first : kWindow;
            for (int64_t t = 0; t < source.tasks; t++) {
                const int64_t* ends = from.ends + t * (d_out + 1) + first;
                sort_window(ends, outputs, place, order);
                if (to) {
                    *sheets++ = uint32_t((at - part.b) / kUnit);
                    if (order.entries) write_sheet(to + at, order, ends, from.tasks[t], outputs, shape);
                }
                at += sheet_bytes(order, shape);
            }
        }
        if ((at - part.b) / kUnit >= int64_t(1) << 32) return -1;
        if (to) *sheets = uint32_t((at - part.b) / kUnit);
        at = round_up(at, 64);
        first_block += blocks_of(from.rank);
    }
    if (to) layer->nbytes = at;
    return at;
}

}  // namespace

// Fills every `ends`. Returns the number of bytes that pack will write, or −1. `place`: the largest rank + 2 zeros.
LORAF_API int64_t loraf_kernels_measure(const LayerSource* source, uint32_t* place) {
    for (int64_t p = 0; p < source->parts; p++) {
        const PartSource& part = source->part[p];
        int64_t d_out = part.stop_row - part.first_row;
        for (int64_t t = 0; t < source->tasks; t++)
            find_ends(part.tasks[t], part.first_row, part.stop_row, part.ends + t * (d_out + 1));
    }
    return lay_out(*source, place, nullptr);
}

// Call it after measure with the same source. `to`: as many bytes as measure returned, 64-byte aligned.
LORAF_API void loraf_kernels_pack(const LayerSource* source, uint32_t* place, char* to) {
    lay_out(*source, place, to);
}
