#include "levels.h"

#include <stdexcept>

#include "cpu_features.h"

// Copied here and not in level/: code of a level must not run before its CPU was asked.
#define DECLARE(name)                      \
  namespace llamaclust::name {             \
  extern const MatmulOps matmul_ops;       \
  extern const VectorOps vector_ops;       \
  extern const AttentionOps attention_ops; \
  extern const SamplerOps sampler_ops;     \
  }
#define LEVEL(name) \
  Level { #name, name::matmul_ops, name::vector_ops, name::attention_ops, name::sampler_ops }

DECLARE(generic)
#ifdef LLAMACLUST_HAS_AVX512VNNI
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512vnni)
#endif

namespace llamaclust {

std::vector<Level> available_levels() {
  std::vector<Level> levels{LEVEL(generic)};
#ifdef LLAMACLUST_HAS_AVX512VNNI
  const CpuFeatures features = cpu_features();
  if (features.avx2) levels.push_back(LEVEL(avx2));
  if (features.avx512) levels.push_back(LEVEL(avx512));
  if (features.avx512vnni) levels.push_back(LEVEL(avx512vnni));
#endif
  return levels;
}

Level find_level(const std::string& name) {
  const std::vector<Level> levels = available_levels();
  if (name.empty()) return levels.back();
  std::string names;
  for (const Level& level : levels) {
    if (name == level.name) return level;
    names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument("feature level " + name + " is not available here; there is: " + names);
}

}  // namespace llamaclust
