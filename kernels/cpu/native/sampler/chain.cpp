// Runs a request's samplers in the order that the request gives. Penalties change the logits; the other samplers reduce
// the candidates; finally one token is drawn.
#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "runtime/math.h"
#include "sampler/backward_search.h"
#include "sampler/random.h"
#include "sampler/sampler.h"

namespace llamaclust {
namespace {

constexpr double kUnit = static_cast<double>(kUnitWeight);
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
// No model has logits that far below the greatest one, so a logit bias has put them there.
constexpr double kFarBelow = 1e6;
constexpr int kMirostatTokens = 100;

// Returns base^exponent for a base in [0, 1].
double power(double base, double exponent) {
  if (base == 0) return exponent == 0 ? 1 : 0;
  return exp_double(exponent * log_double(base));
}

// Returns the newest `window` tokens of a history, newest first; all of them if `window` is negative.
std::vector<int32_t> newest(const std::vector<int32_t>& history, int32_t window) {
  const size_t count = window < 0 ? history.size() : std::min(history.size(), static_cast<size_t>(window));
  return {history.rbegin(), history.rbegin() + static_cast<std::ptrdiff_t>(count)};
}

// Returns the sorted tokens that penalties count.
std::vector<int32_t> counted(const Choice& c) {
  std::vector<int32_t> seen = newest(c.history, c.chain ? c.chain->penalty_window : -1);
  std::sort(seen.begin(), seen.end());
  return seen;
}

bool is_among(const std::vector<int32_t>& ids, int32_t id) { return std::find(ids.begin(), ids.end(), id) != ids.end(); }

// Returns the maximum length of a repetition: the number of tokens at the end of the history, after the newest breaker.
size_t reach(const std::vector<int32_t>& newest_first, const Breakers& breakers) {
  BackwardSearch search(breakers);
  for (size_t i = 0; i < newest_first.size(); i++)
    if (const size_t longest = search.read(newest_first[i]); longest > 0) return i + 1 - longest;
  return newest_first.size();
}

// Returns for each index k (newest first) how many tokens before it equal the tokens at the end, in the same order, up
// to `reach`.
std::vector<size_t> matches(const std::vector<int32_t>& newest_first, size_t reach) {
  const size_t n = newest_first.size();
  std::vector<size_t> found(n, 0);
  // The match that reaches furthest: places [begin, end) equal places [0, end - begin).
  size_t begin = 0, end = 0;
  for (size_t k = 1; k < n; k++) {
    size_t length = k < end ? std::min(found[k - begin], end - k) : 0;
    while (k + length < n && newest_first[length] == newest_first[k + length]) length++;
    found[k] = length;
    if (k + length > end) begin = k, end = k + length;
  }
  for (size_t& length : found) length = std::min(length, reach);
  return found;
}

// Returns multiplier * base^exponent by repeated squaring.
float penalty_of(const Chain& chain, size_t exponent) {
  double power = 1, square = chain.dry_base;
  for (; exponent > 0; exponent >>= 1, square *= square)
    if (exponent & 1) power *= square;
  return static_cast<float>(std::min(chain.dry_multiplier * power, static_cast<double>(kLargest)));
}

// DRY (logits[vocabulary]): penalizes each token that would continue a repetition of the history's end.
void penalize_repetitions(const Choice& c, const Chain& chain, float* logits) {
  const std::vector<int32_t> newest_first = newest(c.history, chain.dry_window);
  const size_t allowed = static_cast<size_t>(chain.dry_allowed_length);
  if (newest_first.size() <= allowed) return;
  const size_t limit = reach(newest_first, chain.breakers);
  if (limit < allowed) return;
  const std::vector<size_t> lengths = matches(newest_first, limit);
  std::map<int32_t, size_t> longest;  // Length of the longest repetition that a token would continue.
  for (size_t k = 1; k < newest_first.size(); k++) {
    if (lengths[k] < allowed) continue;
    size_t& most = longest[newest_first[k - 1]];
    most = std::max(most, lengths[k]);
  }
  for (const auto& sequence : chain.breakers)
    if (sequence.size() == 1) longest.erase(sequence[0]);
  for (const auto& [token, length] : longest) logits[token] = orderly(logits[token] - penalty_of(chain, length - allowed));
}

class ChainRun {
 public:
  ChainRun(const SamplerOps& ops, float* values, int vocabulary, const Choice& choice)
      : ops_(ops), values_(values), vocabulary_(vocabulary), choice_(choice), chain_(*choice.chain) {}

