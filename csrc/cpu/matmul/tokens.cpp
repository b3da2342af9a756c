// Tokens as a segment of a linear sees them: columns in order, rotated where the linear says so.
//
// mixbits/formats/arrange.py is the slow twin. Every segment takes its own columns straight from x,
// so that those of several segments are gathered once in all.
#include "matmul.h"

namespace mixbits {
namespace MB_ISA {

namespace {

constexpr int kWidth = 32;  // columns that are rotated together

// x H in place, for 32 floats: sums and differences of pairs whose numbers differ in one bit.
void rotate(float* x) {
  constexpr int vectors = kWidth / kLanes;
  vf v[vectors];
  for (int i = 0; i < vectors; ++i) v[i] = load(x + i * kLanes);
  for (int half = 1; half < kLanes; half *= 2) {
    vi partner;
    vf sign;
    for (int l = 0; l < kLanes; ++l) {
      partner[l] = l ^ half;
      sign[l] = l & half ? -1.0f : 1.0f;
    }
    for (int i = 0; i < vectors; ++i) v[i] = __builtin_shuffle(v[i], partner) + v[i] * sign;
  }
  for (int half = 1; half < vectors; half *= 2) {
    for (int i = 0; i < vectors; ++i) {
      if (i & half) continue;
      const vf a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
  }
  for (int i = 0; i < vectors; ++i) store(x + i * kLanes, v[i]);
}

template <int SIZE, class Index>
void gather(const char* row, const char* order, int64_t count, char* out) {
  for (int64_t i = 0; i < count; ++i) {
    Index column;
    memcpy(&column, order + i * sizeof(Index), sizeof(Index));
    memcpy(out + i * SIZE, row + int64_t(column) * SIZE, SIZE);
  }
}

template <int SIZE>
void gather(const char* row, const Tokens& t, int64_t first, int64_t count, char* out) {
  const char* order = static_cast<const char*>(t.order) + first * t.order_bytes;
  if (t.order_bytes == 1) return gather<SIZE, uint8_t>(row, order, count, out);
  if (t.order_bytes == 2) return gather<SIZE, uint16_t>(row, order, count, out);
  gather<SIZE, uint32_t>(row, order, count, out);
}

// Columns of a row, in order, as float32; filled up with zeros to whole vectors.
void load_columns(const Tokens& t, const char* row, int64_t first, int64_t count, float* out) {
  const int dtype = t.input.dtype;
  if (!t.order) return load_row(row + first * dtype_bytes(dtype), count, dtype, out);
  for (int64_t i = 0; i < count; i += kRun) {
    alignas(64) char some[kRun * sizeof(float)];
    const int64_t width = min64(count - i, kRun);
    if (dtype == kFloat32) {
      gather<4>(row, t, first + i, width, some);
    } else {
      gather<2>(row, t, first + i, width, some);
    }
    load_row(some, width, dtype, out + i);
  }
}

}  // namespace

void Tokens::load(int64_t m, float* out) const {
  const char* row = input.x + m * input.columns * dtype_bytes(input.dtype);
  if (!rotated) return load_columns(*this, row, first, columns, out);
  const int64_t end = first + columns;
  // A block may lie across the ends of a segment; one that is not whole is left as it is.
  for (int64_t k = first / kWidth * kWidth; k < end; k += kWidth) {
    alignas(64) float block[kWidth];
    const int64_t width = min64(kWidth, input.columns - k);
    load_columns(*this, row, k, width, block);
    if (width == kWidth) rotate(block);
    const int64_t begin = k < first ? first : k;
    memcpy(out + begin - first, block + begin - k, (min64(k + width, end) - begin) * sizeof(float));
  }
  memset(out + columns, 0, (round_up(columns, kLanes) - columns) * sizeof(float));
}

bool Tokens::equals(const Tokens& other) const {
  if (first != other.first || columns != other.columns || rotated != other.rotated) return false;
  if (!order || !other.order) return order == other.order;
  return order == other.order || (order_bytes == other.order_bytes &&
                                  memcmp(order, other.order, input.columns * order_bytes) == 0);
}

}  // namespace MB_ISA
}  // namespace mixbits
