/* Products for bench_edge_counts.py, which counts the instructions between two calls of mark(): of 8, 6, 5, 4, 3 and 2
   bits, with floats and with whole numbers of 8 bits, of 4 and of 12 rows. */
#define FASTOPT_IMPLEMENTATION
#include "fastopt.h"

enum { ROWS = 12, COLS = 1024 };

static uint8_t codes[ROWS * COLS] = {1}; /* the counts do not depend on the numbers */
static uint16_t params[ROWS * COLS / 32] = {0x3c00};
static float x[COLS], y[ROWS], scale = 1;
static int8_t n[COLS];

__attribute__((noinline)) void mark(void) { __asm__ volatile(""); }

int main(void) {
  static const uint8_t bits[] = {8, 6, 5, 4, 3, 2};
  int code = 0;
  for (int i = 0; i < COLS; ++i) x[i] = (float)(i + 1), n[i] = (int8_t)(i % 100);
  for (int i = 0; i < 6; ++i) {
    fo_tensor w;
    memset(&w, 0, sizeof w);
    w.cols = COLS, w.group = bits[i] == 2 ? 64 : 32, w.groups = COLS / w.group;
    w.values = codes, w.scale = w.minimum = params;
    w.layout = FO_DENSE, w.type = FO_CODES, w.bits = bits[i], w.param_type = FO_F16;
    for (w.rows = 4; w.rows <= ROWS; w.rows += 8) {
      w.count = w.rows * COLS;
      mark();
      code |= fo_linear(&w, NULL, x, COLS, y, w.rows);
      mark();
      code |= fo_linear_int8(&w, NULL, n, &scale, COLS, y, w.rows);
    }
  }
  mark();
  return code;
}
