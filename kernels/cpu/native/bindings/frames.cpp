#include "bindings/frames.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <set>

#include "bindings/ranked.h"
#include "frames/result.h"
#include "frames/sampling_inputs.h"
#include "runtime/float_mode.h"

namespace llamaclust {
namespace {

using PythonTiming = std::tuple<uint64_t, uint64_t, uint64_t, uint64_t>;

Bytes view_of(const nb::bytes& data) { return {static_cast<const uint8_t*>(data.data()), data.size()}; }

Timing timing_of(const PythonTiming& timing) {
  return std::apply([](auto... numbers) { return Timing{numbers...}; }, timing);
}

ReadFrame read(const FrameLimits& limits, nb::bytes data) {
  MicrobatchFrame frame = read_frame(view_of(data), limits);
  return ReadFrame{std::move(data), std::move(frame), limits.vocabulary, limits.hidden_width};
}

template <typename T>
nb::object array_of(nb::handle owner, const std::vector<T>& numbers) {
  const size_t shape[1] = {numbers.size()};
  return nb::cast(nb::ndarray<nb::numpy, const T>(numbers.data(), 1, shape, owner));
}

template <typename T>
nb::object matrix_of(nb::handle owner, const std::vector<T>& numbers, size_t rows) {
  if (numbers.empty()) return nb::none();
  const size_t shape[2] = {rows, numbers.size() / rows};
  return nb::cast(nb::ndarray<nb::numpy, const T>(numbers.data(), 2, shape, owner));
}

nb::object adapter_scales_of(nb::handle self) {
  const MicrobatchFrame& frame = nb::cast<ReadFrame&>(self).frame;
  return matrix_of(self, frame.adapter_scales, frame.positions.size());
}

// Returns the arrays in the order of the fields of kernels.backend.Batch. The states and the given rows are tuples.
nb::tuple arrays_of(nb::handle self) {
  const MicrobatchFrame& frame = nb::cast<ReadFrame&>(self).frame;
  nb::object windows = nb::none(), states = nb::none(), given = nb::none();
  if (!frame.window_tables.empty()) windows = array_of(self, frame.window_tables);
  if (!frame.states_before.empty())
    states = nb::make_tuple(array_of(self, frame.states_before), array_of(self, frame.state_starts),
                            array_of(self, frame.state_rows), array_of(self, frame.state_blocks));
  if (const size_t rows = frame.given_rows.size(); rows > 0)
    given = nb::make_tuple(array_of(self, frame.given_rows), matrix_of(self, frame.given_values, rows));
  const nb::object rope = frame.rope_positions.empty()
                              ? nb::none()
                              : matrix_of(self, frame.rope_positions, frame.rope_positions.size() / frame.positions.size());
  return nb::make_tuple(array_of(self, frame.tokens), array_of(self, frame.positions),
                        array_of(self, frame.sequence_starts), array_of(self, frame.table_starts),
                        array_of(self, frame.block_tables), array_of(self, frame.output_rows), windows,
                        adapter_scales_of(self), states, rope, matrix_of(self, frame.groups, frame.positions.size()),
                        given);
}

nb::object hidden_of(nb::handle self) {
  const ReadFrame& read = nb::cast<ReadFrame&>(self);
  if (!read.hidden()) return nb::none();
  const size_t shape[2] = {read.frame.positions.size(), read.hidden_width};
  return nb::cast(nb::ndarray<nb::numpy, const float>(read.hidden(), 2, shape, self));
}

std::vector<uint64_t> depends_on(const ReadFrame& read) {
  std::set<uint64_t> numbers;
  for (const Dependency& dependency : read.frame.dependencies) numbers.insert(dependency.number);
  return {numbers.begin(), numbers.end()};
}

std::vector<std::pair<uint64_t, uint32_t>> dependencies_of(const ReadFrame& read) {
  std::vector<std::pair<uint64_t, uint32_t>> found;
  for (const Dependency& dependency : read.frame.dependencies) found.emplace_back(dependency.number, dependency.output_row);
  return found;
}

std::vector<std::tuple<int32_t, int32_t, int32_t>> draft_orders_of(const ReadFrame& read) {
  std::vector<std::tuple<int32_t, int32_t, int32_t>> orders;
  for (const DraftOrder& order : read.frame.draft_orders) orders.emplace_back(order.chunk, order.next_token, order.drafts);
  return orders;
}

nb::object failure_of(const ReadFrame& read) {
  if (!read.frame.failure) return nb::none();
  const std::string& failure = *read.frame.failure;
  return nb::steal(PyUnicode_DecodeUTF8(failure.data(), static_cast<Py_ssize_t>(failure.size()), "replace"));
}

nb::object written(const FollowingFrame& frame) {
  nb::object out = nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(frame.bytes())));
  if (!out.is_valid()) throw nb::python_error();
  frame.write(reinterpret_cast<uint8_t*>(PyBytes_AsString(out.ptr())));
  return out;
}

