// The CPU kernels of every instruction set against their slow twins (slow.h).
//
//   kernels_test [--few] [SEED]     --few: only what has work for several threads, and less of it
//
// Tensors lie in memory of exact size, at odd addresses: meant to run under sanitizers.
#include <stdarg.h>

#include <array>

#include "slow.h"

namespace mixbits {
namespace test {
namespace {

int failures = 0, checks = 0;
bool few = false;
const char* isa = "";

__attribute__((format(printf, 2, 3))) void check(bool ok, const char* format, ...) {
  ++checks;
  if (ok || ++failures > 20) return;
  va_list arguments;
  va_start(arguments, format);
  printf("FAILED %s: ", isa);
  vprintf(format, arguments);
  printf("\n");
  va_end(arguments);
}

const char* dtype_name(int dtype) {
  static const char* const names[] = {"bfloat16", "float16", "float32"};
  return names[dtype];
}

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

float largest_number(int dtype) {
  return dtype == kFloat16 ? 65504.0f : dtype == kBFloat16 ? 0x1.fep127f : FLT_MAX;
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
  for (const int format : all_formats()) {
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
  for (const int format : all_formats()) {
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
  const std::vector<int> formats = all_formats();
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
        // 16 roundings to float32, as csrc/cpu/statistics.cpp says: 2^-20.
        check(worst <= 1e-6, "statistics [%d, %d] %s fisher %d: off by %g", rows, columns,
              dtype_name(s.dtype), fisher, worst);
        for (int threads = 2; threads <= 3; ++threads)
          check(same_bits(s.run(fisher, threads), got), "statistics depend on threads: [%d, %d]",
                rows, columns);
      }
    }
  }
}

// --- matmul -------------------------------------------------------------------------------------

void fill_weight(Random& random, const Weight& w) {
  const Format format = decode_format(w.format);
  const int element = format.element;
  for (int64_t i = 0; i < w.codes.size(); ++i) {
    int code = int(random.bits() & 0xff);  // spare bits at the ends of rows, too
    if (element == kE4M3 && (code & 0x7f) == 0x7f) code ^= 1;
    if (element == kE5M2 && (code & 0x7f) >= 0x7c) code ^= 0x40;
    w.codes.data()[i] = uint8_t(code);
  }
  for (int64_t i = 0; i < w.zero_points.size(); ++i)
    w.zero_points.data()[i] = uint8_t(random.bits());
  for (int64_t n = 0; n < w.rows; ++n) {
    for (int64_t g = 0; g < w.groups(); ++g) {
      // The largest weights are between 2^-12 and 1.
      uint16_t scale =
          float_to_half(float(random.unit() + 0.1) / float(1 << element_bits(element)));
      if (!is_mx(element) && format.symmetric && random.below(2)) scale |= 0x8000;
      if (is_mx(element))
        scale = uint16_t(127 - minifloat(element).max_exponent - random.below(12));
      memcpy(w.scale_at(n, g), &scale, scale_bytes(element));
    }
  }
}

void fill_tokens(Random& random, const Matmul& m) {
  for (int64_t t = 0; t < m.tokens; ++t) {
    int power = 0;
    for (int64_t k = 0; k < m.columns; ++k) {
      if (k % 32 == 0) power = random.below(8) ? random.between(-4, 4) : -200;  // blocks of zeros
      set(m.x, m.dtype, t * m.columns + k, power < -4 ? 0.0f : ldexpf(random.normal(), power));
    }
  }
}

struct Operand {
  int format;
  int64_t rows;
  int activation;
};

Matmul make_matmul(Random& random, int64_t tokens, int64_t columns, int dtype,
                   const std::vector<Operand>& operands) {
  Matmul m;
  m.tokens = tokens;
  m.columns = columns;
  m.dtype = dtype;
  m.int8_activations = random.below(3) == 0;
  m.x = Bytes(tokens * columns * dtype_size(dtype), random.below(2));
  fill_tokens(random, m);
  for (const Operand& operand : operands) {
    m.weights.emplace_back(operand.format, operand.rows, columns, random.below(2));
    m.activations.push_back(operand.activation);
    fill_weight(random, m.weights.back());
  }
  return m;
}

// What operand number `i` multiplies, in double, and what comes out.
struct Slow {
  std::vector<double> x, w;  // x is rounded to the activation's format
  const Matmul& matmul;
  const Weight& weight;
  bool integers;  // whether the kernel may take x for integers

