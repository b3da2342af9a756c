// Fuzzes the CPU kernels: any bytes choose an operation, an instruction set, a shape and formats,
// and are the content of all tensors.
//
//   fuzz SECONDS [SEED]   random inputs. Each is in ./fuzz-input while it runs, so that the file
//                         holds the one that failed; none is left when all is well
//   fuzz FILE             runs that input again
//   fuzz --fail           fails, for a test of the above
//
// With clang and -fsanitize=fuzzer -DMIXBITS_LIBFUZZER, libFuzzer chooses the inputs.
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include "token_step.h"

namespace mixbits {
namespace test {
namespace {

#define REQUIRE(condition, what)                                \
  do {                                                          \
    if (!(condition)) {                                         \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, what); \
      abort();                                                  \
    }                                                           \
  } while (0)

// --- input --------------------------------------------------------------------------------------

// The input's bytes; beyond its end, random ones that it determines.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size), rest_(hash(data, size)) {}

  uint8_t byte() {
    if (left_ == 0) return uint8_t(rest_.bits());
    --left_;
    return *data_++;
  }
  int below(int bound) { return (byte() | byte() << 8) % bound; }
  template <class C>
  auto choice(const C& from) {
    return from[below(int(from.size()))];
  }

  void fill(const Bytes& bytes) {
    for (int64_t i = 0; i < bytes.size(); ++i) bytes.data()[i] = byte();
  }

  // Numbers of a tensor: any bits, or those that real tensors have, or hard ones.
  void fill_tensor(const Bytes& tensor, int dtype) {
    const int style = below(4), power = below(256) - 128;
    if (style == 0) return fill(tensor);
    for (int64_t i = 0; i < tensor.size() / dtype_size(dtype); ++i) {
      const float number = float(int8_t(byte())) / 32;
      const bool special = style == 2 && byte() % 16 == 0;
      set(tensor, dtype, i,
          special      ? special_number()
          : style == 3 ? ldexpf(number, power)
                       : number);
    }
  }

  void fill_weight(const Weight& w) {
    fill(w.codes);
    fill(w.zero_points);
    const bool any = below(3) == 0, mx = is_mx(decode_format(w.format).element);
    fill(w.scales);
    if (any) return;
    // Else those that real weights have: no NaN, and near 1.
    for (int64_t i = mx ? 0 : 1; i < w.scales.size(); i += mx ? 1 : 2) {
      uint8_t& top = w.scales.data()[i];
      top = uint8_t(mx ? 100 + top % 40 : 0x20 + top % 0x18);
    }
  }

 private:
  static uint64_t hash(const uint8_t* data, size_t size) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; ++i) h = (h ^ data[i]) * 0x100000001b3u;
    return h;
  }
  float special_number() {
    static const float numbers[] = {0.0f,      -0.0f,    NAN,      INFINITY, -INFINITY, 0x1p-149f,
                                    0x1p-126f, 0x1p-24f, 65504.0f, 0x1p127f, -0x1p15f,  3.3e38f};
    return numbers[byte() % 12];
  }

  const uint8_t* data_;
  size_t left_;
  Random rest_;
};

// Often small, sometimes beyond a vector, a run, a panel or a chunk.
int any_columns(Input& in) {
  const int kind = in.below(16);
  return 1 + (kind < 8    ? in.below(70)
              : kind < 14 ? in.below(300)
              : kind < 15 ? in.below(1200)
                          : in.below(4300));
}
int any_tokens(Input& in) {
  const int kind = in.below(64);
  return 1 + (kind < 32 ? in.below(5) : kind < 63 ? in.below(24) : in.below(270));
}
int any_rows(Input& in) { return 1 + in.below(in.below(4) ? 20 : 90); }

// --- operations ---------------------------------------------------------------------------------

int any_format(Input& in) {
  static const std::vector<int> formats = all_formats();
  return in.choice(formats);
}

int any_format_of_weights(Input& in) {
  static const std::vector<int> formats = formats_of_weights();
  return in.choice(formats);
}

void same_numbers(const Bytes& a, const Bytes& b, int dtype, const char* what) {
  REQUIRE(first_difference(a, b, dtype) < 0, what);
}

