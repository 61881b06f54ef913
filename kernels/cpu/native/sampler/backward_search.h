// Finds sequences in a text that is read from its end, in one pass (Aho-Corasick).
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace llamaclust {

class BackwardSearch {
 public:
  explicit BackwardSearch(const std::vector<std::vector<int32_t>>& sequences);

  // Reads the token before those read so far. Returns the length of the longest sequence that begins there, or 0.
  size_t read(int32_t token) { return nodes_[at_ = next(at_, token)].longest; }

 private:
  struct Node {
    int32_t shorter;  // Node of the longest other one among the tokens read last.
    size_t longest;   // Length of the longest sequence among the tokens read last.
  };

  static uint64_t edge(int32_t node, int32_t token) {
    return static_cast<uint64_t>(node) << 32 | static_cast<uint32_t>(token);
  }
  int32_t next(int32_t node, int32_t token) const;
  int32_t extended(int32_t node, int32_t token);

  // A node stands for the last tokens of a sequence; node 0 for none.
  std::vector<Node> nodes_{{0, 0}};
  std::unordered_map<uint64_t, int32_t> edges_;
  int32_t at_ = 0;
};

}  // namespace llamaclust
