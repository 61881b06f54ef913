// Python bindings of the memory that holds the tiles of several matrices.

#include <cerrno>
#include <system_error>

#include "bindings/bindings.h"
#include "pack/pack.h"
#include "runtime/memory.h"

namespace llamaclust {
namespace {

using View = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;
using ReadOnlyView = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;

nb::object view(nb::handle self) {
  const Memory& memory = nb::cast<const Memory&>(self);
  if (memory.is_writable()) return nb::cast(View(memory.data(), {memory.bytes()}, self));
  return nb::cast(ReadOnlyView(memory.data(), {memory.bytes()}, self));
}

Memory mapped(int descriptor, size_t bytes) {
  try {
    return Memory::mapped(descriptor, bytes);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
}

uint64_t checksum_of(const Memory& memory) {
  const nb::gil_scoped_release unlocked;
  return checksum(memory.data(), memory.bytes());
}

void touch(const Memory& memory) {
  const nb::gil_scoped_release unlocked;
  const volatile uint8_t* data = memory.data();
  for (size_t at = 0; at < memory.bytes(); at += Memory::kHugePage) data[at];
}

void collapse(Memory& memory) {
  const nb::gil_scoped_release unlocked;
  memory.collapse();
}

}  // namespace

void bind_memory(nb::module_& module) {
  nb::class_<Memory>(module, "Memory", nb::is_weak_referenceable(), "Zero at first, or a file's bytes; see memory.h.")
      .def(nb::init<size_t>(), "bytes"_a)
      .def_static(
          "mapped", &mapped, "descriptor"_a, "bytes"_a,
          "The first bytes of a file that is never truncated, shared and read-only; OSError where it has no maps.")
      .def_prop_ro("bytes", &Memory::bytes)
      .def_prop_ro("is_writable", &Memory::is_writable)
      .def_prop_ro("address", [](const Memory& memory) { return reinterpret_cast<uintptr_t>(memory.data()); })
      .def_prop_ro("view", &view, "All of it, as an array of bytes.")
      .def("touch", &touch, "Reads a byte of every huge page, so that those that can be had are there.")
      .def("collapse", &collapse, "Moves what is in small pages into huge ones, where the system can.")
      .def("checksum", &checksum_of, "Against damage; equal for equal bytes.");
  module.def("packing_fingerprint", &packing_fingerprint, "file_type"_a, "quant_type"_a,
             "A number that changes with what packing into tiles of `quant_type` makes of blocks of `file_type`.");
}

}  // namespace llamaclust
