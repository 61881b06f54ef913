// Kernels by name, called with pointers to their arguments.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "fibres.h"

namespace shim {

struct Kernel {
  std::string name;
  std::string parameters;  // a letter each: p, i, f, d
  int max_threads;
  const void* function;
  Invoke invoke;
};

std::vector<Kernel>& kernels();

template <class T>
constexpr char letter_of() {
  if (std::is_pointer_v<T>) return 'p';
  if (std::is_same_v<T, int32_t>) return 'i';
  if (std::is_same_v<T, float>) return 'f';
  static_assert(std::is_pointer_v<T> || std::is_same_v<T, int32_t> || std::is_same_v<T, float> ||
                    std::is_same_v<T, double>,
                "arguments of kernels are pointers, int32_t, float and double");
  return 'd';
}

template <class... Parameters, size_t... index>
void call(void (*function)(Parameters...), void** args, std::index_sequence<index...>) {
  function(*static_cast<Parameters*>(args[index])...);
}

template <class... Parameters>
void invoke(const void* function, void** args) {
  call(reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(function)), args,
       std::index_sequence_for<Parameters...>());
}

struct Registration {
  template <class... Parameters>
  Registration(const char* name, int max_threads, void (*function)(Parameters...)) {
    kernels().push_back({name, {letter_of<std::remove_cv_t<Parameters>>()...}, max_threads,
                         reinterpret_cast<const void*>(function), invoke<std::remove_cv_t<Parameters>...>});
  }
};

}  // namespace shim
