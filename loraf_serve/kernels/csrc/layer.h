// A packed layer: one block of memory that begins with a Layer. Its arrays are at byte offsets from the beginning.
//
// A of all parts, stacked, in blocks of 16 rows j, so that a vector is 16 rows at one k and nothing is summed across
// lanes. It is in tiles of kDepth columns, so that it is read sequentially while a tile of x is in the cache:
//     bfloat16           [tile][block][pair of k][16 j][2]
//     float16, float32   [tile][block][k][16 j]
// with zeros beyond a part's rank and beyond d_in.
//
// Each part holds B in windows of kWindow outputs, and a window has one sheet per task. A sheet sorts the window's rows
// by their number of nonzeros and divides them into slices of 16, so that 16 rows advance together with hardly any
// padding:
//     uint8  row[outputs of the window, rounded up to 16]    index in the sorted order → row within the window
//     uint16 length[slices]                                  steps of each slice
//     steps of all slices: 16 values (bfloat16 or float32), 16 columns j (uint8, or uint16 where rank > 256)
// A sheet's arrays are padded to 16 bytes, and a row that ends early is padded with zeros. A task without nonzeros in a
// window has no bytes there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace loraf {

constexpr int64_t kDepth = 512;       // columns of x that are widened and used while they are in the cache; even
constexpr int64_t kBlock = 16;        // rows of A, and rows of a slice of B, that advance together
constexpr int64_t kWindow = 256;      // outputs whose sums stay in the cache during the loop over tasks
constexpr int64_t kRowsAtOnce = 512;  // rows of the batch; limits the memory for z
constexpr int64_t kSlack = 128;       // numbers beyond the end of z that may be read
constexpr int64_t kUnit = 16;         // unit of offsets in B, in bytes

enum Kind : int32_t { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

struct Part {
    int64_t rank, first_block;  // of A
    int64_t d_out, offset;      // offset: first column of y
    int64_t sheets;             // bytes from the layer's beginning: uint32 [windows · tasks + 1], where sheets begin in
                                // B, in kUnit
    int64_t b;                  // bytes from the layer's beginning
    int32_t value_kind;         // kBfloat16 or kFloat32
    int32_t index_bytes;        // 1 or 2
};

struct Layer {
    int64_t nbytes, d_in, tasks, parts;
    int64_t blocks;  // of A
    int64_t rank;    // the largest
    int64_t a;       // bytes from the layer's beginning
    int32_t kind;    // of A, x and y
    int32_t reserved;
    Part part[1];  // `parts` of them
};

inline constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline constexpr int64_t blocks_of(int64_t rank) { return (rank + kBlock - 1) / kBlock; }
inline constexpr int64_t windows_of(int64_t d_out) { return (d_out + kWindow - 1) / kWindow; }
inline constexpr int64_t size_of(int32_t kind) { return kind == kFloat32 ? 4 : 2; }
inline constexpr int64_t depth_of(int64_t d_in, int32_t kind) { return kind == kBfloat16 ? round_up(d_in, 2) : d_in; }

// One call for `rows` rows of a batch, given by their indices. Strides are in elements.
struct Call {
    const Layer* layer;
    char* y;
    int64_t y_stride;
    const char* x;
    int64_t x_stride;
    const int32_t* indices;  // (rows,)
    const float* weights;    // (rows, tasks)
    int64_t rows;
    int64_t lanes;  // of a chunk: rows of the batch in adjacent lanes of vectors
    float* z;       // [chunk][block of A][16 j][lanes], or [lane][block of A][16 j] where lanes are fewer than a vector's;
                    // kSlack numbers more may be read
};

// Scratch of one thread, 64-byte aligned.
struct Scratch {
    char* bytes;
    int64_t size;
};

// The functions of a variant. Each of the threads 0 … threads − 1 calls shrink, all wait, then each calls expand.
struct Variant {
    const char* name;
    bool (*runs_here)();
    int64_t (*lanes)(const Layer* layer, int64_t rows);  // the best chunk size for this number of rows
    int64_t (*scratch)(const Layer* layer);              // bytes that a thread needs
    void (*shrink)(const Call* call, Scratch scratch, int thread, int threads);
    void (*expand)(const Call* call, Scratch scratch, int thread, int threads);
};

}  // namespace loraf
