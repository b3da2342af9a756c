// packed_matmul: out_i[m, n] = sum over k of x[m, k] * W_i[n, k], for some packed W_i at once.
//
// matmul.h has the idea. Here are the choice of a path, the preparation of tokens, and the
// distribution of work: one parallel region over items of some rows of one linear.
#include "matmul.h"

#include <omp.h>

#include "cpu/ops.h"
#include "cpu/simd/team.h"

namespace mixbits {
namespace MB_ISA {

const Path* choose_path(const SegmentWeight& segment, const Tokens& tokens, bool int8_activations) {
  if (tokens.count > kFewTokens) {
    const Path* path = gemm_path(segment, tokens, int8_activations);
    return path ? path : float_path(tokens.count);
  }
  const Path* path = integer_dot_path(segment, tokens, int8_activations);
  if (!path) path = bfloat16_dot_path(segment, tokens);
  return path ? path : float_path(tokens.count);
}

int make_works(const Linear& linear, const Input& input, bool int8_activations, Work* works) {
  int64_t first = 0;
  for (int i = 0; i < linear.segment_count; ++i) {
    const PackedSegment& s = linear.segments[i];
    const Format format = decode_format(s.format);
    works[i] = {{{s.codes, s.scales, s.zero_points, s.divisor, s.columns, format},
                 linear.rows,
                 s.activation,
                 decode_format(s.activation)},
                {input, input.count, s.columns, first, linear.order, linear.order_bytes,
                 linear.rotated, linear.rotated ? int(kFloat32) : input.dtype},
                nullptr,
                nullptr,
                0};
    works[i].path =
        s.format ? choose_path(works[i].segment, works[i].tokens, int8_activations) : plain_path();
    first += s.columns;
  }
  return linear.segment_count;
}

const Work* find_prepared(const Work* works, int count, const Work& work) {
  const SegmentWeight& segment = work.segment;
  for (const Work* other = works; other < works + count; ++other) {
    const SegmentWeight& theirs = other->segment;
    if (other->path == work.path && theirs.activation_code == segment.activation_code &&
        theirs.element() == segment.element() &&
        !theirs.weight.zero_points == !segment.weight.zero_points &&
        other->tokens.equals(work.tokens))
      return other;
  }
  return nullptr;
}

// --- jobs ---------------------------------------------------------------------------------------

namespace {

int64_t rows_of(const Work& work) { return work.path->item_rows(work.segment, work.tokens); }
int64_t sum_stride(const Job& job) { return round_up(job.item_rows, kSumRows); }
int64_t sum_floats(const Job& job) { return job.works->tokens.count * sum_stride(job); }

}  // namespace

Job make_job(const Work* works, int count, void* out) {
  // Few tokens: items of any size do, and all segments together are to take as long as one. Else
  // the most, as a path with few rows may take several times as many.
  const bool few = works->tokens.count <= kFewTokens;
  int64_t rows = rows_of(works[0]);
  for (const Work* work = works + 1; work < works + count; ++work) {
    const int64_t other = rows_of(*work);
    rows = few ? round_up(rows * other / (rows + other), kMaxRows) : rows < other ? other : rows;
  }
  return {works, count, out, rows, (works->segment.rows + rows - 1) / rows};
}

int64_t Job::scratch_bytes() const {
  int64_t bytes = 0;
  for (const Work* work = works; work < works + work_count; ++work) {
    const int64_t need = work->path->scratch_bytes(work->segment, work->tokens);
    bytes = need > bytes ? need : bytes;
  }
  return sum_floats(*this) * int64_t(sizeof(float)) + bytes;
}

void multiply_item(const Job* jobs, int64_t item, char* scratch) {
  while (item >= jobs->items) item -= jobs++->items;
  const Job& job = *jobs;
  const int64_t rows = job.works->segment.rows, first = item * job.item_rows;
  const int64_t last = min64(first + job.item_rows, rows);
  const Sums sums = {reinterpret_cast<float*>(scratch), sum_stride(job)};
  char* rest = reinterpret_cast<char*>(sums.data + sum_floats(job));
  memset(sums.data, 0, sum_floats(job) * sizeof(float));
  for (const Work* work = job.works; work < job.works + job.work_count; ++work) {
    const int64_t step = rows_of(*work);
    for (int64_t row = first; row < last; row += step)
      work->path->multiply(*work, row, min64(row + step, last),
                           {sums.data + row - first, sums.stride}, rest);
  }
  const Input& input = job.works->tokens.input;
  char* out = static_cast<char*>(job.out) + first * dtype_bytes(input.dtype);
  for (int64_t m = 0; m < input.count; ++m)
    store_row(sums.data + m * sums.stride, last - first, input.dtype,
              out + m * rows * dtype_bytes(input.dtype));
}

// --- one call -----------------------------------------------------------------------------------

namespace {

constexpr int kMaxWorks = 2 * kMaxSegments;  // of one pass; more linears take several passes
constexpr int64_t kChunkTokens = 512;        // keeps prepared tokens small; decoding is 1/512 then
constexpr int64_t kSerialProducts = 32 * 1024;

// Prepares all tokens; false when some cannot be. `floats` is a buffer for every thread.
bool prepare_tokens(const Work& work, bool parallel, float* floats, int64_t width, char* out) {
  bool ok = true;
#pragma omp parallel for schedule(static) reduction(&& : ok) if (parallel)
  for (int64_t m = 0; m < work.tokens.count; ++m) {
    float* buffer = floats + (parallel ? omp_get_thread_num() : 0) * width;
    ok = work.path->prepare(work.segment, work.tokens, m, buffer, out + m * work.stride) && ok;
  }
  return ok;
}

struct Pass {
  Work works[kMaxWorks];
  Scratch* prepared[kMaxWorks] = {};  // one per work that has tokens of its own
  Job jobs[kMaxWorks];
  int work_count = 0, job_count = 0;
  const bool serial;

