// The loops of dtype_cast.cpp, which includes this file twice: once for any CPU and once for CPUs with AVX2. The
// compiler vectorizes them; both versions give the same bits. Therefore the file has no include guard and includes
// nothing.

constexpr int kTile = 256;  // Weights of one iteration, which are held on the stack.
constexpr int32_t kMagnitude = 0x7fffffff, kInfinite = 0x7f800000;
constexpr int32_t kSmallestHalf = 113 << 23;  // 2^-14, the smallest normal float16.
constexpr int32_t kTooLarge = 0x477ff000;     // 65520, the smallest number that rounds to infinity in float16.
// Bits of 0.5f. The low mantissa bits of x + 0.5f are the float16 bits of a subnormal x.
constexpr int32_t kHalfBits = 126 << 23;

inline int32_t bits_of(float x) { return __builtin_bit_cast(int32_t, x); }
inline float float_of(int32_t bits) { return __builtin_bit_cast(float, bits); }

inline int32_t half_bits(int32_t x) {
  const int32_t sign = x >> 16 & 0x8000, a = x & kMagnitude;
  const int32_t large = (a - (112 << 23) + 0xfff + (a >> 13 & 1)) >> 13;
  const int32_t small = bits_of(float_of(a) + 0.5f) - kHalfBits;
  return sign | (a < kSmallestHalf ? small : large);
}

// Converts float16 to float32; a NaN remains one. Subnormal float16 numbers are multiples of 2^-24, which the integer
// `a` counts.
inline float widened(int32_t half) {
  const int32_t a = half & 0x7fff;
  const int32_t large = (a << 13) + ((a >= 0x7c00 ? 224 : 112) << 23);
  const int32_t small = bits_of(static_cast<float>(a) * 0x1p-24f);
  return float_of((half & 0x8000 ? -0x7fffffff - 1 : 0) | (a < 0x400 ? small : large));
}

inline void load_tile(const uint8_t* from, SourceDtype source, int n, float* x) {
  if (source == SourceDtype::F32) {
    std::memcpy(x, from, sizeof(float) * n);
    return;
  }
  uint16_t raw[kTile];
  std::memcpy(raw, from, sizeof(uint16_t) * n);
  if (source == SourceDtype::BF16)
    for (int i = 0; i < n; i++) x[i] = float_of(static_cast<int32_t>(static_cast<uint32_t>(raw[i]) << 16));
  else
    for (int i = 0; i < n; i++) x[i] = widened(raw[i]);
}

inline int32_t largest_bits(const float* x, int n) {
  int32_t most = 0;
  for (int i = 0; i < n; i++) {
    const int32_t a = bits_of(x[i]) & kMagnitude;
    most = a > most ? a : most;
  }
  return most;
}

inline bool store_half(const float* x, int n, uint8_t* to) {
  uint16_t out[kTile];
  for (int i = 0; i < n; i++) out[i] = static_cast<uint16_t>(half_bits(bits_of(x[i])));
  std::memcpy(to, out, sizeof(uint16_t) * n);
  return largest_bits(x, n) < kTooLarge;
}

inline void store_bfloat(const float* x, int n, uint8_t* to) {
  uint16_t out[kTile];
  for (int i = 0; i < n; i++) {
    const int32_t u = bits_of(x[i]), a = u & kMagnitude;
    const int32_t rounded = (a + 0x7fff + (a >> 16 & 1)) >> 16;
    out[i] = static_cast<uint16_t>((u >> 16 & 0x8000) | (a > kInfinite ? (a >> 16 | 0x40) : rounded));
  }
  std::memcpy(to, out, sizeof(uint16_t) * n);
}

inline bool store_block(const float* x, uint8_t* to) {
  // The float below 0.5, added with the sign of y before truncation, rounds every y to nearest.
  constexpr float kAlmostHalf = 0x1.fffffep-2f;
  const float most = float_of(largest_bits(x, 32)), d = most / 127.0f, factor = d != 0.0f ? 1.0f / d : 0.0f;
  const uint16_t scale = static_cast<uint16_t>(half_bits(bits_of(d)));
  const bool fits = bits_of(d) < kTooLarge;
  int8_t steps[32];
  for (int i = 0; i < 32; i++) {
    const float y = fits ? x[i] * factor : 0.0f;
    const float rounding = float_of(bits_of(kAlmostHalf) | (bits_of(y) & ~kMagnitude));
    steps[i] = static_cast<int8_t>(static_cast<int32_t>(y + rounding));
  }
  std::memcpy(to, &scale, 2);
  std::memcpy(to + 2, steps, 32);
  return fits;
}

inline bool store_tile(const float* x, int n, TargetDtype target, uint8_t* to) {
  bool fits = true;
  switch (target) {
    case TargetDtype::F32:
      std::memcpy(to, x, sizeof(float) * n);
      return true;
    case TargetDtype::F16:
      return store_half(x, n, to);
    case TargetDtype::BF16:
      store_bfloat(x, n, to);
      return true;
    case TargetDtype::Q8_0:
      for (int i = 0; i < n; i += 32) fits &= store_block(x + i, to + i / 32 * 34);
      return fits;
  }
  return false;
}

static bool run(const uint8_t* from, SourceDtype source, size_t count, TargetDtype target, uint8_t* to) {
  alignas(64) float x[kTile];
  const size_t in = source_bytes(source, kTile), out = target_bytes(target, kTile);
  bool fits = true;
  for (; count > 0; from += in, to += out) {
    const int n = static_cast<int>(count < kTile ? count : kTile);
    load_tile(from, source, n, x);
    fits &= store_tile(x, n, target, to);
    count -= n;
  }
  return fits;
}
