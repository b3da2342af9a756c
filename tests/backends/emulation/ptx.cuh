// csrc/cuda/ptx.cuh for the stand-in: what each instruction does, by the PTX manual, and an abort
// where a program may not rely on what it does.
//
// What is asynchronous happens as late as it may: a bulk copy when somebody waits for a barrier, a
// product of wgmma when its group is waited for; its sums are NaN and its other registers must not
// change until then.
#pragma once

#include "stand_in.h"

namespace mixbits {
namespace cuda {
namespace ptx {

template <int kWords>
inline void load_once(const void* address, uint32_t (&words)[kWords]) {
  if (uintptr_t(address) % sizeof words) emulate::fail("a misaligned load");
  memcpy(words, address, sizeof words);
}

template <int kWords>
inline void store(void* address, const uint32_t (&words)[kWords]) {
  if (uintptr_t(address) % sizeof words) emulate::fail("a misaligned store");
  memcpy(address, words, sizeof words);
}
inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t chosen = selector >> (4 * i), byte = __byte_perm(low, high, chosen & 7) & 0xff;
    result |= (chosen & 8 ? byte >> 7 ? 0xff : 0 : byte) << (8 * i);
  }
  return result;
}
inline uint32_t to_e4m3(float low, float high) {
  const auto code = [](float x) {
    return x == x ? uint32_t(minifloat_encode<float, int32_t>(x, minifloat(kE4M3))) : 0x7fu;
  };
  return code(low) | code(high) << 8;
}
inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

// --- fragments ------------------------------------------------------------------------------

template <class T>
inline float half_of(uint32_t pair, int half) {
  const uint16_t bits = uint16_t(pair >> (16 * half));
  return std::is_same<T, __half>::value ? half_to_float(bits) : bfloat16_to_float(bits);
}

struct MmaOperands {
  uint32_t a[4], b[2];
};
inline MmaOperands mma_operands[1024];

// Element k of row `row` of a warp's 16 x 16 operand a: registers(lane) are those of a lane.
template <class T, class Registers>
float element_a(Registers registers, int row, int k) {
  const uint32_t* a = registers(row % 8 * 4 + k % 8 / 2);
  return half_of<T>(a[row / 8 + k / 8 * 2], k % 2);
}

template <class T>
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1) {
  const int lane = emulate::me().index % 32;
  MmaOperands* const warp = mma_operands + (emulate::me().index - lane);
  warp[lane] = {{a0, a1, a2, a3}, {b0, b1}};
  emulate::wait_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float b = half_of<T>(warp[token * 4 + k % 8 / 2].b[k / 8], k % 2);
      c[i] += element_a<T>([&](int other) { return warp[other].a; }, row, k) * b;
    }
  }
  emulate::wait_warp();
}

// --- barriers and bulk copies ---------------------------------------------------------------

struct MBarrier {
  uint64_t expected : 12, pending : 12, phase : 1;
  int64_t bytes : 39;
};
struct Copy {
  char* to;
  const char* from;
  uint32_t bytes;
  MBarrier* barrier;
};
inline std::vector<Copy> copies;

inline MBarrier* mbarrier(uint64_t* barrier) { return reinterpret_cast<MBarrier*>(barrier); }
inline void settle(MBarrier* barrier) {
  ++emulate::progress;
  if (barrier->pending == 0 && barrier->bytes == 0) {
    barrier->pending = barrier->expected;
    barrier->phase ^= 1;
  }
}
inline uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - emulate::shared<char>();
  if (offset < 0 || offset >= ptrdiff_t(emulate::kSharedBytes)) emulate::fail("not shared memory");
  return uint32_t(offset);
}
inline void barrier_init(uint64_t* barrier, int arrivals) {
  if (shared_address(barrier) % 8) emulate::fail("a misaligned barrier");
  *mbarrier(barrier) = {uint64_t(arrivals), uint64_t(arrivals), 0, 0};
}
inline void barrier_init_fence() {}
inline void arrive(MBarrier* barrier) {
  if (barrier->pending == 0) emulate::fail("one arrival too many");
  barrier->pending -= 1;
  settle(barrier);
}
inline void barrier_arrive(uint64_t* barrier) { arrive(mbarrier(barrier)); }
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  mbarrier(barrier)->bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (mbarrier(barrier)->phase == parity) {
    if (!copies.empty()) {
      const Copy copy = copies.back();
      copies.pop_back();
      memcpy(copy.to, copy.from, copy.bytes);
      copy.barrier->bytes -= copy.bytes;
      settle(copy.barrier);
    }
    emulate::yield();
  }
}
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  if (shared_address(shared) % 16 || uintptr_t(global) % 16 || bytes % 16) {
    emulate::fail("a misaligned bulk copy");
  }
  copies.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, mbarrier(barrier)});
}

