// The interface through which the members of a group exchange their columns of rows.
#pragma once

#include <functional>
#include <span>

namespace llamaclust {

// One gather of a run. Member i computes columns [borders[i], borders[i + 1]) of each row, which may be empty.
struct Gathering {
  int number;  // Index among the run's gathers.
  int rows;
  int to;  // The only member that receives whole rows; -1 for all.
  std::span<const int> borders;
  int own_columns;
  const float* own;  // [rows][own_columns]
  float* whole;      // [rows][borders.back()], which the gather fills.
};

// Called on the thread that runs the plan. start() or finish() throws the error that ends a gather, and later calls
// throw it again.
class Gatherer {
 public:
  virtual ~Gatherer() = default;

  // Maximum number of bands in which runs of many rows are computed. It must be equal at all members of a group.
  static constexpr int kMostBands = 4;
  int bands() const { return bands_; }
  void set_bands(int bands) { bands_ = bands; }

  // Begins a gather after those that have begun. Its rows must stay in place until it is finished.
  virtual void start(const Gathering& gathering) = 0;

  // Sends and receives what is possible now.
  virtual void advance() = 0;

  // Waits until the oldest gather is complete (a member that receives no rows waits until its own are sent), or throws
  // at its deadline. Meanwhile calls `idle` repeatedly, which should take at most a microsecond.
  virtual void finish(const std::function<void()>& idle) = 0;

 private:
  int bands_ = 2;
};

}  // namespace llamaclust