  Slow(const Matmul& m, size_t i) : matmul(m), weight(m.weights[i]) {
    const int element = decode_format(weight.format).element;
    const std::vector<float> floats = to_floats(m.x, m.dtype);
    x.assign(floats.begin(), floats.end());
    if (m.activations[i]) {
      const Bytes rounded =
          slow_fake_quantize(floats, m.tokens, m.columns, m.dtype, m.activations[i]);
      for (size_t at = 0; at < x.size(); ++at) x[at] = double(get(rounded, m.dtype, int64_t(at)));
    }
    w = weight_values(weight);
    integers = !m.activations[i] && (element == kE2M1 || !is_mx(element));
  }

  struct Output {
    double exact = 0, magnitudes = 0, integer_bound = 0, largest = 0;  // of x
    float loop = 0;  // what a loop in float32 makes of it
  };

  Output output(int64_t t, int64_t n) const {
    const double *a = x.data() + t * matmul.columns, *b = w.data() + n * matmul.columns;
    Output out;
    for (int64_t first = 0; first < matmul.columns; first += 32) {
      double largest = 0, weights = 0;
      for (int64_t k = first; k < std::min(first + 32, matmul.columns); ++k) {
        out.exact += a[k] * b[k];
        out.magnitudes += fabs(a[k] * b[k]);
        out.loop += float(a[k]) * float(b[k]);
        largest = std::max(largest, fabs(a[k]));
        weights += fabs(b[k]);
      }
      out.integer_bound += largest * weights;
      out.largest = std::max(out.largest, largest);
    }
    // Half a step of the integers that stand for a block of 32 (csrc/cpu/activations.h): 2^-14 of
    // the power of two below its largest value (float32: 2^-22), or twice that just below the next
    // power; with int8_activations 1/127 of the largest.
    const double half = matmul.int8_activations    ? 1.0 / 254
                        : matmul.dtype == kFloat32 ? 0x1p-23
                                                   : 0x1p-15;
    out.integer_bound *= integers ? 1.01 * half : 0.0;
    return out;
  }

