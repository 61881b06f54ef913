// Many short jobs on one pool, for a build with -fsanitize=thread.
#include "runtime/thread_pool.h"

int main() {
  llamaclust::ThreadPool pool(4);
  for (int i = 0; i < 2000; i++) pool.run([](int) {});
}
