// x [tokens, columns] times a packed weight [rows, columns] transposed, on Hopper's warpgroup
// matrix units (sm_90a), for the numbers of tokens between "reading the weight is the cost" and
// "multiplying is".
//
// The weight is operand A, in registers, where it is dequantized; prepared activations (prepare.cu)
// are operand B in shared memory. A block owns 128 rows and 64, 128 or 256 tokens: two warpgroups
// multiply 64 rows each with the same B, and one thread of a third copies B, whole 128-column tiles
// that are contiguous in memory, into a ring of stages (warpgroups.cuh). Weights go from memory to
// registers, two tiles ahead: every code is wanted by one thread of the block, so shared memory
// would only add a copy.
//
// A warpgroup dequantizes 64 columns while the matrix unit works on the 64 before: two sets of
// 16 registers, and a set is refilled when the group that reads it is finished. The loop has about
// 4 instructions per weight and lane (sm_90a machine code). A multiprocessor issues 128 lanes per
// cycle, and its matrix unit wants 128 x 16 weights every 128 cycles for 128 tokens: half of the
// issue slots. With 64 tokens it is all of them: smaller blocks are for when memory is the limit.
//
// The blocks of a cluster share rows and tokens and split the columns; they add their sums through
// distributed shared memory in the order of their ranks. Nothing is added in memory, no workspace.
//
// Registers are given out per warpgroup: 3 x 168 at the start; the copying one gives its own away.
// After that its code may use 24, so all that follows is inside the branch of either role.
#include "cuda/codes/chunk.cuh"
#include "warpgroups.cuh"

namespace mixbits {
namespace cuda {
namespace {

constexpr int kSetPairs = 8;  // pairs of a row in a set: 64 columns of a quad

MB_HD constexpr int stage_bytes(int tokens) { return tokens * kPreparedColumns * 2; }
MB_HD constexpr int stage_count(int tokens) { return tokens == 256 ? 3 : 4; }
MB_HD constexpr int shared_bytes(int tokens) {
  const int ring = stage_count(tokens) * stage_bytes(tokens), sums = tokens * kSumStride * 4;
  return kBarrierBytes + (ring > sums ? ring : sums);
}

template <int kElement>
struct WeightTile {  // 128 columns of a lane's two rows
  static constexpr int kBits = element_bits(kElement);
  static constexpr int kChunks = kPreparedColumns / tile_columns(kBits);
  Chunk<kElement> chunks[kChunks][2];

  __device__ __forceinline__ void load(const PackedWeight& weight, const uint32_t (&rows)[2],
                                       int column) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      load_chunk<kElement>(weight, rows[0], column + i * tile_columns(kBits), chunks[i][0]);
      load_chunk<kElement>(weight, rows[1], column + i * tile_columns(kBits), chunks[i][1]);
    }
  }

  // Operand A of the 4 steps of 64 columns: half `kHalf` of the tile at `column`.
  template <class T, int kHalf>
  __device__ __forceinline__ void decode(const PackedWeight& weight, int column,
                                         uint32_t (&a)[4][4]) const {
    constexpr int kChunkOf = kChunks == 2 ? kHalf : 0;
    constexpr int kFirst = kChunks == 2 ? 0 : kHalf * kSetPairs;
    const int zero_at = zero_shift<kElement>(weight, column + kChunkOf * tile_columns(kBits));
    uint32_t upper[kSetPairs], lower[kSetPairs];
    decode_pairs<T, kElement, kFirst>(chunks[kChunkOf][0], zero_at, upper);
    decode_pairs<T, kElement, kFirst>(chunks[kChunkOf][1], zero_at, lower);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      a[step][0] = upper[2 * step];
      a[step][1] = lower[2 * step];
      a[step][2] = upper[2 * step + 1];
      a[step][3] = lower[2 * step + 1];
    }
  }
};

