#pragma once

#include "bindings/bindings.h"
#include "frames/microbatch_frame.h"

namespace llamaclust {

// A parsed frame, with the bytes into which its spans point.
struct ReadFrame {
  nb::bytes data;
  MicrobatchFrame frame;
  int32_t vocabulary;
  size_t hidden_width;

  Bytes bytes() const { return {static_cast<const uint8_t*>(data.data()), data.size()}; }

  // Hidden states [rows][hidden_width], or null for a first stage and for a frame that reports a failure.
  const float* hidden() const {
    return hidden_width == 0 || frame.failure ? nullptr : reinterpret_cast<const float*>(bytes().data() + frame.body_at);
  }
};

}  // namespace llamaclust
