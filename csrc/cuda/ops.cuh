// The CUDA operations as bindings_cuda.cpp sees them: plain C++, no CUDA types.
//
// Pointers are device pointers to contiguous row-major memory; dtypes and formats are the
// integers of formats.h, packed layouts those of layout.h. Functions launch on `stream` (a
// cudaStream_t) of the current device and return at once. They neither allocate nor synchronise,
// so that a CUDA graph can capture them. They return null, or the text of the CUDA error.
// Arguments are checked in Python.
#pragma once

#include <stdint.h>

namespace mixbits {
namespace cuda {

// Null when the current device exists and this build has code for it.
const char* why_unusable();

// x, out: [rows, columns] of dtype.
const char* fake_quantize(const void* x, void* out, int64_t rows, int64_t columns, int dtype,
                          int format, void* stream);

// Those without code for a format say so: common.cuh has the lists.

// The tensors of a packed weight, as mixbits/formats/pack.py names them.
struct PackedArgs {
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zero_points;  // null for formats without, as is the next
  const float* divisor;
};

// A packed weight [rows, columns] in one format, and what x is rounded to before it meets it.
struct SegmentArgs {
  PackedArgs packed;
  int64_t columns;         // of several segments, a multiple of 32 in all but the last
  int format, activation;  // 0 where activations are left alone
};

// weight: [rows, columns] of dtype; zero_points is null for formats without.
const char* quantize_pack(const void* weight, uint8_t* codes, void* scales, uint8_t* zero_points,
                          int64_t rows, int64_t columns, int dtype, int format, void* stream);

// out: [rows, columns of the weight] of dtype, rows `stride` values apart.
const char* dequantize(const SegmentArgs& weight, void* out, int64_t rows, int64_t stride,
                       int dtype, void* stream);

constexpr int kMaxFormats = 16;  // of one call to `statistics`

// Number of row blocks, each of which fills [format_count, slabs] doubles of `statistics`'
// workspace.
int64_t statistics_row_blocks(int64_t rows, int64_t columns);

// Fisher statistics have row_weight and column_weight, gradient statistics have a gradient
// [rows, columns] of gradient_dtype; what a form has not is null. `formats` is host memory and is
// read before the call returns.
struct StatisticsArgs {
  const void* weight;           // [rows, columns] of dtype
  const double* row_weight;     // [rows]
  const double* column_weight;  // [columns]
  const void* gradient;
  const int* formats;  // [format_count], at most kMaxFormats
  double* workspace;   // [statistics_row_blocks, format_count, ceil(columns / 32)]
  double* out;         // [format_count, ceil(columns / 32)]
  int64_t rows, columns;
  int dtype, gradient_dtype, format_count;
};
const char* statistics(const StatisticsArgs& args, void* stream);

constexpr int kMaxSegments = 8;  // mixbits.formats.schemes.MAX_SEGMENTS

constexpr int kMaxTokens = 16;  // of one call to `packed_matmul`

// x [tokens, columns] of dtype times segments side by side, [rows, columns] in all, transposed ->
// out [tokens, rows] of dtype, each sum rounded once.
struct MatmulArgs {
  const void* x;
  const SegmentArgs* segments;  // host memory, read before the call returns
  int segment_count;
  void* out;
  int64_t tokens, rows, columns;
  int dtype;
};

// A launch for each segment, which adds to `sums`, float32 [tokens, rows] (null for one segment);
// the last rounds what they and its own add up to. x is [tokens, columns] of the first segment,
// then of the next: with a distance of its own between tokens the kernel would spill.
const char* packed_matmul(const MatmulArgs& args, float* sums, void* stream);

// The same for bfloat16 and float16 on the matrix units, in one launch, for any number of tokens:
// blocks of `warps` warps own 16 * row_tiles rows and 8 * token_tiles tokens. (row_tiles,
// token_tiles) is (1, 1), (4, 1) or (4, 2); a segment's columns are a multiple of 32; x (rows of
// all columns) and codes are aligned to 16 bytes. Several segments need as many warps at least, and
// have no (4, 2): their kernel has code for all formats, six times as much to compile as one for a
// single format.
const char* packed_matmul_mma(const MatmulArgs& args, int row_tiles, int token_tiles, int warps,
                              void* stream);

constexpr int kE4M3Tokens = 128;  // of a block of `packed_matmul_e4m3`

// x [tokens, columns] of dtype (not float32) rounded to e4m3, with a scale per token -> out
// [T, columns rounded up to 128], as fragments.h says, and scales [T], T being tokens rounded up
// to whole blocks.
const char* prepare_e4m3(const void* x, uint8_t* out, float* scales, int64_t tokens,
                         int64_t columns, int dtype, void* stream);

// packed_matmul of one segment in e2m1, folded to e4m3 (fold.h), args.x and token_scales being
// from `prepare_e4m3`, args.x aligned to 16 bytes; row_scales [rows] are e8m0 bytes. Needs sm_90a,
// columns a multiple of 32, and codes aligned to 16 bytes.
const char* packed_matmul_e4m3(const MatmulArgs& args, const uint8_t* row_scales,
                               const float* token_scales, void* stream);

// x [tokens, columns] of dtype -> out, in the order of `order`, rotated, and fake-quantized to the
// MX format that each segment has for activations. With block_tokens 0 out is [tokens, columns] of
// out_dtype, else what packed_matmul_wgmma reads (fragments.h), in 16 bits. out_dtype is dtype or
// float32.
struct PrepareArgs {
  const void* x;
  void* out;
  const void* order;  // [columns] unsigned integers of order_bytes (1, 2 or 4), or null
  int order_bytes;
  bool rotated;
  const SegmentArgs* segments;  // host memory, read before the call returns
  int segment_count;
  int64_t tokens, columns;
  int dtype, out_dtype, block_tokens;
};
const char* prepare_activations(const PrepareArgs& args, void* stream);

// Bytes of what packed_matmul_wgmma reads; of segments, columns are those of all, each rounded up
// to a multiple of 128.
int64_t prepared_bytes(int64_t tokens, int64_t columns, int block_tokens);

// packed_matmul_mma with args.x from `prepare_activations`, aligned to 16 bytes, for the same
// block_tokens (64, 128 or 256); the columns are split between `parts` blocks (1, 2, 4 or 8) of
// a cluster. Needs sm_90a. Several segments are e2m1 and e4m3, or integers, and have blocks of
// kMixedTokens.
constexpr int kMixedTokens = 128;
const char* packed_matmul_wgmma(const MatmulArgs& args, int block_tokens, int parts, void* stream);

}  // namespace cuda
}  // namespace mixbits
