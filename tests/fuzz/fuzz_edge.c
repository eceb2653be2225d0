/* libFuzzer on cpp/edge/fastopt.h: a file of any bytes is opened, and whatever is found in it is decoded and
 * multiplied. */
#include <stdlib.h>
#include <string.h>

#define FASTOPT_IMPLEMENTATION
#include "../../cpp/edge/fastopt.h"

enum { MOST = 1 << 16 };

static void try_tensor(const fo_tensor* w) {
  const size_t batch = 5;
  const uint32_t ids[] = {0, 1};
  if (w->rows > MOST || w->cols > MOST || w->rows * w->cols > MOST) return;
  float* x = (float*)malloc((batch * w->cols + 1) * sizeof(float));
  int8_t* n = (int8_t*)malloc(batch * w->cols + 1);
  float *y = (float*)malloc((batch * w->rows + 2 * w->cols + 1) * sizeof(float)), scale[5];
  for (size_t i = 0; i < batch * w->cols; ++i) x[i] = (float)(i % 7) - 3;
  for (size_t row = 0; row < w->rows && row < 64; ++row) fo_dequantize_row(w, row, y, w->cols);
  fo_embedding(w, ids, 2, y, 2 * w->cols);
  fo_linear(w, NULL, x, batch * w->cols, y, batch * w->rows);
  for (size_t b = 0; b < batch; ++b) fo_round_int8(x + b * w->cols, w->cols, n + b * w->cols, scale + b);
  fo_linear_int8(w, w->rows == 1 ? w : NULL, n, scale, batch * w->cols, y, batch * w->rows);
  free(x), free(n), free(y);
}

int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  static const char* const names[] = {"w", "fc1.weight", "\xc3\xa9\"\\", "\xf0\x9f\x98\x80", "__metadata__", ""};
  fo_model model;
  fo_tensor tensor;
  if (fo_open(&model, bytes, size)) return 0;
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i) {
    if (fo_find(&model, names[i], &tensor) == FO_OK) try_tensor(&tensor);
  }
  return 0;
}
