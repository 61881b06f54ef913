// Fields of a protobuf message in the form that its usual writers give it: ascending, none twice, numbers of one packed
// field together. Other bytes may mean the same, and are refused: the codec in Python reads them then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>

namespace llamaclust {

using Bytes = std::span<const uint8_t>;

// Every read stays within the bytes. After the first one that fails, no further field comes and `is_whole` is false.
class Fields {
 public:
  // Only the field `repeated` may come several times.
  explicit Fields(Bytes bytes, uint32_t repeated = 0)
      : at_(bytes.data()), end_(at_ + bytes.size()), repeated_(repeated) {}

  // The number of the next field; 0: there is none. Its value is to be read before the next call.
  uint32_t next() {
    if (is_broken_ || at_ == end_) return 0;
    const uint8_t tag = *at_++;
    const uint32_t number = tag >> 3;
    if (tag >= 0x80 || number == 0 || number < last_ || (number == last_ && number != repeated_)) return fail();
    kind_ = tag & 7;
    return last_ = number;
  }

  // Whether all fields have been read.
  bool is_whole() const { return !is_broken_ && at_ == end_; }

  uint64_t number64() {
    if (kind_ != kVarint) return fail();
    return varint();
  }

  uint32_t number32() { return narrow(number64()); }

  double real() {
    double value = 0;
    if (kind_ != kFixed64 || end_ - at_ < static_cast<std::ptrdiff_t>(sizeof value)) return fail();
    std::memcpy(&value, at_, sizeof value);
    at_ += sizeof value;
    return value;
  }

  Bytes bytes() {
    if (kind_ != kBytes) return fail(), Bytes();
    const uint64_t size = varint(kLengthBytes);
    if (size > static_cast<uint64_t>(end_ - at_)) return fail(), Bytes();
    const Bytes found(at_, static_cast<size_t>(size));
    at_ += size;
    return found;
  }

  // Calls f(number) for each number of a packed field, of which there is at least one.
  template <typename F>
  void numbers(F f) {
    const Bytes packed = bytes();
    if (packed.empty()) fail();
    Fields inner(packed);
    while (!inner.is_broken_ && inner.at_ != inner.end_) {
      const uint32_t number = inner.narrow(inner.varint());
      if (!inner.is_broken_) f(number);
    }
    if (inner.is_broken_) fail();
  }

  // Calls f(number) for each fixed32 of a packed field, of which there is at least one.
  template <typename F>
  void words(F f) {
    const Bytes packed = bytes();
    if (packed.empty() || packed.size() % sizeof(uint32_t) != 0) fail();
    for (size_t at = 0; at < packed.size() && !is_broken_; at += sizeof(uint32_t)) {
      uint32_t word;
      std::memcpy(&word, packed.data() + at, sizeof word);
      f(word);
    }
  }

  // The message is none that is read here.
  uint32_t fail() {
    is_broken_ = true;
    return 0;
  }

 private:
  static constexpr uint8_t kVarint = 0, kFixed64 = 1, kBytes = 2;

  static constexpr int kVarintBytes = 10, kLengthBytes = 5;  // at most, as protobuf reads them

  uint64_t varint(int bytes = kVarintBytes) {
    uint64_t value = 0;
    for (int shift = 0; shift < 7 * bytes && at_ != end_; shift += 7) {
      const uint8_t byte = *at_++;
      if (shift == 63 && byte > 1) break;
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    return fail();
  }

  uint32_t narrow(uint64_t value) {
    if (value > std::numeric_limits<uint32_t>::max()) return fail();
    return static_cast<uint32_t>(value);
  }

  const uint8_t* at_;
  const uint8_t* const end_;
  const uint32_t repeated_;
  uint32_t last_ = 0;
  uint8_t kind_ = 0;
  bool is_broken_ = false;
};

}  // namespace llamaclust
