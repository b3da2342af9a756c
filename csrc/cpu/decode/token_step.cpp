// token_step: one new token of one sequence through all layers of a model, in one parallel region.
//
// Outside the matmuls a token is a few short rows. Every thread computes those for itself: the
// residual, norms, and the token as the paths of packed_matmul want it. Nothing has then to be
// handed out, and a layer has five phases that are shared, with a barrier behind each:
//
//   q, k, v | attention by key heads | o | gate, up | down
//
// A phase's results are rows that all threads read in the next one. They are written again no
// earlier than one barrier after that, when nobody reads them any more.
#include <omp.h>
#include <time.h>

#include "attention.h"
#include "cpu/matmul/matmul.h"
#include "cpu/ops.h"
#include "cpu/simd/team.h"

namespace mixbits {
namespace MB_ISA {

namespace {

constexpr int kPhases = 5;  // of a layer

// Hands out aligned pieces of memory; beginning at null, it measures what they need.
class Pieces {
 public:
  explicit Pieces(void* start) : at_(static_cast<char*>(start)) {}
  char* bytes(int64_t count) {
    char* piece = at_;
    at_ = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(at_) + round_up(count, 64));
    return piece;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(bytes(count * 4)); }
  int64_t used() const { return int64_t(reinterpret_cast<uintptr_t>(at_)); }

 private:
  char* at_;
};

double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

// --- linears ------------------------------------------------------------------------------------

// A linear and where its result goes.
struct Product {
  const StepLinear* linear;
  char* out;
};

// Bytes of a prepared token.
int64_t stride_of(const Work& work) {
  return round_up(work.path->token_bytes(work.segment, work.tokens.columns), 64);
}

// What a thread needs to multiply with any linear of a model.
struct Needs {
  int64_t prepared = 0, scratch = 0, columns = 0;

  // Linears with the same input.
  template <int N>
  void add(const StepLinear* const (&linears)[N], int64_t width, int dtype) {
    const Input input = {nullptr, 1, width, dtype};
    int64_t bytes = 0;
    for (const StepLinear* linear : linears) {
      Work works[kMaxSegments];
      const int count = make_works(linear->linear, input, linear->int8_activations, works);
      for (int i = 0; i < count; ++i) {
        // A token that the path cannot represent takes the float path.
        const Path* const paths[] = {works[i].path, float_path(1)};
        int64_t token = 0;
        for (const Path* path : paths) {
          works[i].path = path;
          token = larger(token, stride_of(works[i]));
          // Several works in one job need no more than the one that needs most.
          scratch = larger(scratch, make_job(works + i, 1, nullptr).scratch_bytes());
        }
        bytes += token;
      }
    }
    prepared = larger(prepared, bytes);
    columns = larger(columns, width);
  }

 private:
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
};

Needs needs_of(const StepModel& m) {
  Needs needs;
  for (const StepLayer* l = m.layers; l < m.layers + m.layer_count; ++l) {
    needs.add({&l->query, &l->key, &l->value}, m.hidden, m.dtype);
    needs.add({&l->output}, l->query.linear.rows, m.dtype);
    needs.add({&l->gate, &l->up}, m.hidden, m.dtype);
    needs.add({&l->down}, m.intermediate, m.dtype);
  }
  needs.add({&m.head}, m.hidden, m.dtype);
  return needs;
}

// --- memory -------------------------------------------------------------------------------------

// What the phases write and all threads read: rows of the model's dtype.
struct Rows {
  char *query, *key, *value, *attended, *gate, *up, *out;

  Rows(Pieces& pieces, const StepModel& m) {
    const int64_t size = dtype_bytes(m.dtype), keys = m.key_heads * m.head_width * size;
    query = pieces.bytes(keys * m.group);
    key = pieces.bytes(keys);
    value = pieces.bytes(keys);
    attended = pieces.bytes(keys * m.group);
    gate = pieces.bytes(m.intermediate * size);
    up = pieces.bytes(m.intermediate * size);
    out = pieces.bytes(m.hidden * size);
  }
};

// A thread's own memory. Float rows are long enough for whole runs.
struct Own {
  float *residual, *first, *second, *floats;                            // as wide as any token
  float *cos, *sin, *weight, *turned, *queries, *outs, *tile, *scores;  // of heads
  char *row, *prepared, *scratch;

