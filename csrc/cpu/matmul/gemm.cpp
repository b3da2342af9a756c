// The gemm path of packed_matmul: many tokens, with 512-bit dot products of 8 or 16 bits.
//
// An item of work is a panel of 32 rows. It is decoded, some thousand columns at a time, into a
// buffer that stays in L2, and multiplied there with all tokens. Lanes are rows:
//
//   panel    [dword][32 rows] of 4 bytes: four int8, two int16 or two bfloat16 of one row
//   token    [dword]          of 4 bytes: the same columns, broadcast to all lanes
//
// so one instruction adds 16 rows x (2 or 4) columns for one token, and no sum is across lanes.
// Which columns share a dword follows from how codes are packed: a dword of a packed row holds
// 32 / bits of them, and after a shift its bytes (or words) have one code each,
//
//   bits 4, bytes    columns 0 2 4 6 | 1 3 5 7            (2 dwords)
//   bits 4, words    columns 0 4 | 1 5 | 2 6 | 3 7        (4 dwords)
//
// Integers are summed within a block of 32 columns and then meet the scales of rows and token.
// bfloat16 tokens have no scale, so that a sum may go on while the rows' scales last, and int8
// weights are unsigned (see dot.cpp).
//
// Scales of MX blocks are powers of two. For very many tokens they are multiplied into a bfloat16
// panel, which is exact, and the sum goes on through all of it.
#include "panel.h"

namespace mixbits {
namespace MB_ISA {

#if !defined(__AVX512VNNI__)

const Path* gemm_path(const SegmentWeight&, const Tokens&, bool) { return nullptr; }

#else

namespace {

constexpr int kPanelRows = kSumRows;
constexpr int kChunkBlocks = 128;  // a panel has this many blocks of 32 columns at a time
constexpr int kTileM = 6;          // 12 sums, 12 totals and operands fill the 32 registers
constexpr int kRowVectors = kPanelRows / 16;
constexpr int kFoldTokens = 64;  // so many pay for multiplying scales into a panel

// --- tokens -------------------------------------------------------------------------------------

// A prepared token: dwords of all blocks, then scales, then starts. Of integers, then further terms
// (activations.h), which are as many blocks at most, and the numbers of the blocks that they are
// of.
template <class A>
struct Token {
  struct Part {
    int32_t* dwords;
    float* scales;
    int32_t* starts;

    Part(int32_t* p, int64_t blocks)
        : dwords(p),
          scales(reinterpret_cast<float*>(p + blocks * block_dwords<A>())),
          starts(p + blocks * (block_dwords<A>() + 1)) {}
  };
  const Part first;
  int32_t *const term_count, *const blocks_of;
  const Part terms;

