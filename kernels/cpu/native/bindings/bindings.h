// One function for each part of the Python module, and the array types of their arguments.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace llamaclust {

namespace nb = nanobind;
using namespace nb::literals;

template <typename T, int dimensions = 1>
using Array = nb::ndarray<T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;
using Ints = Array<const int32_t>;
using IntRows = Array<const int32_t, 2>;
using Words = Array<const uint32_t>;
using Floats = Array<const float>;
using FloatRows = Array<const float, 2>;

void bind_frames(nb::module_& module);
void bind_memory(nb::module_& module);
void bind_matmul(nb::module_& module);
void bind_sampler(nb::module_& module);
void bind_executor(nb::module_& module);
void bind_gatherer(nb::module_& module);
void bind_links(nb::module_& module);
void bind_quantize(nb::module_& module);

}  // namespace llamaclust