// Where block `rank` has what this block has at `own`.
template <class T>
T* in_block(T* own, uint32_t rank) {
  if (emulate::blocks[rank]->running == 0) emulate::fail("shared memory of a block that has ended");
  return reinterpret_cast<T*>(emulate::blocks[rank]->shared() + shared_address(own));
}
template <uint16_t kMask>
inline void bulk_copy_to_cluster(void* shared, const void* global, uint32_t bytes,
                                 uint64_t* barrier) {
  for (uint32_t rank = 0; kMask >> rank; ++rank) {
    if (kMask >> rank & 1) {
      bulk_copy(static_cast<char*>(shared), global, bytes, barrier);
      copies.back().to = in_block(static_cast<char*>(shared), rank);
      copies.back().barrier = in_block(mbarrier(barrier), rank);
    }
  }
}

template <int kThreads>
inline void sync_threads() {
  if (emulate::me().index >= kThreads) emulate::fail("a thread that the barrier does not count");
  emulate::wait(emulate::my_block().named, kThreads);
}
template <int kRegisters>
inline void give_registers() {}
template <int kRegisters>
inline void take_registers() {}

// --- clusters -------------------------------------------------------------------------------

inline uint32_t cluster_rank() { return emulate::me().block; }
inline void cluster_sync() { emulate::wait(emulate::cluster, int(emulate::threads.size())); }
inline float load_cluster(const float* own, uint32_t rank) { return *in_block(own, rank); }
inline void barrier_arrive_at(uint64_t* own, uint32_t rank) {
  arrive(in_block(mbarrier(own), rank));
}
template <class Kernel, class... Args>
const char* launch_cluster(Kernel kernel, dim3 grid, int threads, size_t shared_bytes,
                           unsigned cluster, void*, Args... args) {
  emulate::launch_cluster(grid, threads, shared_bytes, cluster, [=] { kernel(args...); });
  return nullptr;
}

// --- wgmma ----------------------------------------------------------------------------------

struct Product {
  uint32_t a[4];
  const uint32_t* registers;
  uint64_t b;
  bool add;
};
struct Pipeline {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::vector<float> sums;  // what the registers of d will be
  float* d = nullptr;
  void (*run)(Pipeline&, const std::vector<Product>&);
};
inline Pipeline pipelines[1 << 13];
inline Pipeline& pipeline(int lane) { return pipelines[emulate::running / 32 * 32 + lane]; }
inline Pipeline& my_pipeline() { return pipelines[emulate::running]; }