// One tile: two sets, each dequantized while the set before it is multiplied. `before` is `empty`
// of the tile before.
template <class T, int kElement, int kTokens>
__device__ __forceinline__ void multiply_tile(const PackedWeight& weight,
                                              const WeightTile<kElement>& tile, int column,
                                              uint64_t b, uint32_t (&sets)[2][4][4],
                                              float (&sums)[kTokens / 2], bool not_first,
                                              uint64_t* before) {
  // Descriptors count 16 bytes: 16 values of k further, and 64 values, which are other rows.
  constexpr int kStep = 32 / 16, kHalf = kTokens * 128 / 16;
  tile.template decode<T, 0>(weight, column, sets[0]);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    ptx::wgmma<T>(sums, sets[0][step], b + step * kStep);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();  // the tile before is finished
  if (not_first && threadIdx.x % 32 == 0) ptx::barrier_arrive(before);
  tile.template decode<T, 1>(weight, column, sets[1]);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    ptx::wgmma<T>(sums, sets[1][step], b + kHalf + step * kStep);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
}

// Where the multiplying warps are in the ring.
template <int kTokens>
struct RingPlace {
  int stage = 0, stage_before = stage_count(kTokens) - 1, parity = 0;
  bool not_first = false;

  __device__ __forceinline__ void advance() {
    stage_before = stage++;
    if (stage == stage_count(kTokens)) stage = 0, parity ^= 1;
    not_first = true;
  }
};

// Tiles `first` to `last - 1` of the weight, from `place` of the ring on.
template <class T, int kElement, int kTokens>
__device__ __forceinline__ void multiply_tiles(const PackedWeight& weight, uint8_t* ring,
                                               uint64_t* full, uint64_t* empty, int first, int last,
                                               RingPlace<kTokens>& place,
                                               float (&sums)[kTokens / 2]) {
  constexpr int kAhead = 2;
  const int row = blockIdx.z * kBlockRows + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const uint32_t rows[2] = {valid_row(weight, row), valid_row(weight, row + 8)};
  int column =
      first * kPreparedColumns + threadIdx.x % 4 * chunk_columns(WeightTile<kElement>::kBits);
  uint32_t sets[2][4][4];
  WeightTile<kElement> tiles[kAhead];
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) {
    tiles[ahead].load(weight, rows, column + ahead * kPreparedColumns);
  }
  for (int start = first; start < last; start += kAhead) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead, column += kPreparedColumns) {
      if (start + ahead >= last) break;
      ptx::barrier_wait(&full[place.stage], place.parity);
      const uint32_t b = ptx::shared_address(ring + place.stage * stage_bytes(kTokens));
      multiply_tile<T, kElement, kTokens>(weight, tiles[ahead], column, ptx::swizzled_operand(b),
                                          sets, sums, place.not_first, &empty[place.stage_before]);
      tiles[ahead].load(weight, rows, column + kAhead * kPreparedColumns);
      place.advance();
    }
  }
  ptx::wgmma_wait<0>();
}

// Adds up this block's share of the cluster's tokens, in the order of the parts, and writes it.
template <class T, int kTokens>
__device__ __forceinline__ void add_parts(const float* sums, int rows, T* out, int tokens, int part,
                                          int parts) {
  for (int i = threadIdx.x; i < kTokens / parts * kBlockRows; i += kMultipliers) {
    const int token = i / kBlockRows * parts + part, row = i % kBlockRows;
    float total = 0.0f;
    for (int p = 0; p < parts; ++p) total += ptx::load_cluster(&sums[token * kSumStride + row], p);
    const int out_token = blockIdx.y * kTokens + token, out_row = blockIdx.z * kBlockRows + row;
    if (out_token < tokens && out_row < rows) {
      out[int64_t(out_token) * rows + out_row] = from_float<T>(total);
    }
  }
}