  explicit Pass(bool is_serial) : serial(is_serial) {}
  Pass(const Pass&) = delete;
  ~Pass() {
    for (Scratch* scratch : prepared) delete scratch;
  }

  bool has_room(const Linear& linear) const {
    return work_count + linear.segment_count <= kMaxWorks && job_count < kMaxWorks;
  }

  // False when memory runs out.
  bool add(const Linear& linear, const Input& input, bool int8_activations, void* out) {
    Work* const first = works + work_count;
    const int count = make_works(linear, input, int8_activations, first);
    for (int i = 0; i < count; ++i, ++work_count) {
      if (!prepare(first + i)) return false;
    }
    jobs[job_count++] = make_job(first, count, out);
    return true;
  }

  bool prepare(Work* work) {
    if (const Work* other = find_prepared(works, work_count, *work)) {
      work->prepared = other->prepared;
      work->stride = other->stride;
      return true;
    }
    const Tokens& tokens = work->tokens;
    const bool parallel = !serial && tokens.count > kFewTokens;
    const int64_t width = padded_columns(tokens.columns);
    const Scratch floats((parallel ? omp_get_max_threads() : 1) * width * sizeof(float));
    work->stride = work->path->token_bytes(work->segment, tokens.columns);
    delete prepared[work_count];
    prepared[work_count] = new Scratch(tokens.count * work->stride);
    char* data = static_cast<char*>(prepared[work_count]->data);
    if (!data || !floats.data) return false;
    work->prepared = data;
    if (prepare_tokens(*work, parallel, floats.floats(), width, data)) return true;
    work->path = float_path(tokens.count);  // which takes any
    return prepare(work);
  }

  bool run() const {
    int64_t items = 0, bytes = 0;
    for (int i = 0; i < job_count; ++i) {
      const int64_t need = jobs[i].scratch_bytes();
      bytes = need > bytes ? need : bytes;
      items += jobs[i].items;
    }
    bytes = round_up(bytes, 64) + 64;  // a line between threads
    const int threads = serial || items == 1 ? 1 : omp_get_max_threads();
    Scratch scratch(threads * bytes), memory(threads * sizeof(Counter));
    if (!scratch.data || !memory.data) return false;
    Counter* counters = static_cast<Counter*>(memory.data);
    memset(counters, 0, threads * sizeof(Counter));
#pragma omp parallel if (threads > 1)
    {
      const int me = omp_get_thread_num();
      char* own = static_cast<char*>(scratch.data) + me * bytes;
      deal_out(counters, items, threads, me, [&](int64_t item) { multiply_item(jobs, item, own); });
    }
    return true;
  }
};

// Multiplies tokens with as many linears as a pass takes, from number *target on; false when memory
// runs out.
bool multiply_some(const MatmulArgs& a, int64_t first_token, int* target) {
  const int size = dtype_bytes(a.dtype);
  const Input input = {static_cast<const char*>(a.x) + first_token * a.columns * size,
                       min64(a.tokens - first_token, kChunkTokens), a.columns, a.dtype};
  int64_t rows = 0;
  for (int i = *target; i < a.target_count; ++i) rows += a.targets[i].linear.rows;
  Pass pass(input.count * rows * a.columns <= kSerialProducts);
  for (; *target < a.target_count; ++*target) {
    const MatmulTarget& t = a.targets[*target];
    if (!pass.has_room(t.linear)) break;
    char* out = static_cast<char*>(t.out) + first_token * t.linear.rows * size;
    if (!pass.add(t.linear, input, a.int8_activations, out)) return false;
  }
  return pass.run();
}

}  // namespace

bool packed_matmul(const MatmulArgs& a) {
  for (int64_t token = 0; token < a.tokens; token += kChunkTokens) {
    for (int target = 0; target < a.target_count;) {
      if (!multiply_some(a, token, &target)) return false;
    }
  }
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
