// Runs llama.cpp's encoder of images on a tile of RGB bytes. For each line of standard input, it encodes the tile and
// prints how many milliseconds this took. At the end it writes the float32 rows. With `exact`, attention is float32.
// encode_tile PROJECTOR TILE WIDTH HEIGHT THREADS exact|fast ROWS
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "clip-model.h"

static bool read_file(const char* path, std::vector<uint8_t>& bytes) {
  FILE* file = fopen(path, "rb");
  if (file == nullptr) return false;
  const bool whole = fread(bytes.data(), 1, bytes.size(), file) == bytes.size();
  fclose(file);
  return whole;
}

int main(int argc, char** argv) {
  if (argc != 8) return 2;
  const int width = atoi(argv[3]), height = atoi(argv[4]), threads = atoi(argv[5]);
  clip_context_params params{};
  params.flash_attn_type = strcmp(argv[6], "exact") == 0 ? CLIP_FLASH_ATTN_TYPE_DISABLED : CLIP_FLASH_ATTN_TYPE_AUTO;
  params.image_min_tokens = params.image_max_tokens = -1;
  clip_ctx* context = clip_init(argv[1], params).ctx_v;
  if (context == nullptr) return 1;
  std::vector<uint8_t> bytes(static_cast<size_t>(width) * static_cast<size_t>(height) * 3);
  if (!read_file(argv[2], bytes)) return 1;
  clip_image_u8 tile;
  tile.set_size({width, height}, false);
  tile.cpy_buf(bytes);
  clip_image_f32 normalized;
  normalized.from_u8(tile);
  const clip_hparams* hparams = clip_get_hparams(context);
  normalized.normalize(hparams->image_mean, hparams->image_std);
  const int count = clip_n_output_tokens(context, &normalized), channels = clip_n_mmproj_embd(context);
  std::vector<float> rows(static_cast<size_t>(count) * static_cast<size_t>(channels));
  for (char line[64]; fgets(line, sizeof line, stdin) != nullptr;) {
    const auto begun = std::chrono::steady_clock::now();
    if (!clip_image_encode(context, threads, &normalized, rows)) return 1;
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begun;
    printf("%.3f\n", took.count());
    fflush(stdout);
  }
  FILE* out = fopen(argv[7], "wb");
  if (out == nullptr || fwrite(rows.data(), sizeof(float), rows.size(), out) != rows.size()) return 1;
  return fclose(out);
}
