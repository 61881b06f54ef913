// Many short jobs on one pool, and waits at a barrier that are noticed late, for a build with -fsanitize=thread.
#include <chrono>
#include <cstdio>
#include <thread>

#include "runtime/thread_pool.h"

// A thread that sleeps at a barrier wakes after the next job has begun: its wait is not that job's.
bool next_job_has_waits() {
  llamaclust::Barrier barrier;
  for (int round = 0; round < 50; round++) {
    barrier.open(2);
    std::thread sleeper([&] { barrier.arrive(); });
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    barrier.arrive();
    barrier.open(2);
    sleeper.join();
    if (barrier.waited_ns() != 0) return true;
  }
  return false;
}

int main() {
  llamaclust::ThreadPool pool(4);
  int64_t begun = 0;
  for (int i = 0; i < 2000; i++)
    pool.run([&](int thread) {
      if (thread == 0) begun += pool.speeds().begin(4, 1);
      if (pool.speeds().measures()) pool.speeds().add(thread, 1 + 3 * thread);
    });
  if (begun < 4000) {
    std::fputs("thread 0, which is the fastest, gets no more of the work\n", stderr);
    return 1;
  }
  if (!next_job_has_waits()) return 0;
  std::fputs("a wait counts for the next job\n", stderr);
  return 1;
}
