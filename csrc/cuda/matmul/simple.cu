// x [tokens, columns] times a packed weight [rows, columns] transposed, for at most 16 tokens.
//
// A warp computes kRows outputs of up to 8 tokens (more would not fit in its registers: the
// weight is then read twice, the second time mostly from the L2 cache). Its lanes walk along the
// weight rows together, 16 bytes of codes per lane and row at a time (8 for int2), dequantize them
// in registers, and add in fp32; a lane's columns lie in one group, so there is one scale per 16
// bytes (8 of NVFP4). A scaled value is exact in fp32 (at most 8 bits times 11; NVFP4's is rounded
// once, as in `dequantize`), so that the only roundings are those of the sums. The lanes' sums are
// added by shuffles in a fixed order.
//
// This is the version for few tokens, where reading the weight is the cost. More tokens are
// multiplied by cuBLAS after `dequantize` (mixbits/backends/cuda.py).
#include "cuda/codes/group.cuh"

namespace mixbits {
namespace cuda {
namespace {

// Bytes `first` to `first + 4 * kWords - 1` of a packed row as little-endian words; zeros beyond
// the row's end.
template <int kWords>
__device__ inline void load_words(const uint8_t* row, int64_t first, int64_t row_bytes,
                                  bool aligned, uint32_t (&words)[kWords]) {
  if (aligned) {
    const auto all = *reinterpret_cast<const Vector<uint32_t, kWords>*>(row + first);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = all.values[i];
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = 0;
      for (int b = 0; b < 4; ++b) {
        const int64_t byte = first + i * 4 + b;
        if (byte < row_bytes) words[i] |= uint32_t(row[byte]) << (8 * b);
      }
    }
  }
}

// Columns of a lane at a time, which lie in one group.
MB_HD constexpr int lane_columns(int element) {
  return element == kNVE2M1 || element_bits(element) == 8 ? 16 : 32;
}

// Drops the first 8 codes, so that the next 8 are in the lowest bits.
template <int kBits, int kWords>
__device__ inline void drop_codes(uint32_t (&words)[kWords]) {
  constexpr int kWhole = kBits / 4;  // words that 8 codes fill; int2 fills half of one
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (kBits == 2) {
      words[i] = words[i] >> 16 | (i + 1 < kWords ? words[(i + 1) % kWords] << 16 : 0);
    } else {
      words[i] = i + kWhole < kWords ? words[(i + kWhole) % kWords] : 0;
    }
  }
}

struct MatmulShape {
  int64_t tokens, rows, columns;
  int group_size;
  bool x_aligned, codes_aligned;
  float* sums;       // [tokens, rows]: what segments before this one add up to, and this one too
  bool first, last;  // the last segment writes the output instead
};

template <class T, int kElement, int kTokens, int kRows>
__global__ void __launch_bounds__(kThreads, 2)  // 128 registers: fewer would spill
    few_tokens_kernel(const T* x, const PackedArgs packed, T* out, MatmulShape shape) {
  constexpr int kBits = element_bits(kElement);
  constexpr int kChunk = lane_columns(kElement);
  constexpr int kWords = kChunk * kBits / 32;
  constexpr int kPart = 8;  // columns dequantized at a time: a loop, which bounds the registers
  const int lane = threadIdx.x % 32;
  const int64_t columns = shape.columns, row_bytes = packed_bytes(columns, kBits);
  const int64_t groups = group_count(columns, shape.group_size);
  const int64_t first_row = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * kRows;
  const int64_t first_token = int64_t(blockIdx.y) * kTokens;
  if (first_row >= shape.rows) return;

  float sums[kTokens][kRows] = {};
  for (int64_t column = lane * kChunk; column < columns; column += 32 * kChunk) {
    uint32_t words[kRows][kWords];
    float scale[kRows], offset[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // A row too many is computed like the last one, and not stored.
      const int64_t row = min(first_row + r, shape.rows - 1), group = column / shape.group_size;
      load_words(packed.codes + row * row_bytes, column * kBits / 8, row_bytes, shape.codes_aligned,
                 words[r]);
      scale[r] = load_scale<kElement>(packed, row, group, groups);
      offset[r] = load_offset<kElement>(packed, row, group, groups);
    }
#pragma unroll 1
    for (int part = 0; part < kChunk; part += kPart) {
      float w[kRows][kPart];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          const int bit = i * kBits;
          const int code = (words[r][bit / 32] >> (bit % 32)) & ((1 << kBits) - 1);
          w[r][i] = decode<kElement>(code, offset[r]) * scale[r];
        }
        drop_codes<kBits>(words[r]);
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float values[kPart];
        const int64_t token = min(first_token + t, shape.tokens - 1);
        load_columns(x + token * columns, column + part, columns, shape.x_aligned, values);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < kPart; ++i) sums[t][r] = fmaf(w[r][i], values[i], sums[t][r]);
        }
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = combine_lanes(sums[t][r], 32, [](float a, float b) { return a + b; });
      if (lane == 0 && first_token + t < shape.tokens && first_row + r < shape.rows) {
        const int64_t at = (first_token + t) * shape.rows + first_row + r;
        const float total = shape.first ? sum : shape.sums[at] + sum;
        if (shape.last) {
          out[at] = from_float<T>(total);
        } else {
          shape.sums[at] = total;
        }
      }
    }
  }
}

