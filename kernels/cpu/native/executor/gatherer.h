// Where a member of a group gives the others its columns of rows and takes theirs.
#pragma once

#include <span>

namespace llamaclust {

// One gather of a run. Member i computes columns [borders[i], borders[i + 1]) of a row.
struct Gathering {
  int number;  // in the order of the run's gathers
  int rows;
  int to;  // the only member that gets the whole rows; -1: all
  std::span<const int> borders;
  int own_columns;
  const float* own;  // [rows][own_columns]
  float* whole;      // [rows][borders.back()], to be filled
};

// Called on the thread that runs the plan. What ends a gather is thrown by start() or finish(), then and later.
class Gatherer {
 public:
  virtual ~Gatherer() = default;

  // Begins a gather, behind those that have begun; its rows stay where they are until it is finished.
  virtual void start(const Gathering& gathering) = 0;

  // Sends and receives what is possible now.
  virtual void advance() = 0;

  // Waits until all rows of the oldest gather are there, or are with those that get them; not beyond a deadline.
  virtual void finish() = 0;
};

}  // namespace llamaclust
