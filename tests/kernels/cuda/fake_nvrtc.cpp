// NVRTC's interface over nothing: binaries are the options that they were asked for with.
#include <cstring>
#include <string>

namespace {
std::string source, options;
std::string all(const char* kind) { return std::string(kind) + options; }
int give(const std::string& text, char* out) {
  memcpy(out, text.data(), text.size());
  return 0;
}
}  // namespace

#ifndef MAJOR
#define MAJOR 13
#endif

extern "C" {
int nvrtcVersion(int* major, int* minor) {
  *major = MAJOR, *minor = 1;
  return 0;
}
int nvrtcGetNumSupportedArchs(int* count) {
  *count = 3;
  return 0;
}
int nvrtcGetSupportedArchs(int* numbers) {
  numbers[0] = 90, numbers[1] = 75, numbers[2] = 120;
  return 0;
}
int nvrtcCreateProgram(void** program, const char* text, const char* name, int, const char* const*, const char* const*) {
  *program = &source, source = text, options = name;
  return 0;
}
int nvrtcCompileProgram(void*, int count, const char* const* given) {
  for (int i = 0; i < count; i++) options += std::string(" ") + given[i];
  return source.find("bad") == std::string::npos ? 0 : 6;
}
int nvrtcDestroyProgram(void** program) {
  *program = nullptr;
  return 0;
}
const char* nvrtcGetErrorString(int) { return "an error"; }
int nvrtcGetProgramLogSize(void*, size_t* size) {
  *size = 12;
  return 0;
}
int nvrtcGetProgramLog(void*, char* out) { return give(std::string("bad is bad\n\0", 12), out); }
int nvrtcGetCUBINSize(void*, size_t* size) {
  *size = all("cubin ").size();
  return 0;
}
int nvrtcGetCUBIN(void*, char* out) { return give(all("cubin "), out); }
int nvrtcGetPTXSize(void*, size_t* size) {
  *size = all("ptx ").size();
  return 0;
}
int nvrtcGetPTX(void*, char* out) { return give(all("ptx "), out); }
}
