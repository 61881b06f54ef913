#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <set>

#include "bindings/frames.h"
#include "bindings/ranked.h"
#include "frames/result.h"
#include "frames/sampling_inputs.h"
#include "runtime/float_mode.h"

namespace llamaclust {
namespace {

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
  const nb::object windows = frame.window_tables.empty() ? nb::none() : array_of(self, frame.window_tables);
  return nb::make_tuple(array_of(self, frame.tokens), array_of(self, frame.positions),
                        array_of(self, frame.sequence_starts), array_of(self, frame.table_starts),
                        array_of(self, frame.block_tables), array_of(self, frame.output_rows), windows);
}

nb::object hidden_of(nb::handle self) {
  const ReadFrame& read = nb::cast<ReadFrame&>(self);
  if (read.hidden_width == 0) return nb::none();
  const size_t shape[2] = {read.frame.tokens.size(), read.hidden_width};
  return nb::cast(nb::ndarray<nb::numpy, const float>(read.hidden(), 2, shape, self));
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
  const Bytes data = read.bytes();
  const size_t size = next_frame_bytes(data, read.frame, hidden_bytes);
  nb::object out = nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
  if (!out.is_valid()) throw nb::python_error();
  write_next_frame(data, read.frame, Timing{queue_ns, compute_ns, wire_ns, rows}, hidden.data(), hidden_bytes,
                   reinterpret_cast<uint8_t*>(PyBytes_AsString(out.ptr())));
  return out;
}

struct RowOutcomes {
  std::vector<RowOutcome> rows;
};

RowOutcomes sample(Sampler& sampler, FloatRows logits, const SamplingTasks& tasks) {
  if (tasks.rows.empty()) return {};
  if (static_cast<int>(logits.shape(1)) != sampler.vocabulary() || logits.shape(0) != tasks.rows.size())
    throw nb::value_error("logits must be [tasks, vocabulary]");
  const nb::gil_scoped_release released;
  const FloatMode mode;
  return {sampler.run(logits.data(), tasks.rows)};
}

RowOutcomes sample_ranked(Sampler& sampler, RankedRows records, const SamplingTasks& tasks, const nb::callable& logits_of,
                          const nb::callable& totals_of) {
  if (tasks.rows.empty()) return {};
  return {run_ranked(sampler, std::move(records), tasks.rows, logits_of, totals_of)};
}

bool has_failures(const RowOutcomes& outcomes) {
  const auto failed = [](const RowOutcome& row) { return !row.failure.empty(); };
  return std::any_of(outcomes.rows.begin(), outcomes.rows.end(), failed);
}

std::vector<int32_t> tokens_of(const RowOutcomes& outcomes) {
  std::vector<int32_t> tokens;
  for (const RowOutcome& row : outcomes.rows) tokens.push_back(row.token);
  return tokens;
}

nb::bytes result_of(const RowOutcomes& outcomes, const ReadFrame& read, uint64_t queue_ns, uint64_t compute_ns,
                    uint64_t wire_ns) {
  if (has_failures(outcomes)) throw nb::value_error("a row has no answer");
  const Timing timing{queue_ns, compute_ns, wire_ns, read.frame.tokens.size()};
  const std::string result = write_result(read.frame, timing, outcomes.rows);
  return nb::bytes(result.data(), result.size());
}

void bind_sampling(nb::module_& module) {
  nb::class_<InputsBounds>(module, "InputsReader")
      .def(
          "__init__",
          [](InputsBounds* self, uint32_t max_rows, uint32_t max_context_tokens, uint32_t max_vocabulary,
             uint32_t max_top_logprobs, uint32_t max_top_k, uint64_t max_tokens, size_t max_bytes,
             const std::array<Range, 6>& reals) {
            new (self) InputsBounds{max_rows,  max_context_tokens, max_vocabulary, max_top_logprobs,
                                    max_top_k, max_tokens,         max_bytes,      reals};
          },
          "max_rows"_a, "max_context_tokens"_a, "max_vocabulary"_a, "max_top_logprobs"_a, "max_top_k"_a, "max_tokens"_a,
          "max_bytes"_a, "reals"_a)
      .def(
          "read",
          [](const InputsBounds& bounds, const nb::bytes& data) { return read_inputs(view_of(data), bounds); },
          "data"_a);
  nb::class_<SamplingTasks>(module, "SamplingTasks")
      .def_ro("epoch", &SamplingTasks::epoch)
      .def_ro("number", &SamplingTasks::number)
      .def_prop_ro("rows", [](const SamplingTasks& tasks) { return tasks.rows.size(); })
      .def_prop_ro("needs_tokens", [](const SamplingTasks& tasks) { return !tasks.histories.empty(); })
      .def(
          "complete", [](SamplingTasks& tasks, const ReadFrame& read) { return complete_histories(tasks, read.frame); },
          "frame"_a);
  nb::class_<RowOutcomes>(module, "RowOutcomes")
      .def_ro("rows", &RowOutcomes::rows)
      .def_prop_ro("has_failures", &has_failures)
      .def_prop_ro("tokens", &tokens_of)
      .def("result", &result_of, "frame"_a, "queue_ns"_a, "compute_ns"_a, "wire_ns"_a);
  module.def("sample", &sample, "sampler"_a, "logits"_a, "tasks"_a);
  module.def("sample_ranked", &sample_ranked, "sampler"_a, "records"_a, "tasks"_a, "logits_of"_a, "totals_of"_a);
}

}  // namespace

void bind_frames(nb::module_& module) {
  nb::class_<FrameLimits>(module, "FrameReader")
      .def(
          "__init__",
          [](FrameLimits* self, std::string model_id, uint32_t max_batch_tokens, uint32_t max_outputs,
             uint32_t max_sequences, uint32_t max_context_tokens, uint32_t kv_blocks, uint32_t vocabulary,
             uint32_t window, uint32_t window_blocks, size_t hidden_width, uint32_t max_stages, uint32_t max_rows,
             uint32_t max_kv_blocks, size_t max_header_bytes) {
            new (self) FrameLimits{std::move(model_id), max_batch_tokens, max_outputs,   max_sequences,
                                   max_context_tokens,  kv_blocks,        vocabulary,    window,
                                   window_blocks,       hidden_width,     max_stages,    max_rows,
                                   max_kv_blocks,       max_header_bytes};
          },
          "model_id"_a, "max_batch_tokens"_a, "max_outputs"_a, "max_sequences"_a, "max_context_tokens"_a, "kv_blocks"_a,
          "vocabulary"_a, "window"_a, "window_blocks"_a, "hidden_width"_a, "max_stages"_a, "max_rows"_a,
          "max_kv_blocks"_a, "max_header_bytes"_a)
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
  module.def(
      "read_sampled_tokens",
      [](const nb::bytes& data, uint32_t max_rows, uint32_t max_vocabulary) {
        return read_sampled_tokens(view_of(data), max_rows, max_vocabulary);
      },
      "data"_a, "max_rows"_a, "max_vocabulary"_a);
  bind_sampling(module);
}

}  // namespace llamaclust
