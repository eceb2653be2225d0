/* What the example needs of the machine that it runs on: an operating system's, or none (Cortex-M under QEMU). */
#ifndef BOARD_H
#define BOARD_H

#ifdef __cplusplus
extern "C" {
#endif

void board_print(const char* text);

/* Bytes of the stack that were in use at most since the start; 0 if that is not known. */
unsigned board_stack_used(void);

#ifdef __cplusplus
}
#endif
#endif
