// Times of the product's matrix products, and of the same with sums over k in blocks (blocked.h): C functions for ctypes.
// The level's sources are compiled in, for a few quant types; weights are random.
#include <time.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <vector>

#define LLAMACLUST_LEVEL blocked_sums
#include "blocked.h"
#include "level/matmul/matmul.cpp"
#include "level/quants/k.h"
#include "level/quants/simple.h"

#define SUMS_TYPES(X) X(F16) X(Q4_0) X(Q8_0) X(Q4_K) X(Q6_K)

namespace llamaclust {

size_t activation_bytes(ActivationFormat format, int cols) {
  const size_t n = static_cast<size_t>(cols);
  const size_t bytes = format == ActivationFormat::Q8_32   ? n / 32 * sizeof(Q8_32)
                       : format == ActivationFormat::Q8_256 ? n / 256 * sizeof(Q8_256)
                                                            : n * sizeof(float);
  return (bytes + 63) / 64 * 64;
}

namespace blocked_sums {

TYPE_OPS_TABLE(simple_types, SUMS_TYPES(TYPE_OPS))
const TypeOpsTable k_types{nullptr, 0}, grid_types{nullptr, 0};

namespace {

enum class Way { Product, InBlocks, TwoPasses };

uint8_t* aligned(size_t bytes) {
  return static_cast<uint8_t*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
}

// Copies of a matrix of random weights, activations of up to kPanelMostTokens tokens, and results.
struct Task {
  TileLayout layout;
  Matrix matrix;
  int copies;
  uint8_t *memory, *activations, *scratch;
  float *out, *part;

  Task(QuantType type, int rows, int cols, int copies_) : layout(tile_layout(type)), copies(copies_) {
    const size_t tile = static_cast<size_t>(cols / layout.segment_cols * (layout.body_bytes + layout.tail_bytes) + 63) / 64 * 64;
    matrix = {type, rows, cols, tile, nullptr};
    memory = aligned(copy_bytes() * static_cast<size_t>(copies));
    activations = aligned(activation_bytes(layout.activation, cols) * kPanelMostTokens);
    scratch = aligned(kBlockedScratchBytes);
    out = reinterpret_cast<float*>(aligned(sizeof(float) * static_cast<size_t>(rows) * kPanelMostTokens));
    part = reinterpret_cast<float*>(aligned(sizeof(float) * static_cast<size_t>(rows) * kPanelMostTokens));
    fill();
  }
  ~Task() {
    for (void* p : {(void*)memory, (void*)activations, (void*)scratch, (void*)out, (void*)part}) std::free(p);
  }

  size_t copy_bytes() const { return matrix.tile_bytes * static_cast<size_t>(matrix.tile_count()); }

  // Random bits, with float16 scales (or weights) of 2^-4 to 2^-3.
  void fill() {
    std::mt19937_64 random(1);
    const auto half = [&] { return static_cast<uint16_t>(0x2c00 | (random() & 1023)); };
    const int segments = matrix.cols / layout.segment_cols, group = layout.group_segments();
    for (int tile = 0; tile < matrix.tile_count(); tile++) {
      uint8_t* bytes = memory + static_cast<size_t>(tile) * matrix.tile_bytes;
      uint16_t* halves = reinterpret_cast<uint16_t*>(bytes);
      if (layout.segment_cols == 1) {
        for (size_t i = 0; i < matrix.tile_bytes / 2; i++) halves[i] = static_cast<uint16_t>(half() | (random() & 1) << 15);
        continue;
      }
      for (size_t i = 0; i + 8 <= matrix.tile_bytes; i += 8) { const uint64_t r = random(); memcpy(bytes + i, &r, 8); }
      for (int s = 0; s < segments; s += group) {
        const int count = std::min(group, segments - s);
        const int first = s * (layout.body_bytes + layout.tail_bytes) + count * layout.body_bytes;
        for (int i = 0; i < count * layout.tail_bytes / 2; i++) halves[first / 2 + i] = half();
      }
    }
    for (int i = 1; i < copies; i++) memcpy(memory + copy_bytes() * static_cast<size_t>(i), memory, copy_bytes());
  }

  // x[tokens, cols] is what the matrix is multiplied with from now on.
  void set_activations(const float* x, int tokens) {
    const size_t cols = static_cast<size_t>(matrix.cols), bytes = activation_bytes(layout.activation, matrix.cols);
    for (size_t t = 0; t < static_cast<size_t>(tokens); t++)
      quantize(layout.activation, x + t * cols, matrix.cols, activations + t * bytes);
  }

