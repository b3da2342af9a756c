// mixbits._cpu: the native CPU operations under their Python names.
//
// Pointers and sizes only, no tensors: one build serves every version of torch. Arguments are
// checked by mixbits.ops; dtypes and formats are the numbers of csrc/formats.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <string.h>

#include <iterator>
#include <new>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "formats.h"

namespace py = pybind11;
using namespace mixbits;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Segments = std::vector<std::vector<PackedSegment>>;  // of several linears

void check_memory(bool ok) {
  if (!ok) throw std::bad_alloc();
}

void fake_quantize(uintptr_t x, uintptr_t out, int64_t rows, int64_t columns, int dtype,
                   int format) {
  check_memory(kernels().fake_quantize({pointer(x), pointer(out), rows, columns, dtype, format}));
}

void quantize_pack(uintptr_t weight, uintptr_t codes, uintptr_t scales, uintptr_t zero_points,
                   uintptr_t divisor, int64_t rows, int64_t columns, int dtype, int format) {
  check_memory(kernels().quantize_pack({pointer(weight), pointer<uint8_t>(codes),
                                        pointer<uint8_t>(scales), pointer<uint8_t>(zero_points),
                                        rows, columns, dtype, format, pointer<float>(divisor)}));
}

void dequantize(uintptr_t codes, uintptr_t scales, uintptr_t zero_points, uintptr_t divisor,
                uintptr_t out, int64_t rows, int64_t columns, int dtype, int format) {
  check_memory(kernels().dequantize({pointer<uint8_t>(codes), pointer<uint8_t>(scales),
                                     pointer<uint8_t>(zero_points), pointer(out), rows, columns,
                                     dtype, format, pointer(divisor)}));
}

void fisher_statistics(uintptr_t weight, uintptr_t row_weight, uintptr_t column_weight,
                       uintptr_t out, int64_t rows, int64_t columns, int dtype,
                       const std::vector<int>& formats) {
  check_memory(kernels().statistics({pointer(weight), pointer<double>(row_weight),
                                     pointer<double>(column_weight), nullptr, formats.data(),
                                     pointer<double>(out), rows, columns, dtype, kBFloat16,
                                     int(formats.size())}));
}

void gradient_statistics(uintptr_t weight, uintptr_t gradient, uintptr_t out, int64_t rows,
                         int64_t columns, int dtype, int gradient_dtype,
                         const std::vector<int>& formats) {
  check_memory(kernels().statistics({pointer(weight), nullptr, nullptr, pointer(gradient),
                                     formats.data(), pointer<double>(out), rows, columns, dtype,
                                     gradient_dtype, int(formats.size())}));
}

void square_sums(uintptr_t x, uintptr_t out, int64_t rows, int64_t columns, int dtype,
                 const std::vector<int>& formats) {
  check_memory(kernels().square_sums({pointer(x), formats.data(), pointer<double>(out), rows,
                                      columns, dtype, int(formats.size())}));
}

void compensate_group(uintptr_t group, uintptr_t factor, uintptr_t importance, uintptr_t codes,
                      uintptr_t scales, uintptr_t zero_points, uintptr_t errors, int64_t rows,
                      int64_t stride, int64_t factor_stride, int columns, int format, float divisor,
                      uintptr_t known) {
  check_memory(kernels().compensate_group({pointer<float>(group), pointer<float>(factor),
                                           pointer<float>(importance), pointer<uint8_t>(codes),
                                           pointer<uint8_t>(scales), pointer<uint8_t>(zero_points),
                                           pointer<float>(errors), rows, stride, factor_stride,
                                           columns, format, divisor, pointer<float>(known)}));
}

template <class Index>
bool lies_within(const char* order, int64_t columns) {
  Index most = 0;
  for (int64_t i = 0; i < columns; ++i) {
    Index column;
    memcpy(&column, order + i * sizeof(Index), sizeof(Index));
    most = column > most ? column : most;
  }
  return int64_t(most) < columns;
}