// run(0) with an instruction set and some threads, run(1) with scalar and one.
template <class F>
void run_both(const char* isa, int threads, const F& run) {
  for (int i = 0; i < 2; ++i) {
    set_isa(i ? "scalar" : isa);
    omp_set_num_threads(i ? 1 : threads);
    run(i);
  }
}

// fake_quantize and dequantize(quantize_pack) give the same, with every instruction set.
void fuzz_rounding(Input& in, const char* isa, int threads) {
  const int64_t rows = any_rows(in), columns = any_columns(in);
  const int dtype = in.below(3), format = any_format_of_weights(in);
  const Bytes x(rows * columns * dtype_size(dtype), in.below(8));
  in.fill_tensor(x, dtype);
  Bytes outs[2], values[2];
  Weight packed[2];
  run_both(isa, threads, [&](int i) {
    outs[i] = Bytes(x.size(), in.below(8));
    values[i] = Bytes(x.size(), in.below(8));
    packed[i] = Weight(format, rows, columns, in.below(8));
    for (const Bytes* bytes :
         {&outs[i], &values[i], &packed[i].codes, &packed[i].scales, &packed[i].zero_points})
      bytes->fill(i ? 0xff : 0);
    REQUIRE(run_fake_quantize(x, outs[i], rows, columns, dtype, format), "no memory");
    REQUIRE(run_quantize_pack(x, packed[i], dtype), "no memory");
    REQUIRE(run_dequantize(packed[i], values[i], dtype), "no memory");
    same_numbers(values[i], outs[i], dtype, "the way through codes is another");
  });
  same_numbers(outs[0], outs[1], dtype, "fake_quantize is not that of scalar");
  REQUIRE(packed[0].equals(packed[1]), "quantize_pack is not that of scalar");
}

void fuzz_dequantize(Input& in, const char* isa, int threads) {
  const int dtype = in.below(3);
  const Weight w(any_format_of_weights(in), any_rows(in), any_columns(in), in.below(8));
  in.fill_weight(w);
  Bytes outs[2];
  run_both(isa, threads, [&](int i) {
    outs[i] = Bytes(w.rows * w.columns * dtype_size(dtype), in.below(8));
    outs[i].fill(i ? 0xff : 0);
    REQUIRE(run_dequantize(w, outs[i], dtype), "no memory");
  });
  same_numbers(outs[0], outs[1], dtype, "dequantize is not that of scalar");
}

void fuzz_statistics(Input& in, const char* isa, int threads) {
  const int64_t rows = any_rows(in), columns = any_columns(in);
  const int dtype = in.below(3), gradient_dtype = in.below(3);
  const Bytes weight(rows * columns * dtype_size(dtype), in.below(8));
  const Bytes gradient(rows * columns * dtype_size(gradient_dtype), in.below(8));
  in.fill_tensor(weight, dtype);
  in.fill_tensor(gradient, gradient_dtype);
  const bool fisher = in.below(2);
  std::vector<double> row_weight(rows), column_weight(columns);
  for (double& number : row_weight) number = in.byte();
  for (double& number : column_weight) number = in.byte();
  std::vector<int> formats(1 + in.below(4));
  for (int& format : formats) format = any_format_of_weights(in);
  set_isa(isa);
  Bytes outs[2];
  for (int i = 0; i < 2; ++i) {
    omp_set_num_threads(i ? 1 : threads);
    outs[i] = Bytes(int64_t(formats.size()) * group_count(columns, 32) * 8);
    outs[i].fill(i ? 0xff : 0);
    REQUIRE(kernels().statistics({weight.data(), fisher ? row_weight.data() : nullptr,
                                  fisher ? column_weight.data() : nullptr,
                                  fisher ? nullptr : gradient.data(), formats.data(),
                                  reinterpret_cast<double*>(outs[i].data()), rows, columns, dtype,
                                  gradient_dtype, int(formats.size())}),
            "no memory");
  }
  REQUIRE(outs[0].equals(outs[1]), "statistics depend on threads, or are not written");
}

// What compensate_group writes, for a group that is columns of a wider weight.
struct Compensated {
  Bytes codes, scales, zero_points, errors;

