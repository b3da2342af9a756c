// One run of 128 columns of a row in the registers of a warp: its groups' scales, its codes, and
// its round trip. The arithmetic is that of formats.h; here are only the shuffles around it.
#pragma once

#include "common.cuh"

namespace mixbits {
namespace cuda {

// The scale of a lane's group. `factor` is the reciprocal of an MX scale, or the offset of an
// integer group; `stored` is the e8m0 byte or the bits of the float16.
struct GroupScale {
  float scale;
  float factor;
  int stored;
  bool finite;
};

// Combines the values of a group's `lanes` adjacent lanes (8, 16 or 32); all of them get the
// result. All 32 lanes of the warp must call.
template <class T, class Combine>
__device__ inline T combine_lanes(T value, int lanes, Combine combine) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

template <int kElement>
__device__ inline GroupScale group_scale(const float (&x)[kLaneColumns], const Format& format) {
  static_assert(has(First(), kElement), "scales of others follow from something else");
  const int lanes = format.group_size / kLaneColumns;
  int32_t largest = 0;  // as bits, where NaN and infinity are above all numbers
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    largest = max(largest, bit_cast<int32_t>(x[i]) & 0x7fffffff);
  }
  largest = combine_lanes(largest, lanes, [](int32_t a, int32_t b) { return max(a, b); });
  if constexpr (is_mx(kElement)) {
    const int byte = mx_scale(largest, kElement, format.scale_mode);
    return {e8m0_to_float(byte), e8m0_reciprocal(byte), byte, byte != kNanScale};
  } else {
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      low = fminf(low, x[i]);
      high = fmaxf(high, x[i]);
    }
    low = combine_lanes(low, lanes, [](float a, float b) { return fminf(a, b); });
    high = combine_lanes(high, lanes, [](float a, float b) { return fmaxf(a, b); });
    const IntGroup group =
        int_group(low, high, largest < 0x7f800000, element_bits(kElement), format.symmetric);
    return {group.scale, group.offset, group.scale_half, group.finite};
  }
}

template <int kElement>
__device__ inline int encode(float x, const GroupScale& group) {
  if (!group.finite) return 0;
  if constexpr (is_mx(kElement)) {
    return minifloat_encode<float, int32_t>(x * group.factor, minifloat(kElement));
  } else {
    return small_to_int<float, int32_t>(
        int_round(x, group.scale, group.factor, element_bits(kElement)));
  }
}

// The value that x becomes; NaN in a group that is not finite, because its scale is.
template <int kElement>
__device__ inline float round_trip(float x, const GroupScale& group) {
  if constexpr (is_mx(kElement)) {
    return minifloat_round<float, int32_t>(x * group.factor, minifloat(kElement)) * group.scale;
  } else {
    const float code = int_round(x, group.scale, group.factor, element_bits(kElement));
    return (code - group.factor) * group.scale;
  }
}

// --- the way back ---------------------------------------------------------------------------

// A code's value before scaling; `offset` is used by integers only.
template <int kElement>
__device__ inline float decode(int code, float offset) {
  if constexpr (is_float(kElement)) {
    return minifloat_decode<float, int32_t>(code, minifloat(kElement));
  } else {
    return small_to_float<float, int32_t>(code) - offset;
  }
}

// What codes are multiplied by in group number `group` of a row that has `groups` scales.
template <int kElement>
__device__ inline float load_scale(const PackedArgs& packed, int64_t row, int64_t group,
                                   int64_t groups) {
  if constexpr (has_row_scale(kElement)) {
    return static_cast<const float*>(packed.scales)[row];
  } else if constexpr (is_mx(kElement)) {
    const int byte = static_cast<const uint8_t*>(packed.scales)[row * groups + group];
    return e8m0_to_float(byte) * unit_of(kElement);
  } else if constexpr (kElement == kNVE2M1) {
    const int byte = static_cast<const uint8_t*>(packed.scales)[row * groups + group];
    return minifloat_decode<float, int32_t>(byte, minifloat(kE4M3)) / *packed.divisor;
  } else {
    return __half2float(static_cast<const __half*>(packed.scales)[row * groups + group]);
  }
}

// What integer codes are counted from.
template <int kElement>
__device__ inline float load_offset(const PackedArgs& packed, int64_t row, int64_t group,
                                    int64_t groups) {
  constexpr int kBits = element_bits(kElement);
  if (is_float(kElement)) return 0.0f;
  if (packed.zero_points == nullptr) return float(1 << (kBits - 1));
  const uint8_t* const zero_points = packed.zero_points + row * packed_bytes(groups, kBits);
  return float(unpack_code(zero_points, group, kBits, groups));
}

}  // namespace cuda
}  // namespace mixbits
