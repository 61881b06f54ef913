// Matrix products for tests, benchmarks and measurements of a machine; a model runs them through the executor.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bindings.h"
#include "levels.h"
#include "pack.h"
#include "packed_matrix.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace llamaclust {
namespace {

using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Bytes on a cache line's border.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t size) : data_(static_cast<uint8_t*>(operator new(size, std::align_val_t{64}))) {}
  ~AlignedBytes() { operator delete(data_, std::align_val_t{64}); }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_;
};

void pack_rows(PackedMatrix& matrix, int first_row, nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> data) {
  const nb::gil_scoped_release unlocked;
  matrix.pack_rows(first_row, {data.data(), data.size()});
}

template <typename T>
nb::object new_array(std::initializer_list<size_t> shape, T** data) {
  size_t count = 1;
  for (size_t n : shape) count *= n;
  *data = new T[count]();
  nb::capsule owner(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(*data, shape, owner));
}

// Calls work(begin, end, scratch) for equal parts of [0, count), a thread each.
template <typename Work>
void in_parts(int count, int threads, size_t scratch_bytes, Work work) {
  std::vector<std::thread> others;
  const auto part = [=](int i) {
    AlignedBytes scratch(scratch_bytes);
    const auto border = [=](int64_t n) { return static_cast<int>(n * count / threads); };
    work(border(i), border(i + 1), scratch.data());
  };
  for (int i = 1; i < threads; i++) others.emplace_back(part, i);
  part(0);
  for (std::thread& thread : others) thread.join();
}

size_t activation_rows(const MatmulOps& ops, ActivationFormat format, const FloatRows& x, AlignedBytes& out) {
  const int cols = static_cast<int>(x.shape(1));
  const size_t row_bytes = activation_bytes(format, cols);
  for (size_t t = 0; t < x.shape(0); t++) ops.quantize(format, x.data() + t * x.shape(1), cols, out.data() + t * row_bytes);
  return row_bytes;
}

nb::object multiply(const std::string& level, const PackedMatrix& packed, const FloatRows& x, int threads) {
  const Matrix& matrix = packed.matrix();
  if (x.shape(1) != static_cast<size_t>(matrix.cols)) throw std::invalid_argument("activations of another width");
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
  const MatmulOps ops = find_level(level).matmul;
  const ActivationFormat format = tile_layout(matrix.type).activation;
  const int tokens = static_cast<int>(x.shape(0));
  AlignedBytes activations(activation_bytes(format, matrix.cols) * x.shape(0));
  activation_rows(ops, format, x, activations);
  float* out;
  nb::object result = new_array<float>({x.shape(0), static_cast<size_t>(matrix.rows)}, &out);
  nb::gil_scoped_release unlocked;
  in_parts(matrix.tile_count(), threads, matmul_scratch_bytes(matrix.cols), [&](int begin, int end, uint8_t* scratch) {
    ops.matmul(matrix, activations.data(), tokens, out, static_cast<size_t>(matrix.rows), nullptr, begin, end, scratch);
  });
  return result;
}

nb::object quantize(const std::string& level, const std::string& format_name, const FloatRows& x) {
  const ActivationFormat format = format_name == "F32"     ? ActivationFormat::F32
                                  : format_name == "Q8_32" ? ActivationFormat::Q8_32
                                  : format_name == "Q8_256"
                                      ? ActivationFormat::Q8_256
                                      : throw std::invalid_argument("no activation format " + format_name);
  if (x.shape(1) % (format == ActivationFormat::Q8_256 ? 256 : format == ActivationFormat::Q8_32 ? 32 : 1) != 0)
    throw std::invalid_argument("not whole segments");
  const size_t row_bytes = activation_bytes(format, static_cast<int>(x.shape(1)));
  AlignedBytes rows(row_bytes * x.shape(0));
  std::fill_n(rows.data(), row_bytes * x.shape(0), uint8_t{0});
  activation_rows(find_level(level).matmul, format, x, rows);
  uint8_t* out;
  nb::object result = new_array<uint8_t>({x.shape(0), row_bytes}, &out);
  std::copy_n(rows.data(), row_bytes * x.shape(0), out);
  return result;
}

nb::object dequantize(const std::string& level, const PackedMatrix& packed) {
  const Matrix& matrix = packed.matrix();
  const MatmulOps ops = find_level(level).matmul;
  float* out;
  nb::object result = new_array<float>({static_cast<size_t>(matrix.rows), static_cast<size_t>(matrix.cols)}, &out);
  for (int row = 0; row < matrix.rows; row++) ops.dequantize_row(matrix, row, out + static_cast<size_t>(row) * matrix.cols);
  return result;
}

}  // namespace

void bind_matmul(nb::module_& module) {
  nb::class_<PackedMatrix>(module, "PackedMatrix", "Weights [rows, cols] in tiles; all zero at first.")
      .def(nb::init<int, int, int>(), "quant_type"_a, "rows"_a, "cols"_a)
      .def("pack_rows", &pack_rows, "first_row"_a, "data"_a,
           "Packs rows as a model file holds them; first_row is a multiple of 16, as is their number but at the end.")
      .def_static("shape_only", &PackedMatrix::shape_only, "rows"_a, "cols"_a, "A matrix without memory, for planning.")
      .def_prop_ro("bytes", &PackedMatrix::bytes);
  module.def("matmul", &multiply, "level"_a, "matrix"_a, "x"_a, "threads"_a = 1,
             "Products [tokens, rows] of a matrix with activations x [tokens, cols], both float32.");
  module.def("quantize", &quantize, "level"_a, "format"_a, "x"_a,
             "Activations x [tokens, cols] in a format (F32, Q8_32, Q8_256), as bytes [tokens, row bytes].");
  module.def("dequantize", &dequantize, "level"_a, "matrix"_a, "A matrix's weights as float32 [rows, cols].");
}

}  // namespace llamaclust
