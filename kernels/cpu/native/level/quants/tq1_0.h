// TQ1_0: weight = scale * (q - 1). Digits to base three are pairs of bits here, in TQ2_0's layout: taking them apart for
// every product would cost more time than the bytes that it saves.
#pragma once

#include "level/quants/tq2_0.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct TQ1_0 : TQ2_0 {
  static constexpr QuantType kType = QuantType::TQ1_0;
  static constexpr TileLayout kLayout = kTQ1_0Layout;
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
