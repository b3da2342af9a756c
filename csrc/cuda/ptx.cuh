// The instructions that CUDA C++ has no name for, one function each. Facts in the comments are the
// PTX manual's.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

namespace mixbits {
namespace cuda {
namespace ptx {

// --- loads ----------------------------------------------------------------------------------

// 4, 8 or 16 bytes of weights: read once by this SM, so they need no place in L1, and whole
// 128-byte lines are wanted in L2 because the rest of the line is asked for next.
template <int kWords>
__device__ __forceinline__ void load_once(const void* address, uint32_t (&words)[kWords]) {
  static_assert(kWords == 2 || kWords == 4, "8 or 16 bytes");
  if constexpr (kWords == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(address));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.b32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(address));
  }
}

// 4, 8 or 16 bytes in one store, which the compiler makes of 16-bit values one by one.
template <int kWords>
__device__ __forceinline__ void store(void* address, const uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "4, 8 or 16 bytes");
  if constexpr (kWords == 4) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1])
                 : "memory");
  } else {
    *static_cast<uint32_t*>(address) = words[0];
  }
}

// (a & b) | c in one instruction: with two constants the compiler makes two of it.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// Four bytes of low (numbers 0-3) and high (4-7): number i is chosen by bits 4i to 4i + 2 of the
// selector. Where bit 4i + 3 is set, that byte's sign bit fills all of it.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

// Two numbers rounded to e4m3, to nearest even and saturating; sm_89 and later.
__device__ __forceinline__ uint32_t to_e4m3(float low, float high) {
  uint16_t result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
  return result;
}

// --- mma.sync, sm_80 and later --------------------------------------------------------------

// c [16 rows, 8 tokens] += a [16 rows, 16] b [16, 8 tokens]. With g = lane / 4 and q = lane % 4:
// a0 and a2 are row g, a1 and a3 row g + 8, b token g; c0, c1 are row g and tokens 2q, 2q + 1,
// c2, c3 row g + 8.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same<T, __half>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// --- shared memory, barriers and bulk copies, sm_90 -----------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the copy engine; a block barrier must follow.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and lets the phase also wait for `bytes` of bulk copies.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase of this parity is over: 0 the first, 1 the second, 0 the third...
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies `bytes`, a multiple of 16 between 16-byte boundaries, into this block's shared memory; the
// barrier counts them. The copy engine writes, and wgmma reads, through the async proxy, so no
// proxy fence is needed between the two.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// The same into each block of the cluster whose bit is set in kMask, at the same place there; the
// barrier of each counts what that block gets.
template <uint16_t kMask>
__device__ __forceinline__ void bulk_copy_to_cluster(void* shared, const void* global,
                                                     uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(kMask)
      : "memory");
}

// A barrier of the first kThreads threads of the block.
template <int kThreads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// The registers per thread that the calling warpgroup keeps, or gets when others have given.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- clusters, sm_90 ------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster; what they wrote to shared memory before is visible.
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();  // "aligned" below: all lanes of a warp arrive together
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Arrives at the barrier that block `rank` of the cluster has where this block has `own`. Nothing
// that was written is made visible to that block: it says only that reads are over.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* own, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(own)),
      "r"(rank)
      : "memory");
}

// What block `rank` of the cluster has where this block has `own`.
__device__ __forceinline__ float load_cluster(const float* own, uint32_t rank) {
  float value;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n"
      "}"
      : "=f"(value)
      : "r"(shared_address(own)), "r"(rank)
      : "memory");
  return value;
}

