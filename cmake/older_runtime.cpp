// What headers of newer versions of g++ and glibc take from the shared libraries of their own version: defined here, hidden, so
// that a module compiled with them loads beside glibc 2.28 and the libstdc++ of g++ 8 (manylinux_2_28).

#define HIDDEN __attribute__((visibility("hidden")))

extern "C" {
// libstdc++ 4.9 and later.
[[noreturn]] void __cxa_throw_bad_array_new_length();

// glibc 2.32 and later: whether reference counts may do without atomic operations. 0: they may not.
HIDDEN extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

namespace std {

// libstdc++ 11 and later.
[[noreturn]] HIDDEN void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { __cxa_throw_bad_array_new_length(); }

}  // namespace std
