// Building blocks of every kernel: dtypes, the columns of a lane, and dispatch.
//
// A warp works on a run of 128 columns of a row, 4 adjacent columns per lane. Groups of 32, 64
// and 128 columns are then 8, 16 and 32 adjacent lanes, and a slab of 32 columns is 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/ops.cuh"
#include "cuda/ptx.cuh"
#include "layout.h"

namespace mixbits {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLaneColumns = 4;
constexpr int kRun = 32 * kLaneColumns;
constexpr unsigned kAllLanes = 0xffffffffu;

// --- dtypes ---------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N values that move in one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

// Columns `column` to `column + N - 1` of a row; zeros beyond its end. `aligned` promises that
// every row begins at a multiple of N values and ends at one.
template <int N, class T>
__device__ inline void load_columns(const T* row, int64_t column, int64_t columns, bool aligned,
                                    float (&x)[N]) {
  if (aligned && column < columns) {
    constexpr int kWide = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
    for (int i = 0; i < N; i += kWide) {
      const auto part = *reinterpret_cast<const Vector<T, kWide>*>(row + column + i);
#pragma unroll
      for (int j = 0; j < kWide; ++j) x[i + j] = to_float(part.values[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = column + i < columns ? to_float(row[column + i]) : 0.0f;
  }
}

template <int N, class T>
__device__ inline void store_columns(T* row, int64_t column, int64_t columns, bool aligned,
                                     const float (&x)[N]) {
  if (aligned && column < columns) {
    constexpr int kWide = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
    for (int i = 0; i < N; i += kWide) {
      T values[kWide];
#pragma unroll
      for (int j = 0; j < kWide; ++j) values[j] = from_float<T>(x[i + j]);
      uint32_t words[sizeof(values) / 4];
      memcpy(words, values, sizeof(values));
      ptx::store(row + column + i, words);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column + i < columns) row[column + i] = from_float<T>(x[i]);
    }
  }
}

// Whether rows of `row_bytes` bytes that begin at `pointer` all begin at a multiple of `bytes`.
inline bool rows_aligned(const void* pointer, int64_t row_bytes, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && row_bytes % bytes == 0;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for `warps` warps of work; kernels stride over what a grid this large does not cover.
inline unsigned grid_for(int64_t warps) {
  const int64_t blocks = divide_up(warps, kWarps);
  return unsigned(blocks < (1 << 20) ? blocks : 1 << 20);
}

// --- dispatch -------------------------------------------------------------------------------

template <class T>
struct TypeTag {
  using type = T;
};

// Calls function(TypeTag<T>) for the dtype numbered `dtype`.
template <class Function>
void dispatch_dtype(int dtype, Function function) {
  if (dtype == kBFloat16) function(TypeTag<__nv_bfloat16>());
  if (dtype == kFloat16) function(TypeTag<__half>());
  if (dtype == kFloat32) function(TypeTag<float>());
}

// The same for the types of the matrix units; does nothing for float.
template <class Function>
void dispatch_half(int dtype, Function function) {
  if (dtype == kBFloat16) function(TypeTag<__nv_bfloat16>());
  if (dtype == kFloat16) function(TypeTag<__half>());
}

template <int... kElements>
struct Elements {};
// What every operation has code for; what the kernels for few tokens multiply when it is the only
// segment; what is dequantized.
using First = Elements<kE2M1, kE4M3, kE5M2, kInt2, kInt4, kInt8>;
using Multiplied = Elements<kE2M1, kE4M3, kE5M2, kInt2, kInt4, kInt8, kNVE2M1>;
using Decoded = Elements<kE2M1, kE4M3, kE5M2, kInt2, kInt4, kInt8, kNVE2M1, kE2M3, kMXInt8, kInt3,
                         kInt5, kInt6, kRowE4M3, kRowInt8>;
// What activations are rounded to on their way into a product.
using Activations = Elements<kE2M1, kE4M3, kE5M2>;

template <int... kElements>
MB_HD constexpr bool has(Elements<kElements...>, int element) {
  return ((element == kElements) || ...);
}
constexpr const char* kNoCode = "no code for this format";

// Calls function(std::integral_constant<int, element>) for one of `elements`; in a kernel, as jumps
// to code for each. Does nothing for others: who launches a kernel asks `has` before.
#pragma nv_exec_check_disable
template <int... kElements, class Function>
MB_HD void dispatch_element(Elements<kElements...>, int element, Function function) {
  ((element == kElements ? function(std::integral_constant<int, kElements>()) : void()), ...);
}

// The result of the launch just made, for the functions of ops.cuh.
inline const char* launch_result() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace mixbits
