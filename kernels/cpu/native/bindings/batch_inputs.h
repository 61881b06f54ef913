// Conversions of a batch's arrays from Python to spans.
#pragma once

#include <nanobind/stl/tuple.h>

#include "bindings/frames.h"
#include "executor/executor.h"

namespace llamaclust {

inline std::span<const int32_t> span_of(const Ints& x) { return {x.data(), x.size()}; }

// The members of StateTables, in the order of their declaration.
using PythonStates = std::optional<std::tuple<Ints, Ints, Ints, Ints>>;

inline StateTables states_of(const PythonStates& states) {
  if (!states) return {};
  const auto& [before, starts, rows, blocks] = *states;
  return {span_of(before), span_of(starts), span_of(rows), span_of(blocks)};
}

inline std::span<const int32_t> span_of(const std::optional<IntRows>& x, size_t rows, size_t columns) {
  if (!x) return {};
  if ((rows > 0 && x->shape(0) != rows) || x->shape(1) != columns) throw std::invalid_argument("batch: an array's shape");
  return {x->data(), x->size()};
}

inline GivenTable given_of(const std::optional<std::pair<Ints, FloatRows>>& given) {
  if (!given) return {};
  const auto& [rows, values] = *given;
  if (values.shape(0) != rows.size()) throw std::invalid_argument("batch: given rows without values");
  return {span_of(rows), values.data(), static_cast<int>(values.shape(1))};
}

inline GivenTable given_of(const MicrobatchFrame& frame) {
  if (frame.given_rows.empty()) return {};
  const size_t width = frame.given_values.size() / frame.given_rows.size();
  return {frame.given_rows, frame.given_values.data(), static_cast<int>(width)};
}

}  // namespace llamaclust
