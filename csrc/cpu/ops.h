// The operations of one instruction set, which its table (isa.cpp) lists, and what they share.
#pragma once

#include "kernels.h"

namespace mixbits {
namespace MB_ISA {

bool fake_quantize(const FakeQuantizeArgs& a);
bool quantize_pack(const PackArgs& a);
bool dequantize(const DequantizeArgs& a);
bool statistics(const StatisticsArgs& a);
bool packed_matmul(const MatmulArgs& a);
#ifdef __AVX512VNNI__
// MXFP4 weights with MXFP4 activations. Leaves *done false when some token's rounded values are
// beyond its dtype, which the float32 code handles.
bool mxfp4_matmul(const MatmulArgs& a, bool serial, bool* done);
#endif

// Below this many runs of 128 columns, waking the other threads costs more than they bring.
constexpr int64_t kSerialRuns = 64;

}  // namespace MB_ISA
}  // namespace mixbits
