// The native CPU operations, as a table of functions that every instruction set fills.
//
// All pointers are to contiguous row-major memory without any alignment; dtypes and formats are
// the integers of formats.h; packed layouts are those of layout.h. Functions return false when
// memory runs out, and nothing else can fail: arguments are checked in Python.
#pragma once

#include <stdint.h>

namespace mixbits {

struct FakeQuantizeArgs {
  const void* x;  // [rows, columns] of dtype
  void* out;      // same
  int64_t rows, columns;
  int dtype, format;
};

struct PackArgs {
  const void* weight;  // [rows, columns] of dtype
  uint8_t* codes;
  uint8_t* scales;
  uint8_t* zero_points;  // null for formats without
  int64_t rows, columns;
  int dtype, format;
  float* divisor;  // of scales in e4m3; null for formats without
};

struct DequantizeArgs {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zero_points;  // null for formats without
  void* out;                   // [rows, columns] of dtype
  int64_t rows, columns;
  int dtype, format;
  const void* divisor;  // a float, of scales in e4m3; null for formats without
};

// Fisher statistics have row_weight and column_weight, gradient statistics have gradient.
struct StatisticsArgs {
  const void* weight;           // [rows, columns] of dtype
  const double* row_weight;     // [rows], or null
  const double* column_weight;  // [columns], or null
  const void* gradient;         // [rows, columns] of gradient_dtype, or null
  const int* formats;           // [format_count]
  double* out;                  // [format_count, ceil(columns / 32)]
  int64_t rows, columns;
  int dtype, gradient_dtype, format_count;
};

struct SquareSumsArgs {
  const void* x;       // [rows, columns] of dtype
  const int* formats;  // [format_count]
  double* out;         // [1 + format_count, columns]
  int64_t rows, columns;
  int dtype, format_count;
};

// Shares of an integer group's range whose scales compensate_group tries, in this order:
// mixbits.formats.compensate._SHARES.
constexpr float kShares[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};
// The same of the maximum of an NVFP4 block: mixbits.formats.compensate._NV_SHARES.
constexpr float kNVShares[] = {1.0f,  1.5f, 0.8f,  0.85f, 0.9f,  0.95f, 1.0f,
                               1.05f, 1.1f, 1.15f, 1.2f,  1.25f, 1.3f,  1.35f};

// One group of columns of a weight, whose rows are `stride` numbers apart. Row j of the factor,
// `factor_stride` numbers from the next, says from number j on how later columns make up for j.
struct CompensateArgs {
  const float* group;
  const float* factor;
  const float* importance;  // [columns]
  uint8_t* codes;           // [rows, columns], a byte each
  uint8_t* scales;          // [rows], as they are stored; null where they are known
  uint8_t* zero_points;     // [rows], a byte each; null for formats without
  float* errors;            // [rows, columns]
  int64_t rows, stride, factor_stride;
  int columns, format;  // columns up to the format's group size
  float divisor;        // of scales in e4m3
  const float* known;   // [rows]: float32 scales, which are of whole rows; null for other formats
};

// A packed weight [rows, columns] over consecutive ones of a linear's columns, in their order.
struct PackedSegment {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zero_points;  // null for formats without
  int64_t columns;
  int format;
  int activation;       // format of x, or 0 to leave it as it is
  const void* divisor;  // a float, of scales in e4m3; null for formats without
};

// A linear's weight: segments side by side, at most kMaxSegments. Their columns are those of x in
// another order, where there is one, and then rotated 32 by 32, where they are:
// mixbits/formats/arrange.py.
constexpr int kMaxSegments = 8;  // mixbits.formats.schemes.MAX_SEGMENTS
struct Linear {
  const PackedSegment* segments;
  int segment_count;
  const void* order;  // [columns]: place i holds column order[i] of x; null for the natural one
  int order_bytes;    // of an entry: 1, 2 or 4
  bool rotated;
  int64_t rows;
};

// One of several linears that multiply the same x.
struct MatmulTarget {
  Linear linear;
  void* out;  // [tokens, rows] of x's dtype
};

struct MatmulArgs {
  const void* x;  // [tokens, columns] of dtype
  const MatmulTarget* targets;
  int64_t tokens, columns;  // columns > 0
  int dtype, target_count;
  bool int8_activations;  // round what has no format to 8-bit integers: faster, not exact
};

// A linear of a model: packed, or left alone. Then it has one segment, whose format is 0 and whose
// codes are the weight [rows, columns] of the model's dtype.
struct StepLinear {
  Linear linear;
  const void* bias;  // [rows], or null
  bool int8_activations;
};

// Norms are weights of RMSNorm; those of queries and keys, [head_width], may be null.
struct StepLayer {
  const void *input_norm, *attention_norm;  // before attention; after it
  const void *query_norm, *key_norm;
  StepLinear query, key, value, output, gate, up, down;
};

// A Llama, or a model that differs from one by biases and by norms of queries and keys.
struct StepModel {
  const StepLayer* layers;
  const void* norm;
  StepLinear head;
  int64_t hidden, intermediate, key_heads, group, head_width;  // `group` query heads per key head
  float eps, scaling;
  int dtype, layer_count;
};

// Keys and values of a layer, [key_heads, capacity, head_width] each, of which `length` positions
// are filled; the step fills one more.
struct StepCache {
  void *keys, *values;
  int64_t capacity;
};

struct StepArgs {
  const StepModel* model;
  const StepCache* caches;  // one per layer
  const void* x;            // [hidden]: the token's embedding
  const void *cos, *sin;    // [head_width]: of the token's position
  void* logits;             // [head.rows]
  int64_t length;
  double* multiplying;  // seconds that the first thread spent in matmuls; null to not measure
};

struct Kernels {
  const char* name;
  // The sum of all whole 64-bit words: what reading memory costs at least, for benchmarks.
  uint64_t (*sum_words)(const void* data, int64_t bytes);
  bool (*fake_quantize)(const FakeQuantizeArgs&);
  bool (*quantize_pack)(const PackArgs&);
  bool (*dequantize)(const DequantizeArgs&);
  bool (*statistics)(const StatisticsArgs&);
  bool (*square_sums)(const SquareSumsArgs&);
  bool (*compensate_group)(const CompensateArgs&);
  bool (*packed_matmul)(const MatmulArgs&);
  // One new token of one sequence, through the whole model.
  bool (*token_step)(const StepArgs&);
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();  // x86 only, as the next
const Kernels* avx512vnni_kernels();
const Kernels* avx512bf16_kernels();

// The table in use: at first the best that this CPU can run.
const Kernels& kernels();
// Makes the table called `name` the one in use; false when this CPU or build has none such.
bool set_isa(const char* name);
// Names that set_isa accepts here, best first; null beyond the last.
const char* isa_name(int index);

}  // namespace mixbits
