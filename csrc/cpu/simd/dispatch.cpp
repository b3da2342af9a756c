// Which instruction set runs: the best that this CPU has, unless one was asked for.
//
// Compiled for the baseline, like everything that is not in a namespace of its own.
#include <string.h>

#include "cpu/kernels.h"

namespace mixbits {

namespace {

bool always() { return true; }
#ifdef MB_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512bf16() {
  return has_avx512vnni() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}
#endif

struct Isa {
  bool (*runs_here)();
  const Kernels* (*kernels)();
};

// Best first.
const Isa kIsas[] = {
#ifdef MB_X86
    {has_avx512bf16, avx512bf16_kernels},
    {has_avx512vnni, avx512vnni_kernels},
    {has_avx2, avx2_kernels},
#endif
    {always, scalar_kernels},
};

const Kernels* find(const char* name) {
  for (const Isa& isa : kIsas) {
    if (isa.runs_here() && (!name || strcmp(name, isa.kernels()->name) == 0)) return isa.kernels();
  }
  return nullptr;
}

const Kernels* active = find(nullptr);

}  // namespace

const Kernels& kernels() { return *active; }

bool set_isa(const char* name) {
  const Kernels* found = find(name);
  if (found) active = found;
  return found != nullptr;
}

const char* isa_name(int index) {
  for (const Isa& isa : kIsas) {
    if (isa.runs_here() && index-- == 0) return isa.kernels()->name;
  }
  return nullptr;
}

}  // namespace mixbits
