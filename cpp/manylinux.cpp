// With manylinux.hpp: two functions of libstdc++ that the headers of GCC 11 and newer call, but which the library of
// CentOS 8 does not export. It has always exported an assignment that does the work of both.

extern "C" {
// std::exception_ptr::operator=(const std::exception_ptr&); an exception_ptr is one pointer.
void fastopt_assign(void** to, const void* const* from) noexcept asm("_ZNSt15__exception_ptr13exception_ptraSERKS0_");

// std::exception_ptr::_M_addref() and _M_release().
void fastopt_add_reference(void** pointer) noexcept asm("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void fastopt_release(void** pointer) noexcept asm("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void fastopt_add_reference(void** pointer) noexcept {
  void* copy = nullptr;  // never destroyed: its reference remains
  fastopt_assign(&copy, pointer);
}

void fastopt_release(void** pointer) noexcept {
  const void* const none = nullptr;
  fastopt_assign(pointer, &none);
}
}
