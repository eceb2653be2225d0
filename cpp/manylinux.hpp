// Included before each file of the module in wheels for other systems (FASTOPT_MANYLINUX in CMakeLists.txt): the module
// asks glibc and libstdc++ for nothing that CentOS 8, the system behind manylinux_2_28, lacks. `auditwheel` checks it.
#pragma once

#include <new>

#if defined(__aarch64__)
#define FASTOPT_FIRST_GLIBC "GLIBC_2.17"
#else
#define FASTOPT_FIRST_GLIBC "GLIBC_2.2.5"
#endif

// glibc 2.34 gave these a new version when they moved from libpthread.so, and GCC 12 this wait(). The first ones exist
// everywhere. The assembler ignores the lines of functions that a file does not call.
asm(".symver pthread_create,pthread_create@" FASTOPT_FIRST_GLIBC);
asm(".symver pthread_once,pthread_once@" FASTOPT_FIRST_GLIBC);
asm(".symver pthread_attr_setstacksize,pthread_attr_setstacksize@" FASTOPT_FIRST_GLIBC);
asm(".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");

extern "C" {
// New in glibc 2.32. False: libstdc++ counts references with atomic instructions.
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;

// New in GCC 11.
[[noreturn]] __attribute__((weak, visibility("hidden"))) void fastopt_throw_bad_array_new_length() asm(
    "_ZSt28__throw_bad_array_new_lengthv");
[[noreturn]] void fastopt_throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}
