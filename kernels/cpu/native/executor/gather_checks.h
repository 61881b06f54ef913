// Checks of gathers, of steps that pack activations for them, and of activation slots; used by checks.cpp.
#pragma once

#include <algorithm>

#include "executor/plan.h"
#include "pack/pack.h"

namespace llamaclust {

inline const Buffer& buffer_of(const Plan& plan, BufferId id) {
  require(id >= 0 && static_cast<size_t>(id) < plan.buffers.size(), "a buffer that there is");
  return plan.buffers[static_cast<size_t>(id)];
}

inline const Buffer& line_of(const Plan& plan, BufferId id) {
  require(buffer_of(plan, id).multiple == 1, "a buffer of one line a row");
  return buffer_of(plan, id);
}

inline const ActivationSlot& slot_of(const Plan& plan, int index) {
  require(index >= 0 && static_cast<size_t>(index) < plan.slots.size(), "an activation slot without a writer");
  const ActivationSlot& slot = plan.slots[static_cast<size_t>(index)];
  require(slot.stretch == plan.stretch(), "activations that were quantized before a step that needs all rows");
  return slot;
}

// Reserves room in the slot for what a step writes into it.
inline Access into_slot(Plan& plan, BufferId x, int index, ActivationSlot written) {
  require(index >= 0 && index < kMaxSlots, "activation slot out of range");
  require(written.cols % segment_cols(written.format) == 0, "a width that is no multiple of the weights' blocks");
  if (plan.slots.size() <= static_cast<size_t>(index)) plan.slots.resize(static_cast<size_t>(index) + 1);
  ActivationSlot& slot = plan.slots[static_cast<size_t>(index)];
  const size_t row_bytes = activation_bytes(written.format, written.cols) * static_cast<size_t>(written.multiple);
  const size_t bytes = row_bytes * static_cast<size_t>(plan.rows());
  written.max_row_bytes = std::max(slot.max_row_bytes, row_bytes);
  written.max_bytes = std::max(slot.max_bytes, plan.selects ? 0 : bytes);
  written.max_selected_bytes = std::max(slot.max_selected_bytes, plan.selects ? bytes : 0);
  written.stretch = plan.stretch();
  slot = written;
  return {{x}, {}, true};
}

inline Access check_pack(const Plan& plan, const PackStep& step) {
  const Buffer &x = buffer_of(plan, step.x), &out = buffer_of(plan, step.out);
  require(x.width % segment_cols(step.format) == 0 && out.width == packed_floats(step.format, x.width) &&
              out.multiple == x.multiple,
          "whole segments, packed");
  require(!out.private_copy, "packed rows that all threads share");
  return {{step.x}, {step.out}, true};
}

inline Access check_unpack(Plan& plan, const UnpackStep& step) {
  const int segment = segment_cols(step.format);
  const Buffer& x = buffer_of(plan, step.x);
  require(x.width % packed_floats(step.format, segment) == 0, "whole segments, packed");
  return into_slot(plan, step.x, step.slot, {plan.unpacked_cols(step), x.multiple, step.format});
}

inline Access check_gather(Plan& plan, const GatherStep& step) {
  const Buffer& out = buffer_of(plan, step.out);
  const std::vector<int>& borders = step.borders;
  const int members = static_cast<int>(borders.size()) - 1;
  if (step.has_columns()) {
    const Buffer& x = buffer_of(plan, step.x);
    require(x.multiple == out.multiple && !x.private_copy, "gathered lines that all threads share");
  }
  require(members > 0 && borders[0] == 0 && std::ranges::is_sorted(borders), "columns of members one after the other");
  const int width = step.has_columns() ? buffer_of(plan, step.x).width : 0;
  bool is_own = false;
  for (size_t i = 1; i < borders.size(); i++) is_own |= borders[i] - borders[i - 1] == width;
  require(is_own && borders.back() == out.width, "as many columns as those of a member, and of all");
  require(step.to >= -1 && step.to < members, "rows for a member that there is not");
  require(step.number == plan.gathers++, "gathers in their order");
  if (!step.has_columns()) return {{}, {step.out}, false};
  return {{step.x}, {step.out}, false};
}

}  // namespace llamaclust
