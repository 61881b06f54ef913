// The parts of the Python module, one file each; they share nothing but the module.
#pragma once

#include <nanobind/nanobind.h>

namespace llamaclust {

void bind_memory(nanobind::module_& module);
void bind_matmul(nanobind::module_& module);
void bind_sampler(nanobind::module_& module);
void bind_executor(nanobind::module_& module);
void bind_quantize(nanobind::module_& module);
void bind_dtype_cast(nanobind::module_& module);

}  // namespace llamaclust
