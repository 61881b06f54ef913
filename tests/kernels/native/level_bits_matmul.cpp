// Products, quantized activations and weights of every quant type.
#include <string>
#include <utility>

#include "level_bits.h"
#include "pack/pack.h"

using namespace llamaclust;

namespace level_bits {
namespace {

struct Kind {
  QuantType type;
  const char* name;
  std::vector<int> high_bytes;  // of a block's float16 scales: sign and exponent
};

const Kind kKinds[] = {
    {QuantType::F32, "F32", {}}, {QuantType::F16, "F16", {1}}, {QuantType::BF16, "BF16", {}},
    {QuantType::Q4_0, "Q4_0", {1}}, {QuantType::Q4_1, "Q4_1", {1, 3}}, {QuantType::Q5_0, "Q5_0", {1}},
    {QuantType::Q5_1, "Q5_1", {1, 3}}, {QuantType::Q8_0, "Q8_0", {1}}, {QuantType::Q2_K, "Q2_K", {81, 83}},
    {QuantType::Q3_K, "Q3_K", {109}}, {QuantType::Q4_K, "Q4_K", {1, 3}}, {QuantType::Q5_K, "Q5_K", {1, 3}},
    {QuantType::Q6_K, "Q6_K", {209}}, {QuantType::IQ2_XXS, "IQ2_XXS", {1}}, {QuantType::IQ2_XS, "IQ2_XS", {1}},
    {QuantType::IQ3_XXS, "IQ3_XXS", {1}}, {QuantType::IQ1_S, "IQ1_S", {1}}, {QuantType::IQ4_NL, "IQ4_NL", {1}},
    {QuantType::IQ3_S, "IQ3_S", {1}}, {QuantType::IQ2_S, "IQ2_S", {1}}, {QuantType::IQ4_XS, "IQ4_XS", {1}},
    {QuantType::IQ1_M, "IQ1_M", {55}}, {QuantType::TQ1_0, "TQ1_0", {53}}, {QuantType::TQ2_0, "TQ2_0", {65}},
    {QuantType::MXFP4, "MXFP4", {}},
};

// Floats of a block that are neither huge nor none.
void tame_scales(const Kind& kind, uint8_t* block, int bytes) {
  for (int place : kind.high_bytes) block[place] = (block[place] & 0x8f) | 0x20;
  if (kind.type == QuantType::F32 || kind.type == QuantType::BF16) block[bytes - 1] = (block[bytes - 1] & 0x80) | 0x3e;
  if (kind.type == QuantType::MXFP4) block[0] = block[0] % 32 == 0 ? block[0] / 32 % 3 : 118 + block[0] % 8;
}

// Rows whose bytes next() gives.
template <typename Next>
PackedMatrix matrix_of(const Kind& kind, int rows, int cols, Next next) {
  PackedMatrix matrix(static_cast<int>(kind.type), rows, cols);
  const int block = tile_layout(kind.type).file_bytes;
  std::vector<uint8_t> file(file_row_bytes(kind.type, cols) * static_cast<size_t>(rows));
  for (size_t i = 0; i < file.size(); i++) file[i] = next(i / file_row_bytes(kind.type, cols));
  for (size_t i = 0; i < file.size(); i += static_cast<size_t>(block)) tame_scales(kind, file.data() + i, block);
  matrix.pack_rows(0, file);
  return matrix;
}

struct Product {
  const Level& level;
  const PackedMatrix& packed;

