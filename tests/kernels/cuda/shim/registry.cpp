// The functions that Python calls.
#include "registry.h"

#include <cstring>

namespace shim {

std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

}  // namespace shim

extern "C" {

// Gives the name, parameters and threads of kernel `index`. Returns false past the last kernel.
bool shim_kernel(int index, const char** name, const char** parameters, int* max_threads) {
  if (static_cast<size_t>(index) >= shim::kernels().size()) return false;
  const shim::Kernel& kernel = shim::kernels()[static_cast<size_t>(index)];
  *name = kernel.name.c_str();
  *parameters = kernel.parameters.c_str();
  *max_threads = kernel.max_threads;
  return true;
}

// Runs a grid; the error is in `problem`, or it is empty.
void shim_launch(int index, const unsigned* grid, const unsigned* block, size_t shared_bytes, void** args,
                 char* problem, size_t problem_bytes) {
  const shim::Kernel& kernel = shim::kernels()[static_cast<size_t>(index)];
  const shim::Grid whole{{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}};
  const std::string error = shim::run_grid(whole, shared_bytes, kernel.invoke, kernel.function, args);
  strncpy(problem, error.c_str(), problem_bytes - 1);
}
}
