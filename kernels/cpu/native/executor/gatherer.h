// Where a member of a group gives the others its columns of rows and takes theirs.
#pragma once

#include <span>

namespace llamaclust {

// One gather of a run. Member i computes columns [borders[i], borders[i + 1]) of a row.
struct Gathering {
  int number;  // in the order of the plan's gathers
  int rows;
  int to;  // the only member that gets the whole rows; -1: all
  std::span<const int> borders;
  int own_columns;
  const float* own;  // [rows][own_columns]
  float* whole;      // [rows][borders.back()], to be filled
};

class Gatherer {
 public:
  virtual ~Gatherer() = default;

  // Returns when all of `whole` is there, or this member's rows are with those that get them; throws where they will not
  // be, by a deadline of its own. Called on the thread that runs the plan while the others wait.
  virtual void gather(const Gathering& gathering) = 0;
};

}  // namespace llamaclust
