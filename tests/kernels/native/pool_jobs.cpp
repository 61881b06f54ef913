// Many short jobs on one pool, for a build with -fsanitize=thread.
#include "runtime/thread_pool.h"

namespace {

struct Empty final : llamaclust::ThreadPool::Job {
  void work(int) noexcept override {}
};

}  // namespace

int main() {
  llamaclust::ThreadPool pool(4);
  Empty job;
  for (int i = 0; i < 2000; i++) pool.run(job);
}
