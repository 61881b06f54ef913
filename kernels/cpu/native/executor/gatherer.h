// Where a member of a group gives the others its columns of rows and takes theirs.
#pragma once

#include <functional>
#include <span>

namespace llamaclust {

// One gather of a run. Member i computes columns [borders[i], borders[i + 1]) of a row; some may have none.
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

  // In how many bands runs of many rows are computed, at most: all members of a group do so alike.
  static constexpr int kMostBands = 4;
  int bands() const { return bands_; }
  void set_bands(int bands) { bands_ = bands; }

  // Begins a gather, behind those that have begun; its rows stay where they are until it is finished.
  virtual void start(const Gathering& gathering) = 0;

  // Sends and receives what is possible now.
  virtual void advance() = 0;

  // Waits until all rows of the oldest gather are there, or are with those that get them; not beyond a deadline. Calls
  // `idle`, which takes a microsecond at most, again and again meanwhile.
  virtual void finish(const std::function<void()>& idle) = 0;

 private:
  int bands_ = 2;
};

}  // namespace llamaclust
