// The float path of packed_matmul: weights become float32 again, for every element and dtype.
//
//   few tokens    a row of W is decoded in registers and multiplied there
//   many tokens   a panel of rows is decoded to float32, of about the size of L2, and multiplied
//                 with all tokens, kTileM x kTileN outputs at a time in registers
//
// Vector lanes run along k in both, so packed rows are read as they are stored, and a sum has
// kLanes partial sums that are added at the end.
#include "cpu/codes/span.h"
#include "matmul.h"

namespace mixbits {
namespace MB_ISA {

void float_token(const SegmentWeight& segment, const Tokens& tokens, int64_t m, float* out) {
  tokens.load(m, out);
  const int64_t padded = round_up(tokens.columns, kRun);
  memset(out + tokens.columns, 0, (padded - tokens.columns) * sizeof(float));
  if (!segment.activation_code) return;
  float span = 0;
  if (has_span(segment.activation.element))
    find_spans(out, 1, tokens.columns, kFloat32, &segment.activation_code, 1, &span);
  for (int64_t first = 0; first < tokens.columns; first += kRun) {
    const int count = int(min64(tokens.columns - first, kRun));
    alignas(64) float q[kRun];
    alignas(64) char rounded[kRun * sizeof(float)];
    fake_run(out + first, q, int(round_up(count, segment.activation.group_size)),
             segment.activation, span);
    store_row(q, count, tokens.dtype, rounded);
    load_row(rounded, count, tokens.dtype, out + first);
  }
}

namespace {

// As many accumulators as there are registers, less those for operands.
constexpr int kTileM = 6;
constexpr int kTileN = kLanes == 16 ? 4 : 2;
constexpr int64_t kPanelBytes = 512 * 1024;

// A cache line more than whole runs: rows that are a power of two apart would share the few ways
// of one cache set.
int64_t padded_stride(int64_t columns) { return round_up(columns, kRun) + 16; }

int64_t token_bytes(const SegmentWeight&, int64_t columns) {
  return padded_stride(columns) * int64_t(sizeof(float));
}

bool prepare(const SegmentWeight& segment, const Tokens& tokens, int64_t m, float*, char* out) {
  float_token(segment, tokens, m, reinterpret_cast<float*>(out));
  return true;
}

const float* token(const Work& work, int64_t m) {
  return reinterpret_cast<const float*>(work.prepared + m * work.stride);
}

// --- few tokens -----------------------------------------------------------------------------

template <int ELEMENT, int M>
void dot_row(const Work& work, int64_t n, float* out, int64_t stride) {
  constexpr int bits = element_bits(ELEMENT);
  const SegmentWeight& segment = work.segment;
  const PackedRow row = segment.weight.row(n);
  const int group_size = segment.weight.format.group_size;
  constexpr int vectors = ELEMENT == kNVE2M1 ? 16 / kLanes : 2;  // of a group, side by side
  // Two sums per token, so that one addition need not wait for the last.
  vf sums[M][2] = {};
  int64_t g = 0;
  for (int64_t first = 0; first < work.tokens.columns; first += kRun) {
    const int count = int(min64(work.tokens.columns - first, kRun));
    RunBytes bytes;
    run_bytes<bits>(row, first, count, &bytes);
    for (int k = 0; k < count; k += group_size, ++g) {
      const GroupValue group = group_value<ELEMENT>(row, g);
      for (int i = k; i < k + group_size; i += 2 * kLanes) {
        for (int half = 0; half < 2 && half < vectors; ++half) {
          const int at = i + half * kLanes;
          const vi codes = unpack<bits>(bytes.lower, bytes.upper, at);
          const vf w = decode<ELEMENT>(codes, group.offset) * group.scale;
          for (int m = 0; m < M; ++m) {
            sums[m][half] = fma(w, load(token(work, m) + first + at), sums[m][half]);
          }
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) out[m * stride] += sum_lanes(sums[m][0] + sums[m][1]);
}

template <int ELEMENT>
void dot_rows(const Work& work, int64_t first_row, int64_t last_row, Sums sums) {
  for (int64_t n = first_row; n < last_row; ++n) {
    float* out = sums.data + n - first_row;
    with_count<kFewTokens>(work.tokens.count, [&](auto tag) {
      dot_row<ELEMENT, decltype(tag)::value>(work, n, out, sums.stride);
    });
  }
}

void multiply_few(const Work& work, int64_t first_row, int64_t last_row, Sums sums, char*) {
  with_element(work.segment.element(),
               [&](auto tag) { dot_rows<decltype(tag)::value>(work, first_row, last_row, sums); });
}

// --- many tokens ----------------------------------------------------------------------------

// Columns that are summed on their own, so that fewer terms are added to a sum that is large.
constexpr int64_t kSpan = 512;

// out += M tokens times kTileN panel rows, all of k.
template <int M>
void multiply_tile(const Work& work, const float* panel, int64_t m, int rows, float* out,
                   int64_t out_stride) {
  const int64_t stride = work.stride / int64_t(sizeof(float)), columns = work.tokens.columns;
  const float* x = token(work, m);
  vf sums[M][kTileN] = {};
  for (int64_t first = 0; first < columns; first += kSpan) {
    vf parts[M][kTileN] = {};
    for (int64_t k = first; k < min64(first + kSpan, columns); k += kLanes) {
      vf w[kTileN];
      for (int j = 0; j < kTileN; ++j) w[j] = load(panel + j * stride + k);
      for (int i = 0; i < M; ++i) {
        const vf v = load(x + i * stride + k);
        for (int j = 0; j < kTileN; ++j) parts[i][j] = fma(v, w[j], parts[i][j]);
      }
    }
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < kTileN; ++j) sums[i][j] += parts[i][j];
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < rows; ++j) out[i * out_stride + j] += sum_lanes(sums[i][j]);
  }
}

void multiply_panel(const Work& work, const float* panel, int64_t rows, Sums sums) {
  const int64_t stride = work.stride / int64_t(sizeof(float));
  for (int64_t m = 0; m < work.tokens.count; m += kTileM) {
    for (int64_t j = 0; j < rows; j += kTileN) {
      const float* w = panel + j * stride;
      const int tile_rows = int(min64(rows - j, kTileN));
      float* out = sums.data + m * sums.stride + j;
      with_count<kTileM>(work.tokens.count - m, [&](auto tag) {
        multiply_tile<decltype(tag)::value>(work, w, m, tile_rows, out, sums.stride);
      });
    }
  }
}

template <int ELEMENT>
void decode_panel(const PackedWeight& weight, int64_t first, int64_t rows, int64_t stride,
                  float* panel) {
  for (int64_t j = 0; j < rows; ++j) {
    const PackedRow row = weight.row(first + j);
    for (int64_t k = 0; k < weight.columns; k += kRun) {
      const int count = int(min64(weight.columns - k, kRun));
      decode_run<ELEMENT>(row, weight.format.group_size, k, count, panel + j * stride + k);
    }
  }
}

void multiply_many(const Work& work, int64_t first_row, int64_t last_row, Sums sums,
                   char* scratch) {
  const int64_t stride = work.stride / int64_t(sizeof(float));
  float* panel = reinterpret_cast<float*>(scratch);
  // A tile beyond the last row reads what lies there, and its sums are dropped.
  const int64_t rows = last_row - first_row, tiled = round_up(rows, kTileN);
  memset(panel + rows * stride, 0, (tiled - rows) * work.stride);
  with_element(work.segment.element(), [&](auto tag) {
    decode_panel<decltype(tag)::value>(work.segment.weight, first_row, rows, stride, panel);
  });
  multiply_panel(work, panel, rows, sums);
}

// A multiple of kTileN, of about kPanelBytes, and enough panels for a few threads.
int64_t panel_rows(const SegmentWeight& segment, const Tokens& tokens) {
  const int64_t fit = kPanelBytes / token_bytes(segment, tokens.columns);
  const int64_t share = min64(fit, (segment.rows + 7) / 8);
  return share < kTileN ? kTileN : share / kTileN * kTileN;
}

int64_t panel_bytes(const SegmentWeight& segment, const Tokens& tokens) {
  return panel_rows(segment, tokens) * token_bytes(segment, tokens.columns);
}

int64_t no_scratch(const SegmentWeight&, const Tokens&) { return 0; }
int64_t few_rows(const SegmentWeight&, const Tokens&) { return 16; }

constexpr Path kFew = {token_bytes, prepare, no_scratch, few_rows, multiply_few};
constexpr Path kMany = {token_bytes, prepare, panel_bytes, panel_rows, multiply_many};

}  // namespace

const Path* float_path(int64_t tokens) { return tokens <= kFewTokens ? &kFew : &kMany; }

}  // namespace MB_ISA
}  // namespace mixbits