  // Adds the products of activations x [tokens, cols]. Tiles are computed in two calls, as by two threads.
  void add_to(Crc& crc, const std::vector<float>& x, int tokens, const float* bias) const {
    const Matrix& matrix = packed.matrix();
    const ActivationFormat format = tile_layout(matrix.type).activation;
    const size_t row_bytes = activation_bytes(format, matrix.cols), rows = static_cast<size_t>(matrix.rows);
    Memory activations(row_bytes * static_cast<size_t>(tokens)), scratch(kMatmulScratchBytes);
    for (size_t t = 0; t < static_cast<size_t>(tokens); t++)
      level.matmul.quantize(format, x.data() + t * static_cast<size_t>(matrix.cols), matrix.cols,
                            activations.data() + t * row_bytes);
    std::vector<float> out(rows * static_cast<size_t>(tokens));
    const int middle = matrix.tile_count() / 2;
    for (const auto& [begin, end] : {std::pair{0, middle}, std::pair{middle, matrix.tile_count()}})
      level.matmul.matmul(matrix, activations.data(), tokens, {}, out.data(), rows, bias, begin, end, scratch.data(),
                          begin == 0 ? Prefetch::Far : Prefetch::Near);
    if (tokens == 2) crc.add(std::span<const uint8_t>(activations.data(), activations.bytes()));
    crc.add(out);
  }
};

void add_weights(Crc& crc, const Level& level, const Matrix& matrix) {
  std::vector<float> row(static_cast<size_t>(matrix.cols));
  for (int i = 0; i < matrix.rows; i += 7) {
    level.matmul.dequantize_row(matrix, i, row.data());
    crc.add(row);
  }
}

void print(const Level& level, const std::string& what, const Kind& kind, const Crc& crc) {
  level_bits::print(level.name, (what + kind.name).c_str(), crc);
}

int unit_of(const Kind& kind) {
  const int segment = tile_layout(kind.type).segment_cols;
  return segment == 1 ? 37 : segment;
}

void print_random(const Level& level, const Kind& kind) {
  Random random(static_cast<uint64_t>(kind.type) + 1);
  Crc products, weights;
  for (const auto& [rows, segments] : {std::pair{1, 1}, std::pair{17, 9}, std::pair{83, 3}}) {
    const int cols = unit_of(kind) * segments;
    const auto next = [&](size_t) { return static_cast<uint8_t>(random.bits()); };
    const PackedMatrix packed = matrix_of(kind, rows, cols, next);
    add_weights(weights, level, packed.matrix());
    for (int tokens : {1, 2, 3, 8, 21, 133}) {
      const std::vector<float> x = random.values(static_cast<size_t>(cols * tokens), random.below(9) - 4);
      const std::vector<float> bias = random.values(static_cast<size_t>(rows));
      if (tokens < 100 || rows == 17)
        Product{level, packed}.add_to(products, x, tokens, tokens % 2 == 0 ? bias.data() : nullptr);
    }
  }
  constexpr int kWide = 6144, kMany = 37;  // more columns than a panel has, more tokens than do without panels
  const int cols = kWide / unit_of(kind) * unit_of(kind);
  const PackedMatrix wide = matrix_of(kind, 5, cols, [&](size_t) { return static_cast<uint8_t>(random.bits()); });
  Product{level, wide}.add_to(products, random.values(static_cast<size_t>(cols * kMany)), kMany, nullptr);
  print(level, "products:", kind, products);
  print(level, "weights:", kind, weights);
}

// Rows of equal bytes times activations that are all 127 or all -127 once quantized: sums as great as they can be.
void print_greatest(const Level& level, const Kind& kind) {
  constexpr uint8_t kFills[] = {0x00, 0xff, 0x7f, 0x80, 0x55, 0xaa};
  Crc crc;
  const int cols = 2 * unit_of(kind);
  const PackedMatrix packed = matrix_of(kind, 6, cols, [&](size_t row) { return kFills[row]; });
  for (int tokens : {1, 2, 40}) {
    std::vector<float> x(static_cast<size_t>(cols * tokens), 2.0f);
    for (size_t i = 0; i < x.size(); i++)
      if (i / static_cast<size_t>(cols) % 2 == 1) x[i] = -2.0f;
    Product{level, packed}.add_to(crc, x, tokens, nullptr);
  }
  print(level, "greatest:", kind, crc);
}

}  // namespace

void print_products(const Level& level) {
  for (const Kind& kind : kKinds) {
    print_random(level, kind);
    print_greatest(level, kind);
  }
}

}  // namespace level_bits
