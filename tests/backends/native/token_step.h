// Models for token_step in memory of exact size, and the step once more in double, without any
// rounding: tests/backends/native/token_step_test.cpp compares them, fuzz.cpp makes models of any
// bytes.
#pragma once

#include <memory>

#include "slow.h"

namespace mixbits {
namespace test {

struct Sizes {
  int64_t hidden, intermediate, key_heads, group, width, vocab, layers;
  int64_t length, spare;  // tokens in the cache; capacity beyond the one that is added
};

struct TestLinear {
  Segments packed;    // without weights where it is plain
  Bytes plain, bias;  // empty where there is none
  int64_t rows = 0, columns = 0;
  bool int8 = false;

  bool is_plain() const { return packed.weights.empty(); }
  // The result points into `list`.
  StepLinear get(std::vector<PackedSegment>* list) const {
    Linear linear;
    if (is_plain()) {
      list->push_back({plain.data(), nullptr, nullptr, columns, 0, 0});
      linear = {list->data(), 1, nullptr, 0, false, rows};
    } else {
      linear = packed.get(list);
    }
    return {linear, bias.size() ? bias.data() : nullptr, int8};
  }
};

struct TestLayer {
  Bytes input_norm, attention_norm, query_norm, key_norm;
  TestLinear query, key, value, output, gate, up, down;
  Bytes keys, values;  // [key_heads, capacity, width]

  // The result points into `lists`, of seven.
  StepLayer get(std::vector<PackedSegment>* lists) const {
    const auto or_null = [](const Bytes& b) { return b.size() ? b.data() : nullptr; };
    return {input_norm.data(),   attention_norm.data(), or_null(query_norm),  or_null(key_norm),
            query.get(lists),    key.get(lists + 1),    value.get(lists + 2), output.get(lists + 3),
            gate.get(lists + 4), up.get(lists + 5),     down.get(lists + 6)};
  }
};

// What a step writes.
struct Outcome {
  Bytes logits;
  std::vector<Bytes> caches;
};

struct TestModel {
  Sizes n;
  int dtype;
  std::vector<TestLayer> layers;
  TestLinear head;
  Bytes norm, x, cos, sin;

  int64_t capacity() const { return n.length + 1 + n.spare; }

  Outcome run(int threads, uint8_t pattern) const {
    omp_set_num_threads(threads);
    std::vector<StepLayer> list;
    std::vector<StepCache> caches;
    Outcome out;
    std::vector<std::vector<PackedSegment>> segments(layers.size() * 7 + 1);
    for (const TestLayer& layer : layers) {
      list.push_back(layer.get(segments.data() + list.size() * 7));
      for (const Bytes* from : {&layer.keys, &layer.values}) {
        out.caches.emplace_back(from->size(), pattern & 1);
        memcpy(out.caches.back().data(), from->data(), size_t(from->size()));
      }
    }
    for (size_t i = 0; i < out.caches.size(); i += 2)
      caches.push_back({out.caches[i].data(), out.caches[i + 1].data(), capacity()});
    const StepModel model = {list.data(),
                             norm.data(),
                             head.get(&segments.back()),
                             n.hidden,
                             n.intermediate,
                             n.key_heads,
                             n.group,
                             n.width,
                             1e-5f,
                             1.0f / sqrtf(float(n.width)),
                             dtype,
                             int(n.layers)};
    out.logits = Bytes(n.vocab * dtype_size(dtype), pattern & 1);
    out.logits.fill(pattern);
    double seconds = 0;
    if (!kernels().token_step({&model, caches.data(), x.data(), cos.data(), sin.data(),
                               out.logits.data(), n.length, &seconds}))
      out.caches.clear();
    return out;
  }
};

// A model of these sizes; the callbacks fill tensors and make the weights.
//   tensor(count) -> Bytes            cache(count) -> Bytes
//   linear(rows, columns, has_bias) -> TestLinear
template <class T, class C, class L>
TestModel make_model(const Sizes& n, int dtype, bool head_norms, bool biases, const T& tensor,
                     const C& cache, const L& linear) {
  TestModel m = {n, dtype, {}, {}, {}, {}, {}, {}};
  const int64_t keys = n.key_heads * n.width, queries = keys * n.group;
  for (int64_t i = 0; i < n.layers; ++i) {
    TestLayer l;
    l.input_norm = tensor(n.hidden);
    l.attention_norm = tensor(n.hidden);
    if (head_norms) l.query_norm = tensor(n.width);
    if (head_norms) l.key_norm = tensor(n.width);
    l.query = linear(queries, n.hidden, biases);
    l.key = linear(keys, n.hidden, biases);
    l.value = linear(keys, n.hidden, biases);
    l.output = linear(n.hidden, queries, biases);
    l.gate = linear(n.intermediate, n.hidden, biases);
    l.up = linear(n.intermediate, n.hidden, false);
    l.down = linear(n.hidden, n.intermediate, biases);
    l.keys = cache(keys * m.capacity());
    l.values = cache(keys * m.capacity());
    m.layers.push_back(std::move(l));
  }
  m.head = linear(n.vocab, n.hidden, false);
  m.norm = tensor(n.hidden);
  m.x = tensor(n.hidden);
  m.cos = tensor(n.width);
  m.sin = tensor(n.width);
  return m;
}

// --- the slow twin ------------------------------------------------------------------------------

class SlowStep {
  using Row = std::vector<double>;

