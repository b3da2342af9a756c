// fake_quantize: every element through its code and back, in the tensor's own dtype.
//
// Memory-bound: a run of 128 columns is loaded to float32, rounded, and stored while it is in L1.
#include "group.h"
#include "kernels.h"
#include "ops.h"

namespace mixbits {
namespace MB_ISA {

bool fake_quantize(const FakeQuantizeArgs& a) {
  const Format format = decode_format(a.format);
  const int64_t runs = group_count(a.columns, kRun), work = a.rows * runs;
  const int size = dtype_bytes(a.dtype);
#pragma omp parallel for schedule(static) if (work > kSerialRuns)
  for (int64_t item = 0; item < work; ++item) {
    const int64_t first = item % runs * kRun;
    const int count = int(min64(a.columns - first, kRun));
    const int64_t at = (item / runs * a.columns + first) * size;
    alignas(64) float x[kRun], q[kRun];
    if (count < kRun) memset(x, 0, sizeof(x));
    load_row(static_cast<const char*>(a.x) + at, count, a.dtype, x);
    fake_run(x, q, int(round_up(count, format.group_size)), format);
    store_row(q, count, a.dtype, static_cast<char*>(a.out) + at);
  }
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
