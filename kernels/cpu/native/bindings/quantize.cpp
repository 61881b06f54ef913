// Python bindings that quantize or cast weights to the blocks of a model file.

#include <algorithm>

#include "bindings/bindings.h"
#include "pack/near_points.h"
#include "pack/pack.h"
#include "runtime/dtype_cast.h"
#include "runtime/float_mode.h"
#include "runtime/levels.h"

namespace llamaclust {
namespace {

// Number of weights in a batch. The batch and its temporary data fit into the cache of a core.
constexpr int64_t kBatchWeights = 1 << 13;

void quantize_rows(const std::string& level, int quant_type, const FloatRows& x,
                   const std::optional<Floats>& importance, const Array<uint8_t, 2>& out) {
  const QuantizeOps ops = find_level(level).quantize;
  const QuantType type{quant_type};
  const int64_t rows = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
  const TileLayout layout = tile_layout(type);
  if (layout.activation == ActivationFormat::F32) throw std::invalid_argument("no quantizer for that type");
  if (cols % layout.segment_cols != 0) throw std::invalid_argument("not whole blocks");
  const size_t row_bytes = file_row_bytes(type, static_cast<int>(cols));
  if (out.shape(0) != x.shape(0) || out.shape(1) != row_bytes) throw std::invalid_argument("out of another shape");
  if (importance && importance->shape(0) != x.shape(1)) throw std::invalid_argument("importance of another width");
  const nb::gil_scoped_release unlocked;
  const FloatMode mode;
  const NearPoints* near = near_points(type);
  const int64_t at_once = std::max<int64_t>(1, kBatchWeights / std::max<int64_t>(1, cols));
  std::vector<float> w(static_cast<size_t>(at_once * cols));
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t n = std::min(at_once, rows - row);
    const float* values = x.data() + row * cols;
    for (int64_t r = 0; r < n; r++)
      ops.weigh(values + r * cols, importance ? importance->data() : nullptr, static_cast<int>(cols),
                w.data() + r * cols);
    ops.quantize(type, {values, w.data(), n * cols, near, importance.has_value()},
                 out.data() + static_cast<size_t>(row) * row_bytes);
  }
}

bool cast_dtype_checked(Array<const uint8_t> from, int source, Array<uint8_t> to, int target) {
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

void bind_quantize(nb::module_& module) {
  module.def("quantize_rows", &quantize_rows, "level"_a, "quant_type"_a, "x"_a, "importance"_a.none(), "out"_a,
             "Writes weights x [rows, cols], finite and below 65504, as rows of a model file, out [rows, row bytes]; "
             "importance [cols] says how much an error in a column matters, None where they all do alike.");
  module.def("cast_dtype", &cast_dtype_checked, "x"_a, "source"_a, "out"_a, "target"_a);
}

}  // namespace llamaclust
