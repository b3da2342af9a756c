// Chunks of packed weights as operands of matrix instructions: loaded with one access and
// dequantized in registers, in pairs of 16-bit values (fragments.h says which).
//
// Values are those that `dequantize` writes in T. A minifloat's code is moved to where T has its
// exponent and mantissa, which makes a value 2^(difference of the biases) too small; one
// multiplication repairs that and applies the block's power of two, and is exact wherever the
// result is a number of T. Three things do not fit in it: a product of the two powers beyond T's
// largest, a NaN scale, and codes that are NaN. They are found per chunk, and a rare branch
// repairs them. An integer gets the offset of T's integers by an OR, from which offset and zero
// point are subtracted exactly; for bfloat16 its scale is the sum of two (of 8 digits each, for
// the 11 of a float16), so that a weight is rounded once, as in `dequantize`.
//
// NVFP4's block scales are numbers of T, and so are its products with them, which are not rounded;
// the tensor's scale is left to the sums.
#pragma once

#include "common.cuh"
#include "cuda/ptx.cuh"
#include "fragments.h"

namespace mixbits {
namespace cuda {

// A packed [rows, columns] weight whose chunks can be loaded whole: columns is a multiple of 32
// and codes are aligned to 16 bytes.
struct PackedWeight {
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zero_points;  // null for formats without, as is the next
  const float* divisor;
  int rows, columns;
  uint32_t row_bytes, groups, zero_bytes;  // of a row
  int group_shift;                         // log2 of the group size
};

inline int element_of(const SegmentArgs& a) { return decode_format(a.format).element; }

// The weight [rows, columns] of a segment, or why its chunks cannot be loaded whole.
inline const char* packed_weight(const SegmentArgs& a, int64_t rows, PackedWeight* weight) {
  const Format f = decode_format(a.format);
  if (a.columns % 32 != 0) return "columns must be a multiple of 32";
  if (reinterpret_cast<uintptr_t>(a.packed.codes) % 16 != 0) {
    return "codes must be aligned to 16 bytes";
  }
  const int64_t row_bytes = packed_bytes(a.columns, element_bits(f.element));
  const int64_t groups = group_count(a.columns, f.group_size);
  if (rows * row_bytes > UINT32_MAX) return "codes must be less than 4 GB";
  *weight = {a.packed.codes,
             a.packed.scales,
             a.packed.zero_points,
             a.packed.divisor,
             int(rows),
             int(a.columns),
             uint32_t(row_bytes),
             uint32_t(groups),
             uint32_t(packed_bytes(groups, element_bits(f.element))),
             f.group_size == 128  ? 7
             : f.group_size == 64 ? 6
             : f.group_size == 32 ? 5
                                  : 4};
  return nullptr;
}

struct Segment {
  PackedWeight weight;
  int element;
  int first_column;  // of the whole weight
  int first, end;    // what the kernel divides among segments: warps, or tiles of columns
};

// Weights side by side, of `columns` in all.
struct MixedWeight {
  Segment segments[kMaxSegments];
  int count, columns;
};

inline const char* refused_segments(const MatmulArgs& a) {
  return a.segment_count < 1 || a.segment_count > kMaxSegments ? "1 to 8 segments" : nullptr;
}

// The weights of `a`, or why their chunks cannot be loaded whole. `first` and `end` are not set.
inline const char* mixed_weight(const MatmulArgs& a, MixedWeight* mix) {
  int64_t first_column = 0;
  for (int i = 0; i < a.segment_count; ++i) {
    const SegmentArgs& s = a.segments[i];
    Segment& segment = mix->segments[i];
    segment.element = element_of(s);
    if (!has(First(), segment.element)) return kNoCode;
    if (const char* error = packed_weight(s, a.rows, &segment.weight)) return error;
    segment.first_column = int(first_column);
    first_column += s.columns;
  }
  mix->count = a.segment_count;
  mix->columns = int(first_column);
  return nullptr;
}

// A row too many is the last one: it is computed and not stored.
__device__ __forceinline__ uint32_t valid_row(const PackedWeight& w, int row) {
  return uint32_t(min(row, w.rows - 1));
}

// Nothing is computed from what is loaded until it is decoded: the loads may take their time.
template <int kElement>
struct Chunk {
  static constexpr int kBits = element_bits(kElement);
  uint32_t words[chunk_words(kBits)];
  uint32_t scale;      // an e8m0 byte, the bits of a float16, or two e4m3 bytes
  uint32_t zero_byte;  // integers only: the byte that holds the zero point, at bit zero_shift()
};

// The same for every row.
template <int kElement>
__device__ __forceinline__ int zero_shift(const PackedWeight& w, int column) {
  constexpr int kBits = element_bits(kElement);
  if (is_float(kElement) || kBits == 8 || w.zero_points == nullptr) return 0;
  return (column >> w.group_shift) % (8 / kBits) * kBits;
}

// The chunk of a row that begins at `column`; beyond the end of the row, its first one, because
// the activations are zeros there, and a row that is not finite has no other result anyway.
// Offsets are products in 32 bits: with addresses of all its rows at hand a kernel would spill.
template <int kElement>
__device__ __forceinline__ void load_chunk(const PackedWeight& w, uint32_t row, int column,
                                           Chunk<kElement>& chunk) {
  constexpr int kBits = element_bits(kElement);
  const uint32_t from = column < w.columns ? uint32_t(column) : 0;
  ptx::load_once(w.codes + (row * w.row_bytes + from / 8 * kBits), chunk.words);
  const uint32_t group = from >> w.group_shift;
  if constexpr (is_mx(kElement)) {
    chunk.scale = static_cast<const uint8_t*>(w.scales)[row * w.groups + group];
  } else if constexpr (kElement == kNVE2M1) {
    // A row has an even number of blocks: whole chunks.
    const auto* const scales = static_cast<const uint8_t*>(w.scales) + (row * w.groups + group);
    chunk.scale = scales[0] | uint32_t(scales[1]) << 8;
  } else {
    chunk.scale = static_cast<const uint16_t*>(w.scales)[row * w.groups + group];
    chunk.zero_byte = 1 << (kBits - 1);
    if (w.zero_points != nullptr) {
      chunk.zero_byte = w.zero_points[row * w.zero_bytes + group / (8 / kBits)];
    }
  }
}

// --- arithmetic on pairs --------------------------------------------------------------------

template <class T>
struct PairType {
  using type = __half2;
};
template <>
struct PairType<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

// None of these is contracted with another: the functions are single instructions.
template <class T>
__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
  using P = typename PairType<T>::type;
  return bit_cast<uint32_t>(P(__hmul2(bit_cast<P>(a), bit_cast<P>(b))));
}
template <class T>
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  using P = typename PairType<T>::type;
  return bit_cast<uint32_t>(P(__hsub2(bit_cast<P>(a), bit_cast<P>(b))));
}
template <class T>
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  using P = typename PairType<T>::type;
  return bit_cast<uint32_t>(P(__hfma2(bit_cast<P>(a), bit_cast<P>(b), bit_cast<P>(c))));
}

