// One vector abstraction for every instruction set: GCC vectors of kLanes floats or int32.
//
// Every file that includes this is compiled once per instruction set, with MB_ISA set to its name:
// scalar, avx2, avx512vnni or avx512bf16, whose flags are in setup.py. All code lives in namespace
// mixbits::MB_ISA and is static or a template: were an inline function shared, the linker could
// keep the AVX-512 copy for all. For the same reason no standard container or algorithm is used in
// these files.
//
// Code is written in these vectors, here and in the files that include this. Intrinsics stand only
// where the compiler does not find an instruction by itself: conversions of 16-bit floats,
// permuting and unpacking of bytes, dot products.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "formats.h"
#include "layout.h"

namespace mixbits {
namespace MB_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));
// Doubles come in halves of a float vector.
typedef double vd __attribute__((vector_size(kLanes * 4)));

#define MB_METHOD inline __attribute__((always_inline))
#define MB_INLINE static MB_METHOD

MB_INLINE vf splat(float x) { return x - (vf){}; }
MB_INLINE vi splat_i(int32_t x) { return x - (vi){}; }

// Modulo 2^32: for the bits of floats, where those of a NaN may go beyond int32.
MB_INLINE vi wrapping_add(vi a, vi b) { return vi(vu(a) + vu(b)); }

template <class V>
MB_INLINE V load_raw(const void* p) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class V>
MB_INLINE void store_raw(void* p, V v) {
  memcpy(p, &v, sizeof(v));
}
MB_INLINE vf load(const float* p) { return load_raw<vf>(p); }
MB_INLINE void store(float* p, vf v) { store_raw(p, v); }

MB_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// --- integers of other widths -------------------------------------------------------------------
//
// GCC's __builtin_convertvector goes lane by lane here, at a tenth of the speed.

MB_INLINE vi widen_bytes(vb v) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32((__m128i)v);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&v));
#else
  return __builtin_convertvector(v, vi);
#endif
}

MB_INLINE vi widen_halves(vh v) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, vi);
#endif
}

// Lanes from 0 to 65535.
MB_INLINE vh narrow_to_halves(vi v) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, vh);
#endif
}

// Lanes from 0 to 255.
MB_INLINE vb narrow_to_bytes(vi v) {
#if defined(__AVX512F__)
  return (vb)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
  const __m128i halves = (__m128i)narrow_to_halves(v);
  return bit_cast<vb>(_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves)));
#else
  return __builtin_convertvector(v, vb);
#endif
}

#if defined(__AVX2__)
MB_INLINE vh widen_to_halves(vb v) {
#if defined(__AVX512F__)
  return (vh)_mm256_cvtepu8_epi16((__m128i)v);
#else
  return (vh)_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)&v));
#endif
}

// To the nearest integer, ties to even; values beyond int32 are undefined.
MB_INLINE vi round_to_int(vf v) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)v);
#else
  return (vi)_mm256_cvtps_epi32((__m256)v);
#endif
}

MB_INLINE vf int_to_float(vi v) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps((__m512i)v);
#else
  return (vf)_mm256_cvtepi32_ps((__m256i)v);
#endif
}

// Lane i of the result is lane indices[i] of `v`.
MB_INLINE vf permute(vf v, vi indices) {
#if defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps((__m512i)indices, (__m512)v);
#else
  return (vf)_mm256_permutevar8x32_ps((__m256)v, (__m256i)indices);
#endif
}

// Byte i of the result is entry number (byte i of `indices`, at most 15) of the table.
MB_INLINE vi look_up(vi indices, __m128i table) {
#if defined(__AVX512F__)
  return (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)indices);
#else
  return (vi)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)indices);
#endif
}

// Byte i of the result is that of `a` where the top bit of byte i of `where` is set, else of `b`.
MB_INLINE vi select_bytes(vi where, vi a, vi b) {
#if defined(__AVX512F__)
  return (vi)_mm512_mask_blend_epi8(_mm512_movepi8_mask((__m512i)where), (__m512i)b, (__m512i)a);
#else
  return (vi)_mm256_blendv_epi8((__m256i)b, (__m256i)a, (__m256i)where);
#endif
}

// Each lane: acc + the sum of four products of an unsigned byte of `u` and a signed one of `s`.
// Without VNNI, the products of two neighbours must add up to less than 2^15.
MB_INLINE vi dot_bytes(vi acc, vi u, vi s) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)s);
#else
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)s);
  return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}
#endif