template <class T, int kElement, int kTokens, int kRows>
void launch(const MatmulArgs& a, const SegmentArgs& s, const T* x, const MatmulShape& shape,
            cudaStream_t stream) {
  const dim3 grid(unsigned(divide_up(a.rows, kWarps * kRows)),
                  unsigned(divide_up(a.tokens, kTokens)));
  few_tokens_kernel<T, kElement, kTokens, kRows>
      <<<grid, kThreads, 0, stream>>>(x, s.packed, static_cast<T*>(a.out), shape);
}

// The product with a segment, whose x [tokens, columns] begins at `x`.
template <class T>
const char* multiply(const MatmulArgs& a, const SegmentArgs& s, const T* x, MatmulShape shape,
                     cudaStream_t stream) {
  const Format f = decode_format(s.format);
  if (!has(Multiplied(), f.element)) return kNoCode;
  shape.group_size = f.group_size;
  const int bits = element_bits(f.element);
  // A lane's whole pieces: rows then also end at the end of one.
  shape.codes_aligned =
      s.columns * bits % 8 == 0 && rows_aligned(s.packed.codes, packed_bytes(s.columns, bits),
                                                lane_columns(f.element) * bits / 8);
  shape.x_aligned = s.columns % 8 == 0 && rows_aligned(x, s.columns * sizeof(T), 16);
  dispatch_element(Multiplied(), f.element, [&](auto element) {
    constexpr int kElement = element.value;
    if (a.tokens == 1) {
      launch<T, kElement, 1, 2>(a, s, x, shape, stream);
    } else if (a.tokens <= 4) {
      launch<T, kElement, 4, 2>(a, s, x, shape, stream);
    } else {
      launch<T, kElement, 8, 2>(a, s, x, shape, stream);
    }
  });
  return launch_result();
}

}  // namespace

const char* packed_matmul(const MatmulArgs& a, float* sums, void* stream) {
  if (a.tokens == 0 || a.rows == 0 || a.columns == 0) return nullptr;
  if (a.tokens > kMaxTokens) return "at most 16 tokens in one call";
  const char* error = nullptr;
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = static_cast<const T*>(a.x);
    for (int i = 0; i < a.segment_count && error == nullptr; ++i) {
      const SegmentArgs& s = a.segments[i];
      const MatmulShape shape{
          a.tokens, a.rows, s.columns, 0, false, false, sums, i == 0, i == a.segment_count - 1};
      error = multiply(a, s, x, shape, cudaStream_t(stream));
      x += a.tokens * s.columns;
    }
  });
  return error;
}

}  // namespace cuda
}  // namespace mixbits