  Token(const char* p, int64_t blocks)
      : first(const_cast<int32_t*>(reinterpret_cast<const int32_t*>(p)), blocks),
        term_count(first.starts + blocks),
        blocks_of(term_count + 1),
        terms(blocks_of + blocks, blocks) {}
};

template <class A>
int64_t token_bytes(const SegmentWeight& segment, int64_t columns) {
  const int64_t blocks = group_count(columns, kBlock), dwords = blocks * (block_dwords<A>() + 2);
  const bool has_terms = A::kScaledTokens && !segment.activation_code;
  // A cache line more: tokens that are a power of two apart would share cache sets.
  return round_up((has_terms ? 2 * dwords + blocks + 1 : dwords + 1) * 4, 64) + 64;
}

// The order of a block's elements that shifted dwords of `BITS`-bit codes have.
template <int BITS, class T>
MB_INLINE void order_block(const T* in, T* out) {
  constexpr int parts = 4 / int(sizeof(T)), shifts = 8 * int(sizeof(T)) / BITS;
  for (int first = 0; first < kBlock; first += parts * shifts) {
    for (int i = 0; i < shifts; ++i) {
      for (int t = 0; t < parts; ++t) out[first + i * parts + t] = in[first + i + t * shifts];
    }
  }
}

// Integers of a block in the order of `A`; the sum of them.
template <class A, int BITS>
MB_INLINE int32_t store_integers(const int32_t* values, int32_t* out) {
  alignas(64) int16_t natural[kBlock], ordered[kBlock];
  int32_t sum = 0;
  for (int i = 0; i < kBlock; ++i) {
    natural[i] = int16_t(values[i]);
    sum += values[i];
  }
  if (A::kWidth == 2) {
    order_block<BITS>(natural, ordered);
    memcpy(out, ordered, sizeof(ordered));
  } else {
    alignas(64) int8_t bytes[kBlock], ordered_bytes[kBlock];
    for (int i = 0; i < kBlock; ++i) bytes[i] = int8_t(values[i]);
    order_block<BITS>(bytes, ordered_bytes);
    memcpy(out, ordered_bytes, sizeof(ordered_bytes));
  }
  return sum;
}

template <class A, int BITS, int KIND>
bool prepare_integers(const SegmentWeight& segment, const Tokens& tokens, int64_t m, float* floats,
                      char* out) {
  tokens.load(m, floats);
  const int64_t blocks = group_count(tokens.columns, kBlock);
  memset(floats + tokens.columns, 0, (blocks * kBlock - tokens.columns) * sizeof(float));
  const Token<A> token(out, blocks);
  const float weight_scale = integer_unit(segment.element());
  const int32_t offset = -code_offset(segment.element());
  int32_t terms = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t at = b;
    for (const auto* part = &token.first;; part = &token.terms, at = terms++) {
      alignas(64) int32_t values[kBlock];
      float scale;
      const Fit fit = integer_block(floats + b * kBlock, Integers(KIND), segment.activation,
                                    tokens.dtype, values, &scale);
      const int32_t sum = store_integers<A, BITS>(values, part->dwords + at * block_dwords<A>());
      part->scales[at] = scale * weight_scale;
      part->starts[at] = offset * sum;
      if (fit == kEnough) break;
      if (fit == kUnfit || terms == blocks) return false;
      token.blocks_of[terms] = int32_t(b);
    }
  }
  *token.term_count = terms;
  return true;
}

// --- panels -------------------------------------------------------------------------------------

// What an item of work needs beside the prepared tokens, in its scratch memory.
struct Panel {
  __m512i* dwords;   // [kChunkBlocks * dwords per block][kRowVectors]
  float* scales;     // [blocks][kPanelRows]
  int32_t* offsets;  // [groups][kPanelRows], each twice in 16 bits; only with zero points
  float* rows;       // [16][blocks], the scales of 16 rows
  int group;         // a sum goes on for so many blocks, the last of which has the scale
};

template <class A>
Panel lay_out(char* p, int64_t padded_blocks, int64_t* bytes) {
  Panel panel;
  char* const start = p;
  const auto take = [&p](int64_t size) {
    char* at = p;
    p += round_up(size, 64);
    return at;
  };
  panel.dwords =
      reinterpret_cast<__m512i*>(take(int64_t(kChunkBlocks) * block_dwords<A>() * kPanelRows * 4));
  panel.scales = reinterpret_cast<float*>(take(padded_blocks * kPanelRows * 4));
  panel.offsets = reinterpret_cast<int32_t*>(take(padded_blocks * kPanelRows * 4));
  panel.rows = reinterpret_cast<float*>(take(padded_blocks * 16 * 4));
  panel.group = 1;
  *bytes = p - start;
  return panel;
}

int64_t padded_blocks(int64_t columns) { return round_up(group_count(columns, kBlock), 16); }

template <class A>
int64_t scratch_bytes(const SegmentWeight&, const Tokens& tokens) {
  int64_t bytes;
  lay_out<A>(nullptr, padded_blocks(tokens.columns), &bytes);
  return bytes;
}

// The scales of 16 rows, per block -> [block][kPanelRows].
MB_INLINE void transpose_scales(const float* rows, int64_t stride, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; b += 16) {
    __m512i v[16];
    for (int r = 0; r < 16; ++r) v[r] = _mm512_loadu_si512(rows + r * stride + b);
    transpose(v);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + (b + i) * kPanelRows, v[i]);
  }
}

