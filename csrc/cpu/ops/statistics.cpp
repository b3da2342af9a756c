// Sensitivity statistics: how far several formats move a weight, weighed per element.
//
//   fisher     out[f, slab] = sum  row_weight[n] column_weight[k] (W - Q_f(W))[n, k]^2
//   gradient   out[f, slab] = sum  |gradient[n, k] (W - Q_f(W))[n, k]|
//
// W is read once for all formats:
//
//            128 columns
//          +------------+----   one block: one partial sum per format and slab of 32 columns
//   64 rows|            |
//          +------------+----   processed in tiles of 16 rows, which are converted to float32 in
//                               L1, bounded once for all formats, and rounded to each of them
//
// Errors are weighed and added in float32 along the 16 rows of a tile, each column by itself; as
// no term is negative, their sum is off by at most 16 roundings. All else is in double, in a fixed
// order, so the result does not depend on the number of threads.
//
// An error's sign does not matter, nor does the side to which a tie is rounded, so errors are not
// computed from fake_quantize's result but with fewer instructions.
#include <omp.h>

#include "cpu/codes/span.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace mixbits {
namespace MB_ISA {

constexpr int kBlockRows = 64;
constexpr int kTileRows = 16;
constexpr int kSlab = 32;
constexpr int kRunSlabs = kRun / kSlab;
constexpr int kChunkRuns = 16;  // runs of one item of work: the next run is fetched ahead
static_assert(kTileRows * kRunSlabs == kBatch, "a tile's slabs are one batch of groups");

// Slabs are numbered row by row; within a slab, columns are in the order of load_pair. `upper` says
// which of them are in a slab's second group of 16.
struct Tile {
  alignas(64) float x[kTileRows * kRun];
  alignas(64) float gradient[kTileRows * kRun];  // magnitudes
  alignas(64) float row_weight[kTileRows];       // over the largest of the tile, which is:
  double row_factor;
  Bounds bounds;
  vi upper[kSlab / kLanes];
  int rows;
};

// What one format makes of a tile. An error is scaled by `weight` of its group before it is
// squared with itself or multiplied with the gradient; MX errors are in units of their scale.
// Formats that have spans have these scales instead: one of a row, or two of a slab; errors are
// multiplied by `unit`.
struct TileFormat {
  Scales scales;
  alignas(64) float span_scales[2 * kBatch];
  float unit;
  alignas(64) float weight[kBatch];
  alignas(64) float lowest[kBatch];   // integers: rounded numbers are clamped to these, as sums
  alignas(64) float highest[kBatch];  // with round_magic
  double factor;
};

// --- loading ------------------------------------------------------------------------------------

// `count` elements of a row as float32, in the order of load_pair, zeros beyond; returns where
// whole slabs of the row can be read.
template <int DTYPE>
MB_INLINE const char* load_columns(const char* in, int count, char* rest, float* out) {
  constexpr int size = dtype_bytes(DTYPE);
  for (int line = 0; line < kRun * size; line += 64) __builtin_prefetch(in + kRun * size + line);
  if (count < kRun) {
    memset(rest, 0, kRun * size);
    in = static_cast<const char*>(memcpy(rest, in, count * size));
  }
  for (int k = 0; k < kRun; k += kPair) {
    const Pair v = load_pair<DTYPE>(in + k * size);
    store(out + k, v.a);
    store(out + k + kLanes, v.b);
  }
  return in;
}

static void load_weight(const StatisticsArgs& a, int64_t row, int64_t first, Tile* tile) {
  const int count = int(min64(a.columns - first, kRun));
  with_dtype(a.dtype, [&](auto tag) {
    constexpr int dtype = decltype(tag)::value, size = dtype_bytes(dtype);
    alignas(64) char rest[kRun * size];
    for (int r = 0; r < tile->rows; ++r) {
      const char* in = static_cast<const char*>(a.weight) + ((row + r) * a.columns + first) * size;
      in = load_columns<dtype>(in, count, rest, tile->x + r * kRun);
      find_bounds<false, dtype>(in, r * kRunSlabs, kRunSlabs, kSlab, &tile->bounds);
    }
  });
}

// Columns of x and of the gradient must lie in the same order.
template <int DTYPE>
MB_INLINE void load_gradient_row(const char* in, int count, int weight_dtype, float* out) {
  constexpr int size = dtype_bytes(DTYPE);
  alignas(64) char rest[kRun * size];
  load_columns<DTYPE>(in, count, rest, out);
  for (int k = 0; k < kRun; k += kPair) {
    vf a = load(out + k), b = load(out + k + kLanes);
    if (DTYPE == kBFloat16 && weight_dtype != kBFloat16) {
      const vf even = a, odd = b;
      a = alternate(even, odd, 0);
      b = alternate(even, odd, 1);
    }
    if (DTYPE != kBFloat16 && weight_dtype == kBFloat16) {
      const vf low = a, high = b;
      a = every_second(low, high, 0);
      b = every_second(low, high, 1);
    }
    store(out + k, bit_cast<vf>(vi(bit_cast<vi>(a) & 0x7fffffff)));
    store(out + k + kLanes, bit_cast<vf>(vi(bit_cast<vi>(b) & 0x7fffffff)));
  }
}

static void load_gradient(const StatisticsArgs& a, int64_t row, int64_t first, Tile* tile) {
  const int count = int(min64(a.columns - first, kRun));
  with_dtype(a.gradient_dtype, [&](auto tag) {
    constexpr int dtype = decltype(tag)::value;
    const char* in = static_cast<const char*>(a.gradient);
    for (int r = 0; r < tile->rows; ++r) {
      load_gradient_row<dtype>(in + ((row + r) * a.columns + first) * dtype_bytes(dtype), count,
                               a.dtype, tile->gradient + r * kRun);
    }
  });
}

// The column that a lane of a slab's vector number `i` is.
MB_INLINE int column_of(int i, int lane, bool even_odd) {
  return even_odd ? i / 2 * kPair + 2 * lane + i % 2 : i * kLanes + lane;
}

static void mark_upper_groups(int dtype, Tile* tile) {
  for (int i = 0; i < kSlab / kLanes; ++i) {
    for (int lane = 0; lane < kLanes; ++lane)
      tile->upper[i][lane] = column_of(i, lane, dtype == kBFloat16) >= 16 ? -1 : 0;
  }
}

// Of one item's columns in the order of load_pair, zeros beyond the last.
static void load_column_weights(const StatisticsArgs& a, int64_t first, double* out) {
  for (int k = 0; k < kChunkRuns * kRun; ++k) {
    const int place = column_of(k % kSlab / kLanes, k % kLanes, a.dtype == kBFloat16);
    const int64_t column = first + k / kSlab * kSlab + place;
    out[k] = column >= a.columns ? 0.0 : a.column_weight ? a.column_weight[column] : 1.0;
  }
}

static void load_row_weights(const StatisticsArgs& a, int64_t row, Tile* tile) {
  double largest = 0;
  for (int r = 0; r < tile->rows; ++r) {
    const double weight = a.row_weight ? a.row_weight[row + r] : 1.0;
    largest = weight > largest ? weight : largest;
  }
  tile->row_factor = largest > 0 ? largest : 1.0;
  for (int r = 0; r < tile->rows; ++r) {
    const double weight = a.row_weight ? a.row_weight[row + r] : 1.0;
    tile->row_weight[r] = float(weight / tile->row_factor);
  }
}

// --- scales and weights of a format -------------------------------------------------------------

// Bounds of groups of `slabs` slabs each; of magnitudes alone where IS_MX.
template <bool IS_MX>
MB_INLINE void merge_bounds(const Bounds& in, int groups, int slabs, Bounds* out) {
  for (int g = 0; g < groups; ++g) {
    int32_t low = 0, high = 0;  // as bits, since NaN is above all
    for (int s = g * slabs; s < (g + 1) * slabs; ++s) {
      const int32_t l = bit_cast<int32_t>(in.low[s]), h = bit_cast<int32_t>(in.high[s]);
      low = l > low ? l : low;
      high = h > high ? h : high;
    }
    out->low[g] = bit_cast<float>(low);
    out->high[g] = bit_cast<float>(IS_MX && low > high ? low : high);
  }
}

// Among scales that are positive or NaN.
MB_INLINE float largest_scale(const float* scales, int count) {
  int32_t largest = 0;
  for (int g = 0; g < count; ++g) {
    const int32_t bits = bit_cast<int32_t>(scales[g]);
    const int32_t number = bits < 0x7f800000 ? bits : 0;
    largest = number > largest ? number : largest;
  }
  return largest > 0 ? bit_cast<float>(largest) : 1.0f;
}

// Of a format that has spans, these of the tile's rows; weights belong to rows, or to slabs.
template <int ELEMENT>
static void prepare_span_format(const Tile& tile, const float* spans, bool squares,
                                TileFormat* out) {
  const bool per_row = has_row_scale(ELEMENT);
  const int row_groups = per_row ? 1 : kRunSlabs, scales = per_row ? 1 : 2;
  const int groups = tile.rows * row_groups;
  for (int g = 0; g < groups; ++g) {
    if (per_row) {
      out->span_scales[g] = spans[g];
      continue;
    }
    vi lower = {}, upper = {};
    for (int i = 0; i < kSlab / kLanes; ++i) {
      const vi bits = bit_cast<vi>(load(tile.x + g * kSlab + i * kLanes)) & 0x7fffffff;
      lower = max_of<vi>(lower, bits & ~tile.upper[i]);
      upper = max_of<vi>(upper, bits & tile.upper[i]);
    }
    vi maxima = {};
    maxima[0] = max_lane(lower);
    maxima[1] = max_lane(upper);
    const vf found = nv_scales(bit_cast<vf>(maxima), splat(spans[g / kRunSlabs]), &maxima);
    out->span_scales[2 * g] = found[0];
    out->span_scales[2 * g + 1] = found[1];
  }
  // Squares of errors could be beyond float32: the errors are taken over a power of two.
  const int32_t largest = bit_cast<int32_t>(largest_scale(out->span_scales, groups * scales));
  const float unit = squares ? bit_cast<float>(largest & 0x7f800000) : 1.0f;
  out->unit = 1.0f / unit;
  for (int g = 0; g < groups; ++g)
    out->weight[g] = squares ? tile.row_weight[g / row_groups] : 1.0f;
  out->factor = squares ? tile.row_factor * unit * unit : 1.0;
}

// Slabs that share a weight.
template <int ELEMENT>
MB_INLINE int slabs_of_group(const Format format) {
  return ELEMENT == kNVE2M1 ? 1 : columns_of_group<ELEMENT>(format) / kSlab;
}

template <int ELEMENT>
static void prepare_format(const Tile& tile, const Format format, bool squares, TileFormat* out) {
  const int group_slabs = slabs_of_group<ELEMENT>(format);
  const int groups = tile.rows * kRunSlabs / group_slabs, row_groups = kRunSlabs / group_slabs;
  Bounds bounds;
  merge_bounds<is_mx(ELEMENT)>(tile.bounds, groups, group_slabs, &bounds);
  scales_of_bounds<ELEMENT>(bounds, groups, format, &out->scales);
  if (!is_float(ELEMENT)) {
    const float range = float((1 << element_bits(ELEMENT)) - 1) * unit_of(ELEMENT);
    for (int g = 0; g < groups; ++g) {
      out->lowest[g] = lowest_sum<ELEMENT>(out->scales, g);
      out->highest[g] = out->lowest[g] + range;
    }
  }
  // Squares of scales could be beyond float32: they are taken over the largest.
  const float unit = is_mx(ELEMENT) && squares ? largest_scale(out->scales.scale, groups) : 1.0f;
  for (int r = 0, g = 0; r < tile.rows; ++r) {
    for (int end = g + row_groups; g < end; ++g) {
      const float scale = is_mx(ELEMENT) ? out->scales.scale[g] / unit : 1.0f;
      out->weight[g] = squares ? tile.row_weight[r] * (scale * scale) : scale;
    }
  }
  out->factor = squares ? tile.row_factor * unit * unit : 1.0;
}

// --- errors -------------------------------------------------------------------------------------

// A magnitude, given as its bits, rounded to the element's grid; ties to either side.
template <int ELEMENT>
MB_INLINE vf round_magnitude(vi bits) {
#if defined(__AVX512F__)
  if (ELEMENT == kE2M1) {  // by the lowest bits of the exponent (2, 4, 8, then 2^-4 to 1) and two
    const __m512 from_2 = _mm512_setr_ps(2, 3, 3, 4, 4, 6, 6, 6, 6, 6, 6, 6, 0, 0, 0, 0);
    const __m512 to_2 =
        _mm512_setr_ps(0, 0, 0, 0, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 1, 1, 1, 1.5f, 1.5f, 2);
    const vi smallest = splat_i(123 << 23);
    const vi index = max_of(bits, smallest) >> 21;
    return (vf)_mm512_permutex2var_ps(from_2, (__m512i)index, to_2);
  }
#endif
  constexpr Minifloat element = minifloat(ELEMENT);
  const vi lowest = splat_i((127 + element.min_exponent) << 23), top = splat_i(element.max_value);
  const vi exponent = max_of<vi>(bits & 0x7f800000, lowest);
  const vf magic =
      bit_cast<vf>(wrapping_add(exponent, splat_i((23 - element.mantissa_bits) << 23)));
  const vi rounded = bit_cast<vi>(vf((bit_cast<vf>(bits) + magic) - magic));
  return bit_cast<vf>(vi(rounded < top ? rounded : top));
}

// x - Q(x), for vector number i of a slab in group number g.
template <int ELEMENT>
MB_INLINE vf span_error(vf x, const Tile& tile, const TileFormat& f, int g, int i) {
  vf scale = splat(f.span_scales[g]);
  if (!has_row_scale(ELEMENT)) {
    const vf lower = splat(f.span_scales[2 * g]), upper = splat(f.span_scales[2 * g + 1]);
    scale = tile.upper[i] ? upper : lower;
  }
  const LaneRounding<ELEMENT> rounding = {scale, vf{}, splat(128.0f)};
  return (x - rounding.value(x)) * f.unit;
}

// x - Q(x), of an MX element over the scale, of either sign.
template <int ELEMENT>
MB_INLINE vf rounding_error(vf x, const TileFormat& f, int g) {
  const Scales& scales = f.scales;
  if (is_float(ELEMENT)) {
    const vi bits = bit_cast<vi>(vf(x * scales.reciprocal[g])) & 0x7fffffff;
    return bit_cast<vf>(bits) - round_magnitude<ELEMENT>(bits);
  }
  // The product with the reciprocal may end on the other side of a tie, where errors are equal.
  const vf sum = fma(x, splat(scales.reciprocal[g]), splat(round_magic(ELEMENT)));
  const vf low = splat(f.lowest[g]), high = splat(f.highest[g]);
  const vf floored = sum > low ? sum : low;
  const vf code = (floored < high ? floored : high) - round_magic(ELEMENT);
  if (is_mx(ELEMENT)) return x * scales.reciprocal[g] - code;
  return fma(-code, splat(scales.scale[g]), x);
}

// Adds up the tile's errors, slab by slab.
template <int ELEMENT, bool SQUARES>
static void add_errors(const Tile& tile, const double* column_weight, int group_slabs,
                       const TileFormat& f, double* partial) {
  constexpr int vectors = kSlab / kLanes;
  const int row_groups = kRunSlabs / group_slabs;
  for (int s = 0; s < kRunSlabs; ++s) {
    vf sums[vectors] = {};
    int g = s / group_slabs;
    for (int r = 0; r < tile.rows; ++r, g += row_groups) {
      for (int i = 0; i < vectors; ++i) {
        const int at = r * kRun + s * kSlab + i * kLanes;
        const vf x = load(tile.x + at);
        const vf error = has_span(ELEMENT) ? span_error<ELEMENT>(x, tile, f, g, i)
                                           : rounding_error<ELEMENT>(x, f, g);
        const vf weighed = error * f.weight[g];
        if (SQUARES) {
          sums[i] = fma(weighed, error, sums[i]);
        } else {
          const vf magnitude = bit_cast<vf>(vi(bit_cast<vi>(weighed) & 0x7fffffff));
          sums[i] = fma(magnitude, load(tile.gradient + at), sums[i]);
        }
      }
    }
    vd total = {};
    for (int i = 0; i < 2 * vectors; ++i) {
      const double* weights = column_weight + s * kSlab + i * (kLanes / 2);
      total += widen_to_double(sums[i / 2], i % 2) * load_raw<vd>(weights);
    }
    double slab = 0;
    for (int i = 0; i < kLanes / 2; ++i) slab += total[i];
    partial[s] += f.factor * slab;
  }
}

// One tile, whose row weights are loaded; `partial` is [formats, kRunSlabs], `spans` [formats,
// rows], or null where no format needs any.
static void tile_statistics(const StatisticsArgs& a, const float* spans, int64_t row, int64_t first,
                            const double* column_weight, Tile* tile, double* partial) {
  load_weight(a, row, first, tile);
  if (a.gradient) load_gradient(a, row, first, tile);
  for (int f = 0; f < a.format_count; ++f) {
    const Format format = decode_format(a.formats[f]);
    with_element(format.element, [&](auto tag) {
      constexpr int element = decltype(tag)::value;
      const int group_slabs = slabs_of_group<element>(format);
      TileFormat own;
      if constexpr (has_span(element)) {
        prepare_span_format<element>(*tile, spans + f * a.rows + row, !a.gradient, &own);
      } else {
        prepare_format<element>(*tile, format, !a.gradient, &own);
      }
      double* sums = partial + f * kRunSlabs;
      a.gradient ? add_errors<element, false>(*tile, column_weight, group_slabs, own, sums)
                 : add_errors<element, true>(*tile, column_weight, group_slabs, own, sums);
    });
  }
}

// The runs [begin, end) of the rows from `first_row`; `partial` is [runs, formats, kRunSlabs].
static void block_statistics(const StatisticsArgs& a, const float* spans, int64_t first_row,
                             int64_t begin, int64_t end, double* partial) {
  const int per_run = a.format_count * kRunSlabs;
  Tile tile;
  mark_upper_groups(a.dtype, &tile);
  alignas(64) double column_weight[kChunkRuns * kRun];
  load_column_weights(a, begin * kRun, column_weight);
  memset(partial, 0, sizeof(double) * (end - begin) * per_run);
  const int64_t last_row = min64(first_row + kBlockRows, a.rows);
  for (int64_t row = first_row; row < last_row; row += kTileRows) {
    tile.rows = int(min64(last_row - row, kTileRows));
    load_row_weights(a, row, &tile);
    for (int64_t run = begin; run < end; ++run) {
      tile_statistics(a, spans, row, run * kRun, column_weight + (run - begin) * kRun, &tile,
                      partial + (run - begin) * per_run);
    }
  }
}

bool statistics(const StatisticsArgs& a) {
  const int64_t runs = group_count(a.columns, kRun), blocks = group_count(a.rows, kBlockRows);
  const int64_t slabs = group_count(a.columns, kSlab), per_run = a.format_count * kRunSlabs;
  const int64_t chunks = group_count(runs, kChunkRuns);
  Scratch partial(blocks * runs * per_run * sizeof(double));
  const bool spanned = need_spans(a.formats, a.format_count);
  const Scratch spans(spanned ? a.format_count * a.rows * sizeof(float) : 0);
  if (!partial.data || !spans.data) return false;
  if (spanned)
    find_spans(a.weight, a.rows, a.columns, a.dtype, a.formats, a.format_count, spans.floats());
  double* partials = partial.doubles();
#pragma omp parallel for schedule(dynamic) if (blocks * runs > 1)
  for (int64_t item = 0; item < blocks * chunks; ++item) {
    const int64_t block = item / chunks, begin = item % chunks * kChunkRuns;
    block_statistics(a, spans.floats(), block * kBlockRows, begin, min64(begin + kChunkRuns, runs),
                     partials + (block * runs + begin) * per_run);
  }
  for (int f = 0; f < a.format_count; ++f) {
    for (int64_t slab = 0; slab < slabs; ++slab) {
      double total = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block * runs + slab / kRunSlabs;
        total += partials[at * per_run + f * kRunSlabs + slab % kRunSlabs];
      }
      a.out[f * slabs + slab] = total;
    }
  }
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
