// Prints a checksum of what each feature level of this machine, or the one that is named, computes from the same random
// values, a line an operation: LEVEL OPERATION CRC. Equal lines on two levels, or on two machines, are equal bits.
#include "level_bits.h"

#include <cstring>
#include <utility>

#include "runtime/float_mode.h"
#include "runtime/levels.h"
#include "runtime/math.h"
#include "probes/probes.h"
#include "sampler/sampler.h"
#include "sampler/random.h"

using namespace llamaclust;

namespace level_bits {
namespace {

void print_vectors(const Level& level) {
  Random random(100);
  Crc crc;
  for (int n : {1, 15, 16, 63, 64, 100, 577}) {
    const size_t size = static_cast<size_t>(n);
    const std::vector<float> x = random.values(size, 3), y = random.values(size);
    std::vector<float> out(size);
    level.vector.rms_norm(x.data(), y.data(), 1e-5f, n, out.data());
    crc.add(out);
    level.vector.layer_norm(x.data(), y.data(), x.data(), 1e-5f, n, out.data());
    crc.add(out);
    const float number = level.vector.sigmoid_dot(x.data(), y.data(), n);
#define ADD(op)                                                                         \
  level.vector.elementwise(RowOp::op, x.data(), y.data(), number, n, out.data()); \
  crc.add(out);
    LLAMACLUST_ROW_OPS(ADD)
#undef ADD
    level.vector.decay(x.data(), y.data(), x.data(), n, out.data());
    crc.add(out);
    level.vector.add_scaled(x.data(), 0.37f, n, out.data());
    crc.add(out);
    level.vector.softmax(out.data(), n);
    crc.add(out);
  }
  for (const RopeStyle style : {RopeStyle::Norm, RopeStyle::Neox})
    for (int pairs : {4, 24, 32}) {
      const std::vector<float> x = random.values(64), rotation = random.values(2 * static_cast<size_t>(pairs));
      std::vector<float> out(64);
      level.vector.rope(x.data(), rotation.data(), pairs, 64, style, out.data());
      crc.add(out);
    }
  print(level.name, "vectors", crc);
}

enum class Form { Plain, Biased, Latent };

// Attention of some queries over three spans, the last of them short.
struct Heads {
  static constexpr int kBlocks = 3 * kSpanBlocks;

  Random random{200};
  KvType type;
  Form form;
  int dim, queries;
  int value_dim = form == Form::Latent ? dim - 8 : dim;
  size_t width = static_cast<size_t>(padded_head(dim)), count = static_cast<size_t>(queries);
  size_t piece = kv_piece_bytes(type, dim, form == Form::Latent);
  std::vector<uint16_t> memory = std::vector<uint16_t>(kBlocks * piece / 2, 0x7e00);  // NaN where nothing is
  std::vector<int32_t> blocks = std::vector<int32_t>(kBlocks);
  std::vector<float> q = random.values(count * width);
  std::vector<float> scores = std::vector<float>(kScoredQueries * kSpanTokens);

  Heads(KvType kv_type, Form how, int head_dim, int query_count)
      : type(kv_type), form(how), dim(head_dim), queries(query_count) {
    for (int i = 0; i < kBlocks; i++) blocks[static_cast<size_t>(i)] = i * 5 % kBlocks;
  }

  uint8_t* bytes() { return reinterpret_cast<uint8_t*>(memory.data()); }

  void store(const Level& level, int positions) {
    const KvOps& kv = level.attention.kv[static_cast<int>(type)];
    for (size_t i = 0; i < count; i++) kv.prepare(q.data() + i * width, dim);
    for (int i = 0; i < positions; i++) {
      const std::vector<float> k = random.values(static_cast<size_t>(dim)), v = random.values(static_cast<size_t>(dim));
      const size_t block = static_cast<size_t>(blocks[static_cast<size_t>(i / kKvBlockTokens)]);
      const float* value = form == Form::Latent ? nullptr : v.data();
      kv.store(k.data(), value, dim, i % kKvBlockTokens, bytes() + block * piece);
    }
  }