// A row's scales, one per block. `out` has room for padded_blocks().
template <int ELEMENT>
MB_INLINE void decode_block_scales(const PackedRow& row, int64_t blocks, int group_size,
                                   float* out) {
  decode_scales<ELEMENT>(row, group_count(blocks * kBlock, group_size), out);
  const int shift = log2_of(group_size / kBlock);
  if (shift == 0) return;
  for (int64_t b = blocks - 1; b > 0; --b) out[b] = out[b >> shift];
}

template <int ELEMENT>
void decode_panel_scales(const SegmentWeight& segment, int64_t first, int64_t last,
                         const Panel& panel) {
  const int group_size = segment.weight.format.group_size;
  const int64_t blocks = group_count(segment.weight.columns, kBlock);
  const int64_t stride = padded_blocks(segment.weight.columns);
  const int64_t groups = group_count(segment.weight.columns, group_size);
  for (int r = 0; r < kPanelRows; ++r) {
    const PackedRow row = segment.weight.row(min64(first + r, last - 1));
    decode_block_scales<ELEMENT>(row, blocks, group_size, panel.rows + r % 16 * stride);
    if (r % 16 == 15) transpose_scales(panel.rows, stride, blocks, panel.scales + r - 15);
    if (!row.zero_points) continue;
    for (int64_t g = 0; g < groups; ++g) {
      const int zero_point = unpack_code(row.zero_points, g, element_bits(ELEMENT));
      panel.offsets[g * kPanelRows + r] = zero_point << 16 | zero_point;
    }
  }
}

// Codes of the blocks [first_block, ...) of 32 rows -> panel.dwords.
template <class A, int ELEMENT>
void decode_panel(const SegmentWeight& segment, int64_t first, int64_t last, int64_t first_block,
                  int64_t blocks, const Decoder<A, ELEMENT>& decoder, const Panel& panel) {
  constexpr int bits = element_bits(ELEMENT), per_dword = A::kWidth * 8 / bits;
  const int64_t row_bytes = packed_bytes(segment.weight.columns, bits);
  const int64_t begin = first_block * kBlock * bits / 8;
  const int64_t bytes = min64(blocks * kBlock * bits / 8, row_bytes - begin);
  const int64_t padded = blocks * kBlock * bits / 8;  // a short last block goes on with zeros
  const int group_dwords = segment.weight.format.group_size * bits / 32;
  const int half = is_mx(ELEMENT) ? 0 : 1 << (bits - 1);
  for (int vector = 0; vector < kRowVectors; ++vector) {
    __m512i offset = _mm512_set1_epi32(half << 16 | half);
    for (int64_t at = 0; at < bytes; at += 64) {
      const __mmask64 valid = bytes - at >= 64 ? ~0ull : (1ull << (bytes - at)) - 1;
      __m512i codes[16];
      for (int r = 0; r < 16; ++r) {
        const int64_t n = min64(first + vector * 16 + r, last - 1);
        codes[r] =
            _mm512_maskz_loadu_epi8(valid, segment.weight.codes + n * row_bytes + begin + at);
      }
      transpose(codes);
      __m512i* out = panel.dwords + at / 4 * per_dword * kRowVectors + vector;
      for (int i = 0; i < 16 && at + i * 4 < padded; ++i) {
        if (segment.weight.zero_points) {
          const int64_t group = ((begin + at) / 4 + i) / group_dwords;
          offset = _mm512_load_si512(panel.offsets + group * kPanelRows + vector * 16);
        }
        decoder.store(codes[i], offset, out + i * per_dword * kRowVectors, kRowVectors);
      }
    }
  }
}