__device__ __forceinline__ uint32_t both(uint32_t half) { return half * 0x10001u; }

// `word` shifted left by `distance`, right where that is negative.
template <int kDistance>
__device__ __forceinline__ uint32_t shift(uint32_t word) {
  return kDistance >= 0 ? word << (kDistance & 31) : word >> (-kDistance & 31);
}

// --- minifloats -----------------------------------------------------------------------------

template <class T>
constexpr int kExponentBits = std::is_same<T, __half>::value ? 5 : 8;

template <class T, int kElement>
struct MinifloatPairs {
  static constexpr int kBits = element_bits(kElement);
  static constexpr int kMantissa = minifloat(kElement).mantissa_bits;
  static constexpr int kExponent = kBits - 1 - kMantissa;  // bits of the code's exponent
  static constexpr int kDown = kExponentBits<T> - kExponent;
  static constexpr uint32_t kMagnitude = ((1u << (kBits - 1)) - 1) << (16 - kBits) >> kDown;
  // T's bias less the element's: what the moved code's exponent lacks.
  static constexpr int kBias = (1 << (kExponentBits<T> - 1)) - (1 << (kExponent - 1));
  static constexpr int kMaxField = std::is_same<T, __half>::value ? 30 : 254;
  static constexpr int kMinField = std::is_same<T, __half>::value ? 1 : 0;
  static constexpr int kNanRest = 1 << 16;

  uint32_t factor;  // 2^kBias times the scale, as far as T has it
  int rest;         // binary digits that it has not
  bool rare;        // there are such, or a code is NaN

  __device__ __forceinline__ explicit MinifloatPairs(const Chunk<kElement>& chunk, int) {
    constexpr int kMantissaOfT = 15 - kExponentBits<T>;
    constexpr int kBiasOfT = (1 << (kExponentBits<T> - 1)) - 1;
    const int field = int(chunk.scale) - 127 + kBias + kBiasOfT;
    const int kept = max(kMinField, min(field, kMaxField));
    factor = both(uint32_t(kept) << kMantissaOfT);
    rest = chunk.scale == kNanScale ? kNanRest : field - kept;
    rare = rest != 0 || has_nan(chunk.words);
  }