  SpanTask task(int span, const std::vector<int>& firsts, const std::vector<int>& ends) {
    return {bytes(), piece,         blocks.data() + span * kSpanBlocks, 0, dim, value_dim, 0.125f, queries,
            q.data(), firsts.data(), ends.data(), scores.data()};
  }
};

struct Sums {
  std::vector<float> maximum, sum, values;
  Sums(size_t queries, size_t width) : maximum(queries + 16), sum(queries + 16), values(queries * width + 16 * width) {}
  SpanSums places() { return {maximum.data(), sum.data(), values.data()}; }
};

void print_attention(const Level& level, KvType type, const char* name, Form form = Form::Plain) {
  Crc crc;
  for (const auto& [dim, queries] : {std::pair{64, 1}, std::pair{40, 5}, std::pair{128, 19}}) {
    Heads heads(type, form, dim, queries);
    const size_t width = static_cast<size_t>(padded_head(heads.value_dim));
    const int positions = 2 * kSpanTokens + 77;
    heads.store(level, positions);
    Sums total(heads.count, width), next(heads.count, width);
    for (int span = 0; span < 3; span++) {
      std::vector<int> firsts(heads.count, 0), ends(heads.count, kSpanTokens);
      for (int i = 0; span == 0 && form != Form::Latent && i < queries; i++) firsts[static_cast<size_t>(i)] = 100 + i;
      for (int i = 0; span == 2 && i < queries; i++) ends[static_cast<size_t>(i)] = 77 - (queries - 1 - i);
      SpanTask task = heads.task(span, firsts, ends);
      std::vector<float> slopes;
      std::vector<int> at;
      for (int i = 0; i < queries; i++) {
        slopes.push_back(0.01f * static_cast<float>(i + 1));
        at.push_back(positions - span * kSpanTokens - queries + i);
      }
      if (form == Form::Biased) task.slopes = slopes.data(), task.positions = at.data();
      const KvOps& kv = level.attention.kv[static_cast<int>(type)];
      (form == Form::Latent ? kv.latent_span : kv.span)(task, (span == 0 ? total : next).places());
      if (span > 0) level.attention.merge(total.places(), next.places(), queries, heads.value_dim);
    }
    for (size_t i = 0; i < heads.count; i++) {
      std::vector<float> out(static_cast<size_t>(heads.value_dim));
      level.attention.finish(total.values.data() + i * width, total.sum[i], heads.value_dim, out.data());
      crc.add(out);
    }
  }
  print(level.name, name, crc);
}

void print_convolutions(const Level& level) {
  Random random(500);
  Crc crc;
  for (int taps : {1, 3, 4, kMaxTaps})
    for (int n : {1, 16, 63, 100}) {
      const size_t size = static_cast<size_t>(n), count = static_cast<size_t>(taps);
      const std::vector<float> rows = random.values(count * size), weight = random.values(count * size);
      const std::vector<float> bias = random.values(size);
      std::vector<const float*> x;
      for (size_t t = 0; t < count; t++) x.push_back(rows.data() + t * size);
      std::vector<float> out(size);
      for (const float* added : {static_cast<const float*>(nullptr), bias.data()}) {
        level.state.convolve(x.data(), weight.data(), n, added, taps, n, out.data());
        crc.add(out);
      }
    }
  print(level.name, "convolutions", crc);
}

void print_delta_rules(const Level& level) {
  Random random(600);
  Crc crc;
  constexpr int kRows = 5;
  for (int keys : {1, 24, 128})
    for (int channels : {16, 32})
      for (bool per_key : {false, true}) {
        const int decays = per_key ? keys : 1;
        const auto values = [&](int width) { return random.values(static_cast<size_t>(kRows * width)); };
        std::vector<float> state = values(keys * channels), out = values(channels);
        const std::vector<float> q = values(keys), k = values(keys), v = values(channels);
        const std::vector<float> decay = values(decays), beta = values(1);
        level.state.delta_rule({kRows, keys, channels, state.data(), q.data(), k.data(), v.data(), decay.data(),
                                beta.data(), out.data(), keys, channels, decays, 1, per_key});
        crc.add(state);
        crc.add(out);
      }
  print(level.name, "delta-rules", crc);
}

void print_scans(const Level& level) {
  Random random(700);
  Crc crc;
  for (int head_dim : {1, 8, 16, 24, 64})
    for (int rows : {1, 3, 4, 11}) {
      const int state_size = 7, width = head_dim + 2 * state_size;
      std::vector<float> steps = random.values(static_cast<size_t>(rows), 3), decays(steps.size());
      level.scan.time_steps(steps.data(), -0.5f, -0.7f, rows, decays.data());
      crc.add(steps);
      crc.add(decays);
      const std::vector<float> x = random.values(static_cast<size_t>(rows * width));
      std::vector<float> state = random.values(static_cast<size_t>(state_size * head_dim));
      std::vector<float> out(static_cast<size_t>(rows * head_dim));
      const float* b = x.data() + head_dim;
      level.scan.scan({state.data(), x.data(), b, b + state_size, steps.data(), decays.data(), 0.8f, out.data(), rows,
                       head_dim, state_size, width, head_dim});
      crc.add(state);
      crc.add(out);
    }
  print(level.name, "scans", crc);
}

Choice choice_of(Random& random, uint32_t row, int vocabulary) {
  Choice choice{};
  choice.temperature = 0.1f * static_cast<float>(row % 12);
  choice.top_k = static_cast<int32_t>(row % 3 * 20);
  choice.top_p = 1.0 - 0.05 * (row % 4);
  choice.min_p = 0.01 * (row % 5);
  choice.repetition_penalty = 1.0f + 0.1f * static_cast<float>(row % 2);
  choice.frequency_penalty = 0.2f;
  choice.logit_bias = {{3, 1.5f}, {7, -2.0f}};
  choice.seed = random.bits();
  choice.position = row;
  for (int i = 0; i < 9; i++) choice.history.push_back(random.below(vocabulary));
  return choice;
}

void print_sampling(const Level& level) {
  constexpr int kVocabulary = 1003, kRows = 48;
  Random random(300);
  Crc crc;
  std::vector<float> logits = random.values(kVocabulary * kRows, 4), exponentials(logits.size());
  level.sampler.exp(logits.data(), static_cast<int>(logits.size()), exponentials.data());
  crc.add(exponentials);
  std::vector<RowTask> tasks;
  for (uint32_t row = 0; row < kRows; row++)
    tasks.push_back({row % 8 == 7, 11, choice_of(random, row, kVocabulary), 5});
  for (const RowOutcome& outcome : Sampler(level.sampler, kVocabulary, 2).run(logits.data(), tasks)) {
    crc.add_value(outcome.token);
    crc.add_value(outcome.logprob);
    for (const auto& [token, logprob] : outcome.top_logprobs) {
      crc.add_value(token);
      crc.add_value(logprob);
    }
  }
  print(level.name, "sampling", crc);
}

void print_baseline() {
  Random random(400);
  Crc crc;
  for (uint32_t i = 0; i < 2000; i++) {
    const double x = random.value(static_cast<int>(i % 20));
    double sine, cosine;
    sincos_double(x, &sine, &cosine);
    crc.add_value(sine);
    crc.add_value(cosine);
    crc.add_value(log_double(x < 0 ? -x : x));
    crc.add_value(random_bits(random.bits(), i % 3, i));
  }
  print("any", "baseline", crc);
}

bool probes_work() { return int8_peak(2, 0.01) > 0 && fma_peak(1, 0.01) > 0; }

}  // namespace
}  // namespace level_bits

