// Reads fields of protobuf messages as this project's writers encode them: in ascending order, without repetition.
// Arrays are bytes of little-endian records. Damaged fields and values out of bounds throw a ProtocolViolation that
// names the field.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace llamaclust {

static_assert(std::endian::native == std::endian::little, "messages are little-endian");

using Bytes = std::span<const uint8_t>;

struct ProtocolViolation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The Python class ProtocolError has the same text.
template <typename T>
T bounded(const char* what, T value, T low, T high) {
  if (value >= low && value <= high) return value;
  throw ProtocolViolation(std::string(what) + " is " + std::to_string(value) + ", must be within " +
                          std::to_string(low) + ".." + std::to_string(high));
}

// Iterates over the fields of a message. Reads never go past the end of the bytes.
class Fields {
 public:
  // Only the field with number `repeated` may occur several times.
  Fields(const char* message, Bytes bytes, uint32_t repeated = 0)
      : message_(message), at_(bytes.data()), end_(at_ + bytes.size()), repeated_(repeated) {}

  // Returns the number of the next field, or 0 at the end. The caller reads its value before the next call.
  uint32_t next() {
    if (at_ == end_) return 0;
    const uint8_t tag = *at_++;
    const uint32_t number = tag >> 3;
    if (tag >= 0x80 || number == 0 || number < last_ || (number == last_ && number != repeated_)) fail();
    kind_ = tag & 7;
    return last_ = number;
  }

  uint64_t number64() {
    expect(kVarint);
    return varint(kVarintBytes);
  }

  uint32_t number32() { return narrow(number64()); }

  double real() {
    expect(kFixed64);
    double value;
    if (end_ - at_ < static_cast<std::ptrdiff_t>(sizeof value)) fail();
    std::memcpy(&value, at_, sizeof value);
    at_ += sizeof value;
    return value;
  }

  Bytes bytes() {
    expect(kBytes);
    const uint64_t size = varint(kLengthBytes);
    if (size > static_cast<uint64_t>(end_ - at_)) fail();
    const Bytes found(at_, static_cast<size_t>(size));
    at_ += size;
    return found;
  }

  [[noreturn]] void fail() const { throw ProtocolViolation(std::string(message_) + ": damaged, cannot be decoded"); }

 private:
  static constexpr uint8_t kVarint = 0, kFixed64 = 1, kBytes = 2;
  static constexpr int kVarintBytes = 10, kLengthBytes = 5;  // Maximum lengths, as protobuf has them.

  void expect(uint8_t kind) const {
    if (kind_ != kind) fail();
  }

  uint64_t varint(int bytes) {
    uint64_t value = 0;
    for (int shift = 0; shift < 7 * bytes && at_ != end_; shift += 7) {
      const uint8_t byte = *at_++;
      if (shift == 63 && byte > 1) break;
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    fail();
  }

  uint32_t narrow(uint64_t value) const {
    if (value > std::numeric_limits<uint32_t>::max()) fail();
    return static_cast<uint32_t>(value);
  }

  const char* const message_;
  const uint8_t* at_;
  const uint8_t* const end_;
  const uint32_t repeated_;
  uint32_t last_ = 0;
  uint8_t kind_ = 0;
};

// An array of T in the bytes of a field, which need not be aligned.
template <typename T>
class Records {
 public:
  Records(const char* what, Bytes bytes) : what_(what), bytes_(bytes) {
    if (bytes.size() % sizeof(T) != 0)
      throw ProtocolViolation(std::string(what) + " has " + std::to_string(bytes.size()) +
                              " bytes, which is not a multiple of " + std::to_string(sizeof(T)));
  }

  size_t size() const { return bytes_.size() / sizeof(T); }

  T operator[](size_t index) const {
    if (index >= size())
      throw ProtocolViolation(std::string(what_) + ": there are " + std::to_string(size()) + ", more are needed");
    T record;
    std::memcpy(&record, bytes_.data() + index * sizeof(T), sizeof record);
    return record;
  }

  // Returns records [first, first + count).
  std::vector<T> slice(uint64_t first, uint64_t count) const {
    if (first > size() || count > size() - first)
      throw ProtocolViolation(std::string(what_) + ": " + std::to_string(count) + " from " + std::to_string(first) +
                              " on, there are " + std::to_string(size()));
    std::vector<T> found(count);
    if (count > 0) std::memcpy(found.data(), bytes_.data() + first * sizeof(T), count * sizeof(T));
    return found;
  }

 private:
  const char* const what_;
  const Bytes bytes_;
};

}  // namespace llamaclust