  Compensated(const Bytes& weight, const Bytes& factor, const Bytes& importance, int64_t rows,
              int64_t stride, int columns, int format, uint8_t pattern)
      : codes(rows * columns, pattern & 1),
        scales(rows * scale_bytes(decode_format(format).element), pattern & 1),
        zero_points(has_zero_points(format) ? rows : 0),
        errors(rows * columns * 4) {
    for (const Bytes* bytes : {&codes, &scales, &zero_points, &errors}) bytes->fill(pattern);
    const auto floats = [](const Bytes& b) { return reinterpret_cast<float*>(b.data()); };
    REQUIRE(kernels().compensate_group({floats(weight), floats(factor), floats(importance),
                                        codes.data(), scales.data(),
                                        zero_points.size() ? zero_points.data() : nullptr,
                                        floats(errors), rows, stride, columns, columns, format}),
            "no memory");
  }
};

void fuzz_compensate(Input& in, const char* isa, int threads) {
  const int format = any_format(in), group = decode_format(format).group_size;
  const int columns = 1 + in.below(group), more = in.below(3);
  const int64_t rows = any_rows(in), stride = columns + more;
  // Of the last row nothing lies behind the group.
  const Bytes weight((rows * stride - more) * 4), factor(columns * columns * 4);
  const Bytes importance(columns * 4);
  const int power = in.below(60) - 30;
  for (int64_t i = 0; i < weight.size() / 4; ++i)
    set(weight, kFloat32, i, in.below(500) ? ldexpf(float(int8_t(in.byte())), power) : NAN);
  for (int64_t i = 0; i < columns * columns; ++i)
    set(factor, kFloat32, i, i % (columns + 1) ? float(int8_t(in.byte())) / 256 : 1.5f);
  for (int64_t i = 0; i < columns; ++i) set(importance, kFloat32, i, float(in.byte()));
  set_isa(isa);
  omp_set_num_threads(threads);
  const Compensated a(weight, factor, importance, rows, stride, columns, format, 0);
  set_isa("scalar");
  omp_set_num_threads(1);
  const Compensated b(weight, factor, importance, rows, stride, columns, format, 0xff);
  REQUIRE(
      a.codes.equals(b.codes) && a.scales.equals(b.scales) && a.zero_points.equals(b.zero_points),
      "compensate_group is not that of scalar");
  same_numbers(a.errors, b.errors, kFloat32, "errors are not those of scalar");
}

// A NaN scale makes its row's outputs NaN, and a NaN number its token's.
void check_nan(const Matmul& m, size_t i, const Bytes& out) {
  const Weight& w = m.weights[i];
  const bool mx = is_mx(decode_format(w.format).element);
  std::vector<bool> row(w.rows), token(m.tokens);
  for (int64_t g = 0; g < w.rows * w.groups(); ++g) {
    const uint8_t* scale = w.scales.data() + g * (mx ? 1 : 2);
    const bool nan =
        mx ? *scale == kNanScale : (scale[1] & 0x7c) == 0x7c && (scale[0] || (scale[1] & 3) != 0);
    if (nan) row[g / w.groups()] = true;
  }
  for (int64_t at = 0; at < m.tokens * m.columns; ++at) {
    const float number = get(m.x, m.dtype, at);
    if (number != number) token[at / m.columns] = true;
  }
  for (int64_t at = 0; at < m.tokens * w.rows; ++at) {
    const float number = get(out, m.dtype, at);
    if (token[at / w.rows] || row[at % w.rows]) REQUIRE(number != number, "NaN was lost");
  }
}

// What is multiplied, of a Matmul or of Mixes.
template <class M>
void fill_tokens(Input& in, M* m) {
  m->tokens = any_tokens(in);
  m->columns = any_columns(in);
  m->dtype = in.below(3);
  m->int8_activations = in.below(2);
  m->x = Bytes(m->tokens * m->columns * dtype_size(m->dtype), in.below(8));
  in.fill_tensor(m->x, m->dtype);
}