nb::object next_frame(const ReadFrame& read, FloatRows hidden, uint64_t queue_ns, uint64_t compute_ns,
                      uint64_t wire_ns) {
  const size_t rows = read.frame.positions.size();
  if (hidden.shape(0) != rows) throw nb::value_error("hidden must be [rows, embedding]");
  const Bytes body(reinterpret_cast<const uint8_t*>(hidden.data()), hidden.size() * sizeof(float));
  return written({read.bytes(), read.frame, Timing{queue_ns, compute_ns, wire_ns, rows}, body});
}

nb::object failure_frame(const ReadFrame& read, const std::string& failure) {
  const Bytes body(reinterpret_cast<const uint8_t*>(failure.data()), failure.size());
  return written({read.bytes(), read.frame, std::nullopt, body});
}

struct RowOutcomes {
  explicit RowOutcomes(std::vector<RowOutcome> outcomes = {}) {
    for (RowOutcome& outcome : outcomes) rows.emplace_back(std::move(outcome));
  }

  std::vector<RowAnswer> rows;
};

RowOutcomes sample(Sampler& sampler, FloatRows logits, const SamplingTasks& tasks) {
  if (tasks.rows.empty()) return RowOutcomes{};
  if (static_cast<int>(logits.shape(1)) != sampler.vocabulary() || logits.shape(0) != tasks.rows.size())
    throw nb::value_error("logits must be [tasks, vocabulary]");
  const nb::gil_scoped_release released;
  const FloatMode mode;
  return RowOutcomes{sampler.run(logits.data(), tasks.rows)};
}

RowOutcomes sample_ranked(Sampler& sampler, RankedRows records, const SamplingTasks& tasks, const nb::callable& logits_of,
                          const nb::callable& totals_of) {
  if (tasks.rows.empty()) return RowOutcomes{};
  return RowOutcomes{run_ranked(sampler, std::move(records), tasks.rows, logits_of, totals_of)};
}

std::vector<int32_t> tokens_of(const RowOutcomes& outcomes) {
  std::vector<int32_t> tokens;
  for (const RowAnswer& row : outcomes.rows) tokens.push_back(std::max(row.token, 0));
  return tokens;
}

nb::bytes result_of(const RowOutcomes& outcomes, const ReadFrame& read, const std::optional<PythonTiming>& timing,
                    const std::string& failure, const nb::bytes& embeddings, uint64_t drafting_ns) {
  std::optional<Timing> own;
  if (timing) own = timing_of(*timing);
  const std::string bytes =
      StageResult{read.frame, own, outcomes.rows, failure, view_of(embeddings), drafting_ns}.bytes();
  return nb::bytes(bytes.data(), bytes.size());
}

SamplingTasks second_draws(const SamplingTasks& tasks, const std::vector<size_t>& places,
                           const std::vector<Words>& allowed) {
  std::vector<std::vector<uint32_t>> bits;
  for (const Words& words : allowed) bits.emplace_back(words.data(), words.data() + words.size());
  return tasks.second_draws(places, std::move(bits));
}

std::vector<std::tuple<uint64_t, uint64_t, uint64_t, std::optional<int32_t>>> matcher_rows_of(const SamplingTasks& tasks) {
  std::vector<std::tuple<uint64_t, uint64_t, uint64_t, std::optional<int32_t>>> rows;
  for (const MatcherRow& each : tasks.matcher_rows)
    rows.emplace_back(each.row, each.key, each.position,
                      each.drafted < 0 ? std::nullopt : std::optional<int32_t>(each.drafted));
  return rows;
}

std::vector<bool> scored_of(const SamplingTasks& tasks) {
  std::vector<bool> scored;
  for (const RowTask& row : tasks.rows) scored.push_back(row.scored);
  return scored;
}

