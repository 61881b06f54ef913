// Python bindings of gatherers, which assemble whole rows from the columns of a group's members. A gatherer is a native
// object or a Python function.
#include "executor/gatherer.h"

#include <algorithm>

#include "bindings/bindings.h"

namespace llamaclust {
namespace {

// Calls a Python function with (number, own [rows, columns], whole [rows, width]). The arrays are valid only during the
// call.
class PythonGatherer : public Gatherer {
 public:
  explicit PythonGatherer(nb::object function) : function_(std::move(function)) {}

  void start(const Gathering& gathering) override {
    const nb::gil_scoped_acquire locked;
    const auto rows = [&](const float* data, int width) {
      const size_t shape[2] = {static_cast<size_t>(gathering.rows), static_cast<size_t>(width)};
      const nb::ndarray<nb::numpy, float> array(const_cast<float*>(data), 2, shape, nb::handle());
      return nb::cast(array, nb::rv_policy::reference);
    };
    const auto own = rows(gathering.own, gathering.own_columns), whole = rows(gathering.whole, gathering.borders.back());
    function_(gathering.number, own, whole);
  }
  void advance() override {}
  void finish(const std::function<void()>&) override {}

 private:
  const nb::object function_;
};

void gather(Gatherer& gatherer, int number, const FloatRows& own, const Array<float, 2>& whole,
            const std::vector<int>& borders, std::optional<int> to) {
  const size_t width = borders.empty() || borders.back() < 0 ? 0 : static_cast<size_t>(borders.back());
  if (own.shape(0) == 0 || own.shape(0) != whole.shape(0) || own.shape(1) > width || whole.shape(1) != width ||
      !std::ranges::is_sorted(borders) || borders.front() != 0)
    throw std::invalid_argument("gather: rows and columns that fit the borders");
  const nb::gil_scoped_release unlocked;
  gatherer.start({number, static_cast<int>(own.shape(0)), to.value_or(-1), borders, static_cast<int>(own.shape(1)), own.data(),
                  whole.data()});
  gatherer.finish([] {});
}

void set_bands(Gatherer& gatherer, int bands) {
  if (bands < 1 || bands > Gatherer::kMostBands)
    throw std::invalid_argument("bands must be 1 to " + std::to_string(Gatherer::kMostBands));
  gatherer.set_bands(bands);
}

}  // namespace

void bind_gatherer(nb::module_& module) {
  nb::class_<Gatherer>(module, "Gatherer")
      .def_prop_rw("bands", &Gatherer::bands, &set_bands, "In how many bands runs of many rows are computed, at most.")
      .def("gather", &gather, "number"_a, "own"_a, "whole"_a.noconvert(), "borders"_a,
           "to"_a.none() = nb::none(), "One gather, outside of a run.");
  nb::class_<PythonGatherer, Gatherer>(module, "PythonGatherer").def(nb::init<nb::object>(), "function"_a);
}

}  // namespace llamaclust