// The first or second half of the lanes, as doubles.
MB_INLINE vd widen_to_double(vf v, int half) {
#if defined(__AVX512F__)
  const __m512d lanes = _mm512_castps_pd((__m512)v);
  const __m256d part = half ? _mm512_extractf64x4_pd(lanes, 1) : _mm512_castpd512_pd256(lanes);
  return (vd)_mm512_cvtps_pd(_mm256_castpd_ps(part));
#elif defined(__AVX2__)
  const __m256 lanes = (__m256)v;
  return (vd)_mm256_cvtps_pd(half ? _mm256_extractf128_ps(lanes, 1)
                                  : _mm256_castps256_ps128(lanes));
#else
  return half ? (vd){v[2], v[3]} : (vd){v[0], v[1]};
#endif
}

// Sum of the lanes, always in the same order: halves onto each other.
MB_INLINE float sum_lanes(vf v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1));
  const __m256 eight = _mm512_castps512_ps256((__m512)v) + upper;
#else
  const __m256 eight = (__m256)v;
#endif
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// The value in a register, so that the compiler does not load it once for every use.
MB_INLINE vi in_register(vi v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
}

// --- loading and storing rows of any dtype ----------------------------------------------------

MB_INLINE vf to_float(vh h, int dtype) {
  if (dtype == kBFloat16) return bit_cast<vf>(vi(widen_halves(h) << 16));
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  vf out;
  for (int i = 0; i < kLanes; ++i) out[i] = half_to_float(h[i]);
  return out;
#endif
}

MB_INLINE vh from_float(vf x, int dtype) {
  if (dtype == kBFloat16) {
    const vi bits = bit_cast<vi>(x);
    const vi rounded = wrapping_add(bits, 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vi nan = splat_i(0x7fc0);
    return narrow_to_halves(((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded) & 0xffff);
  }
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vh out;
  for (int i = 0; i < kLanes; ++i) out[i] = float_to_half(x[i]);
  return out;
#endif
}

constexpr int dtype_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// `count` elements to float32, filled up with zeros to a multiple of kLanes; `out` has room.
template <int DTYPE>
static void load_row_as(const void* in, int64_t count, float* out) {
  constexpr int size = dtype_bytes(DTYPE);
  const char* p = static_cast<const char*>(in);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (DTYPE == kFloat32) {
      store(out + i, load_raw<vf>(p + i * size));
    } else {
      store(out + i, to_float(load_raw<vh>(p + i * size), DTYPE));
    }
  }
  if (i < count) {
    char rest[kLanes * size] = {};
    memcpy(rest, p + i * size, (count - i) * size);
    store(out + i, DTYPE == kFloat32 ? load_raw<vf>(rest) : to_float(load_raw<vh>(rest), DTYPE));
  }
}

template <int DTYPE>
static void store_row_as(const float* in, int64_t count, void* out) {
  constexpr int size = dtype_bytes(DTYPE);
  char* p = static_cast<char*>(out);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (DTYPE == kFloat32) {
      store_raw(p + i * size, load(in + i));
    } else {
      store_raw(p + i * size, from_float(load(in + i), DTYPE));
    }
  }
  if (i < count) {
    char rest[kLanes * 4];
    if (DTYPE == kFloat32) {
      store_raw(rest, load(in + i));
    } else {
      store_raw(rest, from_float(load(in + i), DTYPE));
    }
    memcpy(p + i * size, rest, (count - i) * size);
  }
}

static inline void load_row(const void* in, int64_t count, int dtype, float* out) {
  if (dtype == kBFloat16) return load_row_as<kBFloat16>(in, count, out);
  if (dtype == kFloat16) return load_row_as<kFloat16>(in, count, out);
  load_row_as<kFloat32>(in, count, out);
}

// `in` is readable to a multiple of kLanes.
static inline void store_row(const float* in, int64_t count, int dtype, void* out) {
  if (dtype == kBFloat16) return store_row_as<kBFloat16>(in, count, out);
  if (dtype == kFloat16) return store_row_as<kFloat16>(in, count, out);
  store_row_as<kFloat32>(in, count, out);
}

MB_INLINE void store_element(void* out, int dtype, int64_t at, float value) {
  if (dtype == kFloat32) {
    memcpy(static_cast<char*>(out) + at * 4, &value, 4);
  } else {
    const uint16_t h = dtype == kBFloat16 ? float_to_bfloat16(value) : float_to_half(value);
    memcpy(static_cast<char*>(out) + at * 2, &h, 2);
  }
}

// --- memory -------------------------------------------------------------------------------------

// Uninitialised memory aligned to a cache line, freed with its owner. `data` is null when there is
// none left; the caller checks that, before any parallel region.
struct Scratch {
  void* data;
  explicit Scratch(size_t bytes) : data(aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats() const { return static_cast<float*>(data); }
  double* doubles() const { return static_cast<double*>(data); }
  uint8_t* bytes() const { return static_cast<uint8_t*>(data); }
};

MB_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MB_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace MB_ISA
}  // namespace mixbits
