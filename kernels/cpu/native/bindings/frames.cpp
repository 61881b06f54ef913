#include <nanobind/stl/tuple.h>

#include <set>

#include "bindings/bindings.h"
#include "frames/microbatch_frame.h"

namespace llamaclust {
namespace {

// A frame that was read, and the bytes that it looks into.
struct ReadFrame {
  nb::bytes data;
  MicrobatchFrame frame;
  uint32_t vocabulary;
  size_t hidden_width;
};

Bytes view_of(const nb::bytes& data) { return {static_cast<const uint8_t*>(data.data()), data.size()}; }

std::optional<ReadFrame> read(const FrameLimits& limits, nb::bytes data) {
  std::optional<MicrobatchFrame> frame = read_frame(view_of(data), limits);
  if (!frame) return std::nullopt;
  return ReadFrame{std::move(data), std::move(*frame), limits.vocabulary, limits.hidden_width};
}

nb::object array_of(nb::handle owner, const std::vector<int32_t>& numbers) {
  const size_t shape[1] = {numbers.size()};
  return nb::cast(nb::ndarray<nb::numpy, const int32_t>(numbers.data(), 1, shape, owner));
}

// In the order of kernels.backend.Batch.
nb::tuple arrays_of(nb::handle self) {
  const MicrobatchFrame& frame = nb::cast<ReadFrame&>(self).frame;
  return nb::make_tuple(array_of(self, frame.tokens), array_of(self, frame.positions),
                        array_of(self, frame.sequence_starts), array_of(self, frame.table_starts),
                        array_of(self, frame.block_tables), array_of(self, frame.output_rows));
}

nb::object hidden_of(nb::handle self) {
  const ReadFrame& read = nb::cast<ReadFrame&>(self);
  if (read.hidden_width == 0) return nb::none();
  const size_t shape[2] = {read.frame.tokens.size(), read.hidden_width};
  const void* body = view_of(read.data).data() + read.frame.body_at;
  return nb::cast(nb::ndarray<nb::numpy, const float>(body, 2, shape, self));
}

std::vector<uint64_t> numbers_of(const ReadFrame& read) {
  std::set<uint64_t> numbers;
  for (const Dependency& dependency : read.frame.dependencies) numbers.insert(dependency.number);
  return {numbers.begin(), numbers.end()};
}

std::vector<std::tuple<uint64_t, uint64_t, uint64_t, uint64_t>> timings_of(const ReadFrame& read) {
  std::vector<std::tuple<uint64_t, uint64_t, uint64_t, uint64_t>> timings;
  for (const Timing& t : read.frame.timings) timings.emplace_back(t.queue_ns, t.compute_ns, t.wire_ns, t.rows);
  return timings;
}

nb::object next_frame(const ReadFrame& read, FloatRows hidden, uint64_t queue_ns, uint64_t compute_ns,
                      uint64_t wire_ns) {
  const size_t rows = read.frame.tokens.size(), hidden_bytes = hidden.size() * sizeof(float);
  if (hidden.shape(0) != rows) throw nb::value_error("hidden must be [rows, embedding]");
  const Bytes data = view_of(read.data);
  const size_t size = next_frame_bytes(data, read.frame, hidden_bytes);
  nb::object out = nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
  if (!out.is_valid()) throw nb::python_error();
  write_next_frame(data, read.frame, Timing{queue_ns, compute_ns, wire_ns, rows}, hidden.data(), hidden_bytes,
                   reinterpret_cast<uint8_t*>(PyBytes_AsString(out.ptr())));
  return out;
}

}  // namespace

void bind_frames(nb::module_& module) {
  nb::class_<FrameLimits>(module, "FrameReader")
      .def(
          "__init__",
          [](FrameLimits* self, std::string model_id, uint32_t max_batch_tokens, uint32_t max_outputs,
             uint32_t max_sequences, uint32_t max_context_tokens, uint32_t kv_blocks, uint32_t vocabulary,
             size_t hidden_width, uint32_t max_stages, uint32_t max_rows, size_t max_header_bytes) {
            new (self) FrameLimits{std::move(model_id), max_batch_tokens, max_outputs,  max_sequences,
                                   max_context_tokens,  kv_blocks,        vocabulary,   hidden_width,
                                   max_stages,          max_rows,         max_header_bytes};
          },
          "model_id"_a, "max_batch_tokens"_a, "max_outputs"_a, "max_sequences"_a, "max_context_tokens"_a, "kv_blocks"_a,
          "vocabulary"_a, "hidden_width"_a, "max_stages"_a, "max_rows"_a, "max_header_bytes"_a)
      .def("read", &read, "data"_a);
  nb::class_<ReadFrame>(module, "MicrobatchFrame")
      .def_prop_ro("epoch", [](const ReadFrame& read) { return read.frame.epoch; })
      .def_prop_ro("number", [](const ReadFrame& read) { return read.frame.number; })
      .def_prop_ro("rows", [](const ReadFrame& read) { return read.frame.tokens.size(); })
      .def_prop_ro("attended", [](const ReadFrame& read) { return read.frame.attended; })
      .def_prop_ro("depends_on", &numbers_of)
      .def_prop_ro("timings", &timings_of)
      .def_prop_ro("arrays", &arrays_of)
      .def_prop_ro("hidden", &hidden_of)
      .def(
          "fill",
          [](ReadFrame& read, uint64_t number, const std::vector<int64_t>& tokens) {
            return fill_tokens(read.frame, number, tokens, read.vocabulary);
          },
          "number"_a, "tokens"_a)
      .def("next_frame", &next_frame, "hidden"_a, "queue_ns"_a, "compute_ns"_a, "wire_ns"_a);
}

}  // namespace llamaclust
