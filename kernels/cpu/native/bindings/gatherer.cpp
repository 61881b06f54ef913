// What puts rows of a group's members together: native objects, or functions of Python.
#include "executor/gatherer.h"

#include "bindings/bindings.h"

namespace llamaclust {
namespace {

// Calls a function (number, own [rows, columns], whole [rows, width]) whose arrays are there until it returns.
class PythonGatherer : public Gatherer {
 public:
  explicit PythonGatherer(nb::object function) : function_(std::move(function)) {}

  void gather(const Gathering& gathering) override {
    const nb::gil_scoped_acquire locked;
    const auto rows = [&](const float* data, int width) {
      const size_t shape[2] = {static_cast<size_t>(gathering.rows), static_cast<size_t>(width)};
      const nb::ndarray<nb::numpy, float> array(const_cast<float*>(data), 2, shape, nb::handle());
      return nb::cast(array, nb::rv_policy::reference);
    };
    const auto own = rows(gathering.own, gathering.own_columns), whole = rows(gathering.whole, gathering.borders.back());
    function_(gathering.number, own, whole);
  }

 private:
  const nb::object function_;
};

}  // namespace

void bind_gatherer(nb::module_& module) {
  nb::class_<Gatherer>(module, "Gatherer");
  nb::class_<PythonGatherer, Gatherer>(module, "PythonGatherer").def(nb::init<nb::object>(), "function"_a);
}

}  // namespace llamaclust
