// packed_matmul of every instruction set against its slow twin, in double.
//
//   matmul_test [--few] [SEED]     --few: only what has work for several threads, and less of it
//
// Tensors lie in memory of exact size, at odd addresses: meant to run under sanitizers.
#include <array>

#include "checks.h"

namespace mixbits {
namespace test {
namespace {

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
    // In every second token some values are so large that their blocks need further terms.
    for (int count = t % 2 ? random.below(4) : 0; count > 0; --count) {
      const float large = ldexpf(float(random.unit()) - 0.5f, random.between(10, 16));
      set(m.x, m.dtype, t * m.columns + random.below(int(m.columns)), large);
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

// What operand number `i` multiplies, in double, and what comes out: once for all instruction sets.
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
    integers = !m.activations[i] && meets_integers(element);
    for (int64_t t = 0; t < m.tokens; ++t) {
      for (int64_t n = 0; n < weight.rows; ++n) outputs.push_back(output(t, n));
    }
  }

  struct Output {
    double exact = 0, magnitudes = 0, integer_bound = 0, largest = 0;  // of x
    float loop = 0;  // what a loop in float32 makes of it
  };
  std::vector<Output> outputs;  // [tokens, rows]

  Output output(int64_t t, int64_t n) const {
    const double *a = x.data() + t * matmul.columns, *b = w.data() + n * matmul.columns;
    Output out;
    for (int64_t first = 0; first < matmul.columns; first += 32) {
      const int64_t last = std::min(first + 32, matmul.columns);
      double weights = 0;
      for (int64_t k = first; k < last; ++k) {
        out.exact += a[k] * b[k];
        out.magnitudes += fabs(a[k] * b[k]);
        out.loop += float(a[k]) * float(b[k]);
        out.largest = std::max(out.largest, fabs(a[k]));
        weights += fabs(b[k]);
      }
      if (integers)
        out.integer_bound +=
            weights * integer_error(a + first, last - first, matmul.dtype, matmul.int8_activations);
    }
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
      const Slow::Output& expected = slow.outputs[t * m.weights[i].rows + n];
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
  for (const int element : {kE2M1, kE4M3, kE5M2, kE2M3, kMXInt8})
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
// subnormal numbers for zeros beside large ones (csrc/cpu/matmul/bfloat16.h).
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
    const int bits = element_bits(element), upper = bits - lower_bits(bits);
    const int spare = int(-w.columns * (upper ? upper : bits) & 7);
    w.codes.data()[(n + 1) * packed_bytes(w.columns, bits) - 1] &= uint8_t(0xff >> spare);
    if (bits == 8 && is_float(element) && n % 4 == 0)
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
      const Slow::Output& expected = slow.outputs[t * m.weights[i].rows + n];
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

void check_all(Random& random) {
  if (!few) {
    check_matmul_of_all_formats(random);
    check_empty(random);
  }
  done("all formats");
  check_matmul_of_several(random, few ? 150 : 300);
  check_matmul_of_many(random);
  done("several");
  check_extreme_matmul(random, few ? 40 : 800);
}

}  // namespace
}  // namespace test
}  // namespace mixbits

int main(int argc, char** argv) {
  return mixbits::test::run_checks(argc, argv, mixbits::test::check_all);
}