inline uint64_t swizzled_operand(uint32_t start) {
  return uint64_t((start & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// The value of `row` and `k` of the K-major operand that a descriptor means: rows of 128 bytes,
// groups of 8 rows "stride" apart, and bits 4-6 of the address xor-ed with bits 7-9.
template <class Bits>
Bits operand_bits(uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
    emulate::fail("not the 128-byte swizzle");
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = start + row / 8 * stride + row % 8 * 128 + k * sizeof(Bits);
  const uint32_t swizzled = address ^ (address >> 7 & 7) << 4;
  Bits bits;
  memcpy(&bits, emulate::shared<char>() + swizzled, sizeof bits);
  return bits;
}

template <class T, int kSize>
void run_products(Pipeline& mine, const std::vector<Product>& products) {
  const int lane = emulate::me().index % 32;
  for (size_t p = 0; p < products.size(); ++p) {
    if (memcmp(products[p].a, products[p].registers, 16))
      emulate::fail("wgmma's registers changed");
    float a[2][16];
    for (int row = 0; row < 2; ++row) {
      for (int k = 0; k < 16; ++k) {
        const auto registers = [&](int other) { return pipeline(other).groups.front()[p].a; };
        a[row][k] = element_a<T>(registers, lane / 4 + row * 8, k);
      }
    }
    for (int token = 0; token < 2 * kSize; ++token) {
      if (token % 8 / 2 != lane % 4) continue;
      for (int k = 0; k < 16; ++k) {
        const float b = half_of<T>(operand_bits<uint16_t>(products[p].b, token, k), 0);
        float* const sums = &mine.sums[token / 8 * 4 + token % 2];
        sums[0] += a[0][k] * b;
        sums[2] += a[1][k] * b;
      }
    }
  }
}

// sum + the products of a[32] and b[32] as the matrix unit of an H100 adds 8-bit floats, after the
// experiments of arXiv:2603.20421: all are brought to the largest exponent, 14 digits of each are
// kept, and 14 of their sum; what is below is dropped.
inline float add_e4m3(float sum, const uint8_t* a, const uint8_t* b) {
  const auto value = [](int code) {
    return minifloat_decode<float, int32_t>(code, minifloat(kE4M3));
  };
  const auto exponent = [](int code) { return std::max(code >> 3 & 15, 1) - 7; };
  if (sum != sum) return NAN;
  int largest = sum == 0 ? -100 : ilogbf(sum);
  float products[32];
  for (int k = 0; k < 32; ++k) {
    products[k] = value(a[k]) * value(b[k]);
    if (products[k] != 0) largest = std::max(largest, exponent(a[k]) + exponent(b[k]));
  }
  const float digits = ldexpf(1.0f, 13 - largest);
  int64_t total = int64_t(sum * digits);
  for (const float product : products) {
    if (product != product) return NAN;
    total += int32_t(product * digits);
  }
  int dropped = 0;
  while (std::abs(total) >> (14 + dropped)) ++dropped;
  return float(total / (1 << dropped) * (1 << dropped)) / digits;
}

inline void run_e4m3_products(Pipeline& mine, const std::vector<Product>& products) {
  const int lane = emulate::me().index % 32;
  for (size_t p = 0; p < products.size(); ++p) {
    if (memcmp(products[p].a, products[p].registers, 16))
      emulate::fail("wgmma's registers changed");
    uint8_t a[2][32], b[32];
    for (int row = 0; row < 2; ++row) {
      for (int k = 0; k < 32; ++k) {
        const int holder = lane / 4 * 4 + k % 16 / 4;
        const uint32_t word = pipeline(holder).groups.front()[p].a[row + k / 16 * 2];
        a[row][k] = uint8_t(word >> (k % 4 * 8));
      }
    }
    for (int i = 0; i < 64; i += 4) {
      for (int other = 0; other < 2; ++other) {
        const int token = i * 2 + lane % 4 * 2 + other;
        for (int k = 0; k < 32; ++k) b[k] = operand_bits<uint8_t>(products[p].b, token, k);
        for (int row = 0; row < 2; ++row) {
          float& sum = mine.sums[i + other + 2 * row];
          sum = add_e4m3(products[p].add ? sum : 0, a[row], b);
        }
      }
    }
  }
}

inline void wgmma_fence() {}
inline void start_product(float* d, int size, const uint32_t* a, uint64_t b, bool add,
                          void (*run)(Pipeline&, const std::vector<Product>&)) {
  Pipeline& mine = my_pipeline();
  if (mine.d == nullptr) {
    mine.d = d, mine.sums.assign(d, d + size);
    std::fill(d, d + size, NAN);
  }
  if (mine.d != d) emulate::fail("products of two sums under way");
  mine.run = run;
  mine.open.push_back({{a[0], a[1], a[2], a[3]}, a, b, add});
}
template <class T, int kSize>
inline void wgmma(float (&d)[kSize], const uint32_t* a, uint64_t b) {
  start_product(d, kSize, a, b, true, run_products<T, kSize>);
}
template <bool kAdd>
inline void wgmma_e4m3(float (&d)[64], const uint32_t* a, uint64_t b) {
  start_product(d, 64, a, b, kAdd, run_e4m3_products);
}
inline void wgmma_commit() {
  my_pipeline().groups.push_back(my_pipeline().open);
  my_pipeline().open.clear();
}
template <int kPending>
inline void wgmma_wait() {
  Pipeline& mine = my_pipeline();
  while (int(mine.groups.size()) > kPending) {
    emulate::wait_warp();
    mine.run(mine, mine.groups.front());
    emulate::wait_warp();
    mine.groups.erase(mine.groups.begin());
  }
  if (mine.groups.empty() && mine.open.empty() && mine.d != nullptr) {
    std::copy(mine.sums.begin(), mine.sums.end(), mine.d);
    mine.d = nullptr;
  }
}

}  // namespace ptx
}  // namespace cuda
}  // namespace mixbits
