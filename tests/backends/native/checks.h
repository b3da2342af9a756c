// Counting what was checked, and saying what failed: for a program with one `check_all`.
#pragma once

#include <stdarg.h>

#include "slow.h"

namespace mixbits {
namespace test {

inline int failures = 0, checks = 0;
inline bool few = false;
inline const char* isa = "";

__attribute__((format(printf, 2, 3))) inline void check(bool ok, const char* format, ...) {
  ++checks;
  if (ok || ++failures > 20) return;
  va_list arguments;
  va_start(arguments, format);
  printf("FAILED %s: ", isa);
  vprintf(format, arguments);
  printf("\n");
  va_end(arguments);
}

inline void done(const char* name) {
  printf("%s: %d checks, %d failures\n", name, checks, failures);
  fflush(stdout);
}

inline const char* dtype_name(int dtype) {
  static const char* const names[] = {"bfloat16", "float16", "float32"};
  return names[dtype];
}

inline float largest_number(int dtype) {
  return dtype == kFloat16 ? 65504.0f : dtype == kBFloat16 ? 0x1.fep127f : FLT_MAX;
}

// PROGRAM [--few] [SEED], of what `check_all` checks; the exit code.
template <class F>
int run_checks(int argc, char** argv, const F& check_all) {
  uint64_t seed = 1;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--few") == 0) {
      few = true;
    } else {
      seed = strtoull(argv[i], nullptr, 10);
    }
  }
  Random random(seed);
  check_all(random);
  printf("seed %llu: %d checks, %d failures\n", static_cast<unsigned long long>(seed), checks,
         failures);
  return failures ? 1 : 0;
}

}  // namespace test
}  // namespace mixbits
