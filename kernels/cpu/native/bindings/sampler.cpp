#include <nanobind/stl/array.h>

#include <algorithm>

#include "bindings/ranked.h"
#include "probes/probes.h"
#include "runtime/float_mode.h"
#include "runtime/levels.h"
#include "runtime/math.h"
#include "sampler/random.h"
#include "sampler/sampler.h"

namespace llamaclust {
namespace {

RowTask sample_task(float temperature, int32_t top_k, double top_p, double min_p, float repetition_penalty,
                    float frequency_penalty, float presence_penalty, std::vector<TokenValue> logit_bias, uint64_t seed,
                    uint32_t choice, uint32_t position, std::vector<int32_t> history, std::vector<int32_t> suppressed,
                    int32_t top_logprobs, std::shared_ptr<const Chain> chain, std::optional<Words> allowed) {
  std::vector<uint32_t> bits;
  if (allowed) bits.assign(allowed->data(), allowed->data() + allowed->size());
  return {false, -1,
          Choice{temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty,
                 std::move(logit_bias), seed, choice, position, std::move(history), std::move(suppressed),
                 std::move(bits), std::move(chain)},
          top_logprobs};
}

std::shared_ptr<Chain> make_chain(std::vector<int32_t> order, std::vector<int32_t> unpenalized, int32_t penalty_window,
                                  int32_t dry_window, Breakers breakers, double mu, const nb::kwargs& numbers) {
  auto chain = std::make_shared<Chain>();
  size_t known = 0;
#define LLAMACLUST_READ(kind, name) chain->name = nb::cast<kind>(numbers[#name]), known++;
  LLAMACLUST_CHAIN_NUMBERS(LLAMACLUST_READ)
#undef LLAMACLUST_READ
  if (numbers.size() != known) throw nb::value_error("a chain has no such number");
  chain->order = std::move(order);
  chain->unpenalized = std::move(unpenalized);
  chain->penalty_window = penalty_window;
  chain->dry_window = dry_window;
  chain->breakers = std::move(breakers);
  chain->mu = mu;
  return chain;
}

std::vector<RowOutcome> run(Sampler& sampler, FloatRows logits, const std::vector<RowTask>& tasks) {
  if (static_cast<int>(logits.shape(1)) != sampler.vocabulary() || logits.shape(0) != tasks.size())
    throw nb::value_error("logits must be [tasks, vocabulary]");
  const nb::gil_scoped_release released;
  const FloatMode mode;
  return sampler.run(logits.data(), tasks);
}

void exp_of(Floats x, Array<float> out, const std::string& level) {
  if (x.size() != out.size()) throw nb::value_error("x and out differ in length");
  find_level(level).sampler.exp(x.data(), static_cast<int>(x.size()), out.data());
}

std::pair<double, double> sincos_of(double angle) {
  double sine, cosine;
  sincos_double(angle, &sine, &cosine);
  return {sine, cosine};
}

}  // namespace

std::vector<RowOutcome> run_ranked(Sampler& sampler, RankedRows records, const std::vector<RowTask>& tasks,
                                   const nb::callable& logits_of, const nb::callable& totals_of) {
  if (records.shape(1) != ranked_words(sampler.vocabulary()) || records.shape(0) != tasks.size())
    throw nb::value_error("records must be [tasks, words of a record]");
  std::vector<float> divisors = sampler.divisors(tasks);
  std::optional<RankedRows> totals;
  if (std::any_of(divisors.begin(), divisors.end(), [](float by) { return by != 0; })) {
    totals = nb::cast<RankedRows>(totals_of(divisors));
    if (static_cast<int>(totals->shape(1)) != sums_of_row(sampler.vocabulary()) || totals->shape(0) != tasks.size())
      throw nb::value_error("totals must be [tasks, parts of a row]");
  }
  std::vector<RowOutcome> outcomes;
  {
    const nb::gil_scoped_release released;
    const FloatMode mode;
    outcomes = sampler.run_ranked(records.data(), totals ? totals->data() : nullptr, tasks);
  }
  std::vector<int32_t> lacking;
  for (size_t row = 0; row < outcomes.size(); row++)
    if (outcomes[row].lacks_logits) lacking.push_back(static_cast<int32_t>(row));
  if (lacking.empty()) return outcomes;
  const FloatRows logits = nb::cast<FloatRows>(logits_of(lacking));
  if (static_cast<int>(logits.shape(1)) != sampler.vocabulary() || logits.shape(0) != lacking.size())
    throw nb::value_error("logits must be [rows, vocabulary]");
  const nb::gil_scoped_release released;
  const FloatMode mode;
  sampler.complete(logits.data(), tasks, outcomes);
  return outcomes;
}

void bind_sampler(nb::module_& module) {
  nb::class_<Chain>(module, "Chain")
      .def_static("make", &make_chain, "order"_a, "unpenalized"_a, "penalty_window"_a, "dry_window"_a, "breakers"_a,
                  "mu"_a, "numbers"_a);
  nb::class_<RowTask>(module, "RowTask")
      .def_static("sample", &sample_task, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition_penalty"_a,
                  "frequency_penalty"_a, "presence_penalty"_a, "logit_bias"_a, "seed"_a, "choice"_a, "position"_a,
                  "history"_a, "suppressed"_a, "top_logprobs"_a, "chain"_a.none() = nb::none(),
                  "allowed"_a.none() = nb::none())
      .def_static(
          "score", [](int32_t token, int32_t top) { return RowTask{true, token, {}, top}; }, "token"_a,
          "top_logprobs"_a);
  nb::class_<RowOutcome>(module, "RowOutcome")
      .def_ro("token", &RowOutcome::token)
      .def_ro("logprob", &RowOutcome::logprob)
      .def_ro("top_logprobs", &RowOutcome::top_logprobs)
      .def_ro("failure", &RowOutcome::failure)
      .def_ro("mu", &RowOutcome::mu);
  nb::class_<Sampler>(module, "Sampler")
      .def(
          "__init__",
          [](Sampler* self, int vocabulary, const std::string& level, int threads) {
            new (self) Sampler(find_level(level).sampler, vocabulary, threads);
          },
          "vocabulary"_a, "feature_level"_a, "threads"_a)
      .def("run", &run, "logits"_a, "tasks"_a)
      .def("run_ranked", &run_ranked, "records"_a, "tasks"_a, "logits_of"_a, "totals_of"_a)
      .def_prop_ro("record_words", [](const Sampler& sampler) { return ranked_words(sampler.vocabulary()); });
  const nb::call_guard<nb::gil_scoped_release> released;
  nb::class_<ReadProbe>(module, "ReadProbe")
      .def(nb::init<int, int>(), "threads"_a, "cache_multiple"_a, released)
      .def("measure", &ReadProbe::measure, "seconds"_a, released)
      .def_prop_ro("bytes_read", &ReadProbe::bytes_read);
  module.def("int8_peak", &int8_peak, "threads"_a, "seconds"_a, released);
  module.def("fma_peak", &fma_peak, "threads"_a, "seconds"_a, released);
  module.def("philox", &philox, "counter"_a, "key"_a);
  module.def("exp", &exp_of, "x"_a, "out"_a, "feature_level"_a);
  module.def("log", &log_double, "x"_a);
  module.def("exp_double", &exp_double, "x"_a);
  module.def("sincos", &sincos_of, "angle"_a);
}

}  // namespace llamaclust
