// As much of libgomp as csrc/cpu uses, on threads that ThreadSanitizer sees.
//
// The real one synchronizes with futexes from uninstrumented code: ThreadSanitizer would take
// every parallel region for a race, and a suppression for that would hide real ones. Here a region
// is the creation and joining of threads, and nothing else orders what they do: the items of a
// dynamic loop are dealt out with a relaxed counter, which cannot stand in for a synchronization
// that the code lacks, and every thread gets an item where there are enough. What csrc/cpu does
// not use is not here, and does not link.
#include <omp.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// The threads of a region, and what they share of its dynamic loop. A region has one of those at
// most: a second would need a counter of its own.
struct Team {
  int threads;
  std::atomic<long> next_chunk{0};
  std::mutex mutex = {};
  std::condition_variable all_here = {};
  int waiting = 0, barriers = 0;
};

// A loop as a thread knows it; steps are positive.
struct Loop {
  long first, last, step, chunk;
  bool begun;
};

int default_threads = 2;
thread_local Team* current = nullptr;
thread_local int number = 0;
thread_local Loop loop = {};
std::mutex atomics;

void run_team(void (*body)(void*), void* data, unsigned asked, const Loop& its_loop) {
  Team* const outer_team = current;
  const int outer_number = number;
  Team team = {asked ? int(asked) : outer_team ? 1 : default_threads};
  team.next_chunk = team.threads;  // the chunks before belong to one thread each
  const auto work = [&team, body, data, its_loop](int own_number) {
    current = &team;
    number = own_number;
    loop = its_loop;
    body(data);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < team.threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& thread : others) thread.join();
  current = outer_team;
  number = outer_number;
}

}  // namespace

extern "C" {

void omp_set_num_threads(int count) { default_threads = count; }
int omp_get_max_threads() { return default_threads; }
int omp_get_num_threads() { return current ? current->threads : 1; }
int omp_get_thread_num() { return number; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  run_team(body, data, threads, {});
}

void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void*), void* data, unsigned threads,
                                             long first, long last, long step, long chunk,
                                             unsigned) {
  run_team(body, data, threads, {first, last, step, chunk, false});
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  const long size = loop.chunk * loop.step;
  const long chunk =
      loop.begun ? current->next_chunk.fetch_add(1, std::memory_order_relaxed) : number;
  loop.begun = true;
  *first = loop.first + chunk * size;
  *last = *first + size < loop.last ? *first + size : loop.last;
  return *first < loop.last;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long chunk,
                                          long* own_first, long* own_last) {
  loop = {first, last, step, chunk, false};
  return GOMP_loop_nonmonotonic_dynamic_next(own_first, own_last);
}

void GOMP_loop_end_nowait() {}

void GOMP_barrier() {
  Team& team = *current;
  std::unique_lock<std::mutex> lock(team.mutex);
  const int barrier = team.barriers;
  if (++team.waiting == team.threads) {
    team.waiting = 0;
    ++team.barriers;
    team.all_here.notify_all();
  }
  team.all_here.wait(lock, [&] { return team.barriers != barrier; });
}

void GOMP_atomic_start() { atomics.lock(); }
void GOMP_atomic_end() { atomics.unlock(); }

}  // extern "C"
