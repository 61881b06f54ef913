// The matrix operations of a level: quantizing activations, and dispatching on the quant type. Families of types are
// compiled separately (*_types.cpp), because they take most of a build's time.
#include "level/matmul/type_ops.h"
#include "simd/int8.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Quantizes activations to int8 with one scale per segment (rounding: level/matmul_ops.h). The loops are plain, because
// each value needs only exact operations or a single IEEE operation.

// A segment with a smaller maximum counts as 0: 127 / maximum would overflow for numbers that are not much smaller.
constexpr int32_t kSmallestMaximum = 0x04800000;  // 2^-118

struct SegmentScale {
  float scale;
  float inverse;  // If 0, every q is 0.
};

template <int n>
INLINE SegmentScale scale_of(const float* x) {
  const int32_t greatest = greatest_magnitude(x, n);
  if (greatest >= kNotFinite) return {__builtin_nanf(""), 0.0f};
  if (greatest < kSmallestMaximum) return {0.0f, 0.0f};
  const float maximum = __builtin_bit_cast(float, greatest);
  return {maximum / 127.0f, 127.0f / maximum};
}

// Quantizes n values and returns the sum of the quants.
template <int n>
INLINE int32_t quantize_values(const float* __restrict x, float inverse, int8_t* __restrict out) {
  if (inverse == 0.0f) {
    memset(out, 0, n);
    return 0;
  }
  int32_t sum = 0;
  AS_VECTORS for (int i = 0; i < n; i++) {
    const int32_t q = nearest_int(x[i] * inverse);
    out[i] = static_cast<int8_t>(q);
    sum += q;
  }
  return sum;
}

INLINE void quantize_segment(const float* x, Q8_32& out) {
  const SegmentScale s = scale_of<32>(x);
  out.scale = s.scale;
  out.sum = quantize_values<32>(x, s.inverse, out.q);
  out.scaled_sum = s.scale * static_cast<float>(out.sum);
}

// sum = 128 * high + low with low in [-64, 63].
INLINE void split_sum(int32_t sum, int8_t& high, int8_t& low) {
  const int32_t multiple = (sum + 64) >> 7;
  high = static_cast<int8_t>(multiple);
  low = static_cast<int8_t>(sum - 128 * multiple);
}

INLINE void split_sums(Q8_256& out) {
  for (int j = 0; j < 8; j++) split_sum(out.sums[2 * j] + out.sums[2 * j + 1], out.sums_high[j], out.sums_low[j]);
  for (int j = 0; j < 16; j++) split_sum(out.sums[j], out.sums_16_high[j], out.sums_16_low[j]);
}

INLINE void quantize_segment(const float* x, Q8_256& out) {
  const SegmentScale s = scale_of<256>(x);
  out.scale = s.scale;
  for (int i = 0; i < 16; i++) out.sums[i] = quantize_values<16>(x + 16 * i, s.inverse, out.q + 16 * i);
  split_sums(out);
}

template <int n>
INLINE int32_t sum_of(const int8_t* q) {
  int32_t sum = 0;
  AS_VECTORS for (int i = 0; i < n; i++) sum += q[i];
  return sum;
}

// Sets the members that follow from q and scale.
INLINE void set_sums(Q8_32& out) {
  out.sum = sum_of<32>(out.q);
  out.scaled_sum = out.scale * static_cast<float>(out.sum);
}

INLINE void set_sums(Q8_256& out) {
  for (int i = 0; i < 16; i++) out.sums[i] = sum_of<16>(out.q + 16 * i);
  split_sums(out);
}

template <typename Segment, int cols = sizeof(Segment::q)>
void pack_segments(const float* x, int count, float* out) {
  for (int s = 0; s < count; s++, x += cols, out += cols / 4 + 1) {
    Segment segment;
    quantize_segment(x, segment);
    memcpy(out, segment.q, cols);
    out[cols / 4] = segment.scale;
  }
}

template <typename Segment, int cols = sizeof(Segment::q)>
void unpack_segments(const float* packed, int count, Segment* out) {
  for (int s = 0; s < count; s++, packed += cols / 4 + 1) {
    memcpy(out[s].q, packed, cols);
    out[s].scale = packed[cols / 4];
    set_sums(out[s]);
  }
}

void quantize(ActivationFormat format, const float* x, int cols, void* out) {
  if (format == ActivationFormat::Q8_32)
    for (int s = 0; s < cols / 32; s++) quantize_segment(x + 32 * s, static_cast<Q8_32*>(out)[s]);
  else if (format == ActivationFormat::Q8_256)
    for (int s = 0; s < cols / 256; s++) quantize_segment(x + 256 * s, static_cast<Q8_256*>(out)[s]);
  else
    memcpy(out, x, static_cast<size_t>(cols) * sizeof(float));
}

void pack(ActivationFormat format, const float* x, int cols, float* out) {
  if (format == ActivationFormat::Q8_32) pack_segments<Q8_32>(x, cols / 32, out);
  else if (format == ActivationFormat::Q8_256) pack_segments<Q8_256>(x, cols / 256, out);
  else memcpy(out, x, static_cast<size_t>(cols) * sizeof(float));
}

void unpack(ActivationFormat format, const float* packed, int cols, void* out) {
  if (format == ActivationFormat::Q8_32) unpack_segments(packed, cols / 32, static_cast<Q8_32*>(out));
  else if (format == ActivationFormat::Q8_256) unpack_segments(packed, cols / 256, static_cast<Q8_256*>(out));
  else memcpy(out, packed, static_cast<size_t>(cols) * sizeof(float));
}

void matmul(const Matrix& weights, const uint8_t* activations, int tokens, const TokenLines& lines, float* out,
            size_t out_stride, const float* bias, int tile_begin, int tile_end, uint8_t* scratch,
            Prefetch prefetch) {
  const TypeOps& ops = ops_of(weights.type);
  // The second and later tokens read tiles that are already in the cache.
  if (tokens > kPrefetchedTokens) prefetch = Prefetch::Far;
  const Product product = product_of(ops.layout, weights, activations, lines, out, out_stride, bias, prefetch);
  if (tokens > ops.direct_tokens)
    ops.multiply_by_panels(product, tokens, tile_begin, tile_end, scratch);
  else
    ops.multiply_few(product, tokens, tile_begin, tile_end);
}

void dequantize_row(const Matrix& weights, int row, float* out) {
  const uint8_t* tile = weights.tiles + static_cast<size_t>(row / kTileRows) * weights.tile_bytes;
  ops_of(weights.type).dequantize(tile, row % kTileRows, weights.cols, out);
}

}  // namespace

extern const MatmulOps matmul_ops;
const MatmulOps matmul_ops{quantize, pack, unpack, matmul, dequantize_row};

}  // namespace llamaclust::LLAMACLUST_LEVEL
