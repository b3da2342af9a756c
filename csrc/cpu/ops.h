// The operations of one instruction set, which its table (isa.cpp) lists, and what they share.
#pragma once

#include "kernels.h"

namespace mixbits {
namespace MB_ISA {

uint64_t sum_words(const void* data, int64_t bytes);
bool fake_quantize(const FakeQuantizeArgs& a);
bool quantize_pack(const PackArgs& a);
bool dequantize(const DequantizeArgs& a);
bool statistics(const StatisticsArgs& a);
bool square_sums(const SquareSumsArgs& a);
bool compensate_group(const CompensateArgs& a);
bool packed_matmul(const MatmulArgs& a);
bool token_step(const StepArgs& a);

// Below this many runs of 128 columns, waking the other threads costs more than they bring.
constexpr int64_t kSerialRuns = 64;

}  // namespace MB_ISA
}  // namespace mixbits