// The `count` products of a Matmul or of Mixes, which are the same whatever the threads and whether
// others are multiplied beside them.
template <class M>
std::vector<Bytes> products_of(Input& in, const M& m, size_t count, const char* isa, int threads) {
  set_isa(isa);
  std::vector<Bytes> outs = m.run(1, 0), again = m.run(threads, 0xff);
  REQUIRE(outs.size() == count && again.size() == count, "no memory");
  const size_t alone = size_t(in.below(int(count)));
  REQUIRE(m.run(1, 0xff, alone, alone + 1)[0].equals(outs[alone]), "company matters");
  for (size_t i = 0; i < count; ++i)
    REQUIRE(outs[i].equals(again[i]), "products depend on threads, or are not written");
  return outs;
}

Matmul any_matmul(Input& in) {
  Matmul m;
  fill_tokens(in, &m);
  int64_t products = 0;
  const int activation = in.below(2) ? any_format(in) : 0;
  for (int count = 1 + in.below(in.below(8) ? 3 : 12); count > 0; --count) {
    const int64_t rows = any_rows(in);
    products += m.tokens * m.columns * rows;
    if (products > 400000 && !m.weights.empty()) break;
    m.weights.emplace_back(any_format(in), rows, m.columns, in.below(8));
    in.fill_weight(m.weights.back());
    m.activations.push_back(in.below(4) ? activation : in.below(2) ? any_format(in) : 0);
  }
  return m;
}

void fuzz_matmul(Input& in, const char* isa, int threads) {
  const Matmul m = any_matmul(in);
  const std::vector<Bytes> outs = products_of(in, m, m.weights.size(), isa, threads);
  for (size_t i = 0; i < outs.size(); ++i) check_nan(m, i, outs[i]);
}

Segments any_segments(Input& in, int64_t rows, int64_t columns) {
  Segments s;
  for (int64_t left = columns; left > 0;) {
    const bool last = s.weights.size() + 1 == kMaxSegments || in.below(2);
    const int64_t width = last ? left : 1 + in.below(int(left));
    s.weights.emplace_back(any_format(in), rows, width, in.below(8));
    in.fill_weight(s.weights.back());
    s.activations.push_back(in.below(2) ? any_format(in) : 0);
    left -= width;
  }
  arrange(&s, [&](int bound) { return in.below(bound); });
  return s;
}

void fuzz_segments(Input& in, const char* isa, int threads) {
  Mixes m;
  fill_tokens(in, &m);
  for (int count = 1 + in.below(in.below(8) ? 2 : 6); count > 0; --count) {
    const int64_t rows = any_rows(in);
    if (m.tokens * m.columns * rows > 400000 && !m.linears.empty()) break;
    m.linears.push_back(any_segments(in, rows, m.columns));
  }
  products_of(in, m, m.linears.size(), isa, threads);
}

TestLinear any_linear(Input& in, int64_t rows, int64_t columns, bool bias, int dtype) {
  TestLinear linear;
  linear.rows = rows;
  linear.columns = columns;
  linear.int8 = in.below(2);
  if (in.below(5) == 0) {
    linear.plain = Bytes(rows * columns * dtype_size(dtype), in.below(8));
    in.fill_tensor(linear.plain, dtype);
  } else {
    linear.packed = any_segments(in, rows, columns);
  }
  if (bias) linear.bias = Bytes(rows * dtype_size(dtype), in.below(8));
  in.fill_tensor(linear.bias, dtype);
  return linear;
}

void fuzz_token_step(Input& in, const char* isa, int threads) {
  const int dtype = in.below(3);
  const Sizes n = {1 + in.below(100), 1 + in.below(150),    1 + in.below(3),
                   1 + in.below(4),   2 + 2 * in.below(40), 1 + in.below(30),
                   1 + in.below(2),   in.below(70),         in.below(3)};
  const bool head_norms = in.below(2), biases = in.below(2);
  const auto tensor = [&](int64_t count) {
    Bytes bytes(count * dtype_size(dtype), in.below(8));
    in.fill_tensor(bytes, dtype);
    return bytes;
  };
  const TestModel m = make_model(n, dtype, head_norms, biases, tensor, tensor,
                                 [&](int64_t rows, int64_t columns, bool bias) {
                                   return any_linear(in, rows, columns, bias, dtype);
                                 });
  set_isa(isa);
  const Outcome one = m.run(1, 0), more = m.run(threads, 0xff);
  REQUIRE(!one.caches.empty() && !more.caches.empty(), "no memory");
  same_numbers(one.logits, more.logits, dtype, "a step depends on threads, or is not written");
  for (size_t i = 0; i < one.caches.size(); ++i)
    same_numbers(one.caches[i], more.caches[i], dtype, "the cache depends on threads");
}

