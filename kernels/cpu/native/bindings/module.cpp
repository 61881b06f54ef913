#include "bindings/bindings.h"
#include "runtime/levels.h"

using namespace llamaclust;

namespace {

std::vector<std::string> level_names() {
  std::vector<std::string> names;
  for (const Level& level : available_levels()) names.emplace_back(level.name);
  return names;
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Arithmetic of the CPU backend.";
  // A process may end while stages are still loaded, which nanobind would report as a leak.
  nb::set_leak_warnings(false);
  module.def("available_levels", &level_names, "Feature levels this machine can run, slowest first.");
  bind_sampler(module);
  bind_frames(module);
  bind_memory(module);
  bind_matmul(module);
  bind_gatherer(module);
  bind_links(module);
  bind_executor(module);
  bind_quantize(module);
}
