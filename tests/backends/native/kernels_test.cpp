// Rounding, packing and statistics of every instruction set against their slow twins (slow.h).
//
//   kernels_test [--few] [SEED]     --few: only what has work for several threads, and less of it
//
// Tensors lie in memory of exact size, at odd addresses: meant to run under sanitizers.
#include "checks.h"

namespace mixbits {
namespace test {
namespace {

// --- inputs -------------------------------------------------------------------------------------

constexpr int kKinds = 16;

// One number of a row on which rounding goes wrong if it can.
float hard_number(Random& random, int kind, float largest) {
  const float x = random.normal();
  switch (kind) {
    case 1:
      return ldexpf(x, random.between(-60, 60));
    case 2:
      return float(random.between(-24, 24)) / 4;  // ties of e2m1
    case 3:
      return float(random.between(-32, 32)) / 2;  // ties of integers
    case 4:
      return 0.0f;
    case 5:
      return -0.0f;
    case 6:
      return ldexpf(x, -127);  // float32 subnormals, and scales at e8m0's lower end
    case 7:
      return ldexpf(x, -145);
    case 8:
      return x < 0 ? -largest : largest;
    case 9:
      return x * 1e-6f;  // around the floor of integer scales
    case 10:
      return fabsf(x);  // one sign only: zero points at an end
    case 11:
      return -fabsf(x);
    case 12:
      return nextafterf(exp2f(roundf(x)), 0);  // just below a power of two
    default:
      return x;
  }
}

Bytes hard_rows(Random& random, int64_t rows, int64_t columns, int dtype) {
  Bytes x(rows * columns * dtype_size(dtype), 1);
  for (int64_t n = 0; n < rows; ++n) {
    const int kind = int(n % kKinds);
    for (int64_t k = 0; k < columns; ++k) {
      set(x, dtype, n * columns + k, hard_number(random, kind, largest_number(dtype)));
    }
    if (kind == 13) set(x, dtype, n * columns + columns / 2, NAN);
    if (kind == 14) set(x, dtype, n * columns + columns / 2, INFINITY);
    if (kind == 15) set(x, dtype, n * columns + columns - 1, -INFINITY);
  }
  return x;
}

// --- rounding and packing: to the bit -----------------------------------------------------------

// The operations on x with `threads`, compared with their slow twins.
void check_rounding(const Bytes& x, const Weight& packed, const Bytes& rounded, int dtype,
                    int threads) {
  const int64_t rows = packed.rows, columns = packed.columns;
  const char* element = element_name(decode_format(packed.format).element);
  omp_set_num_threads(threads);
  Bytes out(x.size(), 1);
  out.fill(0xa5);
  check(run_fake_quantize(x, out, rows, columns, dtype, packed.format), "no memory");
  int64_t at = first_difference(out, rounded, dtype);
  check(at < 0, "fake_quantize %s (%x) %s [%d, %d] threads %d at %d", element, packed.format,
        dtype_name(dtype), int(rows), int(columns), threads, int(at));
  Weight own(packed.format, rows, columns, 1);
  for (const Bytes* bytes : {&own.codes, &own.scales, &own.zero_points}) bytes->fill(0xa5);
  check(run_quantize_pack(x, own, dtype), "no memory");
  check(own.equals(packed), "quantize_pack %s (%x) %s [%d, %d] threads %d", element, packed.format,
        dtype_name(dtype), int(rows), int(columns), threads);
  out.fill(0xa5);
  check(run_dequantize(own, out, dtype), "no memory");
  at = first_difference(out, rounded, dtype);
  check(at < 0, "dequantize %s (%x) %s [%d, %d] threads %d at %d", element, packed.format,
        dtype_name(dtype), int(rows), int(columns), threads, int(at));
}

void check_rounding_of_all_formats(Random& random) {
  const std::vector<int> widths = {1, 31, 32, 33, 64, 96, 127, 128, 129, 172, 192, 300};
  int number = 0;
  for (const int format : formats_of_weights()) {
    for (int dtype = kBFloat16; dtype <= kFloat32; ++dtype, ++number) {
      // 70 rows are enough work for several threads.
      for (const int rows : {kKinds, 70}) {
        if (few && (rows < 70 || number % 5 != 0)) continue;
        const int columns = rows == 70 ? 172 : random.choice(widths);
        if (rows == 70 && number % 5 != 0) continue;
        const Bytes x = hard_rows(random, rows, columns, dtype);
        const std::vector<float> floats = to_floats(x, dtype);
        const Weight packed = slow_pack(floats, rows, columns, format);
        const Bytes rounded = slow_dequantize(packed, dtype);
        for (const char* name : isa_names()) {
          set_isa(isa = name);
          for (int threads = 1; threads <= (rows == 70 ? 3 : 1); ++threads)
            check_rounding(x, packed, rounded, dtype, threads);
        }
      }
    }
  }
}

// Any bytes are a packed weight: all codes, all scales.
void check_dequantize_of_any_bytes(Random& random) {
  for (const int format : formats_of_weights()) {
    const int columns = random.choice(std::vector<int>{1, 33, 127, 300}), rows = 64;
    const int dtype = random.below(3);
    const Weight w(format, rows, columns, 1);
    for (const Bytes* bytes : {&w.codes, &w.scales, &w.zero_points}) {
      for (int64_t i = 0; i < bytes->size(); ++i) bytes->data()[i] = uint8_t(random.bits());
    }
    const Bytes expected = slow_dequantize(w, dtype);
    for (const char* name : isa_names()) {
      set_isa(isa = name);
      Bytes out(expected.size(), 1);
      check(run_dequantize(w, out, dtype), "no memory");
      const int64_t at = first_difference(out, expected, dtype);
      check(at < 0, "dequantize of any bytes, format %x %s columns %d at %d", format,
            dtype_name(dtype), columns, int(at));
    }
  }
}

// An output beyond 32 MiB at an aligned address is written past the caches, and must be the same.
void check_streaming(Random& random) {
  const int64_t columns = 1 << 20, rows = 17;
  const int dtype = kBFloat16;
  const Bytes x(rows * columns * 2, 1);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const uint16_t word = i < columns ? float_to_bfloat16(random.normal()) : uint16_t(0);
    memcpy(x.data() + i * 2, &word, 2);
    if (i >= columns) memcpy(x.data() + i * 2, x.data() + (i - columns + 1) % columns * 2, 2);
  }
  void* aligned = aligned_alloc(64, size_t(x.size()));
  if (!aligned) abort();
  Bytes out(x.size(), 1);
  omp_set_num_threads(2);
  for (const int format : {mx_formats()[0], int_formats()[8]}) {
    memset(aligned, 0xa5, size_t(x.size()));
    out.fill(0x5a);
    check(kernels().fake_quantize({x.data(), aligned, rows, columns, dtype, format}), "no memory");
    check(run_fake_quantize(x, out, rows, columns, dtype, format), "no memory");
    check(memcmp(aligned, out.data(), size_t(x.size())) == 0, "streaming, format %x", format);
  }
  free(aligned);
}

// --- statistics ---------------------------------------------------------------------------------

struct Statistics {
  int64_t rows, columns;
  int dtype, gradient_dtype;
  Bytes weight, gradient;
  std::vector<double> row_weight, column_weight;
  std::vector<int> formats;

