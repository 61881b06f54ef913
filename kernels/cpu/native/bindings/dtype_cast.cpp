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

bool narrow_bytes_of(Given from, int stored, Wanted to, int kind) {
  if (stored < 0 || stored > 2 || kind < 0 || kind > 3) throw nb::value_error("no such type");
  const auto given = static_cast<Stored>(stored);
  const auto wanted = static_cast<Narrow>(kind);
  const size_t count = from.size() / stored_bytes(given, 1);
  const bool whole = wanted != Narrow::Q8_0 || count % 32 == 0;
  if (!whole || stored_bytes(given, count) != from.size() || narrow_bytes(wanted, count) != to.size())
    throw nb::value_error("sizes that do not fit together");
  const nb::gil_scoped_release released;
  return narrow(from.data(), given, count, wanted, to.data());
}

}  // namespace

void bind_narrowing(nb::module_& module) { module.def("narrow", &narrow_bytes_of, "x"_a, "stored"_a, "out"_a, "kind"_a); }

}  // namespace llamaclust
