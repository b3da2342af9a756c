// CUDA on a CPU, as far as csrc/cuda needs it: the lanes of a block (of a cluster, where there is
// one) are coroutines on one thread, shuffles and barriers switch between them, and a lane that
// others wait for in vain is reported as a deadlock. tests/backends/test_cuda_build.py compiles the
// kernels' own source with this in place of the CUDA headers.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "formats.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
using std::max;
using std::min;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
typedef void* cudaStream_t;
typedef int cudaError_t;
enum { cudaSuccess = 0 };
struct cudaFuncAttributes {};
template <class F>
int cudaFuncGetAttributes(cudaFuncAttributes*, F) {
  return 0;
}
inline int cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(int) { return ""; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated kernel: %s\n", what);
  abort();
}

struct Barrier {
  int waiting = 0, passed = 0;
};

constexpr size_t kSharedBytes = 227 << 10;  // of a block of sm_90
constexpr size_t kStackBytes = 64 << 10;

struct Block {
  dim3 index;
  int running;  // threads
  std::unique_ptr<char[]> memory{new char[kSharedBytes + 1024]};
  Barrier all, named, warps[32];
  char* shared() { return memory.get() + (1024 - uintptr_t(memory.get()) % 1024) % 1024; }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  int index, block;
  bool done;
  uint64_t slot;
};

inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<Thread>> threads;  // of all blocks of a cluster, block by block
inline std::vector<std::unique_ptr<Block>> blocks;
inline Barrier cluster;
inline int running, cluster_size;
inline long progress;
inline std::function<void()> body;

inline Thread& me() { return *threads[running]; }
inline Block& my_block() { return *blocks[me().block]; }
template <class T>
T* shared() {
  return reinterpret_cast<T*>(my_block().shared());
}
// The lane of this warp whose number is `lane`.
inline Thread& lane(int lane) { return *threads[running / 32 * 32 + lane]; }

inline void yield() { swapcontext(&me().context, &scheduler); }
inline void wait(Barrier& barrier, int count) {
  const int pass = barrier.passed;
  ++progress;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.passed;
  }
  while (barrier.passed == pass) yield();
}
inline void wait_warp() { wait(my_block().warps[me().index / 32], 32); }
inline void thread_main() {
  body();
  me().done = true;
  --my_block().running;
  ++progress;
  yield();
}

// A turn for each thread of a block; whether there are any left.
inline bool run_block(int block) {
  const int count = int(threads.size() / blocks.size());
  bool left = false;
  for (running = block * count; running < (block + 1) * count; ++running) {
    if (me().done) continue;
    left = true, threadIdx = dim3(me().index), blockIdx = my_block().index;
    swapcontext(&scheduler, &me().context);
  }
  return left;
}

inline void run_cluster() {
  cluster = Barrier();
  for (auto& block : blocks) {
    memset(block->memory.get(), 0xcd, kSharedBytes + 1024);
    block->all = block->named = Barrier();
    block->running = int(threads.size() / blocks.size());
    for (auto& warp : block->warps) warp = Barrier();
  }
  for (auto& thread : threads) {
    thread->done = false;
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack.get();
    thread->context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread->context, thread_main, 0);
  }
  // Each block runs until it must wait for another: none may rely on their keeping pace.
  for (bool left = true; left;) {
    const long before = progress;
    left = false;
    for (int block = 0; block < int(blocks.size()); ++block) {
      long last;
      do {
        last = progress;
        left |= run_block(block);
      } while (progress != last);
    }
    if (left && progress == before) fail("deadlock");
  }
}

// Clusters are `blocks_together` blocks that follow each other in x.
inline void launch_cluster(dim3 grid, int count, size_t shared_bytes, unsigned blocks_together,
                           std::function<void()> kernel) {
  if (shared_bytes > kSharedBytes || count > 1024 || count % 32 || grid.x % blocks_together) {
    fail("a launch that no GPU takes");
  }
  body = kernel, gridDim = grid, blockDim = dim3(count), cluster_size = blocks_together;
  blocks.resize(blocks_together);
  threads.resize(blocks_together * count);
  for (auto& block : blocks) block = std::make_unique<Block>();
  for (size_t t = 0; t < threads.size(); ++t) {
    threads[t] = std::make_unique<Thread>();
    threads[t]->index = t % count, threads[t]->block = t / count;
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += blocks_together) {
        for (unsigned b = 0; b < blocks_together; ++b) blocks[b]->index = dim3(x + b, y, z);
        run_cluster();
      }
    }
  }
}
inline void launch(dim3 grid, int count, size_t shared_bytes, std::function<void()> kernel) {
  launch_cluster(grid, count, shared_bytes, 1, kernel);
}

}  // namespace emulate

inline void __syncthreads() { emulate::wait(emulate::my_block().all, blockDim.x); }
inline void __syncwarp() { emulate::wait_warp(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  memcpy(&emulate::me().slot, &value, sizeof value);
  emulate::wait_warp();
  memcpy(&value, &emulate::lane(emulate::me().index % 32 ^ distance).slot, sizeof value);
  emulate::wait_warp();
  return value;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __half2float(__half h) { return mixbits::half_to_float(h.bits); }
inline __half __float2half_rn(float x) { return {mixbits::float_to_half(x)}; }
inline float __bfloat162float(__nv_bfloat16 h) { return mixbits::bfloat16_to_float(h.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {mixbits::float_to_bfloat16(x)}; }

// Products of two numbers of 11 digits are exact in a float, sums of two in a double.
#define MB_PAIRS(Pair, Scalar, to, from)                       \
  inline Pair __hmul2(Pair a, Pair b) {                        \
    return {from(to(a.x) * to(b.x)), from(to(a.y) * to(b.y))}; \
  }                                                            \
  inline Pair __hsub2(Pair a, Pair b) {                        \
    return {from(to(a.x) - to(b.x)), from(to(a.y) - to(b.y))}; \
  }                                                            \
  inline Pair __hfma2(Pair a, Pair b, Pair c) {                \
    return {from(float(double(to(a.x)) * to(b.x) + to(c.x))),  \
            from(float(double(to(a.y)) * to(b.y) + to(c.y)))}; \
  }
MB_PAIRS(__half2, __half, __half2float, __float2half_rn)
MB_PAIRS(__nv_bfloat162, __nv_bfloat16, __bfloat162float, __float2bfloat16_rn)
#undef MB_PAIRS
inline __nv_bfloat162 __float2bfloat162_rn(float x) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(x)};
}