  Own(Pieces& pieces, const Needs& needs, const Heads& heads) {
    const int64_t width = padded_columns(needs.columns), padded = heads.padded();
    residual = pieces.floats(width);
    first = pieces.floats(width);
    second = pieces.floats(width);
    floats = pieces.floats(width);
    cos = pieces.floats(padded);
    sin = pieces.floats(padded);
    weight = pieces.floats(padded);
    turned = pieces.floats(padded);
    queries = pieces.floats(heads.group * padded);
    outs = pieces.floats(heads.group * padded);
    tile = pieces.floats(kTile * padded);
    scores = pieces.floats(heads.group * heads.score_stride());
    row = pieces.bytes(needs.columns * dtype_bytes(heads.dtype));
    prepared = pieces.bytes(needs.prepared);
    scratch = pieces.bytes(needs.scratch);
  }
};

// --- one thread of a step -----------------------------------------------------------------------

struct Worker {
  const StepArgs& args;
  const StepModel& model;
  const Heads heads;
  const Rows rows;
  const Own own;
  Counter* counters;  // of the next phase
  Barrier& barrier;
  const int threads, me;

  void run() {
    load_row(args.x, model.hidden, model.dtype, own.residual);
    load_row(args.cos, model.head_width, model.dtype, own.cos);
    load_row(args.sin, model.head_width, model.dtype, own.sin);
    for (int i = 0; i < model.layer_count; ++i) run_layer(model.layers[i], args.caches[i]);
    normalize(model.norm);
    multiply({{&model.head, static_cast<char*>(args.logits)}}, own.row, model.hidden);
  }

  void run_layer(const StepLayer& l, const StepCache& cache) {
    normalize(l.input_norm);
    multiply({{&l.query, rows.query}, {&l.key, rows.key}, {&l.value, rows.value}}, own.row,
             model.hidden);
    share(model.key_heads, [&](int64_t head) { attend_head(l, cache, head); });
    multiply({{&l.output, rows.out}}, rows.attended, l.query.linear.rows);
    add_output(l.output);
    normalize(l.attention_norm);
    multiply({{&l.gate, rows.gate}, {&l.up, rows.up}}, own.row, model.hidden);
    load_output(l.gate, rows.gate, 0, model.intermediate, own.first);
    load_output(l.up, rows.up, 0, model.intermediate, own.second);
    silu_times(own.first, own.second, model.intermediate, model.dtype);
    store_row(own.first, model.intermediate, model.dtype, own.row);
    multiply({{&l.down, rows.out}}, own.row, model.intermediate);
    add_output(l.down);
  }

  // A phase: items that are done by whichever thread comes first, until all are.
  template <class F>
  void share(int64_t items, const F& do_item) {
    deal_out(counters, items, threads, me, do_item);
    counters += threads;
    barrier.wait(threads);
  }

  // The residual, normalized -> own.row.
  void normalize(const void* weight) {
    load_row(weight, model.hidden, model.dtype, own.second);
    rms_norm(own.residual, own.second, model.hidden, model.eps, model.dtype, own.first);
    store_row(own.first, model.hidden, model.dtype, own.row);
  }

  // `count` results of a linear from number `first` on, with its bias.
  void load_output(const StepLinear& linear, const char* out, int64_t first, int64_t count,
                   float* x) {
    const int64_t at = first * dtype_bytes(model.dtype);
    load_row(out + at, count, model.dtype, x);
    if (!linear.bias) return;
    load_row(static_cast<const char*>(linear.bias) + at, count, model.dtype, own.floats);
    add_row(x, own.floats, count, model.dtype);
  }

  void add_output(const StepLinear& linear) {
    load_output(linear, rows.out, 0, model.hidden, own.first);
    add_row(own.residual, own.first, model.hidden, model.dtype);
  }

  // Prepares the token for works[number], unless one before it has the same. Returns the bytes of
  // `room` that it takes.
  int64_t prepare(Work* works, int number, char* room) const {
    Work& work = works[number];
    for (;; work.path = float_path(1)) {
      const Work* other = find_prepared(works, number, work);
      work.prepared = other ? other->prepared : room;
      work.stride = stride_of(work);
      if (other) return 0;
      if (work.path->prepare(work.segment, work.tokens, 0, own.floats, room)) return work.stride;
    }
  }

