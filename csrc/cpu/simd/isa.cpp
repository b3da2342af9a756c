// The table of one instruction set's operations.
#include <string.h>

#include "cpu/kernels.h"
#include "cpu/ops.h"

#define MB_JOIN_(a, b) a##b
#define MB_JOIN(a, b) MB_JOIN_(a, b)
#define MB_TEXT_(a) #a
#define MB_TEXT(a) MB_TEXT_(a)

namespace mixbits {

namespace MB_ISA {

uint64_t sum_words(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  const int64_t words = bytes / 8;
  uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word;
    memcpy(&word, p + i * 8, 8);
    sum += word;
  }
  return sum;
}

}  // namespace MB_ISA

// scalar_kernels, avx2_kernels and so on
const Kernels* MB_JOIN(MB_ISA, _kernels)() {
  static const Kernels table = {
      MB_TEXT(MB_ISA),       MB_ISA::sum_words,  MB_ISA::fake_quantize, MB_ISA::quantize_pack,
      MB_ISA::dequantize,    MB_ISA::statistics, MB_ISA::square_sums,   MB_ISA::compensate_group,
      MB_ISA::packed_matmul, MB_ISA::token_step};
  return &table;
}

}  // namespace mixbits
