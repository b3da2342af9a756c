// token_step of every instruction set against the step in double (token_step.h), and against itself
// with other numbers of threads.
//
//   token_step_test [SEED]
#include "token_step.h"

namespace mixbits {
namespace test {
namespace {

int failures = 0, checks = 0;

void check(bool ok, const char* what, const char* isa, const TestModel& m, double error = 0) {
  ++checks;
  if (ok || ++failures > 20) return;
  printf("FAILED %s: %s, dtype %d, hidden %d, width %d, length %d: error %g\n", isa, what, m.dtype,
         int(m.n.hidden), int(m.n.width), int(m.n.length), error);
}

Bytes random_tensor(Random& random, int64_t count, int dtype, float scale, float offset = 0) {
  Bytes tensor(count * dtype_size(dtype), 1);
  for (int64_t i = 0; i < count; ++i) set(tensor, dtype, i, offset + scale * random.normal());
  return tensor;
}

// Makes up for a rotation, by which x grows as the root of 32: the weights are 8 times smaller.
void shrink(Segments* s) {
  for (const Weight& w : s->weights) {
    const bool mx = is_mx(decode_format(w.format).element);
    for (int64_t g = 0; g < w.rows * w.groups(); ++g) {
      if (mx) {
        w.scales.data()[g] = uint8_t(std::max(w.scales.data()[g] - 3, 0));
        continue;
      }
      uint16_t half;
      memcpy(&half, w.scales.data() + 2 * g, 2);
      half = float_to_half(half_to_float(half) / 8);
      memcpy(w.scales.data() + 2 * g, &half, 2);
    }
  }
}

// Weights of all formats in one to three segments, and some that were left alone. Activations stay
// as they are: rounding them may take another code where the step in double takes its neighbour.
TestLinear random_linear(Random& random, int64_t rows, int64_t columns, bool bias, int dtype) {
  static const std::vector<int> formats = all_formats();
  TestLinear linear;
  linear.rows = rows;
  linear.columns = columns;
  const float scale = 1.0f / sqrtf(float(columns));
  if (random.below(5) == 0) {
    linear.plain = random_tensor(random, rows * columns, dtype, scale);
  } else {
    for (int64_t left = columns; left > 0;) {
      const bool last = linear.packed.weights.size() == 2 || random.below(2);
      const int64_t width = last ? left : random.between(1, int(left));
      std::vector<float> values(rows * width);
      for (float& v : values) v = scale * random.normal();
      linear.packed.weights.push_back(slow_pack(values, rows, width, random.choice(formats)));
      linear.packed.activations.push_back(0);
      left -= width;
    }
    if (random.below(2)) arrange(&linear.packed, [&](int bound) { return random.below(bound); });
    if (linear.packed.rotated) shrink(&linear.packed);
  }
  if (bias) linear.bias = random_tensor(random, rows, dtype, 0.1f);
  return linear;
}

TestModel random_model(Random& random, int dtype) {
  const Sizes n = {random.choice(std::vector<int>{1, 31, 64, 172}),
                   random.choice(std::vector<int>{5, 48, 96, 300}),
                   random.between(1, 3),
                   random.between(1, 4),
                   random.choice(std::vector<int>{2, 16, 20, 64, 80}),
                   random.between(1, 40),
                   random.between(1, 2),
                   random.choice(std::vector<int>{0, 1, 15, 31, 32, 33, 100}),
                   random.below(3)};
  const bool head_norms = random.below(2), biases = random.below(2);
  return make_model(
      n, dtype, head_norms, biases,
      [&](int64_t count) { return random_tensor(random, count, dtype, 0.3f, 0.7f); },
      [&](int64_t count) { return random_tensor(random, count, dtype, 1.0f); },
      [&](int64_t rows, int64_t columns, bool bias) {
        return random_linear(random, rows, columns, bias, dtype);
      });
}

// Some twenty operations of a layer follow one another, each of which rounds once to the dtype (or
// in float32 sums in another order); errors are independent, and a factor of 2 is left for models
// that make more of them.
double allowed(const TestModel& m, const std::vector<double>& exact) {
  const double unit = m.dtype == kBFloat16 ? 0x1p-8 : m.dtype == kFloat16 ? 0x1p-11 : 0x1p-21;
  double largest = 0;
  for (const double v : exact) largest = std::max(largest, fabs(v));
  return 2 * sqrt(20.0 * double(m.n.layers)) * unit * std::max(largest, 1.0);
}

void check_model(Random& random, int dtype) {
  const TestModel m = random_model(random, dtype);
  const std::vector<double> exact = SlowStep(m).logits();
  for (const char* name : isa_names()) {
    set_isa(name);
    const Outcome one = m.run(1, 0xff);
    check(!one.caches.empty(), "memory ran out", name, m);
    double error = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      const double e = fabs(get(one.logits, dtype, int64_t(i)) - exact[i]);
      error = e <= error ? error : e;  // also where e is NaN
    }
    check(error <= allowed(m, exact), "logits", name, m, error);
    for (int threads = 2; threads <= 4; ++threads) {
      const Outcome more = m.run(threads, 0x5a);
      check(more.logits.equals(one.logits), "logits depend on threads", name, m);
      for (size_t i = 0; i < one.caches.size(); ++i)
        check(more.caches[i].equals(one.caches[i]), "the cache depends on threads", name, m);
    }
  }
}

}  // namespace
}  // namespace test
}  // namespace mixbits

int main(int argc, char** argv) {
  using namespace mixbits::test;
  const uint64_t seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1;
  Random random(seed);
  for (int i = 0; i < 60; ++i) check_model(random, i % 3);
  printf("seed %llu: %d checks, %d failures\n", static_cast<unsigned long long>(seed), checks,
         failures);
  return failures ? 1 : 0;
}
