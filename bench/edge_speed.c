/* Times products of cpp/edge/fastopt.h for bench_edge.py: edge_speed FILE BATCH SECONDS. The file has a weight "w".
   Prints the shortest times of fo_linear, of fo_linear_int8, and of a loop over floats, in microseconds. */
/* bench_edge.py compiles this file once more with NAIVE, for the loop, whose sums a compiler may reorder. */
#include <stddef.h>

void naive(const float* w, size_t rows, size_t cols, const float* x, size_t batch, float* y);

#if defined(NAIVE)
void naive(const float* w, size_t rows, size_t cols, const float* x, size_t batch, float* y) {
  for (size_t b = 0; b < batch; ++b) {
    for (size_t row = 0; row < rows; ++row) {
      float sum = 0;
      for (size_t i = 0; i < cols; ++i) sum += w[row * cols + i] * x[b * cols + i];
      y[b * rows + row] = sum;
    }
  }
}
#else
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define FASTOPT_IMPLEMENTATION
#include "../cpp/edge/fastopt.h"

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

int main(int count, char** words) {
  fo_model model;
  fo_tensor w;
  FILE* file = count == 4 ? fopen(words[1], "rb") : NULL;
  if (!file) return 1;
  fseek(file, 0, SEEK_END);
  const size_t size = (size_t)ftell(file), batch = (size_t)atoi(words[2]);
  uint8_t* bytes = (uint8_t*)malloc(size);
  rewind(file);
  if (!bytes || fread(bytes, 1, size, file) != size) return 1;
  if (fo_open(&model, bytes, size) || fo_find(&model, "w", &w)) return 1;
  float *x = (float*)malloc(4 * batch * w.cols), *y = (float*)malloc(4 * batch * w.rows);
  float *dense = (float*)malloc(4 * w.rows * w.cols), *scale = (float*)malloc(4 * batch);
  int8_t* n = (int8_t*)malloc(batch * w.cols);
  if (!x || !y || !dense || !scale || !n) return 1;
  for (size_t i = 0; i < batch * w.cols; ++i) x[i] = (float)((i * 7919) % 1999) / 1000 - 1;
  for (size_t b = 0; b < batch; ++b) fo_round_int8(x + b * w.cols, w.cols, n + b * w.cols, scale + b);
  for (size_t row = 0; row < w.rows; ++row) fo_dequantize_row(&w, row, dense + row * w.cols, w.cols);
  for (int kind = 0; kind < 3; ++kind) {
    double shortest = 1e30, end = now() + 1e6 * atof(words[3]);
    do {
      const double start = now();
      if (kind == 0 && fo_linear(&w, NULL, x, batch * w.cols, y, batch * w.rows)) return 1;
      if (kind == 1 && fo_linear_int8(&w, NULL, n, scale, batch * w.cols, y, batch * w.rows)) return 1;
      if (kind == 2) naive(dense, w.rows, w.cols, x, batch, y);
      const double time = now() - start;
      if (time < shortest) shortest = time;
    } while (now() < end);
    printf("%.2f ", shortest);
  }
  return 0;
}
#endif