  int32_t sample(double* mu) {
    for (int32_t number : chain_.order) step(static_cast<Step>(number));
    rank(vocabulary_);
    if (size() == 0) return -1;
    if (chain_.mirostat == 0) return ids_[draw()];
    weigh();
    if (chain_.mirostat == 1) {
      keep(mirostat_candidates());
    } else {
      int count = 1;
      while (count < size() && information(count) / kLn2 <= chain_.mu) count++;
      keep(count);
    }
    const int sampled = draw();
    const double surprise = -log_double(static_cast<double>(weights_[sampled]) / static_cast<double>(total_)) / kLn2;
    *mu = chain_.mu - chain_.mirostat_eta * (surprise - chain_.mirostat_tau);
    return ids_[sampled];
  }

 private:
  // At first, candidates are the entries of values_ above -infinity. Once a step has ranked them, they are ids_ with
  // their values in ranked_, best first; these values still have to be divided by divisor_, the temperature.
  void step(Step step) {
    switch (step) {
      case Step::kPenalties:
        if (penalizes(choice_)) spread(), penalize(choice_, values_);
        return;
      case Step::kDry:
        if (chain_.dry_multiplier > 0) spread(), penalize_repetitions(choice_, chain_, values_);
        return;
      case Step::kTopNSigma: return top_n_sigma();
      case Step::kTopK:
        if (choice_.top_k > 0) rank(choice_.top_k), keep(choice_.top_k);
        return;
      case Step::kTailFree: return tail_free();
      case Step::kTypical: return typical();
      case Step::kTopP: return top_p();
      case Step::kMinP: return min_p();
      case Step::kXtc: return xtc();
      case Step::kTemperature: return temperature();
      case Step::kCount: return;
    }
  }

  // Ranks the best candidates: all of them, or `most` if the next step keeps no more than that.
  void rank(int most) {
    if (is_ranked_) return;
    is_ranked_ = true;
    Ranking ranking(ops_, values_, vocabulary_);
    const int count = std::min(ranking.extend(most), std::min(most, vocabulary_));
    ranked_.assign(ranking.ready_values(), ranking.ready_values() + count);
    ids_.resize(count);
    for (int i = 0; i < count; i++) ids_[i] = ranking.id(i);
  }

  // Writes the ranked candidates back to values_, divided by the temperature if that step has run.
  void spread() {
    if (!is_ranked_) return;
    is_ranked_ = false;
    std::fill(values_, values_ + vocabulary_, -kInfinity);
    for (int i = 0; i < size(); i++) values_[ids_[i]] = std::max(-kLargest, std::min(kLargest, ranked_[i] / divisor_));
    divisor_ = 1;
  }

  void keep(int count) {
    if (count >= size()) return;
    ids_.resize(count);
    ranked_.resize(count);
  }

  void drop(int count) {
    ids_.erase(ids_.begin(), ids_.begin() + count);
    ranked_.erase(ranked_.begin(), ranked_.begin() + count);
  }

  void weigh() {
    rank(vocabulary_);
    if (size() == 0) return;
    weights_.resize(size());
    total_ = ops_.weigh(ranked_.data(), size(), ranked_[0], divisor_, weights_.data());
    log_total_ = log_double(static_cast<double>(total_) / kUnit);
  }

  // Returns -ln of the candidate's probability. Requires a previous weigh().
  double information(int rank) const {
    return log_total_ - static_cast<double>((ranked_[rank] - ranked_[0]) / divisor_);
  }

