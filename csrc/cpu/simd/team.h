// How the threads of one parallel region share work and wait for each other.
#pragma once

#include <pthread.h>

#include "simd.h"

namespace mixbits {
namespace MB_ISA {

// How many items of a thread's share have been taken; zero before the work begins.
struct alignas(64) Counter {
  int64_t taken;
};

// Calls do_item for items that no other thread has: a thread's own share first, which are
// neighbours, as the prefetcher likes it, then what is left of the others' shares.
template <class F>
MB_INLINE void deal_out(Counter* counters, int64_t items, int threads, int me, const F& do_item) {
  for (int i = 0; i < threads; ++i) {
    const int owner = (me + i) % threads;
    const int64_t first = items * owner / threads, last = items * (owner + 1) / threads;
    for (;;) {
      const int64_t item = first + __atomic_fetch_add(&counters[owner].taken, 1, __ATOMIC_RELAXED);
      if (item >= last) break;
      do_item(item);
    }
  }
}

MB_INLINE void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// All `threads` of a region wait until the last has arrived; what each wrote before, all see after.
//
// Between two phases of a step a wait takes a microsecond or two, and putting a thread to sleep and
// waking it fifty: so threads spin at first. On busy cores the one that is waited for may not be
// running. Then the others sleep, as one that is woken runs at once; one that spins or yields
// has used up its time when its turn would come.
class Barrier {
 public:
  void wait(int threads) {
    const int round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      // A sleeper says that it sleeps before it looks at the round for the last time: one of the
      // two sees what the other wrote.
      __atomic_store_n(&round_, round + 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(&sleepers_, __ATOMIC_SEQ_CST) > 0) wake_all();
      return;
    }
    for (int spins = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++spins) {
      if (spins == kSpins) return sleep(round);
      pause_briefly();
    }
  }

 private:
  static constexpr int kSpins = 1000;  // 20 to 40 microseconds

  void sleep(int round) {
    __atomic_add_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&mutex_);
    while (__atomic_load_n(&round_, __ATOMIC_SEQ_CST) == round) pthread_cond_wait(&next_, &mutex_);
    pthread_mutex_unlock(&mutex_);
    __atomic_sub_fetch(&sleepers_, 1, __ATOMIC_RELAXED);
  }
  void wake_all() {
    pthread_mutex_lock(&mutex_);
    pthread_cond_broadcast(&next_);
    pthread_mutex_unlock(&mutex_);
  }

  alignas(64) int arrived_ = 0;
  alignas(64) int round_ = 0;
  int sleepers_ = 0;
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t next_ = PTHREAD_COND_INITIALIZER;
};

}  // namespace MB_ISA
}  // namespace mixbits