  // x, a row of the model's dtype, times linears that share it.
  template <int N>
  void multiply(const Product (&products)[N], const char* x, int64_t columns) {
    const double start = me == 0 && args.multiplying ? seconds_now() : 0;
    const Input input = {x, 1, columns, model.dtype};
    Work works[N * kMaxSegments];
    Job jobs[N];
    char* room = own.prepared;
    int64_t items = 0;
    int done = 0;
    for (int i = 0; i < N; ++i) {
      const StepLinear& linear = *products[i].linear;
      Work* const first = works + done;
      const int count = make_works(linear.linear, input, linear.int8_activations, first);
      for (int j = 0; j < count; ++j, ++done) room += prepare(works, done, room);
      jobs[i] = make_job(first, count, products[i].out);
      items += jobs[i].items;
    }
    deal_out(counters, items, threads, me,
             [&](int64_t item) { multiply_item(jobs, item, own.scratch); });
    if (me == 0 && args.multiplying) *args.multiplying += seconds_now() - start;
    counters += threads;
    barrier.wait(threads);
  }

  // The new key and value of a head go into the cache; then its query heads attend.
  void attend_head(const StepLayer& l, const StepCache& cache, int64_t head) {
    const int64_t width = model.head_width, size = dtype_bytes(model.dtype);
    const int64_t padded = heads.padded(), place = head * cache.capacity * width * size;
    char* keys = static_cast<char*>(cache.keys) + place;
    char* values = static_cast<char*>(cache.values) + place;
    load_head(l.key, rows.key, l.key_norm, head, own.queries);
    store_row(own.queries, width, model.dtype, keys + args.length * width * size);
    load_output(l.value, rows.value, head * width, width, own.queries);
    store_row(own.queries, width, model.dtype, values + args.length * width * size);
    const vf scaling = splat(model.scaling);
    for (int64_t g = 0; g < model.group; ++g) {
      float* query = own.queries + g * padded;
      load_head(l.query, rows.query, l.query_norm, head * model.group + g, query);
      for (int64_t i = 0; i < padded; i += kLanes) store(query + i, load(query + i) * scaling);
    }
    attend(heads, own.queries, keys, values, own.tile, own.scores, own.outs);
    for (int64_t g = 0; g < model.group; ++g)
      store_row(own.outs + g * padded, width, model.dtype,
                rows.attended + (head * model.group + g) * width * size);
  }

  // A head's query or key, normalized where the model does that, and turned to its position.
  void load_head(const StepLinear& linear, const char* out, const void* norm, int64_t head,
                 float* x) {
    const int64_t width = model.head_width;
    load_output(linear, out, head * width, width, x);
    if (norm) {
      load_row(norm, width, model.dtype, own.weight);
      rms_norm(x, own.weight, width, model.eps, model.dtype, x);
    }
    rotate_row(x, own.cos, own.sin, width, model.dtype, own.turned);
  }
};

}  // namespace

bool token_step(const StepArgs& a) {
  const StepModel& m = *a.model;
  const Heads heads = {m.group, m.head_width, a.length + 1, m.dtype};
  const Needs needs = needs_of(m);
  const int threads = omp_get_max_threads();
  const int64_t counters = (int64_t(m.layer_count) * kPhases + 1) * threads;
  Pieces sizes(nullptr);
  Rows(sizes, m);
  const int64_t shared = sizes.used();
  Own(sizes, needs, heads);
  const int64_t own = sizes.used() - shared + 64;  // a line between threads
  Scratch memory(shared + threads * own), zeros(counters * sizeof(Counter));
  if (!memory.data || !zeros.data) return false;
  memset(zeros.data, 0, counters * sizeof(Counter));
  Pieces pieces(memory.data);
  const Rows rows(pieces, m);
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num();
    Pieces ours(memory.bytes() + shared + me * own);
    Worker worker = {a,
                     m,
                     heads,
                     rows,
                     Own(ours, needs, heads),
                     static_cast<Counter*>(zeros.data),
                     barrier,
                     omp_get_num_threads(),
                     me};
    worker.run();
  }
  return true;
}

}  // namespace MB_ISA
}  // namespace mixbits