void fuzz_sum_words(Input& in, const char* isa, int threads) {
  const Bytes data(in.below(5000), in.below(8));
  in.fill(data);
  uint64_t sums[2];
  run_both(isa, threads, [&](int i) { sums[i] = kernels().sum_words(data.data(), data.size()); });
  REQUIRE(sums[0] == sums[1], "sum_words");
}

}  // namespace
}  // namespace test
}  // namespace mixbits

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace mixbits::test;
  static const std::vector<const char*> isas = isa_names();
  Input in(data, size);
  const int operation = in.below(24), threads = 2 + in.below(2);
  const char* isa = in.choice(isas);
  if (operation < 9) {
    fuzz_matmul(in, isa, threads);
  } else if (operation < 12) {
    fuzz_rounding(in, isa, threads);
  } else if (operation < 13) {
    fuzz_dequantize(in, isa, threads);
  } else if (operation < 15) {
    fuzz_statistics(in, isa, threads);
  } else if (operation < 17) {
    fuzz_token_step(in, isa, threads);
  } else if (operation < 21) {
    fuzz_segments(in, isa, threads);
  } else if (operation < 23) {
    fuzz_compensate(in, isa, threads);
  } else {
    fuzz_sum_words(in, isa, threads);
  }
  return 0;
}

#if !defined(MIXBITS_LIBFUZZER)
namespace {

const char* const kFile = "fuzz-input";

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// In the file before it runs: no crash is then too hard for it to be found there.
void keep(int file, const std::vector<uint8_t>& input) {
  const ssize_t size = ssize_t(input.size());
  if (ftruncate(file, 0) != 0 || pwrite(file, input.data(), input.size(), 0) != size) {
    perror(kFile);
    exit(2);
  }
}

std::vector<uint8_t> random_input(mixbits::test::Random& random) {
  std::vector<uint8_t> input(random.below(random.below(4) ? 64 : 4096));
  // Some inputs are full of the bytes that are special in floats and scales.
  const bool special = random.below(4) == 0;
  static const std::vector<uint8_t> bytes = {0, 0, 1, 0x7c, 0x7e, 0x7f, 0x80, 0xfe, 0xff};
  for (uint8_t& byte : input) {
    byte = uint8_t(random.bits());
    if (special && random.below(2)) byte = random.choice(bytes);
  }
  return input;
}

int run_random(double seconds, uint64_t seed) {
  const int file = open(kFile, O_RDWR | O_CREAT | O_TRUNC, 0644);
  printf("seed %llu\n", static_cast<unsigned long long>(seed));
  fflush(stdout);
  mixbits::test::Random random(seed);
  const double end = now() + seconds;
  long executions = 0;
  for (; now() < end; ++executions) {
    const std::vector<uint8_t> input = random_input(random);
    keep(file, input);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  close(file);
  unlink(kFile);
  printf("%ld executions in %g s\n", executions, seconds);
  return 0;
}

int run_file(const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) {
    perror(path);
    return 2;
  }
  std::vector<uint8_t> input;
  for (int byte = fgetc(file); byte != EOF; byte = fgetc(file)) input.push_back(uint8_t(byte));
  fclose(file);
  LLVMFuzzerTestOneInput(input.data(), input.size());
  printf("%s: %zu bytes, nothing wrong\n", path, input.size());
  return 0;
}

int fail() {
  mixbits::test::Random random(1);
  keep(open(kFile, O_RDWR | O_CREAT | O_TRUNC, 0644), random_input(random));
  const mixbits::test::Bytes bytes(3, 1);
  volatile uint8_t* beyond = bytes.data() + 3;
  *beyond = 1;  // AddressSanitizer's to find
  abort();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  if (strcmp(argv[1], "--fail") == 0) return fail();
  char* rest = nullptr;
  const double seconds = strtod(argv[1], &rest);
  if (*rest) return run_file(argv[1]);
  return run_random(seconds, argc > 2 ? strtoull(argv[2], nullptr, 10) : 1);
}
#endif
