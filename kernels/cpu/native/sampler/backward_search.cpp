#include "sampler/backward_search.h"

namespace llamaclust {

BackwardSearch::BackwardSearch(const std::vector<std::vector<int32_t>>& sequences) {
  std::vector<int32_t> ends(sequences.size(), 0);
  bool has_more = true;
  // A node needs the nodes of shorter ends, so all sequences grow by one token at a time.
  for (size_t length = 1; has_more; length++) {
    has_more = false;
    for (size_t i = 0; i < sequences.size(); i++) {
      const std::vector<int32_t>& sequence = sequences[i];
      if (sequence.size() < length) continue;
      has_more = true;
      ends[i] = extended(ends[i], sequence[sequence.size() - length]);
      if (sequence.size() == length) nodes_[ends[i]].longest = length;
    }
  }
}

int32_t BackwardSearch::extended(int32_t node, int32_t token) {
  const int32_t made = static_cast<int32_t>(nodes_.size());
  const auto [edge, is_new] = edges_.emplace(BackwardSearch::edge(node, token), made);
  if (is_new) {
    const int32_t shorter = node == 0 ? 0 : next(nodes_[node].shorter, token);
    nodes_.push_back({shorter, nodes_[shorter].longest});
  }
  return edge->second;
}

int32_t BackwardSearch::next(int32_t node, int32_t token) const {
  for (;; node = nodes_[node].shorter) {
    const auto found = edges_.find(edge(node, token));
    if (found != edges_.end()) return found->second;
    if (node == 0) return 0;
  }
}

}  // namespace llamaclust
