#pragma once

#include "bindings/bindings.h"
#include "frames/microbatch_frame.h"

namespace llamaclust {

// A frame that was read, and the bytes that it looks into.
struct ReadFrame {
  nb::bytes data;
  MicrobatchFrame frame;
  int32_t vocabulary;
  size_t hidden_width;

  Bytes bytes() const { return {static_cast<const uint8_t*>(data.data()), data.size()}; }

  // [rows][hidden_width]; null where a first stage gets none.
  const float* hidden() const {
    return hidden_width == 0 || frame.failure ? nullptr : reinterpret_cast<const float*>(bytes().data() + frame.body_at);
  }
};

}  // namespace llamaclust
