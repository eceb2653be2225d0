#include "board.h"

#if defined(__ARM_ARCH_PROFILE) && __ARM_ARCH_PROFILE == 'M'

#include <stdint.h>

/* Set by cortex-m.ld. */
extern uint32_t stack_begin[], stack_end[], data_begin[], data_end[], data_image[], bss_begin[], bss_end[];

int main(void);
void reset(void);

/* Asks the debugger, here QEMU, for a service. */
static void semihost(uint32_t operation, const void* argument) {
  register uint32_t r0 __asm__("r0") = operation;
  register const void* r1 __asm__("r1") = argument;
  __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

static void stop(uint32_t status) {
  const uint32_t reason[] = {0x20026, status};
  for (;;) semihost(0x20, reason);
}

void board_print(const char* text) { semihost(0x04, text); }

static const uint32_t unused = 0x5a5a5a5a;

unsigned board_stack_used(void) {
  const uint32_t* at = stack_begin;
  while (at < stack_end && *at == unused) ++at;
  return (unsigned)((const uint8_t*)stack_end - (const uint8_t*)at);
}

void reset(void) {
#if defined(__ARM_FP)
  *(volatile uint32_t*)0xe000ed88u |= 0xfu << 20; /* lets the FPU be used */
  __asm__ volatile("dsb\n isb");
#endif
  const uint32_t* here;
  __asm__ volatile("mov %0, sp" : "=r"(here));
  for (uint32_t* p = stack_begin; p < here; ++p) *p = unused;
  for (uint32_t *p = data_begin, *from = data_image; p < data_end;) *p++ = *from++;
  for (uint32_t* p = bss_begin; p < bss_end;) *p++ = 0;
  stop((uint32_t)main());
}

static void fault(void) {
  board_print("fault\n");
  stop(1);
}

/* Where the stack starts, the entry, and what is run on NMI and faults. */
__attribute__((section(".vectors"), used)) static const struct {
  const void* stack;
  void (*handlers[15])(void);
} vectors = {stack_end, {reset, fault, fault, fault, fault, fault}};

#else

#include <stdio.h>

void board_print(const char* text) { fputs(text, stdout); }

unsigned board_stack_used(void) { return 0; }

#endif
