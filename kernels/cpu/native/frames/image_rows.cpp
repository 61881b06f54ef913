#include "frames/image_rows.h"

namespace llamaclust {
namespace {

// Rows [first, end) of a chunk.
struct Rows {
  int32_t chunk, first, end;
};

class Reading {
 public:
  Reading(const FrameLimits& limits, MicrobatchFrame& frame) : limits_(limits), frame_(frame) {}

  void given(Records<Rows> given, Records<float> values) {
    for_each("given rows", given, [&](size_t first, size_t end) {
      for (size_t row = first; row < end; row++) frame_.given_rows.push_back(static_cast<int32_t>(row));
    });
    check_count("values of given rows", values.size(), frame_.given_rows.size() * limits_.given_width);
    frame_.given_values = values.slice(0, values.size());
  }

  // A row outside all groups forms a group of its own.
  void groups(Records<Rows> groups) {
    for (size_t i = 0; groups.size() > 0 && i < frame_.positions.size(); i++)
      frame_.groups.insert(frame_.groups.end(), {frame_.positions[i], frame_.positions[i] + 1});
    for_each("rows of a group", groups, [&](size_t first, size_t end) {
      for (size_t row = first; row < end; row++) {
        frame_.groups[2 * row] = frame_.positions[first];
        frame_.groups[2 * row + 1] = frame_.positions[end - 1] + 1;
      }
    });
  }

  void rope_positions(Records<int32_t> chunks, Records<int32_t> numbers) {
    const auto sections = static_cast<size_t>(limits_.rope_sections);
    const size_t rows = frame_.positions.size();
    if (chunks.size() > 0 && sections == 0)
      throw ProtocolViolation("microbatch with rope positions, rows of this model have one each");
    for (size_t section = 0; chunks.size() > 0 && section < sections; section++)
      frame_.rope_positions.insert(frame_.rope_positions.end(), frame_.positions.begin(), frame_.positions.end());
    int32_t least = 0;
    size_t at = 0;
    for (size_t i = 0; i < chunks.size(); i++) {
      const auto chunk = static_cast<size_t>(bounded("chunk with rope positions", chunks[i], least, this->chunks() - 1));
      least = static_cast<int32_t>(chunk) + 1;
      for (auto row = static_cast<size_t>(start(chunk)); row < static_cast<size_t>(start(chunk + 1)); row++)
        for (size_t section = 0; section < sections; section++)
          frame_.rope_positions[section * rows + row] =
              bounded("rope position", numbers[at++], 0, limits_.max_context - 1);
    }
    check_count("rope positions", numbers.size(), at);
  }

 private:
  int32_t chunks() const { return static_cast<int32_t>(frame_.sequence_starts.size()) - 1; }
  int32_t start(size_t chunk) const { return frame_.sequence_starts[chunk]; }

  // Calls `take` for each record with its rows, counted from the first row of the microbatch.
  template <typename Take>
  void for_each(const char* what, const Records<Rows>& records, Take take) const {
    if (records.size() > 0 && limits_.given_width == 0)
      throw ProtocolViolation("microbatch with rows of images, this model takes none");
    int32_t chunk = 0, last = 0;
    for (size_t i = 0; i < records.size(); i++) {
      const Rows each = records[i];
      if (bounded("chunk with rows of images", each.chunk, chunk, chunks() - 1) > chunk) last = 0;
      chunk = each.chunk;
      const int32_t before = start(static_cast<size_t>(chunk));
      bounded(what, each.end, 1, start(static_cast<size_t>(chunk) + 1) - before);
      bounded(what, each.first, last, each.end - 1);
      last = each.end;
      take(static_cast<size_t>(before + each.first), static_cast<size_t>(before + each.end));
    }
  }

  static void check_count(const char* what, size_t found, size_t needed) {
    if (found != needed)
      throw ProtocolViolation(std::to_string(found) + " " + what + ", " + std::to_string(needed) + " expected");
  }

  const FrameLimits& limits_;
  MicrobatchFrame& frame_;
};

}  // namespace

void read_image_rows(Bytes images, const FrameLimits& limits, MicrobatchFrame& frame) {
  constexpr uint32_t kSections = 6;
  Bytes sections[kSections];
  Fields fields("ImageRows", images);
  while (const uint32_t field = fields.next()) {
    if (field >= kSections) fields.fail();
    sections[field] = fields.bytes();
  }
  Reading reading(limits, frame);
  reading.given({"given rows", sections[1]}, {"values of given rows", sections[2]});
  reading.groups({"rows of groups", sections[3]});
  reading.rope_positions({"chunks with rope positions", sections[4]}, {"rope positions", sections[5]});
}

}  // namespace llamaclust