  // Returns the entropy in nats. Requires a previous weigh().
  double entropy() const {
    double sum = 0;
    for (int i = 0; i < size(); i++)
      if (weights_[i] > 0) sum += static_cast<double>(weights_[i]) * information(i);
    return sum / static_cast<double>(total_);
  }

  void top_n_sigma() {
    if (chain_.top_n_sigma <= 0) return;
    spread();
    const double greatest = *std::max_element(values_, values_ + vocabulary_);
    const double least = greatest - kFarBelow;
    double sum = 0, squares = 0, count = 0;
    for (int i = 0; i < vocabulary_; i++)
      if (values_[i] >= least) sum += values_[i], count++;
    const double mean = sum / count;
    for (int i = 0; i < vocabulary_; i++)
      if (values_[i] >= least) squares += (values_[i] - mean) * (values_[i] - mean);
    const double limit = greatest - chain_.top_n_sigma * std::sqrt(squares / count);
    for (int i = 0; i < vocabulary_; i++)
      if (values_[i] < limit) values_[i] = -kInfinity;
  }

  // Tail-free sampling: cuts where the sum of the absolute second differences of the ranked probabilities reaches a
  // share of their total.
  void tail_free() {
    if (chain_.tfs_z >= 1) return;
    weigh();
    if (size() <= 2) return;
    std::vector<int64_t> bends(size() - 2);
    int64_t sum = 0;
    for (int i = 0; i < size() - 2; i++) sum += bends[i] = std::abs(weights_[i] - 2 * weights_[i + 1] + weights_[i + 2]);
    if (sum == 0) {
      std::fill(bends.begin(), bends.end(), 1);
      sum = size() - 2;
    }
    int64_t so_far = bends[0];
    for (int i = 1; i < size() - 2; i++) {
      so_far += bends[i];
      if (static_cast<double>(so_far) > chain_.tfs_z * static_cast<double>(sum)) return keep(i);
    }
  }

  // Locally typical sampling: keeps the candidates whose information is nearest to the entropy, until their
  // probabilities sum to typical_p.
  void typical() {
    if (chain_.typical_p >= 1) return;
    weigh();
    const double mean = entropy();
    std::vector<std::pair<double, int>> order(size());
    for (int i = 0; i < size(); i++) order[i] = {std::abs(information(i) - mean), i};
    std::sort(order.begin(), order.end());
    std::vector<int> kept;
    int64_t so_far = 0;
    for (const auto& [distance, rank] : order) {
      kept.push_back(rank);
      so_far += weights_[rank];
      if (static_cast<double>(so_far) >= chain_.typical_p * static_cast<double>(total_)) break;
    }
    std::sort(kept.begin(), kept.end());
    for (size_t i = 0; i < kept.size(); i++) ids_[i] = ids_[kept[i]], ranked_[i] = ranked_[kept[i]];
    keep(static_cast<int>(kept.size()));
  }

  void top_p() {
    if (choice_.top_p >= 1) return;
    weigh();
    const double nucleus = choice_.top_p * static_cast<double>(total_);
    int64_t so_far = 0;
    for (int i = 0; i < size(); i++) {
      so_far += weights_[i];
      if (static_cast<double>(so_far) >= nucleus) return keep(i + 1);
    }
  }

  void min_p() {
    if (choice_.min_p <= 0) return;
    weigh();
    const double least = choice_.min_p * kUnit;
    for (int i = 1; i < size(); i++)
      if (static_cast<double>(weights_[i]) < least) return keep(i);
  }

  // XTC: with the configured probability, removes all candidates above the threshold except the least probable of them.
  void xtc() {
    if (chain_.xtc_probability <= 0 || chain_.xtc_threshold > 0.5) return;
    const uint64_t bits = random_bits(choice_.seed, choice_.choice, choice_.position, 1);
    if (static_cast<double>(bits >> 11) * 0x1p-53 >= chain_.xtc_probability) return;
    weigh();
    const double least = chain_.xtc_threshold * static_cast<double>(total_);
    int probable = 0;
    while (probable < size() && static_cast<double>(weights_[probable]) >= least) probable++;
    if (probable > 1) drop(probable - 1);
  }

