// What the kernels of warpgroup products share: a block of two warpgroups that multiply 64 rows
// each, and one thread of a third that copies activations into a ring of stages for them. `full`
// says that a stage's bytes are there, `empty` that all multiplying warps have read it.
//
// The kShare blocks of a cluster may want the same activations: each then copies its part of a
// tile to all of them. The bytes of the others count in a block's own `full`, and a stage is empty
// when the warps of all blocks have read theirs, so each warp tells all blocks.
#pragma once

#include "cuda/ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define MB_HAS_WGMMA 1
#endif

namespace mixbits {
namespace cuda {

constexpr int kGroupRows = 64, kGroups = 2, kBlockRows = kGroups * kGroupRows;
constexpr int kMultipliers = 128 * kGroups, kBlockThreads = kMultipliers + 128;
constexpr int kSumStride = kBlockRows + 4;  // floats; a warp's stores then spread over the banks
constexpr int kBarrierBytes = 1024;         // more than enough; keeps what follows aligned

// All threads must call; with kShare > 1 a cluster_sync must follow.
template <int kStages, int kShare>
__device__ __forceinline__ void init_ring(uint64_t* full, uint64_t* empty) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(&full[stage], 1);
      ptx::barrier_init(&empty[stage], kShare * kMultipliers / 32);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
}

// Copies `count` tiles of kBytes, which follow each other, into the ring.
template <int kStages, int kBytes, int kShare>
__device__ __forceinline__ void copy_tiles(const uint8_t* tiles, uint8_t* ring, uint64_t* full,
                                           uint64_t* empty, int count) {
  constexpr int kPart = kBytes / kShare;
  const int from = kShare > 1 ? int(ptx::cluster_rank()) * kPart : 0;
  for (int i = 0; i < count; ++i) {
    const int stage = i % kStages;
    // The stage's use number i / kStages begins when the one before is over.
    if (i >= kStages) ptx::barrier_wait(&empty[stage], (i / kStages + 1) % 2);
    ptx::barrier_expect(&full[stage], kBytes);
    uint8_t* const to = ring + stage * kBytes + from;
    const uint8_t* const tile = tiles + int64_t(i) * kBytes + from;
    if constexpr (kShare > 1) {
      ptx::bulk_copy_to_cluster<(1 << kShare) - 1>(to, tile, kPart, &full[stage]);
    } else {
      ptx::bulk_copy(to, tile, kPart, &full[stage]);
    }
  }
}

// The first of a thread's two rows within the block; the other is 8 below.
__device__ __forceinline__ int first_row() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }

// A multiplying thread's sums -> shared memory [token][row].
template <int kTokens>
__device__ __forceinline__ void store_sums(const float (&sums)[kTokens / 2], float* shared) {
  const int row = first_row(), token = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    shared[(i / 4 * 8 + token + i % 2) * kSumStride + row + i % 4 / 2 * 8] = sums[i];
  }
}

}  // namespace cuda
}  // namespace mixbits