// Launches clusters of `cluster` blocks along x; null, or the text of the CUDA error. A block may
// use more than 48 KB of shared memory only after the attribute is set.
template <class Kernel, class... Args>
const char* launch_cluster(Kernel kernel, dim3 grid, int threads, size_t shared_bytes,
                           unsigned cluster, void* stream, Args... args) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = cudaStream_t(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  cudaGetLastError();  // already in `error`
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// --- wgmma, sm_90a --------------------------------------------------------------------------

// Operand B in shared memory, K-major rows of 128 bytes in the 128-byte swizzle: 8 rows are
// 1024 bytes, which is the distance of the next 8 (the "stride"); the "leading" distance is
// unused within one swizzle row. The rows begin at a multiple of 1024 bytes; `start` may be 32, 64
// or 96 bytes further, for the next values of k.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t start) {
  return uint64_t((start & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// Orders accesses to the registers of wgmma before those of the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define MB_D8(i)                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MB_D32(i) MB_D8(i), MB_D8(i + 8), MB_D8(i + 16), MB_D8(i + 24)
#define MB_TEXT32_0                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MB_TEXT32_1                                                                            \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MB_TEXT64_1                                                                            \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, " \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// d += a b: the three 1s are "add to d", "a as it is", "b as it is", the 0 "b is K-major".
#define MB_WGMMA(shape, type, outputs, rest, ...)                                                \
  asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned." shape \
               "k16.f32." type "." type " {" outputs "}, " rest ", add, 1, 1, 0;\n}"             \
               : __VA_ARGS__                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d [64 rows, tokens] += a [64 rows, 16] b [16, tokens], started by the four warps of a
// warpgroup; warp w has rows 16w to 16w + 15 of a and d, in the layout of `mma`, d[4i..] being
// tokens 8i to 8i + 7. Its registers are taken until wgmma_wait.
template <class T, int kSize>
__device__ __forceinline__ void wgmma(float (&d)[kSize], const uint32_t* a, uint64_t b) {
  static_assert(kSize == 32 || kSize == 64 || kSize == 128, "64, 128 or 256 tokens");
  constexpr bool kHalf = std::is_same<T, __half>::value;
  if constexpr (kSize == 32) {
#define MB_REST "{%32, %33, %34, %35}, %36"
    if constexpr (kHalf) {
      MB_WGMMA("m64n64", "f16", MB_TEXT32_0, MB_REST, MB_D32(0));
    } else {
      MB_WGMMA("m64n64", "bf16", MB_TEXT32_0, MB_REST, MB_D32(0));
    }
#undef MB_REST
  } else if constexpr (kSize == 64) {
#define MB_REST "{%64, %65, %66, %67}, %68"
    if constexpr (kHalf) {
      MB_WGMMA("m64n128", "f16", MB_TEXT32_0 ", " MB_TEXT32_1, MB_REST, MB_D32(0), MB_D32(32));
    } else {
      MB_WGMMA("m64n128", "bf16", MB_TEXT32_0 ", " MB_TEXT32_1, MB_REST, MB_D32(0), MB_D32(32));
    }
#undef MB_REST
  } else {
#define MB_REST "{%128, %129, %130, %131}, %132"
#define MB_TEXT MB_TEXT32_0 ", " MB_TEXT32_1 ", " MB_TEXT64_1
    if constexpr (kHalf) {
      MB_WGMMA("m64n256", "f16", MB_TEXT, MB_REST, MB_D32(0), MB_D32(32), MB_D32(64), MB_D32(96));
    } else {
      MB_WGMMA("m64n256", "bf16", MB_TEXT, MB_REST, MB_D32(0), MB_D32(32), MB_D32(64), MB_D32(96));
    }
#undef MB_TEXT
#undef MB_REST
  }
}

// d [64 rows, 128 tokens] = (kAdd: +=) a [64 rows, 32] b [32, 128 tokens] of e4m3, else as `wgmma`.
// With g = lane / 4 and q = lane % 4: a0 and a2 are row g, a1 and a3 row g + 8; a0 and a1 hold
// values 4q to 4q + 3, the others those 16 further.
template <bool kAdd>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], const uint32_t* a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.u32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" MB_TEXT32_0 ", " MB_TEXT32_1
      "}, {%64, %65, %66, %67}, %68, add, 1, 1;\n}"
      : MB_D32(0), MB_D32(32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kAdd)));
}
#undef MB_WGMMA
#undef MB_TEXT64_1
#undef MB_TEXT32_1
#undef MB_TEXT32_0
#undef MB_D32
#undef MB_D8

}  // namespace ptx
}  // namespace cuda
}  // namespace mixbits
