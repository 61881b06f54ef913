// Hidden definitions of symbols that headers of newer g++ and glibc versions expect in their own shared libraries. With them,
// a module that these versions compiled loads with glibc 2.28 and the libstdc++ of g++ 8 (manylinux_2_28).

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>

#define HIDDEN __attribute__((visibility("hidden")))

extern "C" {
// libstdc++ 4.9 and later.
[[noreturn]] void __cxa_throw_bad_array_new_length();

// glibc 2.32 and later. Nonzero means that reference counts need no atomic operations.
HIDDEN extern char __libc_single_threaded;
char __libc_single_threaded = 0;

// libstdc++ 11 and later: std::exception_ptr counts its copies with these functions. Here they use the assignment operator, which
// earlier versions have too. Later headers may make that operator an inline function, which calls these.
#if _GLIBCXX_RELEASE < 15
void assign_exception(void* to, const void* from) __asm__("_ZNSt15__exception_ptr13exception_ptraSERKS0_");
HIDDEN void add_reference(const void* exception) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
HIDDEN void release(void* exception) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void add_reference(const void* exception) {
  void* copy = nullptr;
  assign_exception(&copy, exception);  // The copy is never destroyed, so the count stays raised.
}
void release(void* exception) {
  void* const none = nullptr;
  assign_exception(exception, &none);
}
#endif
}

namespace std {

// libstdc++ 11 and later.
[[noreturn]] HIDDEN void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { __cxa_throw_bad_array_new_length(); }

}  // namespace std

// Functions that OpenSSL's archive uses. glibc 2.34 gave functions of libpthread and libdl new symbol versions. The old version is
// that of the first glibc for the processor. Before glibc 2.33, stat() and fstat() were inline functions.
#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))

#ifdef __x86_64__
#define FIRST_VERSION "GLIBC_2.2.5"
#else
#define FIRST_VERSION "GLIBC_2.17"
#endif

#define FIRST(result, name, parameters, arguments)             \
  result first_##name parameters;                              \
  __asm__(".symver first_" #name ", " #name "@" FIRST_VERSION); \
  HIDDEN result name parameters { return first_##name arguments; }

extern "C" {
FIRST(void*, dlopen, (const char* path, int flags), (path, flags))
FIRST(void*, dlsym, (void* library, const char* name), (library, name))
FIRST(int, dlclose, (void* library), (library))
FIRST(char*, dlerror, (), ())
FIRST(int, dladdr, (const void* address, void* info), (address, info))
FIRST(int, pthread_once, (int* once, void (*function)()), (once, function))
FIRST(int, pthread_key_create, (unsigned* key, void (*function)(void*)), (key, function))
FIRST(int, pthread_key_delete, (unsigned key), (key))
FIRST(void*, pthread_getspecific, (unsigned key), (key))
FIRST(int, pthread_setspecific, (unsigned key, const void* value), (key, value))
FIRST(int, pthread_rwlock_init, (void* lock, const void* attributes), (lock, attributes))
FIRST(int, pthread_rwlock_destroy, (void* lock), (lock))
FIRST(int, pthread_rwlock_rdlock, (void* lock), (lock))
FIRST(int, pthread_rwlock_wrlock, (void* lock), (lock))
FIRST(int, pthread_rwlock_unlock, (void* lock), (lock))

HIDDEN int stat(const char* path, void* status) {
  return static_cast<int>(syscall(SYS_newfstatat, AT_FDCWD, path, status, 0));
}
HIDDEN int fstat(int descriptor, void* status) { return static_cast<int>(syscall(SYS_fstat, descriptor, status)); }
}

#endif
