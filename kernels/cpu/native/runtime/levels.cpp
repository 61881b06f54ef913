#include "runtime/levels.h"

#include <stdexcept>

#include "runtime/cpu_features.h"

// LLAMACLUST_LEVELS(X), of the build: X(name) for each level that is there (arithmetic.cmake).
// Tables are copied here and not in level/: code of a level must not run before the CPU is known to have it.
#define DECLARE(name)                      \
  namespace llamaclust::name {             \
  extern const MatmulOps matmul_ops;       \
  extern const VectorOps vector_ops;       \
  extern const AttentionOps attention_ops; \
  extern const SamplerOps sampler_ops;     \
  extern const QuantizeOps quantize_ops;   \
  }
#define LEVEL(name) \
  Level { #name, name::matmul_ops, name::vector_ops, name::attention_ops, name::sampler_ops, name::quantize_ops }

LLAMACLUST_LEVELS(DECLARE)

namespace llamaclust {

std::vector<Level> available_levels() {
  const CpuFeatures can = cpu_features();
  std::vector<Level> levels;
#define ADD(name) \
  if (can.name) levels.push_back(LEVEL(name));
  LLAMACLUST_LEVELS(ADD)
  return levels;
}

Level find_level(const std::string& name) {
  const std::vector<Level> levels = available_levels();
  if (name.empty() && !levels.empty()) return levels.back();
  std::string names;
  for (const Level& level : levels) {
    if (name == level.name) return level;
    names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument("feature level " + name + " is not available here; there is: " + names);
}

}  // namespace llamaclust