#if defined(MB_BFLOAT16)
// Multiplies a panel of bfloat16 by its blocks' scales, powers of two, by adding to exponents.
// False when one is outside 2^-27 .. 2^60: what vdpbf16ps takes for zero would begin to count.
bool fold_scales(const Panel& panel, int64_t first, int64_t blocks) {
  float* const scales = panel.scales + first * kPanelRows;
  for (int64_t i = 0; i < blocks * kPanelRows; ++i) {
    if (!(scales[i] >= 0x1p-27f && scales[i] <= 0x1p60f)) return false;
  }
  const __m512i one = _mm512_set1_epi32(bit_cast<int32_t>(1.0f));
  const __m512i special = _mm512_set1_epi16(0x7f7f);  // of magnitudes less one: 0, inf and nan
  __m512i* w = panel.dwords;
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i power[kRowVectors];
    for (int v = 0; v < kRowVectors; ++v) {
      float* const scale = scales + b * kPanelRows + v * 16;
      const __m512i bits = _mm512_srai_epi32(_mm512_sub_epi32(_mm512_loadu_si512(scale), one), 16);
      power[v] = _mm512_or_si512(and_mask(bits, 0xffff), _mm512_slli_epi32(bits, 16));
      _mm512_storeu_si512(scale, one);
    }
    for (int d = 0; d < block_dwords<Bf16>(); ++d) {
      for (int v = 0; v < kRowVectors; ++v, ++w) {
        const __m512i value = _mm512_load_si512(w);
        const __m512i less = _mm512_sub_epi16(and_mask(value, 0x7fff7fff), _mm512_set1_epi16(1));
        const __mmask32 finite = _mm512_cmplt_epu16_mask(less, special);
        _mm512_store_si512(w, _mm512_mask_add_epi16(value, finite, value, power[v]));
      }
    }
  }
  return true;
}
#endif

// --- multiplication -----------------------------------------------------------------------------

