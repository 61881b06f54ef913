#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bindings/bindings.h"
#include "runtime/dtype_cast.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace llamaclust {
namespace {

using Given = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Wanted = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

bool cast_dtype_checked(Given from, int source, Wanted to, int target) {
  if (source < 0 || source > 2 || target < 0 || target > 3) throw nb::value_error("no such type");
  const auto given = static_cast<SourceDtype>(source);
  const auto wanted = static_cast<TargetDtype>(target);
  const size_t count = from.size() / source_bytes(given, 1);
  const bool whole = wanted != TargetDtype::Q8_0 || count % 32 == 0;
  if (!whole || source_bytes(given, count) != from.size() || target_bytes(wanted, count) != to.size())
    throw nb::value_error("sizes that do not fit together");
  const nb::gil_scoped_release released;
  return cast_dtype(from.data(), given, count, wanted, to.data());
}

}  // namespace

void bind_dtype_cast(nb::module_& module) {
  module.def("cast_dtype", &cast_dtype_checked, "x"_a, "source"_a, "out"_a, "target"_a);
}

}  // namespace llamaclust