// One block: `multiply(ring, full, empty, first, last, sums)` adds the products of its part of the
// weight's `tiles`, from `first` to `last - 1`.
template <class T, int kTokens, class Multiply>
__device__ __forceinline__ void multiply_block(const uint8_t* prepared, int tiles, int rows, T* out,
                                               int tokens, int parts, Multiply multiply) {
  constexpr int kStages = stage_count(kTokens);
  extern __shared__ __align__(1024) uint8_t shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared);
  uint64_t* empty = full + kStages;
  uint8_t* ring = shared + kBarrierBytes;
  const int part = int(ptx::cluster_rank());
  const int first = tiles * part / parts, last = tiles * (part + 1) / parts;
  init_ring<kStages, 1>(full, empty);

  if (threadIdx.x >= kMultipliers) {
    ptx::give_registers<24>();
    if (threadIdx.x == kMultipliers) {
      constexpr int kBytes = stage_bytes(kTokens);
      copy_tiles<kStages, kBytes, 1>(prepared + (int64_t(blockIdx.y) * tiles + first) * kBytes,
                                     ring, full, empty, last - first);
    }
    ptx::cluster_sync();
    ptx::cluster_sync();
  } else {
    ptx::take_registers<240>();
    float* const block_sums = reinterpret_cast<float*>(ring);
    {
      float sums[kTokens / 2] = {};
      multiply(ring, full, empty, first, last, sums);
      ptx::sync_threads<kMultipliers>();  // nobody reads the ring any more
      store_sums<kTokens>(sums, block_sums);
    }
    ptx::cluster_sync();
    add_parts<T, kTokens>(block_sums, rows, out, tokens, part, parts);
    ptx::cluster_sync();  // no block ends while another reads its sums
  }
}

template <class T, int kElement, int kTokens>
__global__ void __launch_bounds__(kBlockThreads, 1)  // the 1 fixes the registers at entry
    wgmma_kernel(const uint8_t* prepared, PackedWeight weight, T* out, int tokens, int parts) {
#ifdef MB_HAS_WGMMA
  const int tiles = (weight.columns + kPreparedColumns - 1) / kPreparedColumns;
  multiply_block<T, kTokens>(prepared, tiles, weight.rows, out, tokens, parts,
                             [&](uint8_t* ring, uint64_t* full, uint64_t* empty, int first,
                                 int last, float (&sums)[kTokens / 2]) {
                               RingPlace<kTokens> place;
                               multiply_tiles<T, kElement, kTokens>(weight, ring, full, empty,
                                                                    first, last, place, sums);
                             });
#endif
}

// What the segments of a mix may be: kMx e2m1 and e4m3, else integers. With code for all six
// formats in one kernel ptxas makes functions of them, and no product of wgmma may be under way in
// a call (C7510): the matrix unit would wait for every group. With e5m2 beside the other two it
// spills.
template <bool kMx>
using Family = std::conditional_t<kMx, Elements<kE2M1, kE4M3>, Elements<kInt2, kInt4, kInt8>>;

template <bool kMx>
bool is_family(const MixedWeight& mix) {
  for (int i = 0; i < mix.count; ++i) {
    if (!has(Family<kMx>(), mix.segments[i].element)) return false;
  }
  return true;
}

// Segments of a weight, one after the other; their tiles count on.
template <class T, bool kMx>
__global__ void __launch_bounds__(kBlockThreads, 1)
    mixed_wgmma_kernel(const uint8_t* prepared, const __grid_constant__ MixedWeight mix, T* out,
                       int tokens, int parts) {
#ifdef MB_HAS_WGMMA
  multiply_block<T, kMixedTokens>(
      prepared, mix.segments[mix.count - 1].end, mix.segments[0].weight.rows, out, tokens, parts,
      [&](uint8_t* ring, uint64_t* full, uint64_t* empty, int first, int last,
          float (&sums)[kMixedTokens / 2]) {
        RingPlace<kMixedTokens> place;
        for (int s = 0; s < mix.count; ++s) {
          const Segment& segment = mix.segments[s];
          const int begin = max(first, segment.first) - segment.first;
          const int end = min(last, segment.end) - segment.first;
          if (begin >= end) continue;
          dispatch_element(Family<kMx>(), segment.element, [&](auto element) {
            multiply_tiles<T, element.value, kMixedTokens>(segment.weight, ring, full, empty, begin,
                                                           end, place, sums);
          });
        }
      });
#endif
}