// sums += M tokens times the panel's blocks, which are `first` and following.
template <class A, int M>
void multiply_tile(const Work& work, int64_t m, const Panel& panel, int64_t first, int64_t blocks,
                   Sums sums) {
  constexpr int dwords = block_dwords<A>();
  const int64_t all = group_count(work.tokens.columns, kBlock);
  const int32_t* x[M];
  const int64_t scales_at = all * dwords, starts_at = scales_at + all;
  for (int i = 0; i < M; ++i) {
    x[i] = Token<A>(work.prepared + (m + i) * work.stride, all).first.dwords;
  }
  float* totals = sums.data + m * sums.stride;
  __m512 total[M][kRowVectors];
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < kRowVectors; ++v)
      total[i][v] = _mm512_loadu_ps(totals + i * sums.stride + v * 16);
  }
  const __m512i* w = panel.dwords;
  typename A::Sum sum[M][kRowVectors];
  bool begin = true;
  for (int64_t b = first; b < first + blocks; ++b) {
    for (int i = 0; begin && i < M; ++i) {
      for (int v = 0; v < kRowVectors; ++v) sum[i][v] = A::start(x[i] + starts_at + b);
    }
    for (int d = 0; d < dwords; ++d, w += kRowVectors) {
      for (int i = 0; i < M; ++i) {
        const __m512i token = _mm512_set1_epi32(x[i][b * dwords + d]);
        for (int v = 0; v < kRowVectors; ++v) sum[i][v] = A::dot(sum[i][v], w[v], token);
      }
    }
    begin = (b + 1) % panel.group == 0 || b + 1 == first + blocks;
    if (!begin) continue;
    for (int v = 0; v < kRowVectors; ++v) {
      const __m512 scale = _mm512_loadu_ps(panel.scales + b * kPanelRows + v * 16);
      for (int i = 0; i < M; ++i) {
        const float token_scale = bit_cast<float>(x[i][scales_at + b]);
        total[i][v] = add_scaled(sum[i][v], scale, token_scale, total[i][v]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < kRowVectors; ++v)
      _mm512_storeu_ps(totals + i * sums.stride + v * 16, total[i][v]);
  }
}

// sums += a token's further terms times the panel's blocks, which are `first` and following.
template <class A>
void add_terms(const Token<A>& token, const Panel& panel, int64_t first, int64_t blocks,
               float* sums) {
  constexpr int dwords = block_dwords<A>();
  for (int32_t i = 0; i < *token.term_count; ++i) {
    const int64_t b = token.blocks_of[i] - first;
    if (b < 0 || b >= blocks) continue;
    const int32_t* const x = token.terms.dwords + i * dwords;
    const __m512i* w = panel.dwords + b * dwords * kRowVectors;
    // Two sums of each vector of rows, so that one addition need not wait for the last.
    typename A::Sum sum[2][kRowVectors];
    for (int v = 0; v < kRowVectors; ++v) {
      sum[0][v] = A::start(token.terms.starts + i);
      sum[1][v] = _mm512_setzero_si512();
    }
    for (int d = 0; d < dwords; ++d, w += kRowVectors) {
      const __m512i dword = _mm512_set1_epi32(x[d]);
      for (int v = 0; v < kRowVectors; ++v) sum[d % 2][v] = A::dot(sum[d % 2][v], w[v], dword);
    }
    for (int v = 0; v < kRowVectors; ++v) {
      const __m512 scale = _mm512_loadu_ps(panel.scales + (first + b) * kPanelRows + v * 16);
      const __m512i all = _mm512_add_epi32(sum[0][v], sum[1][v]);
      const __m512 total = _mm512_loadu_ps(sums + v * 16);
      _mm512_storeu_ps(sums + v * 16, add_scaled(all, scale, token.terms.scales[i], total));
    }
  }
}

template <class A>
void multiply_tokens(const Work& work, const Panel& panel, int64_t first, int64_t blocks,
                     Sums sums) {
  // Tiles of nearly equal height, rather than a last one that is nearly empty.
  const int64_t tiles = (work.tokens.count + kTileM - 1) / kTileM;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m = tile * work.tokens.count / tiles;
    const int64_t end = (tile + 1) * work.tokens.count / tiles;
    with_count<kTileM>(end - m, [&](auto tag) {
      multiply_tile<A, decltype(tag)::value>(work, m, panel, first, blocks, sums);
    });
    if constexpr (A::kScaledTokens) {
      for (int64_t i = m; i < end; ++i) {
        const Token<A> token(work.prepared + i * work.stride,
                             group_count(work.tokens.columns, kBlock));
        add_terms<A>(token, panel, first, blocks, sums.data + i * sums.stride);
      }
    }
  }
}

template <class A, int ELEMENT>
void multiply(const Work& work, int64_t first_row, int64_t last_row, Sums sums, char* scratch) {
  const SegmentWeight& segment = work.segment;
  const int64_t blocks = group_count(work.tokens.columns, kBlock);
  int64_t bytes;
  Panel panel = lay_out<A>(scratch, padded_blocks(work.tokens.columns), &bytes);
  static const Decoder<A, ELEMENT> decoder;
  decode_panel_scales<ELEMENT>(segment, first_row, last_row, panel);
  for (int64_t first = 0; first < blocks; first += kChunkBlocks) {
    const int64_t count = min64(blocks - first, kChunkBlocks);
    decode_panel<A, ELEMENT>(segment, first_row, last_row, first, count, decoder, panel);
    panel.group = A::kScaledTokens ? 1 : segment.weight.format.group_size / kBlock;
#if defined(MB_BFLOAT16)
    if constexpr (is_mx(ELEMENT) && !A::kScaledTokens) {
      if (work.tokens.count >= kFoldTokens && fold_scales(panel, first, count))
        panel.group = kChunkBlocks;
    }
#endif
    multiply_tokens<A>(work, panel, first, count, sums);
  }
}

