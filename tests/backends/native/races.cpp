// Proof that the build for ThreadSanitizer sees races, and only those: `races racy KIND` must be
// reported and `races correct KIND` must not. Kinds are the ways in which csrc/cpu shares work.
#include <omp.h>
#include <stdio.h>
#include <string.h>

#include <vector>

namespace {

constexpr int kItems = 1000;

// A sum over a static loop: as a reduction, or without one.
long static_loop(bool racy) {
  long sum = 0;
  if (racy) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < kItems; ++i) sum += i;
  } else {
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (int i = 0; i < kItems; ++i) sum += i;
  }
  return sum;
}

// Items of a dynamic loop that write their own element, or also their neighbour's.
long dynamic_loop(bool racy) {
  std::vector<long> out(kItems + 1);
  const int reach = racy ? 1 : 0;
#pragma omp parallel for schedule(dynamic)
  for (int i = 0; i < kItems; ++i) {
    for (int j = i; j <= i + reach; ++j) out[j] = i;
  }
  return out[kItems / 2];
}

// Scratch memory per thread, or of which all threads use the first one's.
long scratch(bool racy) {
  const int count = omp_get_max_threads();
  std::vector<long> own(count);
#pragma omp parallel for schedule(dynamic)
  for (int i = 0; i < kItems; ++i) own[racy ? 0 : omp_get_thread_num()] += i;
  long sum = 0;
  for (const long part : own) sum += part;
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const bool racy = strcmp(argv[1], "racy") == 0;
  omp_set_num_threads(2);
  const long result = strcmp(argv[2], "static") == 0    ? static_loop(racy)
                      : strcmp(argv[2], "dynamic") == 0 ? dynamic_loop(racy)
                                                        : scratch(racy);
  printf("%ld\n", result);
  return 0;
}
