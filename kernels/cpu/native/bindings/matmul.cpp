// Python bindings of matrix products, for tests, benchmarks and measurements of a machine. Models run products through
// the executor.

#include <algorithm>
#include <chrono>

#include "bindings/bindings.h"
#include "executor/prefetch_choice.h"
#include "pack/pack.h"
#include "runtime/float_mode.h"
#include "runtime/levels.h"
#include "runtime/thread_pool.h"

namespace llamaclust {
namespace {

void pack_rows(PackedMatrix& matrix, int first_row, Array<const uint8_t> data, std::optional<int> file_type) {
  const nb::gil_scoped_release unlocked;
  const QuantType own = matrix.matrix().type;
  matrix.pack_rows(first_row, {data.data(), data.size()}, file_type ? static_cast<QuantType>(*file_type) : own);
}

template <typename T>
nb::object new_array(std::initializer_list<size_t> shape, T** data) {
  size_t count = 1;
  for (size_t n : shape) count *= n;
  *data = new T[count]();
  nb::capsule owner(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(*data, shape, owner));
}

// Quantized activations of several tokens in one format.
struct Activations {
  Activations(const MatmulOps& ops, ActivationFormat format, const FloatRows& x)
      : row_bytes(activation_bytes(format, static_cast<int>(x.shape(1)))), memory(row_bytes * x.shape(0)) {
    const FloatMode mode;
    for (size_t t = 0; t < x.shape(0); t++)
      ops.quantize(format, x.data() + t * x.shape(1), static_cast<int>(x.shape(1)), memory.data() + t * row_bytes);
  }
  size_t row_bytes;
  Memory memory;
};

// Returns the first matrix. Throws std::invalid_argument unless all matrices have its type and shape.
const Matrix& shape_of(const std::vector<const PackedMatrix*>& matrices, const FloatRows& x) {
  if (matrices.empty()) throw std::invalid_argument("no matrices");
  const Matrix& first = matrices[0]->matrix();
  for (const PackedMatrix* packed : matrices) {
    const Matrix& matrix = packed->matrix();
    if (matrix.tiles == nullptr) throw std::invalid_argument("a matrix of shape_only has no weights");
    if (matrix.type != first.type || matrix.rows != first.rows || matrix.cols != first.cols)
      throw std::invalid_argument("matrices of several types or shapes");
  }
  if (x.shape(1) != static_cast<size_t>(first.cols)) throw std::invalid_argument("activations of another width");
  return first;
}

// Multiplies every matrix with the same activations; each thread computes its range of each matrix's tiles. Every
// matrix overwrites `out`. Returns the duration in seconds.
double run_products(const std::string& level, const std::vector<const PackedMatrix*>& matrices, const FloatRows& x,
                    const float* bias, int threads, Prefetch prefetch, float* out) {
  const MatmulOps ops = find_level(level).matmul;
  const Matrix& shape = matrices[0]->matrix();
  const Activations activations(ops, tile_layout(shape.type).activation, x);
  ThreadPool pool(threads);
  std::vector<Memory> scratches;
  for (int thread = 0; thread < threads; thread++) scratches.emplace_back(kMatmulScratchBytes);
  double seconds = 0;
  pool.run([&](int thread) {
    const Memory& scratch = scratches[thread];
    std::fill_n(scratch.data(), scratch.bytes(), uint8_t{0});
    pool.barrier().arrive();
    const auto start = std::chrono::steady_clock::now();
    const auto border = [&](int64_t n) { return static_cast<int>(n * shape.tile_count() / threads); };
    for (const PackedMatrix* packed : matrices)
      ops.matmul(packed->matrix(), activations.memory.data(), static_cast<int>(x.shape(0)), {}, out,
                 static_cast<size_t>(shape.rows), bias, border(thread), border(thread + 1), scratch.data(),
                 prefetch);
    pool.barrier().arrive();
    if (thread == 0) seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  });
  return seconds;
}

Prefetch way_of(bool near) { return near ? Prefetch::Near : Prefetch::Far; }

nb::object multiply(const std::string& level, const PackedMatrix& matrix, const FloatRows& x, int threads,
                    const std::optional<Floats>& bias, bool near) {
  const size_t rows = static_cast<size_t>(shape_of({&matrix}, x).rows);
  if (bias && bias->shape(0) != rows) throw std::invalid_argument("a bias of another length");
  float* out;
  nb::object result = new_array<float>({x.shape(0), rows}, &out);
  nb::gil_scoped_release unlocked;
  run_products(level, {&matrix}, x, bias ? bias->data() : nullptr, threads, way_of(near), out);
  return result;
}

double multiply_seconds(const std::string& level, const std::vector<const PackedMatrix*>& matrices, const FloatRows& x,
                        int threads, bool near) {
  std::vector<float> out(x.shape(0) * static_cast<size_t>(shape_of(matrices, x).rows));
  nb::gil_scoped_release unlocked;
  return run_products(level, matrices, x, nullptr, threads, way_of(near), out.data());
}

bool prefers_near(const std::vector<int64_t>& far_ns, const std::vector<int64_t>& near_ns) {
  if (far_ns.empty() || far_ns.size() != near_ns.size()) throw std::invalid_argument("as many times of both ways");
  return faster_prefetch(far_ns, near_ns) == Prefetch::Near;
}

std::optional<bool> prefetches_near() {
  const std::optional<Prefetch> way = known_prefetch();
  return way ? std::optional(*way == Prefetch::Near) : std::nullopt;
}

void set_prefetches_near(std::optional<bool> near) {
  set_known_prefetch(near ? std::optional(way_of(*near)) : std::nullopt);
}

ActivationFormat format_named(const std::string& name) {
  if (name == "F32") return ActivationFormat::F32;
  if (name == "Q8_32") return ActivationFormat::Q8_32;
  if (name == "Q8_256") return ActivationFormat::Q8_256;
  throw std::invalid_argument("no activation format " + name);
}

nb::object quantize(const std::string& level, const std::string& format_name, const FloatRows& x) {
  const ActivationFormat format = format_named(format_name);
  if (x.shape(1) % segment_cols(format) != 0) throw std::invalid_argument("not whole segments");
  const Activations activations(find_level(level).matmul, format, x);
  uint8_t* out;
  nb::object result = new_array<uint8_t>({x.shape(0), activations.row_bytes}, &out);
  std::copy_n(activations.memory.data(), activations.memory.bytes(), out);
  return result;
}

nb::object dequantize(const std::string& level, const PackedMatrix& packed) {
  const Matrix& matrix = packed.matrix();
  if (matrix.tiles == nullptr) throw std::invalid_argument("a matrix of shape_only has no weights");
  const MatmulOps ops = find_level(level).matmul;
  const FloatMode mode;
  float* out;
  nb::object result = new_array<float>({static_cast<size_t>(matrix.rows), static_cast<size_t>(matrix.cols)}, &out);
  for (int row = 0; row < matrix.rows; row++)
    ops.dequantize_row(matrix, row, out + static_cast<size_t>(row) * matrix.cols);
  return result;
}

std::vector<int> quant_types() {
#define NUMBER(name, number, ...) number,
  return {LLAMACLUST_QUANT_TYPES(NUMBER)};
#undef NUMBER
}

}  // namespace

void bind_matmul(nb::module_& module) {
  nb::class_<PackedMatrix>(module, "PackedMatrix", "Weights [rows, cols] in tiles; all zero at first.")
      .def(nb::init<int, int, int>(), "quant_type"_a, "rows"_a, "cols"_a)
      .def(nb::init<int, int, int, std::shared_ptr<const Memory>, size_t>(), "quant_type"_a, "rows"_a, "cols"_a,
           "memory"_a, "offset"_a)
      .def("pack_rows", &pack_rows, "first_row"_a, "data"_a, "file_type"_a = nb::none(),
           "Packs rows as a model file holds them, in blocks of `file_type` (None: the matrix's own); first_row is a "
           "multiple of 16, as is their number but at the end.")
      .def_static("shape_only", &PackedMatrix::shape_only, "quant_type"_a, "rows"_a, "cols"_a,
                  "A matrix without memory, for planning.")
      .def_prop_ro("bytes", &PackedMatrix::bytes);
  module.def("quant_types", &quant_types, "ggml's numbers of the types that matrices may have.");
  module.def("matmul", &multiply, "level"_a, "matrix"_a, "x"_a, "threads"_a = 1, "bias"_a = nb::none(),
             "near"_a = false,
             "Products [tokens, rows] of a matrix with activations x [tokens, cols], both float32. `near` is the prefetch "
             "distance of weights for one or two tokens.");
  module.def("matmul_seconds", &multiply_seconds, "level"_a, "matrices"_a, "x"_a, "threads"_a,
             "near"_a = false, "Time of the products of several matrices of one shape with x [tokens, cols], without quantizing it.");
  module.def("prefetches_near", &prefetches_near,
             "True if stages of this process prefetch weights of one or two tokens from near. None if that was not measured; "
             "stages then prefetch from far.");
  module.def("set_prefetches_near", &set_prefetches_near, "near"_a.none(),
             "Sets the prefetch distance, for tests and comparisons. None: the next large stage measures which one is faster.");
  module.def("prefers_near", &prefers_near, "far_ns"_a, "near_ns"_a,
             "True if prefetching from near is faster, by paired measurements of both distances.");
  module.def("quantize", &quantize, "level"_a, "format"_a, "x"_a,
             "Activations x [tokens, cols] in a format (F32, Q8_32, Q8_256), as bytes [tokens, row bytes].");
  module.def("dequantize", &dequantize, "level"_a, "matrix"_a, "A matrix's weights as float32 [rows, cols].");
}

}  // namespace llamaclust
