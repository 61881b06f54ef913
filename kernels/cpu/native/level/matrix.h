// How weights and activations lie in memory, the same for every feature level.
//
// A tile holds 16 rows. Its columns are cut into segments: the stretch of k over which integer sums are exact and after
// which floats come in (32 or 256 columns). A segment is a body (quants and sub-block scales, whole cache lines) and a
// tail (its float scales). Where a tail is less than a cache line, the bodies of 2 or 4 segments stand before their
// tails, so that everything loaded is aligned; only the last group of a tile may be short.
//
// Inside a body, a k-group is 64 bytes: four columns of sixteen rows, byte 4 * row + column. Tiles of float types are
// columns of sixteen values.
#pragma once

#include "level/matmul_ops.h"

namespace llamaclust {

struct TileLayout {
  int segment_cols;
  int file_bytes;  // of a segment of one row in a model file
  int body_bytes;  // of a segment of a tile
  int tail_bytes;
  ActivationFormat activation;
  constexpr __attribute__((always_inline)) int group_segments() const {
    return tail_bytes == 0 || tail_bytes >= 64 ? 1 : 64 / tail_bytes;
  }
};

// How a type's bits stand in body and tail is told where they are read: level/quants/.
constexpr TileLayout kQ4_0Layout{32, 18, 256, 32, ActivationFormat::Q8_32};
constexpr TileLayout kQ4_1Layout{32, 20, 256, 64, ActivationFormat::Q8_32};
constexpr TileLayout kQ5_0Layout{32, 22, 320, 32, ActivationFormat::Q8_32};
constexpr TileLayout kQ5_1Layout{32, 24, 320, 64, ActivationFormat::Q8_32};
constexpr TileLayout kQ8_0Layout{32, 34, 512, 32, ActivationFormat::Q8_32};
constexpr TileLayout kQ2_KLayout{256, 84, 1280, 64, ActivationFormat::Q8_256};
constexpr TileLayout kQ3_KLayout{256, 110, 1728, 32, ActivationFormat::Q8_256};
constexpr TileLayout kQ4_KLayout{256, 144, 2240, 64, ActivationFormat::Q8_256};
constexpr TileLayout kQ5_KLayout{256, 176, 2752, 64, ActivationFormat::Q8_256};
constexpr TileLayout kQ6_KLayout{256, 210, 3328, 32, ActivationFormat::Q8_256};
constexpr TileLayout kIQ4_XSLayout{256, 136, 2176, 32, ActivationFormat::Q8_256};
constexpr TileLayout kMXFP4Layout{32, 17, 256, 16, ActivationFormat::Q8_32};
constexpr TileLayout kTQ2_0Layout{256, 66, 1024, 32, ActivationFormat::Q8_256};
constexpr TileLayout kTQ1_0Layout{256, 54, 1024, 32, ActivationFormat::Q8_256};
constexpr TileLayout kIQ2_XXSLayout{256, 66, 1088, 32, ActivationFormat::Q8_256};
constexpr TileLayout kIQ2_XSLayout{256, 74, 1216, 32, ActivationFormat::Q8_256};
constexpr TileLayout kIQ2_SLayout{256, 82, 1536, 32, ActivationFormat::Q8_256};
constexpr TileLayout kIQ3_XXSLayout{256, 98, 1600, 32, ActivationFormat::Q8_256};
constexpr TileLayout kIQ3_SLayout{256, 110, 2112, 32, ActivationFormat::Q8_256};
constexpr TileLayout kIQ1_SLayout{256, 50, 960, 32, ActivationFormat::Q8_256};
constexpr TileLayout kIQ1_MLayout{256, 56, 1088, 0, ActivationFormat::Q8_256};
constexpr TileLayout kF32Layout{1, 4, 64, 0, ActivationFormat::F32};
constexpr TileLayout kF16Layout{1, 2, 32, 0, ActivationFormat::F32};

constexpr bool same_size_as_file(const TileLayout& t) {
  return t.body_bytes + t.tail_bytes == kTileRows * t.file_bytes;
}
static_assert(same_size_as_file(kQ4_0Layout));
static_assert(same_size_as_file(kQ4_1Layout));
static_assert(same_size_as_file(kQ5_0Layout));
static_assert(same_size_as_file(kQ5_1Layout));
static_assert(same_size_as_file(kQ8_0Layout));
static_assert(same_size_as_file(kQ2_KLayout));
static_assert(same_size_as_file(kQ3_KLayout));
static_assert(same_size_as_file(kQ4_KLayout));
static_assert(same_size_as_file(kQ5_KLayout));
static_assert(same_size_as_file(kQ6_KLayout));
static_assert(same_size_as_file(kMXFP4Layout));
static_assert(same_size_as_file(kTQ2_0Layout));
static_assert(same_size_as_file(kF32Layout));
static_assert(same_size_as_file(kF16Layout));

// Decoding may be worth a tenth more bytes, a quarter for types below four bits a weight.
constexpr bool near_size_of_file(const TileLayout& t) {
  const int allowed_percent = 8 * t.file_bytes < 4 * t.segment_cols ? 125 : 110;
  return 100 * (t.body_bytes + t.tail_bytes) <= allowed_percent * kTileRows * t.file_bytes;
}
static_assert(near_size_of_file(kIQ4_XSLayout));
static_assert(near_size_of_file(kTQ1_0Layout));
// Grids are resolved where that is far quicker than to look points up one by one, and costs a quarter at most.
constexpr bool larger_by_a_quarter_at_most(const TileLayout& t) {
  return 4 * (t.body_bytes + t.tail_bytes) <= 5 * kTileRows * t.file_bytes;
}
static_assert(larger_by_a_quarter_at_most(kIQ2_XXSLayout));
static_assert(larger_by_a_quarter_at_most(kIQ2_XSLayout));
static_assert(larger_by_a_quarter_at_most(kIQ2_SLayout));
static_assert(larger_by_a_quarter_at_most(kIQ3_XXSLayout));
static_assert(larger_by_a_quarter_at_most(kIQ3_SLayout));
static_assert(larger_by_a_quarter_at_most(kIQ1_SLayout));
static_assert(larger_by_a_quarter_at_most(kIQ1_MLayout));

// Activations of one segment. q = x * (127 / maximum) to nearest, ties to even; scale = maximum / 127; a maximum below
// 2^-118 counts as zero. A segment with an infinity or a NaN has a NaN scale and zeros.
struct Q8_32 {
  int8_t q[32];
  float scale;
  float scaled_sum;  // scale * sum, one rounding
  int32_t sum;       // of q
};
struct Q8_256 {
  int8_t q[256];
  int32_t sums[16];     // of q, per 16
  int8_t sums_high[8];  // sums per 32 are 128 * high + low, with low in [-64, 63]
  int8_t sums_low[8];
  int8_t sums_16_high[16];  // sums per 16 likewise
  int8_t sums_16_low[16];
  float scale;
  int32_t padding[3];
};
// Weights unpacked for many tokens take up to this many bytes a column and tile, this many tiles at a time.
constexpr int kPanelColumnBytes = 24;
constexpr int kPanelTiles = 4;

static_assert(sizeof(Q8_32) == 44 && alignof(Q8_32) == 4);
static_assert(sizeof(Q8_256) == 384 && alignof(Q8_256) == 4);

}  // namespace llamaclust