  void temperature() {
    rank(vocabulary_);
    const double wanted = chain_.dynatemp_range > 0 && size() > 1 ? dynamic_temperature() : choice_.temperature;
    const float temperature = std::min(static_cast<float>(wanted), kLargest);
    if (temperature > 0)
      divisor_ = temperature;
    else
      keep(1);
  }

  // Returns a temperature between the minimum and the maximum of the range, by the entropy relative to the maximum
  // entropy.
  double dynamic_temperature() {
    weigh();
    const double share = std::min(1.0, std::max(0.0, entropy() / log_double(size())));
    const double low = std::max(0.0, choice_.temperature - chain_.dynatemp_range);
    const double high = choice_.temperature + chain_.dynatemp_range;
    return low + (high - low) * power(share, chain_.dynatemp_exponent);
  }

  // Mirostat 1: returns how many candidates to keep so that the expected surprise is mu. Fits the exponent of Zipf's
  // law to the best candidates.
  int mirostat_candidates() {
    if (size() < 2) return 1;
    double products = 0, squares = 0;
    for (int i = 0; i < std::min(size(), kMirostatTokens) - 1; i++) {
      const double t = log_double((i + 2.0) / (i + 1.0));
      const double b = (static_cast<double>(ranked_[i]) - static_cast<double>(ranked_[i + 1])) / divisor_;
      products += t * b;
      squares += t * t;
    }
    const double exponent = products / squares;
    if (!(exponent > 0)) return size();
    const double excess = exponent - 1, log_n = log_double(vocabulary_);
    const double shape = std::abs(excess) < 1e-9 ? 1 / log_n : excess / (1 - exp_double(-excess * log_n));
    const double count = exp_double((log_double(shape) + chain_.mu * kLn2) / exponent);
    return count >= size() ? size() : std::max(1, static_cast<int>(count));
  }

  int draw() {
    weigh();
    const int64_t target = scaled(random_bits(choice_.seed, choice_.choice, choice_.position), total_);
    int rank = 0;
    for (int64_t sum = weights_[0]; sum <= target; sum += weights_[rank]) rank++;
    return rank;
  }

  int size() const { return static_cast<int>(ids_.size()); }

  const SamplerOps& ops_;
  float* values_;
  int vocabulary_;
  const Choice& choice_;
  const Chain& chain_;
  bool is_ranked_ = false;
  float divisor_ = 1;
  std::vector<int32_t> ids_;
  std::vector<float> ranked_;
  std::vector<int64_t> weights_;  // exp((value - best) / divisor) in units of 2^-40.
  int64_t total_ = 0;
  double log_total_ = 0;
};

}  // namespace

float orderly(float logit) { return logit != logit ? -kLargest : std::min(logit, kLargest); }

bool penalizes(const Choice& c) {
  return !c.history.empty() && (c.repetition_penalty != 1 || c.frequency_penalty != 0 || c.presence_penalty != 0);
}

void penalize(const Choice& c, float* logits) {
  const std::vector<int32_t> seen = counted(c);
  for (size_t i = 0; i < seen.size();) {
    size_t end = i;
    while (end < seen.size() && seen[end] == seen[i]) end++;
    if (!c.chain || !is_among(c.chain->unpenalized, seen[i])) {
      float& logit = logits[seen[i]];
      logit = logit <= 0 ? logit * c.repetition_penalty : logit / c.repetition_penalty;
      logit = orderly(logit - (static_cast<float>(end - i) * c.frequency_penalty + c.presence_penalty));
    }
    i = end;
  }
}

int32_t sample_by_chain(const SamplerOps& ops, float* values, int vocabulary, const Choice& choice, double* mu) {
  return ChainRun(ops, values, vocabulary, choice).sample(mu);
}

}  // namespace llamaclust