// An order is a tensor that anybody may write to, and what it holds are addresses.
void check_order(const Linear& l) {
  int64_t columns = 0;
  for (int i = 0; i < l.segment_count; ++i) columns += l.segments[i].columns;
  const char* order = static_cast<const char*>(l.order);
  const bool ok = l.order_bytes == 1   ? lies_within<uint8_t>(order, columns)
                  : l.order_bytes == 2 ? lies_within<uint16_t>(order, columns)
                  : l.order_bytes == 4 ? lies_within<uint32_t>(order, columns)
                                       : false;
  if (!ok)
    throw py::value_error("an order must hold each of " + std::to_string(columns) +
                          " columns once: one is beyond them");
}

// Reads linears from numbers: order (0 without), bytes of its entries, whether rotated, rows and
// segments, then the members of every PackedSegment in order.
class LinearReader {
 public:
  explicit LinearReader(const std::vector<uintptr_t>& numbers) : numbers_(numbers) {}
  bool done() const { return at_ == numbers_.size(); }
  uintptr_t next() { return numbers_.at(at_++); }

  // Its segments lie in a list of their own, which must outlive it.
  Linear linear() {
    Linear l = {nullptr, 0, pointer(next()), int(next()), next() != 0, int64_t(next())};
    l.segment_count = int(next());
    if (l.segment_count < 1 || l.segment_count > kMaxSegments)
      throw py::value_error("a linear must have 1 to " + std::to_string(kMaxSegments) +
                            " segments: got " + std::to_string(l.segment_count));
    segments_.emplace_back();
    for (int i = 0; i < l.segment_count; ++i) {
      PackedSegment s;
      s.codes = pointer<uint8_t>(next());
      s.scales = pointer<uint8_t>(next());
      s.zero_points = pointer<uint8_t>(next());
      s.columns = int64_t(next());
      s.format = int(next());
      s.activation = int(next());
      s.divisor = pointer(next());
      segments_.back().push_back(s);
    }
    l.segments = segments_.back().data();
    if (l.order) check_order(l);
    return l;
  }

  Segments take_segments() { return std::move(segments_); }

 private:
  const std::vector<uintptr_t>& numbers_;
  size_t at_ = 0;
  Segments segments_;
};

// `targets` are numbers, for each the address of its result and what LinearReader reads.
void packed_matmul(uintptr_t x, int64_t tokens, int64_t columns, int dtype, bool int8_activations,
                   const std::vector<uintptr_t>& targets) {
  LinearReader reader(targets);
  std::vector<MatmulTarget> list;
  while (!reader.done()) {
    void* out = pointer(reader.next());
    list.push_back({reader.linear(), out});
  }
  check_memory(kernels().packed_matmul(
      {pointer(x), list.data(), tokens, columns, dtype, int(list.size()), int8_activations}));
}

// A model for token_step, which keeps addresses: what they point at must outlive it.
class BoundModel {
 public:
  BoundModel(const std::vector<std::vector<uintptr_t>>& norms,
             const std::vector<std::vector<std::vector<uintptr_t>>>& linears, uintptr_t norm,
             const std::vector<uintptr_t>& head, const std::vector<int64_t>& sizes, float eps,
             float scaling, int dtype) {
    for (size_t i = 0; i < norms.size(); ++i) {
      const auto& n = norms.at(i);
      const auto& l = linears.at(i);
      layers_.push_back({pointer(n.at(0)), pointer(n.at(1)), pointer(n.at(2)), pointer(n.at(3)),
                         make_linear(l.at(0)), make_linear(l.at(1)), make_linear(l.at(2)),
                         make_linear(l.at(3)), make_linear(l.at(4)), make_linear(l.at(5)),
                         make_linear(l.at(6))});
    }
    model_ = {layers_.data(), pointer(norm),      make_linear(head), sizes.at(0), sizes.at(1),
              sizes.at(2),    sizes.at(3),        sizes.at(4),       eps,         scaling,
              dtype,          int(layers_.size())};
  }
  BoundModel(const BoundModel&) = delete;

  double step(uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t logits, int64_t length,
              const std::vector<uintptr_t>& caches) const {
    constexpr size_t members = 3;
    if (caches.size() != layers_.size() * members)
      throw py::value_error("caches must be three numbers for each layer");
    std::vector<StepCache> list;
    for (size_t i = 0; i < caches.size(); i += members)
      list.push_back({pointer(caches[i]), pointer(caches[i + 1]), int64_t(caches[i + 2])});
    for (const Linear& linear : ordered_) check_order(linear);
    double multiplying = 0;
    check_memory(kernels().token_step({&model_, list.data(), pointer(x), pointer(cos), pointer(sin),
                                       pointer(logits), length, &multiplying}));
    return multiplying;
  }