 public:
  explicit SlowStep(const TestModel& model) : m_(model), n_(model.n) {}

  Row logits() const {
    Row h = row(m_.x);
    for (const TestLayer& layer : m_.layers) {
      add(&h, multiply(layer.output, attend(layer, normalize(h, layer.input_norm))));
      const Row x = normalize(h, layer.attention_norm), up = multiply(layer.up, x);
      Row gate = multiply(layer.gate, x);
      for (size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + exp(-gate[i]));
      add(&h, multiply(layer.down, gate));
    }
    return multiply(m_.head, normalize(h, m_.norm));
  }

 private:
  Row row(const Bytes& b) const {
    const std::vector<float> floats = to_floats(b, m_.dtype);
    return Row(floats.begin(), floats.end());
  }
  static void add(Row* x, const Row& y) {
    for (size_t i = 0; i < x->size(); ++i) (*x)[i] += y[i];
  }
  Row normalize(const Row& x, const Bytes& weight) const {
    const Row w = row(weight);
    double squares = 0;
    for (const double v : x) squares += v * v;
    Row out(x.size());
    for (size_t i = 0; i < x.size(); ++i)
      out[i] = x[i] / sqrt(squares / double(x.size()) + double(1e-5f)) * w[i];
    return out;
  }
  Row multiply(const TestLinear& linear, const Row& x) const {
    Row out(linear.rows);
    if (linear.is_plain()) {
      add_product(row(linear.plain), x.data(), int64_t(x.size()), &out);
    } else {
      const Segments& s = linear.packed;
      const Row arranged = arrange_row(s, x);
      const double* part = arranged.data();
      for (const Weight& w : s.weights) {
        add_product(weight_values(w), part, w.columns, &out);
        part += w.columns;
      }
    }
    if (linear.bias.size()) add(&out, row(linear.bias));
    return out;
  }
  static void add_product(const Row& w, const double* x, int64_t columns, Row* out) {
    for (size_t i = 0; i < out->size(); ++i) {
      for (int64_t k = 0; k < columns; ++k) (*out)[i] += w[int64_t(i) * columns + k] * x[k];
    }
  }
  // As slow_arranged, without rounding: the sign is that of the bits that two numbers share.
  static Row arrange_row(const Segments& s, const Row& x) {
    Row ordered(x.size()), out(x.size());
    for (size_t i = 0; i < x.size(); ++i) ordered[i] = x[size_t(s.column(int64_t(i)))];
    if (!s.rotated) return ordered;
    for (size_t i = 0; i < x.size(); ++i) {
      const size_t first = i / 32 * 32;
      if (first + 32 > x.size()) {
        out[i] = ordered[i];
        continue;
      }
      for (size_t k = 0; k < 32; ++k)
        out[i] += __builtin_parity(unsigned(k & i % 32)) ? -ordered[first + k] : ordered[first + k];
    }
    return out;
  }
  // Head number `head` of a row, normalized where the model does, and turned.
  Row turned(const Row& all, int64_t head, const Bytes& norm) const {
    const Row cos = row(m_.cos), sin = row(m_.sin);
    Row x(all.begin() + head * n_.width, all.begin() + (head + 1) * n_.width), out = x;
    if (norm.size()) x = normalize(x, norm);
    for (int64_t i = 0, half = n_.width / 2; i < n_.width; ++i)
      out[i] = x[i] * cos[i] + (i < half ? -x[i + half] : x[i - half]) * sin[i];
    return out;
  }
  Row attend(const TestLayer& l, const Row& x) const {
    const Row query = multiply(l.query, x), key = multiply(l.key, x), value = multiply(l.value, x);
    const Row keys = row(l.keys), values = row(l.values);
    Row out;
    for (int64_t head = 0; head < n_.key_heads * n_.group; ++head) {
      const int64_t owner = head / n_.group, place = owner * m_.capacity() * n_.width;
      const Row q = turned(query, head, l.query_norm), own = turned(key, owner, l.key_norm);
      Row scores(n_.length + 1), result(n_.width);
      double sum = 0, largest = -INFINITY;
      for (int64_t t = 0; t <= n_.length; ++t) {
        for (int64_t i = 0; i < n_.width; ++i)
          scores[t] += q[i] * (t < n_.length ? keys[place + t * n_.width + i] : own[i]);
        scores[t] /= sqrt(double(n_.width));
        largest = std::max(largest, scores[t]);
      }
      for (double& s : scores) sum += s = exp(s - largest);
      for (int64_t t = 0; t <= n_.length; ++t) {
        for (int64_t i = 0; i < n_.width; ++i)
          result[i] +=
              scores[t] / sum *
              (t < n_.length ? values[place + t * n_.width + i] : value[owner * n_.width + i]);
      }
      out.insert(out.end(), result.begin(), result.end());
    }
    return out;
  }

  const TestModel& m_;
  const Sizes& n_;
};

}  // namespace test
}  // namespace mixbits
