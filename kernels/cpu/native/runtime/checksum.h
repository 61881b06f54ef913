// A checksum at the speed of memory, against damage and not against forgery: it differs for any two pieces of memory of
// one size that differ in one 64-bit word, and for others all but surely.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llamaclust {

uint64_t checksum(const uint8_t* data, size_t bytes);

}  // namespace llamaclust