 private:
  // A linear as Python passes it: its bias, whether activations may become 8-bit integers, and what
  // LinearReader reads.
  StepLinear make_linear(const std::vector<uintptr_t>& numbers) {
    LinearReader reader(numbers);
    const void* bias = pointer(reader.next());
    const bool int8_activations = reader.next() != 0;
    const StepLinear linear = {reader.linear(), bias, int8_activations};
    for (auto& segments : reader.take_segments()) segments_.push_back(std::move(segments));
    if (linear.linear.order) ordered_.push_back(linear.linear);
    return linear;
  }

  Segments segments_;  // to which the linears of layers_ and model_ point
  std::vector<Linear> ordered_;
  std::vector<StepLayer> layers_;
  StepModel model_;
};

uint64_t sum_words(uintptr_t data, int64_t bytes) {
  return kernels().sum_words(pointer(data), bytes);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; const char* name = isa_name(i); ++i) names.push_back(name);
  return names;
}

void force_isa(const std::string& name) {
  if (set_isa(name.c_str())) return;
  std::string known;
  for (const std::string& isa : available_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw py::value_error("instruction set must be one of " + known + ": got " + name);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU operations of mixbits on raw pointers; use mixbits.ops instead.";
  m.attr("MAX_SEGMENTS") = kMaxSegments;
  m.attr("SHARES") = std::vector<float>(std::begin(kShares), std::end(kShares));
  m.attr("NV_SHARES") = std::vector<float>(std::begin(kNVShares), std::end(kNVShares));
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("fake_quantize", &fake_quantize, release(), "x [rows, columns] -> out, same dtype");
  m.def("quantize_pack", &quantize_pack, release(),
        "weight [rows, columns] -> codes, scales, zero_points, divisor (0 where there are none)");
  m.def("dequantize", &dequantize, release(),
        "codes, scales, zero_points, divisor (0 where there are none) -> out [rows, columns] of "
        "dtype");
  m.def("fisher_statistics", &fisher_statistics, release(),
        "weight, row_weight, column_weight -> out float64 [formats, ceil(columns / 32)]");
  m.def("gradient_statistics", &gradient_statistics, release(),
        "weight, gradient -> out float64 [formats, ceil(columns / 32)]");
  m.def("square_sums", &square_sums, release(),
        "x [rows, columns] -> out float64 [1 + formats, columns]");
  m.def("compensate_group", &compensate_group, release(),
        "group [rows, columns] of some stride, factor, importance, divisor, known scales of rows "
        "or 0 -> codes, scales (0 where they are known), zero_points (0 where there are none), "
        "errors");
  m.def("packed_matmul", &packed_matmul, release(),
        "x [tokens, columns], targets (out [tokens, rows]; order or 0, bytes of its entries, "
        "rotated, "
        "rows, segments; for each codes, scales, zero_points or 0, columns, format, activation's "
        "format or 0, divisor or 0; one after the other) -> every out");
  py::class_<BoundModel>(m, "StepModel", "a model of which token_step knows all addresses")
      .def(
          py::init<const std::vector<std::vector<uintptr_t>>&,
                   const std::vector<std::vector<std::vector<uintptr_t>>>&, uintptr_t,
                   const std::vector<uintptr_t>&, const std::vector<int64_t>&, float, float, int>(),
          "per layer: norms (input, attention, query or 0, key or 0), linears (query, key, value, "
          "output, gate, up, down; each its bias or 0, int8_activations, and as targets of "
          "packed_matmul, without out); the last norm; the head; sizes (hidden, "
          "intermediate, key heads, query heads per key head, head width); eps; scaling; dtype")
      .def("step", &BoundModel::step, release(),
           "x [hidden], cos, sin [head width], length, caches (keys, values, capacity of every "
           "layer) -> logits; the caches grow by one; returns the seconds spent in matmuls");
  m.def("sum_words", &sum_words, release(), "sum of the 64-bit words of `bytes` bytes at data");
  m.def("isa", [] { return kernels().name; }, "name of the instruction set in use");
  m.def("available_isas", &available_isas, "names that this CPU can run, best first");
  m.def("set_isa", &force_isa, "use this instruction set; ValueError names those there are");
}
