// The table of one instruction set's operations.
#include "kernels.h"
#include "ops.h"

#define MB_JOIN_(a, b) a##b
#define MB_JOIN(a, b) MB_JOIN_(a, b)
#define MB_TEXT_(a) #a
#define MB_TEXT(a) MB_TEXT_(a)

namespace mixbits {

// scalar_kernels, avx2_kernels or avx512vnni_kernels
const Kernels* MB_JOIN(MB_ISA, _kernels)() {
  static const Kernels table = {
      MB_TEXT(MB_ISA),    MB_ISA::fake_quantize, MB_ISA::quantize_pack,
      MB_ISA::dequantize, MB_ISA::statistics,    MB_ISA::packed_matmul,
  };
  return &table;
}

}  // namespace mixbits