void bind_tasks(nb::module_& module) {
  nb::class_<InputsBounds>(module, "InputsReader")
      .def(
          "__init__",
          [](InputsBounds* self, uint32_t max_rows, uint32_t max_context_tokens, uint32_t max_vocabulary,
             uint32_t max_top_logprobs, uint32_t max_released, uint32_t max_breakers, uint32_t max_breaker_tokens,
             uint64_t max_tokens, size_t max_bytes, double max_bias, double max_mu, const std::array<Range, 7>& params,
             const std::array<Range, 13>& chain) {
            new (self) InputsBounds{max_rows,     max_context_tokens, max_vocabulary, max_top_logprobs, max_released,
                                    max_breakers, max_breaker_tokens, max_tokens,     max_bytes,        max_bias,
                                    max_mu,       params,             chain};
          },
          "max_rows"_a, "max_context_tokens"_a, "max_vocabulary"_a, "max_top_logprobs"_a, "max_released"_a,
          "max_breakers"_a, "max_breaker_tokens"_a, "max_tokens"_a, "max_bytes"_a, "max_bias"_a, "max_mu"_a, "params"_a,
          "chain"_a)
      .def(
          "read",
          [](const InputsBounds& bounds, const nb::bytes& data) { return read_inputs(view_of(data), bounds); },
          "data"_a);
  nb::class_<SamplingTasks>(module, "SamplingTasks")
      .def_ro("epoch", &SamplingTasks::epoch)
      .def_ro("number", &SamplingTasks::number)
      .def_ro("released", &SamplingTasks::released)
      .def_prop_ro("starts", [](const SamplingTasks& tasks) { return nb::bytes(tasks.starts.data(), tasks.starts.size()); })
      .def_prop_ro("rows", [](const SamplingTasks& tasks) { return tasks.rows.size(); })
      .def_prop_ro("scored", &scored_of)
      .def_prop_ro("matcher_rows", &matcher_rows_of)
      .def(
          "complete", [](SamplingTasks& tasks, const ReadFrame& read) { tasks.complete(read.frame); }, "frame"_a)
      .def(
          "allow_suppressed", [](SamplingTasks& tasks, size_t place) { tasks.rows.at(place).choice.suppressed.clear(); },
          "place"_a)
      .def("second_draws", &second_draws, "places"_a, "allowed"_a)
      .def("drafts", &SamplingTasks::drafts, "places"_a, "later"_a);
}

void bind_outcomes(nb::module_& module) {
  nb::class_<RowAnswer, RowOutcome>(module, "RowAnswer")
      .def_ro("forced", &RowAnswer::forced)
      .def_ro("forced_draft", &RowAnswer::forced_draft)
      .def_ro("drafted", &RowAnswer::drafted)
      .def_ro("is_deferred", &RowAnswer::is_deferred)
      .def_ro("is_request_fault", &RowAnswer::is_request_fault)
      .def_ro("matcher_ns", &RowAnswer::matcher_ns);
  nb::class_<RowOutcomes>(module, "RowOutcomes")
      .def(nb::init<>())
      .def_prop_ro("rows", [](const RowOutcomes& outcomes) { return outcomes.rows; })
      .def_prop_ro("tokens", &tokens_of)
      .def(
          "set",
          [](RowOutcomes& outcomes, size_t place, int32_t token, float logprob, std::vector<TokenValue> top_logprobs,
             std::string failure, bool is_request_fault, bool is_deferred, std::optional<double> mu,
             std::vector<int32_t> forced, std::vector<int32_t> forced_draft, uint64_t matcher_ns) {
            RowAnswer& row = outcomes.rows.at(place);
            row.token = token;
            row.logprob = logprob;
            row.top_logprobs = std::move(top_logprobs);
            row.failure = std::move(failure);
            row.is_request_fault = is_request_fault;
            row.is_deferred = is_deferred;
            row.mu = mu.value_or(std::numeric_limits<double>::quiet_NaN());
            row.forced = std::move(forced);
            row.forced_draft = std::move(forced_draft);
            row.matcher_ns = matcher_ns;
          },
          "place"_a, "token"_a, "logprob"_a, "top_logprobs"_a, "failure"_a, "is_request_fault"_a, "is_deferred"_a,
          "mu"_a.none(), "forced"_a, "forced_draft"_a, "matcher_ns"_a)
      .def(
          "set_drafted",
          [](RowOutcomes& outcomes, size_t place, std::vector<int32_t> tokens) {
            outcomes.rows.at(place).drafted = std::move(tokens);
          },
          "place"_a, "tokens"_a)
      .def("result", &result_of, "frame"_a, "timing"_a.none(), "failure"_a = "", "embeddings"_a = nb::bytes("", 0),
           "drafting_ns"_a = 0);
  module.def("sample", &sample, "sampler"_a, "logits"_a, "tasks"_a);
  module.def("sample_ranked", &sample_ranked, "sampler"_a, "records"_a, "tasks"_a, "logits_of"_a, "totals_of"_a);
}

