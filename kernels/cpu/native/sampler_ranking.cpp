#include "sampler_ranking.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>

namespace llamaclust {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// An integer that grows as the value falls, then as the id grows. Both zeros are one value.
uint64_t key_of(float value, int id) {
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);
  const uint32_t ascending = bits & 0x80000000 ? ~bits : bits | 0x80000000;
  return uint64_t{~ascending} << 32 | static_cast<uint32_t>(id);
}

float value_of(uint64_t key) {
  const uint32_t ascending = ~static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>(ascending & 0x80000000 ? ascending & 0x7FFFFFFF : ~ascending);
}

}  // namespace

Ranking::Ranking(const SamplerOps& ops, const float* values, int n)
    : ops_(ops), values_(values), n_(n), blocks_((n + kRankBlock - 1) / kRankBlock) {
  maximum_ = ops.maxima(values, n, blocks_.data());
}

int Ranking::best() const {
  const auto block = std::find(blocks_.begin(), blocks_.end(), maximum_);
  return static_cast<int>(std::find(values_ + (block - blocks_.begin()) * kRankBlock, values_ + n_, maximum_) - values_);
}

// Fills keys_ with the `count` best, or all there are, and perhaps some more.
void Ranking::collect(int count) {
  float threshold = kLowest;
  if (count <= static_cast<int>(blocks_.size())) {
    // `count` blocks reach this value, so at least as many entries do.
    std::vector<float> greatest(blocks_);
    std::nth_element(greatest.begin(), greatest.begin() + (count - 1), greatest.end(), std::greater<float>());
    threshold = greatest[count - 1];
  }
  complete_ = threshold == kLowest;
  keys_.clear();
  ready_values_.clear();
  for (size_t b = 0; b < blocks_.size(); b++) {
    if (blocks_[b] < threshold) continue;
    const int begin = static_cast<int>(b) * kRankBlock, end = std::min(begin + kRankBlock, n_);
    for (int i = begin; i < end; i++)
      if (values_[i] >= threshold && values_[i] != kLowest) keys_.push_back(key_of(values_[i], i));
  }
}

int Ranking::extend(int count) {
  count = std::min(count, n_);
  if (count > static_cast<int>(keys_.size()) && !complete_) collect(count);
  const size_t ready = ready_values_.size(), end = std::min<size_t>(count, keys_.size());
  if (end > ready) {
    if (end < keys_.size()) std::nth_element(keys_.begin() + ready, keys_.begin() + end, keys_.end());
    std::sort(keys_.begin() + ready, keys_.begin() + end);
    ready_values_.reserve(end);
    for (size_t i = ready; i < end; i++) ready_values_.push_back(value_of(keys_[i]));
  }
  return static_cast<int>(ready_values_.size());
}

bool RankedWeights::grow(int count) {
  const int from = static_cast<int>(weights_.size());
  const int to = ranking_.extend(std::max({count, 4 * from, kRankBlock}));
  if (to <= from) return false;
  weights_.resize(to);
  ranking_.ops().weigh(ranking_.ready_values() + from, to - from, ranking_.maximum(), divisor_, weights_.data() + from);
  return to >= count;
}

int64_t RankedWeights::sum(int count) {
  int64_t sum = 0;
  for (int i = 0; i < count && has(i); i++) sum += weights_[i];
  return sum;
}

}  // namespace llamaclust