  // Adding this to a byte without its sign reaches bit 7 for the codes that are NaN or infinity.
  static constexpr uint32_t kNanGap = kElement == kE4M3   ? 0x01010101u
                                      : kElement == kE5M2 ? 0x04040404u
                                                          : 0;
  template <int kWords>
  __device__ static __forceinline__ bool has_nan(const uint32_t (&words)[kWords]) {
    if (kNanGap == 0) return false;
    uint32_t found = 0;
#pragma unroll
    for (const uint32_t word : words) found |= (word & 0x7f7f7f7fu) + kNanGap;
    return (found & 0x80808080u) != 0;
  }

  // The codes moved to where T has its fields.
  template <int kPlace>
  __device__ static __forceinline__ uint32_t moved(uint32_t word) {
    constexpr int kUp = 16 - kBits * (kPlace + 1);  // brings the code's sign to that of T
    return (shift<kUp>(word) & 0x80008000u) | (shift<kUp - kDown>(word) & kMagnitude * 0x10001u);
  }
  template <int kPlace>
  __device__ __forceinline__ uint32_t get(uint32_t word) const {
    return multiply<T>(moved<kPlace>(word), factor);
  }

  // 2^rest as two numbers of T, of which the first takes what it can.
  struct Repair {
    uint32_t first, second;
  };
  __device__ __forceinline__ Repair repair() const {
    constexpr int kMin = std::is_same<T, __half>::value ? -24 : -126;
    constexpr int kMax = std::is_same<T, __half>::value ? 15 : 127;
    if (rest == kNanRest) return {0x7fff7fffu, 0x7fff7fffu};
    const int first = max(kMin, min(rest, kMax)), second = max(kMin, min(rest - first, kMax));
    return {power_of_two(first), power_of_two(second)};
  }
  __device__ static __forceinline__ uint32_t power_of_two(int exponent) {
    return both(bit_cast<uint16_t>(from_float<T>(bit_cast<float>(uint32_t(exponent + 127) << 23))));
  }
  template <int kPlace>
  __device__ static __forceinline__ uint32_t repaired(uint32_t pair, uint32_t word, Repair by) {
    pair = multiply<T>(multiply<T>(pair, by.first), by.second);
    if (kNanGap == 0) return pair;
    const uint32_t found = ((word & 0x7f7f7f7fu) + kNanGap) & 0x80808080u;
    const uint32_t signs = shift<16 - kBits*(kPlace + 1)>(found) & 0x80008000u;
    return pair | (signs >> 15) * 0x7fffu;
  }
};

// --- NVFP4 ----------------------------------------------------------------------------------

// Of half kHalf of a chunk, which is a block: its values times its scale, and less kLeft times,
// because a factor of 2^kBias times the scale would be beyond T.
template <class T, int kHalf>
struct NVPairs {
  using Codes = MinifloatPairs<T, kNVE2M1>;
  static constexpr bool kIsHalf = std::is_same<T, __half>::value;
  static constexpr float kLeft = kIsHalf ? 128.0f : 256.0f;
  static_assert(Codes::kBias == (kIsHalf ? 7 + 7 : 118 + 8), "2^7 and 2^118 times the scale");
  uint32_t factor;

  __device__ __forceinline__ explicit NVPairs(const Chunk<kNVE2M1>& chunk, int) {
    const uint32_t byte = chunk.scale >> (8 * kHalf) & 0xff;
    // Moved to the fields of a float16, e4m3 is 2^-8 times what it was.
    const uint16_t half = uint16_t((byte & 0x7f) << 7 | (byte & 0x80) << 8);
    if constexpr (kIsHalf) {
      factor = multiply<T>(both(half), 0x78007800u);  // 2^15
    } else {
      const float power = bit_cast<float>((127u + 126u) << 23);
      factor =
          bit_cast<uint32_t>(__float2bfloat162_rn(__half2float(bit_cast<__half>(half)) * power));
    }
    if ((byte & 0x7f) == uint32_t(kNanNVScale)) factor = 0x7fff7fffu;
  }

  template <int kPlace>
  __device__ __forceinline__ uint32_t get(uint32_t word) const {
    return multiply<T>(Codes::template moved<kPlace>(word), factor);
  }
};

// --- integers -------------------------------------------------------------------------------