// Raises a ProtocolViolation in Python as ProtocolError, the exception that the Python readers raise.
void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const ProtocolViolation& error) {
    const nb::object kind = nb::module_::import_("llamaclust.core.errors").attr("ProtocolError");
    PyErr_SetString(kind.ptr(), error.what());
  }
}

}  // namespace

void bind_frames(nb::module_& module) {
  nb::register_exception_translator(&translate, nullptr);
  nb::class_<FrameLimits>(module, "FrameReader")
      .def(
          "__init__",
          [](FrameLimits* self, std::string model_id, int32_t max_batch_tokens, int32_t max_outputs,
             int32_t max_sequences, int32_t max_context_tokens, int32_t kv_blocks, int32_t vocabulary, int32_t window,
             int32_t window_blocks, int32_t state_blocks, int32_t adapters, size_t hidden_width, size_t given_width,
             int32_t rope_sections, int32_t max_stages, int32_t max_rows, int32_t max_kv_blocks, int32_t max_drafts,
             float max_scale, size_t max_header_bytes, size_t max_failure_bytes) {
            new (self) FrameLimits{std::move(model_id), max_batch_tokens, max_outputs,   max_sequences,
                                   max_context_tokens,  kv_blocks,        vocabulary,    window,
                                   window_blocks,       state_blocks,     adapters,      hidden_width,
                                   given_width,         rope_sections,    max_stages,    max_rows,
                                   max_kv_blocks,       max_drafts,       max_scale,     max_header_bytes,
                                   max_failure_bytes};
          },
          "model_id"_a, "max_batch_tokens"_a, "max_outputs"_a, "max_sequences"_a, "max_context_tokens"_a, "kv_blocks"_a,
          "vocabulary"_a, "window"_a, "window_blocks"_a, "state_blocks"_a, "adapters"_a, "hidden_width"_a,
          "given_width"_a, "rope_sections"_a, "max_stages"_a, "max_rows"_a, "max_kv_blocks"_a, "max_drafts"_a, "max_scale"_a, "max_header_bytes"_a, "max_failure_bytes"_a)
      .def("read", &read, "data"_a);
  nb::class_<ReadFrame>(module, "MicrobatchFrame")
      .def_prop_ro("epoch", [](const ReadFrame& read) { return read.frame.epoch; })
      .def_prop_ro("number", [](const ReadFrame& read) { return read.frame.number; })
      .def_prop_ro("rows", [](const ReadFrame& read) { return read.frame.positions.size(); })
      .def_prop_ro("attended", [](const ReadFrame& read) { return read.frame.attended; })
      .def_prop_ro("depends_on", &depends_on)
      .def_prop_ro("dependencies", &dependencies_of)
      .def_prop_ro("draft_orders", &draft_orders_of)
      .def_prop_ro("checked_chunks", [](const ReadFrame& read) { return read.frame.checked_chunks; })
      .def_prop_ro("embedded_rows",
                   [](nb::handle self) { return array_of(self, nb::cast<ReadFrame&>(self).frame.embedded_rows); })
      .def_prop_ro("failure", &failure_of)
      .def_prop_ro("arrays", &arrays_of)
      .def_prop_ro("adapter_scales", &adapter_scales_of)
      .def_prop_ro("hidden", &hidden_of)
      .def(
          "fill",
          [](ReadFrame& read, uint64_t number, const std::vector<int32_t>& tokens) {
            return fill_tokens(read.frame, number, tokens, read.vocabulary);
          },
          "number"_a, "tokens"_a)
      .def("next_frame", &next_frame, "hidden"_a, "queue_ns"_a, "compute_ns"_a, "wire_ns"_a)
      .def("failure_frame", &failure_frame, "failure"_a);
  module.def(
      "read_sampled_tokens",
      [](const nb::bytes& data, size_t max_rows, int32_t max_vocabulary) {
        return read_sampled_tokens(view_of(data), max_rows, max_vocabulary);
      },
      "data"_a, "max_rows"_a, "max_vocabulary"_a);
  bind_tasks(module);
  bind_outcomes(module);
}

}  // namespace llamaclust