  // Twice the error of the loop, plus what that may be by luck: half a unit in the last place of
  // the dtype (eps / 2), and K roundings to float32 in 8 or more partial sums. Those are of either
  // sign: sqrt(K / 8), and with some margin sqrt(K) / 4 units, of partial sums that the sum of
  // magnitudes bounds. Below the smallest normal numbers units are absolute.
  double allowed(const Output& out) const {
    static const double eps[] = {0x1p-7, 0x1p-10, 0x1p-23}, unit[] = {0x1p-126, 0x1p-24, 0x1p-126};
    return 2 * fabs(double(round_to(matmul.dtype, out.loop)) - out.exact) +
           eps[matmul.dtype] * fabs(out.exact) + out.integer_bound +
           0x1p-24 * (2 + sqrt(double(matmul.columns)) / 4) * out.magnitudes + unit[matmul.dtype];
  }
};

void report(const Matmul& m, size_t i, const char* what, int64_t t, int64_t n, double got,
            double expected, double allowed) {
  const Format format = decode_format(m.weights[i].format);
  check(false,
        "%s: M %d K %d N %d %s, weight %s group %d zero points %d, activation %x, int8 %d, target "
        "%d of %d, at (%d, %d): got %.9g, expected %.9g, off by %.3g, allowed %.3g",
        what, int(m.tokens), int(m.columns), int(m.weights[i].rows), dtype_name(m.dtype),
        element_name(format.element), format.group_size, has_zero_points(m.weights[i].format),
        m.activations[i], m.int8_activations, int(i), int(m.weights.size()), int(t), int(n), got,
        expected, fabs(got - expected), allowed);
}

void check_values(const Matmul& m, size_t i, const Slow& slow, const Bytes& out) {
  ++checks;
  for (int64_t t = 0; t < m.tokens; ++t) {
    for (int64_t n = 0; n < m.weights[i].rows; ++n) {
      const Slow::Output expected = slow.output(t, n);
      const double got = get(out, m.dtype, t * m.weights[i].rows + n);
      const double allowed = slow.allowed(expected);
      if (fabs(got - expected.exact) <= allowed) continue;
      return report(m, i, "matmul", t, n, got, expected.exact, allowed);
    }
  }
}

// Results do not depend on threads, on other weights in the call, or on what memory held before.
std::vector<Bytes> check_invariance(const Matmul& m) {
  std::vector<Bytes> outs = m.run(1, 0);
  check(outs.size() == m.weights.size(), "no memory");
  for (int threads = 2; threads <= 3; ++threads) {
    const std::vector<Bytes> again = m.run(threads, 0xff);
    for (size_t i = 0; i < outs.size(); ++i) {
      if (!again[i].equals(outs[i])) report(m, i, "depends on threads", 0, 0, threads, 1, 0);
    }
  }
  for (size_t i = 0; i < outs.size() && outs.size() > 1; ++i) {
    if (!m.run(2, 0xff, i, i + 1)[0].equals(outs[i])) report(m, i, "company", 0, 0, 0, 0, 0);
  }
  return outs;
}

void check_matmul(const Matmul& m) {
  std::vector<Slow> slow;
  for (size_t i = 0; i < m.weights.size(); ++i) slow.emplace_back(m, i);
  for (const char* name : isa_names()) {
    set_isa(isa = name);
    const std::vector<Bytes> outs = check_invariance(m);
    for (size_t i = 0; i < outs.size(); ++i) check_values(m, i, slow[i], outs[i]);
  }
}

std::vector<int> weight_formats() {
  std::vector<int> formats = int_formats();
  for (int element = kE2M1; element <= kE5M2; ++element)
    formats.push_back(format_code(element, 32, true, kFloor));
  return formats;
}

// No activation half of the time; e2m1, for which there is code of its own, in a fourth.
int random_activation(Random& random) {
  if (random.below(2)) return 0;
  const std::vector<int> mx = mx_formats();
  if (random.below(2)) return mx[random.below(3)];
  return random.below(4) ? random.choice(mx) : random.choice(int_formats());
}

const std::vector<int> kTokens = {1, 2, 3, 4, 5, 6, 17, 118};
const std::vector<int> kColumns = {1, 31, 32, 96, 172, 192, 257, 1024, 4096, 4200};
const std::vector<int> kRows = {1, 15, 16, 17, 33, 100};

// Shapes up to this many products: a sanitizer takes some nanoseconds for each.
constexpr int64_t kProducts = 1 << 20;

// Every format with every dtype and number of tokens; columns, rows and activations as they come.
void check_matmul_of_all_formats(Random& random) {
  for (const int format : weight_formats()) {
    for (int i = 0; i < 3 * int(kTokens.size()); ++i) {
      const int tokens = kTokens[i / 3];
      int columns = 0, rows = 0;
      do {
        columns = random.choice(kColumns);
        rows = random.choice(kRows);
      } while (int64_t(tokens) * columns * rows > kProducts);
      const Operand operand = {format, rows, random_activation(random)};
      check_matmul(make_matmul(random, tokens, columns, i % 3, {operand}));
    }
  }
}

// Several weights of mixed formats.
void check_matmul_of_several(Random& random, int count) {
  for (int i = 0; i < count; ++i) {
    const int tokens = random.choice(kTokens), columns = random.choice(kColumns);
    std::vector<Operand> operands;
    int64_t left = few ? kProducts / 4 : kProducts;
    const int activation = random_activation(random);
    for (int target = random.between(2, 4); target > 0; --target) {
      const int rows = random.choice(kRows);
      if ((left -= int64_t(tokens) * columns * rows) < 0) break;
      const int format = random.choice(weight_formats());
      // Weights that share an activation share prepared tokens.
      operands.push_back({format, rows, random.below(2) ? activation : random_activation(random)});
    }
    if (!operands.empty())
      check_matmul(make_matmul(random, tokens, columns, random.below(3), operands));
  }
}

// More weights than one pass takes; more tokens than a chunk; more columns than a panel.
void check_matmul_of_many(Random& random) {
  std::vector<Operand> operands;
  for (int i = 0; i < 10; ++i)
    operands.push_back({weight_formats()[i * 2], 5 + i, i % 2 ? 0 : mx_formats()[0]});
  check_matmul(make_matmul(random, 3, 160, kBFloat16, operands));
  check_matmul(make_matmul(random, 7, 160, kFloat32, operands));
  for (const int tokens : {257, 258, 263}) {
    const std::vector<Operand> two = {{mx_formats()[0], 17, mx_formats()[0]},
                                      {int_formats()[7], 33, 0}};
    check_matmul(make_matmul(random, tokens, 65, random.below(3), two));
  }
  for (const int format : weight_formats()) {
    if (few) break;
    check_matmul(make_matmul(random, 6, 4224 + 45, random.below(3),
                             {{format, 34, random.below(2) ? mx_formats()[0] : 0}}));
  }
}

void check_empty(Random& random) {
  for (const auto& [tokens, rows, columns] :
       {std::array<int, 3>{0, 3, 64}, {3, 0, 64}, {6, 0, 64}}) {
    for (const int format : weight_formats())
      check_matmul(make_matmul(random, tokens, columns, random.below(3), {{format, rows, 0}}));
  }
}

// --- matmul of numbers at the ends of their ranges ----------------------------------------------

// A token's numbers are of one magnitude, as are those of real ones: bfloat16 dot products take
// subnormal numbers for zeros beside large ones (csrc/cpu/bfloat16.h).
void fill_extreme_tokens(Random& random, const Matmul& m) {
  for (int64_t t = 0; t < m.tokens; ++t) {
    static const int powers[] = {0, 0, 0, -20, 20, -126, -140, -70, 70, 110, 127};
    const int power = powers[random.below(m.dtype == kFloat16 ? 5 : 11)], kind = random.below(8);
    for (int64_t k = 0; k < m.columns; ++k)
      set(m.x, m.dtype, t * m.columns + k, kind == 7 ? 0.0f : ldexpf(random.normal() / 4, power));
    const int64_t at = t * m.columns + random.below(m.columns);
    if (kind == 0) set(m.x, m.dtype, at, NAN);
    if (kind == 1) set(m.x, m.dtype, at, INFINITY);
    if (kind == 2) set(m.x, m.dtype, at, -INFINITY);
  }
}

void fill_extreme_weight(Random& random, const Weight& w) {
  const int element = decode_format(w.format).element;
  static const uint16_t halves[] = {0x0000, 0x8000, 0x0001, 0x83ff, 0x0400, 0x7bff, 0xfbff, 0x7e00};
  static const uint8_t bytes[] = {0, 0, 1, 64, 127, 190, 253, kNanScale};
  for (int64_t n = 0; n < w.rows; ++n) {
    for (int64_t g = 0; g < w.groups() && n % 3 != 0; ++g) {
      const int i = random.below(n % 2 ? 7 : 8);  // in every second row no NaN
      const uint16_t scale = is_mx(element) ? bytes[i] : halves[i];
      memcpy(w.scale_at(n, g), &scale, scale_bytes(element));
    }
    // quantize_pack leaves zeros behind the last code of a row; others might decode to infinity.
    const int bits = element_bits(element), spare = int(-w.columns * bits & 7);
    w.codes.data()[(n + 1) * packed_bytes(w.columns, bits) - 1] &= uint8_t(0xff >> spare);
    if (bits == 8 && is_mx(element) && n % 4 == 0)
      w.codes.data()[n * w.columns + random.below(w.columns)] = 0x7f;  // NaN
  }
}

double largest_scale(const Weight& w, int64_t n) {
  const int element = decode_format(w.format).element;
  double largest = 0;
  for (int64_t g = 0; g < w.groups(); ++g) {
    uint16_t stored = 0;
    memcpy(&stored, w.scale_at(n, g), scale_bytes(element));
    const double scale = is_mx(element) ? scale_value(stored) : double(half_to_float(stored));
    largest = std::max(largest, fabs(scale));
  }
  return largest;
}

void check_extreme_values(const Matmul& m, size_t i, const Slow& slow, const Bytes& out) {
  ++checks;
  for (int64_t t = 0; t < m.tokens; ++t) {
    for (int64_t n = 0; n < m.weights[i].rows; ++n) {
      const Slow::Output expected = slow.output(t, n);
      const double got = get(out, m.dtype, t * m.weights[i].rows + n), exact = expected.exact;
      double allowed = 0;
      bool ok;
      if (!isfinite(exact)) {
        // Infinity times 0 is NaN, and so may be a sum in which infinities meet.
        ok = isnan(exact) ? isnan(got) : !isfinite(got);
      } else {
        // Weights, products of scales and partial sums may be beyond float32 where the sum is not.
        if (!isfinite(expected.loop) || largest_scale(m.weights[i], n) * expected.largest > 0x1p110)
          continue;
        if (fabs(exact) > 0.99 * largest_number(m.dtype)) continue;
        // What is lost below float32's smallest normal number, 2^-126, is a unit per product.
        allowed = slow.allowed(expected) + double(m.columns) * 0x1p-120;
        ok = fabs(got - exact) <= allowed;
      }
      if (!ok) return report(m, i, "extreme matmul", t, n, got, exact, allowed);
    }
  }
}

void check_extreme_matmul(Random& random, int count) {
  for (int i = 0; i < count; ++i) {
    const int tokens = random.choice(std::vector<int>{1, 3, 6, 17});
    const int columns = random.choice(std::vector<int>{1, 32, 96, 172});
    const Operand operand = {random.choice(weight_formats()), random.choice(kRows),
                             random_activation(random)};
    const Matmul m = make_matmul(random, tokens, columns, random.below(3), {operand});
    fill_extreme_tokens(random, m);
    fill_extreme_weight(random, m.weights[0]);
    const Slow slow(m, 0);
    for (const char* name : isa_names()) {
      set_isa(isa = name);
      const std::vector<Bytes> outs = check_invariance(m);
      if (!outs.empty()) check_extreme_values(m, 0, slow, outs[0]);
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

void check_all(uint64_t seed) {
  Random random(seed);
  const auto done = [](const char* name) {
    printf("%s: %d checks, %d failures\n", name, checks, failures);
    fflush(stdout);
  };
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
  done("statistics");
  if (!few) {
    check_matmul_of_all_formats(random);
    check_empty(random);
  }
  done("matmul of all formats");
  check_matmul_of_several(random, few ? 150 : 300);
  check_matmul_of_many(random);
  done("matmul of several");
  check_extreme_matmul(random, few ? 40 : 800);
  done("matmul of extreme numbers");
}

}  // namespace
}  // namespace test
}  // namespace mixbits

int main(int argc, char** argv) {
  uint64_t seed = 1;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--few") == 0) {
      mixbits::test::few = true;
    } else {
      seed = strtoull(argv[i], nullptr, 10);
    }
  }
  mixbits::test::check_all(seed);
  printf("seed %llu: %d checks, %d failures\n", static_cast<unsigned long long>(seed),
         mixbits::test::checks, mixbits::test::failures);
  return mixbits::test::failures ? 1 : 0;
}