int64_t panel_rows(const SegmentWeight&, const Tokens&) { return kPanelRows; }

template <class A, int ELEMENT, int KIND>
constexpr Path kIntegers = {
    token_bytes<A>,       prepare_integers<A, element_bits(ELEMENT), KIND>,
    scratch_bytes<A>,     panel_rows,
    multiply<A, ELEMENT>,
};

#if defined(MB_BFLOAT16)
template <int BITS>
bool prepare_bfloat16(const SegmentWeight& segment, const Tokens& tokens, int64_t m, float* floats,
                      char* out) {
  float_token(segment, tokens, m, floats);
  const int64_t padded = round_up(tokens.columns, kBlock);
  uint16_t* natural = reinterpret_cast<uint16_t*>(floats);  // behind what has been read
  if (!narrow_to_bfloat16(floats, padded, natural)) return false;
  for (int64_t k = 0; k < padded; k += kBlock) {
    uint16_t ordered[kBlock];
    order_block<BITS>(natural + k, ordered);
    memcpy(out + k * 2, ordered, sizeof(ordered));
  }
  return true;
}

template <int ELEMENT>
constexpr Path kBf16 = {
    token_bytes<Bf16>,       prepare_bfloat16<element_bits(ELEMENT)>,
    scratch_bytes<Bf16>,     panel_rows,
    multiply<Bf16, ELEMENT>,
};

template <int ELEMENT>
const Path* bfloat16_path() {
  return &kBf16<ELEMENT>;
}
#else
template <int ELEMENT>
const Path* bfloat16_path() {
  return nullptr;
}
#endif

bool can_be_bfloat16(const SegmentWeight& segment, int dtype) {
#if defined(MB_BFLOAT16)
  return has_bfloat16_activations(segment, dtype);
#else
  (void)segment, (void)dtype;
  return false;
#endif
}

// Whether codes of a packed dword become a panel's integers, and groups are whole blocks.
constexpr bool has_integer_panel(int element) {
  return has_integer_codes(element) && element != kNVE2M1 && element != kMXInt8 &&
         lower_bits(element_bits(element)) == element_bits(element);
}

template <int ELEMENT>
const Path* path_of(const SegmentWeight& segment, const Tokens& tokens, bool int8_activations) {
  if constexpr (has_integer_panel(ELEMENT)) {
    if (has_integer_activations(segment)) {
      const Integers kind = integers_for(segment, tokens.dtype, int8_activations);
      // Unsigned bytes cannot be counted from a zero point.
      if (!segment.weight.zero_points) {
        if (kind == kE2M1Codes) return &kIntegers<Int8, ELEMENT, kE2M1Codes>;
        if (kind == kMXInt8Codes) return &kIntegers<Int8, ELEMENT, kMXInt8Codes>;
        if (kind == kInt8Values) return &kIntegers<Int8, ELEMENT, kInt8Values>;
      }
      if (can_be_bfloat16(segment, tokens.dtype)) return bfloat16_path<ELEMENT>();
      if (!segment.activation_code && tokens.dtype != kFloat32)
        return &kIntegers<Int16, ELEMENT, kInt16Values>;
    }
  }
  if constexpr (has_integer_panel(ELEMENT) || ELEMENT == kE4M3 || ELEMENT == kE5M2) {
    if (can_be_bfloat16(segment, tokens.dtype)) return bfloat16_path<ELEMENT>();
  }
  return nullptr;
}

}  // namespace

const Path* gemm_path(const SegmentWeight& segment, const Tokens& tokens, bool int8_activations) {
  const Path* path = nullptr;
  with_element(segment.element(), [&](auto tag) {
    path = path_of<decltype(tag)::value>(segment, tokens, int8_activations);
  });
  return path;
}

#endif

}  // namespace MB_ISA
}  // namespace mixbits