template <class T, int kElement>
struct IntegerPairs {
  static constexpr int kBits = element_bits(kElement);
  static constexpr bool kHalf = std::is_same<T, __half>::value;
  // 1024 as float16 has room for 10 bits of an integer, 128 as bfloat16 for 7: the eighth is
  // worth 128 in the exponent too, because 256 is the next exponent's first number.
  static constexpr bool kSplit = !kHalf && kBits == 8;
  static constexpr uint32_t kOffset = kHalf ? 0x64006400u : 0x43004300u;
  static constexpr uint32_t kMask = ((kSplit ? 0x80u : 1u << kBits) - 1) * 0x10001u;
  uint32_t scale, scale_low;       // the scale is their sum; scale_low for bfloat16 only
  uint32_t offset, offset_eighth;  // what an integer has too much; offset_eighth for kSplit only

  __device__ __forceinline__ explicit IntegerPairs(const Chunk<kElement>& chunk, int zero_at) {
    const uint32_t zero = chunk.zero_byte >> zero_at & ((1 << kBits) - 1);
    offset = kOffset + both(kSplit ? zero & 0x7f : zero);
    offset_eighth = kOffset + both(zero & 0x80);
    if constexpr (kHalf) {
      scale = both(chunk.scale);
    } else {
      const float whole = __half2float(bit_cast<__half>(uint16_t(chunk.scale)));
      // Conversions to pairs are 4 times as fast as those to one bfloat16.
      scale = bit_cast<uint32_t>(__float2bfloat162_rn(whole));
      scale_low = bit_cast<uint32_t>(__float2bfloat162_rn(whole - bit_cast<float>(scale << 16)));
    }
  }

  template <int kPlace>
  __device__ __forceinline__ uint32_t get(uint32_t word) const {
    const uint32_t codes = word >> (kBits * kPlace);
    uint32_t value = subtract<T>(ptx::and_or(codes, kMask, kOffset), offset);
    if constexpr (kSplit) {
      // Each difference and their sum are integers of at most 8 bits: exact.
      const uint32_t eighth = subtract<T>(ptx::and_or(codes, 0x00800080u, kOffset), offset_eighth);
      value = multiply_add<T>(eighth, 0x3f803f80u, value);
    }
    if constexpr (kHalf) return multiply<T>(value, scale);
    return multiply_add<T>(value, scale, multiply<T>(value, scale_low));
  }
};

// --- chunk -> pairs -------------------------------------------------------------------------

template <class T, int kElement, int kFirst, int... kIndex, class Pairs>
__device__ __forceinline__ void fill_pairs(const Chunk<kElement>& chunk, const Pairs& decoder,
                                           uint32_t* pairs, std::integer_sequence<int, kIndex...>) {
  constexpr int kWordPairs = 16 / element_bits(kElement);
  ((pairs[kIndex] = decoder.template get<(kFirst + kIndex) % kWordPairs>(
        chunk.words[(kFirst + kIndex) / kWordPairs])),
   ...);
  if constexpr (is_mx(kElement)) {
    if (decoder.rare) {
      const auto by = decoder.repair();
      ((pairs[kIndex] = decoder.template repaired<(kFirst + kIndex) % kWordPairs>(
            pairs[kIndex], chunk.words[(kFirst + kIndex) / kWordPairs], by)),
       ...);
    }
  }
}

template <class T, int kElement, int kFirst>
struct PairDecoder {
  using type =
      std::conditional_t<is_mx(kElement), MinifloatPairs<T, kElement>, IntegerPairs<T, kElement>>;
};
template <class T, int kFirst>
struct PairDecoder<T, kNVE2M1, kFirst> {
  static_assert(kFirst % 8 == 0, "8 pairs are a block");
  using type = NVPairs<T, kFirst / 8>;
};

// Pairs kFirst to kFirst + kCount - 1 of a chunk, in T; `zero_at` is zero_shift() of its column.
template <class T, int kElement, int kFirst, int kCount>
__device__ __forceinline__ void decode_pairs(const Chunk<kElement>& chunk, int zero_at,
                                             uint32_t (&pairs)[kCount]) {
  using Decoder = typename PairDecoder<T, kElement, kFirst>::type;
  static_assert(kElement != kNVE2M1 || kCount <= 8, "of one block");
  fill_pairs<T, kElement, kFirst>(chunk, Decoder(chunk, zero_at), pairs,
                                  std::make_integer_sequence<int, kCount>());
}

}  // namespace cuda
}  // namespace mixbits
