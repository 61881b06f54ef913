// Integer dot products whose sums are pairs of columns in 16 bits: how long they stay below 32768.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// 2 columns * 127 * the greatest byte (128 for eight bits, see step) * groups.
template <int kBits>
constexpr int kGroupsPerSum = kBits <= 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;

template <int kBits>
constexpr bool kCentred = kBits == 8;
constexpr bool kSumsFrom = false;

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