  Product product(Prefetch prefetch) const {
    return product_of(layout, matrix, activations, {}, out, static_cast<size_t>(matrix.rows), nullptr, prefetch);
  }
};

// Borders of the blocks: whole 256s of columns, nearly equal; the last block has what is left.
Blocked sums_of(const Task& task, const Product& product, int blocks) {
  Blocked blocked{product, blocks, {}};
  const int unit = std::max(1, 256 / task.layout.segment_cols), units = (product.segments + unit - 1) / unit;
  for (int b = 0; b <= blocks; b++) blocked.borders[b] = std::min(product.segments, unit * part_begin(units, b, blocks));
  return blocked;
}

template <class Type>
void multiply_blocked(const Task& task, const Blocked& blocked, int tokens) {
  using Decoder = typename InProducts<Type>::Decoder;
  const int tiles = task.matrix.tile_count();
  if constexpr (!kFloat<Type>)
    if (tokens > direct_tokens<Decoder>()) return blocked_many<Decoder>(blocked, tokens, 0, tiles, task.scratch);
  blocked_few<Decoder>(blocked, tokens, 0, tiles);
}

// The product's own loops for segments [begin, end), their sum to `out`.
void multiply_slice(const Task& task, Product p, int tokens, int begin, int end, float* out) {
  const TypeOps& ops = ops_of(task.matrix.type);
  const int segment_bytes = task.layout.body_bytes + task.layout.tail_bytes;
  p.tiles += static_cast<size_t>(begin) * static_cast<size_t>(segment_bytes);
  const size_t activation = task.layout.activation == ActivationFormat::F32     ? sizeof(float)
                            : task.layout.activation == ActivationFormat::Q8_32 ? sizeof(Q8_32)
                                                                                : sizeof(Q8_256);
  p.activations += static_cast<size_t>(begin) * activation;
  p.segments = end - begin;
  p.output.out = out;
  const auto loops = tokens > ops.direct_tokens;
  if (loops) ops.multiply_by_panels(p, tokens, 0, task.matrix.tile_count(), task.scratch);
  else ops.multiply_few(p, tokens, 0, task.matrix.tile_count());
}

void multiply(Task& task, Way way, int blocks, int tokens, Prefetch prefetch, const uint8_t* tiles) {
  if (tokens > kPrefetchedTokens) prefetch = Prefetch::Far;
  Product product = task.product(prefetch);
  product.tiles = tiles;
  const Blocked blocked = sums_of(task, product, blocks);
  if (way == Way::Product) return multiply_slice(task, product, tokens, 0, product.segments, task.out);
  if (way == Way::TwoPasses) {  // all rows over the first half of k, then over the second; for its time, sums stay apart
    multiply_slice(task, product, tokens, 0, blocked.borders[blocks / 2], task.part);
    return multiply_slice(task, product, tokens, blocked.borders[blocks / 2], product.segments, task.out);
  }
#define CALL(name) \
  if (task.matrix.type == QuantType::name) return multiply_blocked<name>(task, blocked, tokens);
  SUMS_TYPES(CALL)
#undef CALL
}

double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace
}  // namespace blocked_sums
}  // namespace llamaclust

using namespace llamaclust;
using namespace llamaclust::blocked_sums;

extern "C" {

void* sums_open(int type, int rows, int cols, int copies) {
  return new Task(static_cast<QuantType>(type), rows, cols, copies);
}

void sums_close(void* task) { delete static_cast<Task*>(task); }

// Processor time of products with every copy, in seconds.
double sums_run(void* given, int way, int blocks, int tokens, int near, int copies) {
  Task& task = *static_cast<Task*>(given);
  const double began = seconds();
  for (int i = 0; i < copies; i++)
    multiply(task, static_cast<Way>(way), blocks, tokens, near ? Prefetch::Near : Prefetch::Far,
             task.memory + task.copy_bytes() * static_cast<size_t>(i));
  return seconds() - began;
}

void sums_set_activations(void* task, const float* x, int tokens) { static_cast<Task*>(task)->set_activations(x, tokens); }

const float* sums_output(void* task) { return static_cast<Task*>(task)->out; }

}  // extern "C"
