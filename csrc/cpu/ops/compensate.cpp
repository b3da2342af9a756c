// compensate_group: error-compensating rounding of one group of columns
// (mixbits/formats/compensate.py).
//
// Every row chooses a scale of its own, then rounds one column after the other and makes up for
// its error in those still to come. Lanes are rows: what happens to one is what the slow twin does,
// operation by operation, so that results are equal to the bit.
#include <omp.h>

#include "cpu/codes/span.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace mixbits {
namespace MB_ISA {

namespace {

constexpr int kMaxColumns = 128;

// A scale for every lane, and what rounding with it needs.
template <int ELEMENT>
struct LaneScales {
  Scales of;  // of the first kLanes groups

  LaneRounding<ELEMENT> rounding() const {
    return {load(of.scale), load(of.reciprocal), load(of.offset)};
  }
  // Takes the other's scales in some lanes.
  void replace(vi which, const LaneScales& other) {
    for (int l = 0; l < kLanes; ++l) {
      if (!which[l]) continue;
      of.scale[l] = other.of.scale[l];
      of.reciprocal[l] = other.of.reciprocal[l];
      of.offset[l] = other.of.offset[l];
      of.stored[l] = other.of.stored[l];
    }
  }
};

// kLanes rows of a group, column by column.
struct Tile {
  vf x[kMaxColumns];
  int columns;
};

// Whether scales follow from magnitudes alone.
template <int ELEMENT>
constexpr bool kOfMagnitudes = is_mx(ELEMENT) || has_span(ELEMENT);

// Of every row; as find_bounds has them.
template <int ELEMENT>
Bounds bounds_of(const Tile& tile) {
  vi low = {}, high = {};
  const int32_t sign = int32_t(0x80000000);
  for (int j = 0; j < tile.columns; ++j) {
    const vi bits = bit_cast<vi>(tile.x[j]);
    high = max_of<vi>(high, kOfMagnitudes<ELEMENT> ? vi(bits & 0x7fffffff) : bits);
    low = max_of<vi>(low, bits ^ sign);
  }
  Bounds bounds;
  store(bounds.high, bit_cast<vf>(high));
  store(bounds.low, bit_cast<vf>(low));
  return bounds;
}

template <int ELEMENT>
constexpr int candidates() {
  return is_mx(ELEMENT)       ? 2
         : ELEMENT == kNVE2M1 ? int(sizeof(kNVShares) / sizeof(kNVShares[0]))
                              : int(sizeof(kShares) / sizeof(kShares[0]));
}

// Scales that are found elsewhere, beside codes that are counted from 128, or floats.
template <int ELEMENT>
void set_scales(vf scale, vi stored, LaneScales<ELEMENT>* out) {
  store(out->of.scale, scale);
  store(out->of.reciprocal, vf{});  // of powers of two only
  store(out->of.offset, splat(128.0f));
  for (int l = 0; l < kLanes; ++l) out->of.stored[l] = uint16_t(stored[l]);
}

// Candidate number c of the search: MX, c powers of two above the smallest scale; others, a share
// of the range.
template <int ELEMENT>
void candidate(const Bounds& bounds, int c, const Format format, float divisor,
               LaneScales<ELEMENT>* out) {
  if (ELEMENT == kNVE2M1) {
    vi stored;
    const vf scale = nv_scales(load(bounds.high) * kNVShares[c], splat(divisor), &stored);
    return set_scales(scale, stored, out);
  }
  if (is_mx(ELEMENT)) {
    mx_scales<ELEMENT>(bounds, kLanes, kFloor, &out->of);
    for (int l = 0; l < kLanes; ++l) {
      const int byte = out->of.stored[l] + (out->of.stored[l] >= kNanScale - 1 ? 0 : c);
      out->of.stored[l] = uint16_t(byte);
      out->of.scale[l] = e8m0_to_float(byte);
      out->of.reciprocal[l] = e8m0_reciprocal(byte);
    }
    return;
  }
  Bounds less;
  store(less.low, load(bounds.low) * kShares[c]);
  store(less.high, load(bounds.high) * kShares[c]);
  int_scales(less, 0, element_bits(ELEMENT), format.symmetric, &out->of);
}

// Squares of the errors with these scales, weighed and added up: halves onto each other.
template <int ELEMENT>
vf squares(const Tile& tile, const LaneScales<ELEMENT>& scales, const float* importance,
           int group_size) {
  vf sums[kMaxColumns];
  const LaneRounding<ELEMENT> rounding = scales.rounding();
  for (int j = 0; j < group_size; ++j) {
    if (j >= tile.columns) {
      sums[j] = vf{};
      continue;
    }
    const vf error = rounding.value(tile.x[j]) - tile.x[j];
    sums[j] = error * error * importance[j];
  }
  for (int half = group_size / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// The scales of least error. Where no error is a number, those of the format's own rule.
template <int ELEMENT>
LaneScales<ELEMENT> search(const Tile& tile, const float* importance, const Format format,
                           float divisor) {
  Bounds bounds = bounds_of<ELEMENT>(tile);
  LaneScales<ELEMENT> best, other;
  if constexpr (has_span(ELEMENT)) {
    candidate<ELEMENT>(bounds, 0, format, divisor, &best);
  } else {
    scales_of_bounds<ELEMENT>(bounds, kLanes, format, &best.of);
  }
  vf least = splat(__builtin_inff());
  for (int c = 0; c < candidates<ELEMENT>(); ++c) {
    candidate<ELEMENT>(bounds, c, format, divisor, &other);
    const vf error = squares(tile, other, importance, columns_of_group<ELEMENT>(format));
    const vi better = error < least;
    least = better ? error : least;
    best.replace(better, other);
  }
  return best;
}

// Those that are given of rows, or of least error.
template <int ELEMENT>
LaneScales<ELEMENT> choose_scales(const CompensateArgs& a, const Tile& tile, const float* known) {
  if constexpr (has_row_scale(ELEMENT)) {
    LaneScales<ELEMENT> given;
    set_scales(load(known), vi{}, &given);
    return given;
  } else {
    return search<ELEMENT>(tile, a.importance, decode_format(a.format), a.divisor);
  }
}

template <int ELEMENT>
void compensate_rows(const CompensateArgs& a, int64_t first) {
  const int count = int(min64(a.rows - first, kLanes));
  Tile tile;
  tile.columns = a.columns;
  float known[kLanes] = {};
  if (a.known) memcpy(known, a.known + first, count * sizeof(float));
  for (int j = 0; j < a.columns; ++j) {
    for (int r = 0; r < kLanes; ++r)  // a row that is not there is the last
      tile.x[j][r] = a.group[(first + (r < count ? r : count - 1)) * a.stride + j];
  }
  const LaneScales<ELEMENT> scales = choose_scales<ELEMENT>(a, tile, known);
  const LaneRounding<ELEMENT> rounding = scales.rounding();
  for (int j = 0; j < a.columns; ++j) {
    const float* row = a.factor + j * a.factor_stride;
    const vf x = tile.x[j], error = (x - rounding.value(x)) / row[j];
    const vi codes = rounding.code(x);
    for (int i = j + 1; i < a.columns; ++i) tile.x[i] -= error * row[i];
    for (int r = 0; r < count; ++r) {
      a.codes[(first + r) * a.columns + j] = uint8_t(codes[r]);
      a.errors[(first + r) * a.columns + j] = error[r];
    }
  }
  for (int r = 0; r < count; ++r) {
    if (!a.known)
      memcpy(a.scales + (first + r) * scale_bytes(ELEMENT), scales.of.stored + r,
             scale_bytes(ELEMENT));
    if (a.zero_points) a.zero_points[first + r] = uint8_t(scales.of.offset[r]);
  }
}

}  // namespace

bool compensate_group(const CompensateArgs& a) {
  const int64_t tiles = group_count(a.rows, kLanes);
#pragma omp parallel for schedule(static) if (tiles > 4)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    with_element(decode_format(a.format).element,
                 [&](auto tag) { compensate_rows<decltype(tag)::value>(a, tile * kLanes); });
  }
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
