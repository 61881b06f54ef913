// Weights into blocks. Of the types with grids two, one of each kind: their tables take long to make in an emulator.
#include <string>

#include "level_bits.h"
#include "pack/pack.h"
#include "pack/near_points.h"

using namespace llamaclust;

namespace level_bits {
namespace {

struct Kind {
  QuantType type;
  const char* name;
};

constexpr Kind kKinds[] = {
    {QuantType::Q4_0, "Q4_0"},     {QuantType::Q4_1, "Q4_1"},       {QuantType::Q5_0, "Q5_0"},
    {QuantType::Q5_1, "Q5_1"},     {QuantType::Q8_0, "Q8_0"},       {QuantType::Q2_K, "Q2_K"},
    {QuantType::Q3_K, "Q3_K"},     {QuantType::Q4_K, "Q4_K"},       {QuantType::Q5_K, "Q5_K"},
    {QuantType::Q6_K, "Q6_K"},     {QuantType::IQ4_NL, "IQ4_NL"},   {QuantType::IQ4_XS, "IQ4_XS"},
    {QuantType::TQ1_0, "TQ1_0"},   {QuantType::TQ2_0, "TQ2_0"},     {QuantType::MXFP4, "MXFP4"},
    {QuantType::IQ2_XXS, "IQ2_XXS"}, {QuantType::IQ3_S, "IQ3_S"},
};

}  // namespace

void print_quantizers(const Level& level) {
  constexpr int kCols = 1280;
  Random random(500);
  const std::vector<float> x = random.values(kCols, -5);
  std::vector<float> importance = random.values(kCols), w(kCols);
  for (float& value : importance) value = value < 0 ? -value : value;
  level.quantize.weigh(x.data(), importance.data(), kCols, w.data());
  for (const Kind& kind : kKinds) {
    Crc crc;
    std::vector<uint8_t> blocks(file_row_bytes(kind.type, kCols));
    for (const bool has_importance : {true, false}) {
      level.quantize.quantize(kind.type, {x.data(), w.data(), kCols, near_points(kind.type), has_importance}, blocks.data());
      crc.add(blocks);
    }
    print(level.name, (std::string("written-") + kind.name).c_str(), crc);
  }
}

}  // namespace level_bits
