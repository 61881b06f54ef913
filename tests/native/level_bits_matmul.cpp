// Products, quantized activations and weights of every quant type.
#include <string>
#include <utility>

#include "level_bits.h"
#include "pack.h"
#include "packed_matrix.h"

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

// One block of random bits whose floats are neither huge nor none.
void fill_block(const Kind& kind, Random& random, uint8_t* block, int bytes) {
  for (int i = 0; i < bytes; i++) block[i] = static_cast<uint8_t>(random.bits());
  for (int place : kind.high_bytes) block[place] = (block[place] & 0x8f) | 0x20;
  if (kind.type == QuantType::F32 || kind.type == QuantType::BF16) block[bytes - 1] = (block[bytes - 1] & 0x80) | 0x3e;
  if (kind.type == QuantType::MXFP4) block[0] = random.below(8) == 0 ? block[0] % 3 : 118 + block[0] % 8;
}

PackedMatrix random_matrix(const Kind& kind, Random& random, int rows, int cols) {
  PackedMatrix matrix(static_cast<int>(kind.type), rows, cols);
  const int block = tile_layout(kind.type).file_bytes;
  std::vector<uint8_t> file(file_row_bytes(kind.type, cols) * static_cast<size_t>(rows));
  for (size_t at = 0; at < file.size(); at += static_cast<size_t>(block))
    fill_block(kind, random, file.data() + at, block);
  matrix.pack_rows(0, file);
  return matrix;
}

struct Product {
  const Level& level;
  const PackedMatrix& packed;

  // Products of the tiles in two calls, as two threads would make them.
  void add_to(Crc& crc, Random& random, int tokens, bool with_bias) const {
    const Matrix& matrix = packed.matrix();
    const ActivationFormat format = tile_layout(matrix.type).activation;
    const size_t row_bytes = activation_bytes(format, matrix.cols);
    Memory activations(row_bytes * static_cast<size_t>(tokens)), scratch(matmul_scratch_bytes(matrix.cols));
    for (int t = 0; t < tokens; t++) {
      const std::vector<float> x = random.values(static_cast<size_t>(matrix.cols), random.below(9) - 4);
      level.matmul.quantize(format, x.data(), matrix.cols, activations.data() + static_cast<size_t>(t) * row_bytes);
    }
    const std::vector<float> bias = random.values(static_cast<size_t>(matrix.rows));
    const size_t rows = static_cast<size_t>(matrix.rows);
    std::vector<float> out(rows * static_cast<size_t>(tokens));
    const int middle = matrix.tile_count() / 2;
    for (const auto& [begin, end] : {std::pair{0, middle}, std::pair{middle, matrix.tile_count()}})
      level.matmul.matmul(matrix, activations.data(), tokens, out.data(), rows, with_bias ? bias.data() : nullptr,
                          begin, end, scratch.data());
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

}  // namespace

void print_products(const Level& level) {
  for (const Kind& kind : kKinds) {
    Random random(static_cast<uint64_t>(kind.type) + 1);
    Crc products, weights;
    const int segment = tile_layout(kind.type).segment_cols, unit = segment == 1 ? 37 : segment;
    for (const auto& [rows, segments] : {std::pair{1, 1}, std::pair{17, 9}, std::pair{83, 3}}) {
      const PackedMatrix packed = random_matrix(kind, random, rows, unit * segments);
      add_weights(weights, level, packed.matrix());
      for (int tokens : {1, 2, 3, 8, 21, 133})
        if (tokens < 100 || rows == 17) Product{level, packed}.add_to(products, random, tokens, tokens % 2 == 0);
    }
    print(level.name, (std::string("products:") + kind.name).c_str(), products);
    print(level.name, (std::string("weights:") + kind.name).c_str(), weights);
  }
}

}  // namespace level_bits