  int64_t slabs() const { return group_count(columns, 32); }

  std::vector<double> run(bool fisher, int threads) const {
    omp_set_num_threads(threads);
    std::vector<double> out(formats.size() * slabs(), -1.0);
    const bool ok = kernels().statistics(
        {weight.data(), fisher ? row_weight.data() : nullptr,
         fisher ? column_weight.data() : nullptr, fisher ? nullptr : gradient.data(),
         formats.data(), out.data(), rows, columns, dtype, gradient_dtype, int(formats.size())});
    if (!ok) out.clear();
    return out;
  }

  std::vector<double> slow(bool fisher) const {
    const std::vector<float> w = to_floats(weight, dtype), g = to_floats(gradient, gradient_dtype);
    std::vector<double> out(formats.size() * slabs());
    for (size_t f = 0; f < formats.size(); ++f) {
      const Bytes rounded = slow_fake_quantize(w, rows, columns, kFloat32, formats[f]);
      for (int64_t i = 0; i < rows * columns; ++i) {
        const int64_t n = i / columns, k = i % columns;
        const double error = double(w[i]) - double(get(rounded, kFloat32, i));
        out[f * slabs() + k / 32] +=
            fisher ? row_weight[n] * column_weight[k] * error * error : fabs(double(g[i]) * error);
      }
    }
    return out;
  }
};

Statistics random_statistics(Random& random, int64_t rows, int64_t columns) {
  Statistics s;
  s.rows = rows;
  s.columns = columns;
  s.dtype = random.below(3);
  s.gradient_dtype = random.below(3);
  s.weight = Bytes(rows * columns * dtype_size(s.dtype), 1);
  s.gradient = Bytes(rows * columns * dtype_size(s.gradient_dtype), 1);
  for (int64_t n = 0; n < rows; ++n) {
    const int power = random.between(s.dtype == kFloat16 ? -6 : -30, 2);
    for (int64_t k = 0; k < columns; ++k) {
      const float w = random.below(2000) ? random.normal() : random.below(2) ? NAN : INFINITY;
      set(s.weight, s.dtype, n * columns + k, ldexpf(w, power));
      set(s.gradient, s.gradient_dtype, n * columns + k, random.normal());
    }
    s.row_weight.push_back(random.unit());
  }
  for (int64_t k = 0; k < columns; ++k) s.column_weight.push_back(random.unit());
  const std::vector<int> formats = formats_of_weights();
  for (int i = random.between(3, 6); i > 0; --i) s.formats.push_back(random.choice(formats));
  return s;
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

void check_statistics(Random& random) {
  const std::vector<std::pair<int, int>> shapes = {{1, 1},    {3, 33},    {16, 128}, {65, 172},
                                                   {64, 160}, {130, 320}, {20, 2100}};
  for (const auto& [rows, columns] : shapes) {
    if (few && rows * columns < 5000) continue;
    const Statistics s = random_statistics(random, rows, columns);
    for (const bool fisher : {true, false}) {
      const std::vector<double> expected = s.slow(fisher);
      for (const char* name : isa_names()) {
        set_isa(isa = name);
        const std::vector<double> got = s.run(fisher, 1);
        double worst = got.size() == expected.size() ? 0 : 1;
        for (size_t i = 0; i < got.size(); ++i) {
          if (isnan(expected[i])) check(isnan(got[i]), "statistics of NaN at %d", int(i));
          const double off = fabs(got[i] - expected[i]) / std::max(expected[i], DBL_MIN);
          if (!isnan(expected[i]) && !(off <= worst)) worst = off;
        }
        // 16 roundings to float32, as csrc/cpu/ops/statistics.cpp says: 2^-20.
        check(worst <= 1e-6, "statistics [%d, %d] %s fisher %d: off by %g", rows, columns,
              dtype_name(s.dtype), fisher, worst);
        for (int threads = 2; threads <= 3; ++threads)
          check(same_bits(s.run(fisher, threads), got), "statistics depend on threads: [%d, %d]",
                rows, columns);
      }
    }
  }
}

std::vector<double> run_square_sums(const Statistics& s, int threads) {
  omp_set_num_threads(threads);
  std::vector<double> out((1 + s.formats.size()) * s.columns, -1.0);
  const bool ok = kernels().square_sums({s.weight.data(), s.formats.data(), out.data(), s.rows,
                                         s.columns, s.dtype, int(s.formats.size())});
  if (!ok) out.clear();
  return out;
}

std::vector<double> slow_square_sums(const Statistics& s) {
  const std::vector<float> x = to_floats(s.weight, s.dtype);
  std::vector<double> out((1 + s.formats.size()) * s.columns);
  for (size_t f = 0; f <= s.formats.size(); ++f) {
    Bytes rounded(x.size() * 4, 1);
    rounded.fill(0);
    if (f > 0) rounded = slow_fake_quantize(x, s.rows, s.columns, kFloat32, s.formats[f - 1]);
    for (size_t i = 0; i < x.size(); ++i) {
      const float part = x[i] - get(rounded, kFloat32, i);
      out[f * s.columns + i % s.columns] += part * part;
    }
  }
  return out;
}

void check_square_sums(Random& random) {
  const std::vector<std::pair<int, int>> shapes = {{1, 1},   {3, 33},    {16, 128}, {65, 172},
                                                   {2, 900}, {20, 2100}, {3, 5000}};
  for (const auto& [rows, columns] : shapes) {
    const Statistics s = random_statistics(random, rows, columns);
    const std::vector<double> expected = slow_square_sums(s);
    for (const char* name : isa_names()) {
      set_isa(isa = name);
      for (int threads = 1; threads <= 3; ++threads) {
        const std::vector<double> got = run_square_sums(s, threads);
        size_t equal = 0;
        while (equal < got.size() && (got[equal] == expected[equal] || isnan(expected[equal])) &&
               isnan(got[equal]) == isnan(expected[equal]))
          ++equal;
        check(equal == expected.size(), "square_sums [%d, %d] %s, %d threads: %d of %d equal", rows,
              columns, dtype_name(s.dtype), threads, int(equal), int(expected.size()));
      }
    }
  }
}

// --- the rest -----------------------------------------------------------------------------------

void check_sum_words(Random& random) {
  for (const int size : {0, 1, 7, 8, 9, 63, 64, 1000, 100003}) {
    const Bytes data(size, 1);
    for (int i = 0; i < size; ++i) data.data()[i] = uint8_t(random.bits());
    uint64_t expected = 0;
    for (int i = 0; i + 8 <= size; i += 8) {
      uint64_t word;
      memcpy(&word, data.data() + i, 8);
      expected += word;
    }
    for (const char* name : isa_names()) {
      set_isa(isa = name);
      for (int threads = 1; threads <= 3; ++threads) {
        omp_set_num_threads(threads);
        check(kernels().sum_words(data.data(), size) == expected, "sum_words of %d bytes", size);
      }
    }
  }
}

void check_isas() {
  const std::vector<const char*> names = isa_names();
  check(!names.empty() && strcmp(names.back(), "scalar") == 0, "scalar is the last resort");
  check(strcmp(kernels().name, names[0]) == 0, "the best is in use at first");
  check(!set_isa("mmx"), "mmx is not one");
  for (const char* name : names) check(set_isa(name) && !strcmp(kernels().name, name), "%s", name);
}

void check_all(Random& random) {
  check_isas();
  check_sum_words(random);
  check_rounding_of_all_formats(random);
  done("rounding");
  check_dequantize_of_any_bytes(random);
  if (!few) {
    for (const char* name : isa_names()) {
      set_isa(isa = name);
      check_streaming(random);
    }
  }
  done("dequantize, streaming");
  check_statistics(random);
  check_square_sums(random);
}

}  // namespace
}  // namespace test
}  // namespace mixbits

int main(int argc, char** argv) {
  return mixbits::test::run_checks(argc, argv, mixbits::test::check_all);
}
