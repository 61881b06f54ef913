// Integer dot products in plain C++.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Bytes {
  uint8_t v[64];
};
using Sums = I32x16;
using Scale = I32x16;

template <int kBits>
constexpr int kGroupsPerSum = 64;
// Whether `step` takes bytes of eight bits as signed, less 128, so that the caller need not subtract it.
template <int kBits>
constexpr bool kCentred = false;

DOT Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
DOT void store_bytes(uint8_t* p, const Bytes& b) { memcpy(p, b.v, sizeof b.v); }
// Each byte shifted right (left where negative), then masked; no bit that crosses into another byte may be in the mask.
template <int shift, int mask>
DOT Bytes field(const Bytes& b) {
  Bytes r;
  for (int i = 0; i < 64; i++)
    r.v[i] = static_cast<uint8_t>((shift >= 0 ? b.v[i] >> (shift & 7) : b.v[i] << (-shift & 7)) & mask);
  return r;
}
DOT Bytes merge(const Bytes& a, const Bytes& b) {
  Bytes r;
  for (int i = 0; i < 64; i++) r.v[i] = a.v[i] | b.v[i];
  return r;
}
// Column n of the k-group as lanes.
template <int n>
DOT I32x16 column(const Bytes& b) {
  I32x16 r;
  for (int i = 0; i < 16; i++) r.v[i] = b.v[4 * i + n];
  return r;
}
template <int n>
DOT I32x16 signed_column(const Bytes& b) {
  I32x16 r;
  for (int i = 0; i < 16; i++) r.v[i] = static_cast<int8_t>(b.v[4 * i + n]);
  return r;
}

DOT Sums no_sums() { return broadcast(0); }
DOT Sums sums_of_one() { return broadcast(1); }  // per row
template <int kBits>
DOT Sums step(const Sums& sums, const Bytes& w, int32_t activations) {
  int8_t a[4];
  memcpy(a, &activations, 4);
  Sums r;
  for (int i = 0; i < 16; i++)
    r.v[i] = sums.v[i] + w.v[4 * i] * a[0] + w.v[4 * i + 1] * a[1] + w.v[4 * i + 2] * a[2] + w.v[4 * i + 3] * a[3];
  return r;
}
DOT I32x16 add_sums(const I32x16& total, const Sums& sums) { return add(total, sums); }
DOT Scale make_scale(const I32x16& scale) { return scale; }
DOT I32x16 add_scaled(const I32x16& total, const Sums& sums, const Scale& scale) { return add(total, mul(sums, scale)); }
// total + scale * (sums - offset); offset is even.
DOT I32x16 add_scaled(const I32x16& total, const Sums& sums, int32_t offset, const Scale& scale) {
  return add(total, mul(sub(sums, broadcast(offset)), scale));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