template <class T, int kElement, int kTokens>
const char* launch(const MatmulArgs& a, const PackedWeight& weight, int parts, void* stream) {
  // Blocks that read the same rows of the weight run at the same time and share them in L2.
  const dim3 grid(unsigned(parts), unsigned(divide_up(a.tokens, kTokens)),
                  unsigned(divide_up(a.rows, kBlockRows)));
  return ptx::launch_cluster(wgmma_kernel<T, kElement, kTokens>, grid, kBlockThreads,
                             shared_bytes(kTokens), unsigned(parts), stream,
                             static_cast<const uint8_t*>(a.x), weight, static_cast<T*>(a.out),
                             int(a.tokens), parts);
}

template <class T, bool kMx>
const char* launch_mixed(const MatmulArgs& a, const MixedWeight& mix, int parts, void* stream) {
  const dim3 grid(unsigned(parts), unsigned(divide_up(a.tokens, kMixedTokens)),
                  unsigned(divide_up(a.rows, kBlockRows)));
  return ptx::launch_cluster(
      mixed_wgmma_kernel<T, kMx>, grid, kBlockThreads, shared_bytes(kMixedTokens), unsigned(parts),
      stream, static_cast<const uint8_t*>(a.x), mix, static_cast<T*>(a.out), int(a.tokens), parts);
}

const char* refused(int64_t rows, int parts) {
  if (parts < 1 || parts > 8 || (parts & (parts - 1)) != 0) return "1, 2, 4 or 8 parts";
  if (divide_up(rows, kBlockRows) > 65535) return "at most 8388480 rows";
  return nullptr;
}

const char* multiply_one(const MatmulArgs& a, int block_tokens, int parts, void* stream) {
  PackedWeight weight{};
  if (!has(First(), element_of(a.segments[0]))) return kNoCode;
  if (const char* error = packed_weight(a.segments[0], a.rows, &weight)) return error;
  const char* error = "no kernel of these sizes";
  dispatch_half(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_element(First(), element_of(a.segments[0]), [&](auto element) {
      constexpr int kElement = element.value;
      if (block_tokens == 64) error = launch<T, kElement, 64>(a, weight, parts, stream);
      if (block_tokens == 128) error = launch<T, kElement, 128>(a, weight, parts, stream);
      if (block_tokens == 256) error = launch<T, kElement, 256>(a, weight, parts, stream);
    });
  });
  return error;
}

const char* multiply_several(const MatmulArgs& a, int block_tokens, int parts, void* stream) {
  if (block_tokens != kMixedTokens) return "no kernel of these sizes";
  MixedWeight mix{};
  if (const char* error = mixed_weight(a, &mix)) return error;
  int tiles = 0;
  for (int i = 0; i < mix.count; ++i) {
    mix.segments[i].first = tiles;
    tiles += int(divide_up(mix.segments[i].weight.columns, kPreparedColumns));
    mix.segments[i].end = tiles;
  }
  const char* error = "no kernel of these formats";
  dispatch_half(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (is_family<true>(mix)) error = launch_mixed<T, true>(a, mix, parts, stream);
    if (is_family<false>(mix)) error = launch_mixed<T, false>(a, mix, parts, stream);
  });
  return error;
}

}  // namespace

const char* packed_matmul_wgmma(const MatmulArgs& a, int block_tokens, int parts, void* stream) {
  if (a.tokens == 0 || a.rows == 0 || a.columns == 0) return nullptr;
  if (const char* error = refused_segments(a)) return error;
  if (const char* error = refused(a.rows, parts)) return error;
  const auto multiply = a.segment_count == 1 ? multiply_one : multiply_several;
  return multiply(a, block_tokens, parts, stream);
}

}  // namespace cuda
}  // namespace mixbits
