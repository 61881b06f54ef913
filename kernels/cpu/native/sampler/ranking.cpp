#include "sampler/ranking.h"

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <limits>
#include <utility>

namespace llamaclust {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Returns an integer that grows as the value falls, and for equal values as the id grows. +0 and -0 are equal.
uint64_t key_of(float value, int id) {
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);
  const uint32_t ascending = bits & 0x80000000 ? ~bits : bits | 0x80000000;
  return uint64_t{~ascending} << 32 | static_cast<uint32_t>(id);
}

float value_of(uint64_t key) {
  const uint32_t ascending = ~static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>(ascending & 0x80000000 ? ascending & 0x7FFFFFFF : ~ascending);
}

// Sorts by the values in the upper halves. The radix sort is stable, so keys that arrive in order of id stay so among
// equal values.
void sort_by_value(std::vector<uint64_t>& keys) {
  std::vector<uint64_t> other(keys.size());
  for (int shift = 32; shift < 64; shift += 8) {
    std::array<size_t, 257> starts{};
    for (uint64_t key : keys) starts[(key >> shift & 0xFF) + 1]++;
    for (int digit = 0; digit < 256; digit++) starts[digit + 1] += starts[digit];
    for (uint64_t key : keys) other[starts[key >> shift & 0xFF]++] = key;
    keys.swap(other);
  }
}

float nth_greatest(std::vector<float> values, int n) {
  std::nth_element(values.begin(), values.begin() + n, values.end(), std::greater<float>());
  return values[n];
}

}  // namespace

Ranking::Ranking(const SamplerOps& ops, const float* values, int n)
    : ops_(ops), values_(values), n_(n), blocks_((n + kRankBlock - 1) / kRankBlock) {
  maximum_ = ops.maxima(values, n, blocks_.data()) + 0.0f;  // Adding 0 turns -0 into +0.
}

Ranking::Ranking(const SamplerOps& ops, const Ranked& ranked, int n)
    : ops_(ops), values_(nullptr), n_(n), maximum_(ranked.maximum + 0.0f), total_(ranked.total),
      divided_total_(ranked.divided_total), divisor_(ranked.divisor), complete_(ranked.is_complete), is_sorted_(false), keys_(ranked.keys, ranked.keys + ranked.count) {}

int64_t Ranking::checked_total() const {
  return values_ == nullptr ? total_ : ops_.weigh(values_, n_, maximum_, 1.0f, nullptr);
}

// Blocks without a candidate have no weight. They are skipped because exp is slow for them, with subnormal results.
int64_t Ranking::total(float divisor) {
  if (values_ == nullptr) {
    if (divisor == 1) return total_;
    if (divisor != divisor_) need_values();
    return divided_total_;
  }
  int64_t total = 0;
  const auto block_count = blocks_.size();
  for (size_t begin = 0, end; begin < block_count; begin = end + 1) {
    for (end = begin; end < block_count && blocks_[end] != -kInfinity;) end++;
    const int first = static_cast<int>(begin) * kRankBlock, last = std::min(static_cast<int>(end) * kRankBlock, n_);
    if (end > begin) total += ops_.weigh(values_ + first, last - first, maximum_, divisor, nullptr);
  }
  return total;
}

int Ranking::best() {
  if (values_ == nullptr) {
    if (keys_.empty()) need_values();
    return keys_.empty() ? 0 : static_cast<int>(*std::min_element(keys_.begin(), keys_.end()) & 0xFFFFFFFF);
  }
  const auto block = std::find(blocks_.begin(), blocks_.end(), maximum_);
  return static_cast<int>(std::find(values_ + (block - blocks_.begin()) * kRankBlock, values_ + n_, maximum_) - values_);
}

float Ranking::value(int id) {
  if (values_ != nullptr) return values_[id] + 0.0f;
  const auto is_wanted = [id](uint64_t key) { return static_cast<int>(key & 0xFFFFFFFF) == id; };
  const auto found = std::find_if(keys_.begin(), keys_.end(), is_wanted);
  if (found != keys_.end()) return value_of(*found);
  need_values();
  return 0;
}

// Returns a value that probably at least `count` entries reach, and not many more.
float Ranking::threshold(int count) const {
  // The maxima of `count` blocks reach it, so at least `count` entries do.
  if (2 * count <= static_cast<int>(blocks_.size())) return nth_greatest(blocks_, count - 1);
  constexpr int kStride = 37;
  std::vector<float> sample;
  for (int i = 0; i < n_; i += kStride) sample.push_back(values_[i]);
  const int rank = count / kStride + count / (8 * kStride) + 16;
  return rank < static_cast<int>(sample.size()) ? nth_greatest(std::move(sample), rank) : -kInfinity;
}

// Collects every entry that reaches the threshold.
void Ranking::collect(float threshold) {
  complete_ = threshold == -kInfinity;
  size_t count = 0;
  for (size_t b = 0; b < blocks_.size(); b++) {
    if (blocks_[b] < threshold || blocks_[b] == -kInfinity) continue;
    const int begin = static_cast<int>(b) * kRankBlock, end = std::min(begin + kRankBlock, n_);
    if (keys_.size() < count + kRankBlock) keys_.resize(2 * count + kRankBlock);
    for (int i = begin; i < end; i++) {
      keys_[count] = key_of(values_[i], i);
      count += values_[i] >= threshold && values_[i] != -kInfinity;
    }
  }
  keys_.resize(count);
  sort_by_value(keys_);
  make_ready();
}

void Ranking::make_ready() {
  is_sorted_ = true;
  ready_values_.resize(keys_.size());
  std::transform(keys_.begin(), keys_.end(), ready_values_.begin(), value_of);
}

int Ranking::extend(int count) {
  count = std::min(count, n_);
  if (!is_sorted_) {
    std::sort(keys_.begin(), keys_.end());
    make_ready();
  }
  if (values_ == nullptr) return static_cast<int>(keys_.size());
  const auto lacking = [&] { return count > static_cast<int>(keys_.size()) && !complete_; };
  if (lacking()) collect(threshold(count));
  if (lacking()) collect(-kInfinity);
  return static_cast<int>(keys_.size());
}

bool RankedWeights::grow(int count) {
  const int from = static_cast<int>(weights_.size());
  const int to = ranking_.extend(std::max({count, 4 * from, kRankBlock}));
  if (to < std::min(count, ranking_.size()) && !ranking_.is_complete()) ranking_.need_values();
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