int main(int count, char** words) {
  const FloatMode mode;
  for (const Level& level : available_levels()) {
    if (count > 1 && std::strcmp(level.name, words[1]) != 0) continue;
    level_bits::print_products(level);
    level_bits::print_vectors(level);
    level_bits::print_attention(level, KvType::F16, "attention");
    level_bits::print_attention(level, KvType::Q8_0, "attention-q8_0");
    level_bits::print_attention(level, KvType::F16, "attention-biased", level_bits::Form::Biased);
    level_bits::print_attention(level, KvType::Q8_0, "attention-q8_0-biased", level_bits::Form::Biased);
    level_bits::print_attention(level, KvType::F16, "attention-latent", level_bits::Form::Latent);
    level_bits::print_attention(level, KvType::Q8_0, "attention-q8_0-latent", level_bits::Form::Latent);
    level_bits::print_attention(level, KvType::Int8, "attention-int8");
    level_bits::print_attention(level, KvType::Int8, "attention-int8-biased", level_bits::Form::Biased);
    level_bits::print_attention(level, KvType::Int8, "attention-int8-latent", level_bits::Form::Latent);
    level_bits::print_convolutions(level);
    level_bits::print_delta_rules(level);
    level_bits::print_scans(level);
    level_bits::print_sampling(level);
    level_bits::print_quantizers(level);
  }
  level_bits::print_baseline();
  std::printf("best %s\n", find_level("").name);
  return level_bits::probes_work() ? 0 : 1;
}
