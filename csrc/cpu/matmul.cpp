// packed_matmul: out_i[m, n] = sum over k of x[m, k] * W_i[n, k], for some packed W_i at once.
//
// matmul.h has the idea. Here are the choice of a path, the preparation of tokens, and the
// distribution of work: one parallel region over items of some rows of one weight.
#include "matmul.h"

#include <omp.h>

#include "ops.h"
#include "team.h"

namespace mixbits {
namespace MB_ISA {

const Path* choose_path(const Target& target, const Tokens& tokens, bool int8_activations) {
  if (tokens.count > kFewTokens) {
    const Path* path = gemm_path(target, tokens, int8_activations);
    return path ? path : float_path(tokens.count);
  }
  const Path* path = integer_dot_path(target, tokens, int8_activations);
  if (!path) path = bfloat16_dot_path(target, tokens);
  return path ? path : float_path(tokens.count);
}

Job make_job(const Work& work, const Path* path) {
  const int64_t rows = path->item_rows(*work.target, *work.tokens);
  return {work, path, rows, (work.target->rows + rows - 1) / rows};
}

const Job* find_prepared(const Job* jobs, int count, const Path* path, const Target& target) {
  for (const Job* job = jobs; job < jobs + count; ++job) {
    const Target& other = *job->work.target;
    if (job->path == path && other.activation_code == target.activation_code &&
        other.element() == target.element() &&
        !other.weight.zero_points == !target.weight.zero_points)
      return job;
  }
  return nullptr;
}

void multiply_item(const Job* jobs, int64_t item, char* scratch) {
  while (item >= jobs->items) item -= jobs++->items;
  const int64_t first = item * jobs->item_rows;
  const int64_t last = min64(first + jobs->item_rows, jobs->work.target->rows);
  jobs->path->multiply(jobs->work, first, last, scratch);
}

namespace {

constexpr int kMaxTargets = 8;         // of one pass; more weights take several passes
constexpr int64_t kChunkTokens = 512;  // keeps prepared tokens small; decoding is 1/512 then
constexpr int64_t kSerialProducts = 32 * 1024;

// Prepares all tokens; false when some cannot be, or, with *no_memory, when there is none left.
bool prepare_tokens(const Path& path, const Target& target, const Tokens& tokens, bool serial,
                    int64_t stride, char* out, bool* no_memory) {
  const int64_t width = padded_columns(tokens.columns);
  const bool parallel = !serial && tokens.count > kFewTokens;
  Scratch floats((parallel ? omp_get_max_threads() : 1) * width * sizeof(float));
  *no_memory = !floats.data;
  if (*no_memory) return false;
  bool ok = true;
#pragma omp parallel for schedule(static) reduction(&& : ok) if (parallel)
  for (int64_t m = 0; m < tokens.count; ++m) {
    float* buffer = floats.floats() + (parallel ? omp_get_thread_num() : 0) * width;
    ok = path.prepare(target, tokens, m, buffer, out + m * stride) && ok;
  }
  return ok;
}

struct Pass {
  Job jobs[kMaxTargets];
  Scratch* prepared[kMaxTargets] = {};  // one per job that has tokens of its own
  int count = 0;

  ~Pass() {
    for (Scratch* scratch : prepared) delete scratch;
  }

  // Adds a job along `path`; false when tokens cannot be prepared or memory runs out.
  bool add(const Target& target, const Tokens& tokens, const Path* path, bool serial,
           bool* no_memory) {
    *no_memory = false;
    Work work = {&target, &tokens, nullptr, 0};
    if (const Job* other = find_prepared(jobs, count, path, target)) {
      work.prepared = other->work.prepared;
      work.stride = other->work.stride;
    } else {
      work.stride = path->token_bytes(target, tokens.columns);
      delete prepared[count];
      prepared[count] = new Scratch(tokens.count * work.stride);
      char* data = static_cast<char*>(prepared[count]->data);
      *no_memory = !data;
      if (!data || !prepare_tokens(*path, target, tokens, serial, work.stride, data, no_memory))
        return false;
      work.prepared = data;
    }
    jobs[count++] = make_job(work, path);
    return true;
  }

  bool run(bool serial) const {
    int64_t items = 0, bytes = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t need = jobs[i].path->scratch_bytes(*jobs[i].work.target, *jobs[i].work.tokens);
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

Target make_target(const MatmulTarget& t, int64_t columns, int64_t first_token, int out_bytes) {
  return {{t.codes, t.scales, t.zero_points, columns, decode_format(t.format)},
          static_cast<char*>(t.out) + first_token * t.rows * out_bytes,
          t.rows,
          t.activation,
          decode_format(t.activation)};
}

bool multiply_chunk(const MatmulArgs& a, int64_t first_token, int first_target) {
  const int size = dtype_bytes(a.dtype);
  const Tokens tokens = {static_cast<const char*>(a.x) + first_token * a.columns * size,
                         min64(a.tokens - first_token, kChunkTokens), a.columns, a.dtype};
  Target targets[kMaxTargets];
  Pass pass;
  int64_t rows = 0;
  const int count = int(min64(a.target_count - first_target, kMaxTargets));
  for (int i = 0; i < count; ++i) {
    targets[i] = make_target(a.targets[first_target + i], a.columns, first_token, size);
    rows += targets[i].rows;
  }
  const bool serial = tokens.count * rows * a.columns <= kSerialProducts;
  for (int i = 0; i < count; ++i) {
    const Path* path = choose_path(targets[i], tokens, a.int8_activations);
    bool no_memory = false;
    if (pass.add(targets[i], tokens, path, serial, &no_memory)) continue;
    if (no_memory || !pass.add(targets[i], tokens, float_path(tokens.count), serial, &no_memory))
      return false;
  }
  return pass.run(serial);
}

}  // namespace

bool packed_matmul(const MatmulArgs& a) {
  for (int64_t token = 0; token < a.tokens; token += kChunkTokens) {
    for (int target = 0; target < a.target_count; target += kMaxTargets) {
      if (!multiply_chunk(a, token, target)) return false;
    }
  }
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
