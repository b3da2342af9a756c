// packed_matmul of linears with several segments, in any order of columns and rotated, against
// their slow twin: with every instruction set, at odd addresses of memory of exact size.
//
//   mixed_test [--few] [SEED]     --few: only what has work for several threads, and less of it
#include "checks.h"

namespace mixbits {
namespace test {
namespace {

void check_linear(bool ok, const char* what, const Mixes& m, size_t i, double off = 0) {
  check(ok,
        "%s, M %d K %d dtype %d int8 %d, linear %d of %d, rows %d segments %d order %d rotated %d: "
        "%g times what is allowed",
        what, int(m.tokens), int(m.columns), m.dtype, m.int8_activations, int(i),
        int(m.linears.size()), int(m.linears[i].rows()), int(m.linears[i].weights.size()),
        m.linears[i].order_bytes, m.linears[i].rotated, off);
}

// Sums over all segments, for every token and row.
struct Slow {
  std::vector<double> exact, magnitudes, integer_bound;
  std::vector<float> loop;  // what a loop in float32 makes of it

  Slow(const Mixes& m, const Segments& s) {
    const size_t count = size_t(m.tokens * s.rows());
    exact = magnitudes = integer_bound = std::vector<double>(count);
    loop.resize(count);
    const std::vector<float> x = slow_arranged(s, to_floats(m.x, m.dtype));
    int64_t first = 0;
    for (size_t i = 0; i < s.weights.size(); first += s.weights[i++].columns)
      add(m, s, i, columns_of(x, m.columns, first, s.weights[i].columns));
  }

  void add(const Mixes& m, const Segments& s, size_t i, const std::vector<float>& x) {
    const Weight& weight = s.weights[i];
    const int64_t columns = weight.columns;
    const int dtype = s.rotated ? int(kFloat32) : m.dtype;
    std::vector<float> rounded = x;
    if (s.activations[i])
      rounded = to_floats(slow_fake_quantize(x, m.tokens, columns, dtype, s.activations[i]), dtype);
    const std::vector<double> w = weight_values(weight);
    const int element = decode_format(weight.format).element;
    const bool integers = !s.activations[i] && meets_integers(element);
    for (int64_t t = 0; t < m.tokens; ++t) {
      const std::vector<double> token(rounded.begin() + t * columns,
                                      rounded.begin() + (t + 1) * columns);
      std::vector<double> errors;  // of every block
      for (int64_t k = 0; integers && k < columns; k += 32)
        errors.push_back(integer_error(&token[k], std::min<int64_t>(32, columns - k), dtype,
                                       m.int8_activations));
      for (int64_t n = 0; n < weight.rows; ++n) {
        const int64_t at = t * weight.rows + n;
        for (int64_t k = 0; k < columns; ++k) {
          const double a = rounded[t * columns + k], b = w[n * columns + k];
          exact[at] += a * b;
          magnitudes[at] += fabs(a * b);
          loop[at] += float(a) * float(b);
          if (integers) integer_bound[at] += errors[k / 32] * fabs(b);
        }
      }
    }
  }

  // The rule of matmul_test.cpp, for one sum.
  double allowed(const Mixes& m, size_t at) const {
    static const double eps[] = {0x1p-7, 0x1p-10, 0x1p-23}, unit[] = {0x1p-126, 0x1p-24, 0x1p-126};
    return 2 * fabs(double(round_to(m.dtype, loop[at])) - exact[at]) +
           eps[m.dtype] * fabs(exact[at]) + integer_bound[at] +
           0x1p-24 * (2 + sqrt(double(m.columns)) / 4) * magnitudes[at] + unit[m.dtype];
  }
};

Mixes random_mixes(Random& random, int64_t tokens, int64_t columns, int64_t products) {
  static const std::vector<int> formats = all_formats();
  Mixes m;
  m.tokens = tokens;
  m.columns = columns;
  m.dtype = random.below(3);
  m.int8_activations = random.below(4) == 0;
  m.x = Bytes(tokens * columns * dtype_size(m.dtype), random.below(2));
  for (int64_t i = 0; i < tokens * columns; ++i) {
    const int power = random.below(100) ? int(i / 32 % 7) - 3 : random.between(4, 9);
    set(m.x, m.dtype, i, ldexpf(random.normal(), power));
  }
  for (int count = random.between(1, 4); count > 0; --count) {
    const int64_t rows = std::max<int64_t>(1, random.below(products / (tokens * columns) + 1));
    Segments s;
    for (int64_t left = columns; left > 0;) {
      const bool last = s.weights.size() + 1 == kMaxSegments || random.below(3) == 0;
      const int64_t width = last ? left : random.between(1, int(left));
      std::vector<float> values(rows * width);
      for (float& v : values) v = random.normal();
      s.weights.push_back(slow_pack(values, rows, width, random.choice(formats)));
      s.activations.push_back(random.below(2) ? random.choice(mx_formats()) : 0);
      left -= width;
    }
    arrange(&s, [&](int bound) { return random.below(bound); });
    m.linears.push_back(std::move(s));
  }
  return m;
}

void check_mixes(const Mixes& m) {
  std::vector<Slow> slow;
  for (const Segments& s : m.linears) slow.emplace_back(m, s);
  for (const char* name : isa_names()) {
    set_isa(isa = name);
    const std::vector<Bytes> outs = m.run(1, 0);
    check_linear(outs.size() == m.linears.size(), "no memory", m, 0);
    for (size_t i = 0; i < outs.size(); ++i) {
      double worst = 0;
      for (size_t at = 0; at < slow[i].exact.size(); ++at) {
        const double off = fabs(get(outs[i], m.dtype, int64_t(at)) - slow[i].exact[at]);
        const double ratio = off / slow[i].allowed(m, at);
        worst = ratio <= worst ? worst : ratio;  // also where it is NaN
      }
      check_linear(worst <= 1, "values", m, i, worst);
      check_linear(m.run(2, 0xff, i, i + 1)[0].equals(outs[i]), "company", m, i);
    }
    const std::vector<Bytes> again = m.run(3, 0xff);
    for (size_t i = 0; i < outs.size(); ++i)
      check_linear(again[i].equals(outs[i]), "depends on threads", m, i);
  }
}

void check_all(Random& random) {
  const std::vector<int> tokens = {1, 2, 4, 5, 17, 40}, columns = {1, 33, 64, 172, 257, 320, 1500};
  for (int i = 0; i < (few ? 40 : 150); ++i) {
    const int64_t m = random.choice(tokens), k = few ? 320 : random.choice(columns);
    check_mixes(random_mixes(random, m, k, few ? 80000 : 60000));
  }
  check_mixes(random_mixes(random, 515, 70, 1 << 17));  // more tokens than a chunk
}

}  // namespace
}  // namespace test
}  // namespace mixbits

int main(int argc, char** argv) {
  return mixbits::test::run_checks(argc, argv, mixbits::test::check_all);
}
