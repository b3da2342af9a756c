// fake_quantize: every element through its code and back, in the tensor's own dtype.
//
// Memory-bound: elements are read twice, the second time from L1, and written once. An output
// larger than the caches is written past them: it would be gone before anyone reads it, and
// stores to lines that are not there would read them first, half as much traffic again.
#include "cpu/codes/span.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace mixbits {
namespace MB_ISA {

constexpr int64_t kStreamBytes = 32 << 20;
constexpr int64_t kChunk = 32 * kBatch;  // columns of one item of work

// At most kChunk columns of one row, beginning at a group.
template <int ELEMENT, int DTYPE, bool STREAM>
static void fake_columns(const char* x, char* out, int64_t count, const Format format) {
  constexpr int size = dtype_bytes(DTYPE);
  const int group = columns_of_group<ELEMENT>(format), groups = int(count / group);
  if (groups > 0) fake_groups<ELEMENT, DTYPE, STREAM>(x, out, groups, format);
  const int64_t done = int64_t(groups) * group;
  if (done < count) {
    alignas(64) char rest[kRun * size] = {}, rounded[kRun * size];
    memcpy(rest, x + done * size, (count - done) * size);
    fake_groups<ELEMENT, DTYPE, false>(rest, rounded, 1, format);
    memcpy(out + done * size, rounded, (count - done) * size);
  }
}

template <int ELEMENT, int DTYPE, bool STREAM>
static void fake_rows(const FakeQuantizeArgs& a, const Format format) {
  constexpr int size = dtype_bytes(DTYPE);
  const char* x = static_cast<const char*>(a.x);
  char* out = static_cast<char*>(a.out);
  const int64_t chunks = group_count(a.columns, kChunk), work = a.rows * chunks;
  const bool serial = a.rows * group_count(a.columns, kRun) <= kSerialRuns;
#pragma omp parallel if (!serial)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < work; ++item) {
      const int64_t first = item % chunks * kChunk;
      const int64_t at = (item / chunks * a.columns + first) * size;
      fake_columns<ELEMENT, DTYPE, STREAM>(x + at, out + at, min64(a.columns - first, kChunk),
                                           format);
    }
#if defined(__AVX2__)
    if (STREAM) _mm_sfence();
#endif
  }
}

template <int ELEMENT>
static void fake_row(const FakeQuantizeArgs& a, int64_t row, float span) {
  const int64_t at = row * a.columns * dtype_bytes(a.dtype);
  const char* x = static_cast<const char*>(a.x) + at;
  char* out = static_cast<char*>(a.out) + at;
  for (int64_t first = 0; first < a.columns; first += kRun) {
    alignas(64) float values[kRun];
    load_run(x, first, a.columns, a.dtype, values);
    fake_span_run<ELEMENT>(values, span, values);
    store_row(values, min64(a.columns - first, kRun), a.dtype, out + first * dtype_bytes(a.dtype));
  }
}

static bool fake_spans(const FakeQuantizeArgs& a, int element) {
  const Scratch spans(a.rows * sizeof(float));
  if (!spans.data) return false;
  find_spans(a.x, a.rows, a.columns, a.dtype, &a.format, 1, spans.floats());
  const bool serial = a.rows == 1 || a.rows * group_count(a.columns, kRun) <= kSerialRuns;
#pragma omp parallel for schedule(static) if (!serial)
  for (int64_t row = 0; row < a.rows; ++row) {
    with_element(element, [&](auto tag) {
      constexpr int e = decltype(tag)::value;
      if constexpr (has_span(e)) fake_row<e>(a, row, spans.floats()[row]);
    });
  }
  return true;
}

bool fake_quantize(const FakeQuantizeArgs& args) {
  FakeQuantizeArgs a = args;
  const Format format = decode_format(a.format);
  if (has_span(format.element)) return fake_spans(a, format.element);
  if (a.columns % format.group_size == 0) {  // groups ignore rows, and so may we
    a.columns *= a.rows;
    a.rows = 1;
  }
  const bool aligned = a.rows == 1 && reinterpret_cast<uintptr_t>(a.out) % 64 == 0;
  const bool stream = aligned && a.rows * a.columns * dtype_bytes(a.dtype) >= kStreamBytes;
  with_element(format.element, [&](auto element) {
    with_dtype(a.dtype, [&](auto dtype) {
      constexpr int e = decltype(element)::value, d = decltype(dtype)::value;
      if constexpr (has_span(e)) return;
      stream ? fake_rows<e, d, true>(a, format) : fake_rows<e, d, false>(a, format);
    });
  });
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
