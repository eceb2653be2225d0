/* Does with cpp/edge/fastopt.h what requests on stdin ask for, and writes the results to stdout;
   tests/edge/test_edge.py talks to it.

   A request: seven uint32 (operation, offset, and the bytes of name, bias, file, x and y), name, bias, file, x. The
   file is put `offset` bytes behind an aligned address, in memory of just its size; of no bytes, it is the one before.
   A reply: int32 code, y. */
#include <stdio.h>

#include "../fuzz/fuzz_edge.c"

enum { TRY, DEQUANTIZE, LINEAR, LINEAR_INT8, EMBEDDING };

static uint8_t* take(uint32_t size, uint32_t offset) {
  uint8_t* memory = (uint8_t*)malloc(offset + size + !(offset + size));
  if (!memory || fread(memory + offset, 1, size, stdin) != size) exit(1);
  return memory;
}

static char* take_name(uint32_t size) {
  char* name = (char*)realloc(take(size, 0), size + 1);
  if (!name) exit(1);
  name[size] = 0;
  return name;
}

static int operate(uint32_t operation, const uint8_t* file, uint32_t file_size, const char* name, const char* bias_name,
                   const void* x, uint32_t x_size, float* y, uint32_t y_size) {
  const size_t x_count = x_size / 4, y_count = y_size / 4;
  fo_model model;
  fo_tensor w, bias;
  int code = fo_open(&model, file, file_size);
  if (!code) code = fo_find(&model, name, &w);
  if (!code && *bias_name) code = fo_find(&model, bias_name, &bias);
  if (code) return code;
  const fo_tensor* add = *bias_name ? &bias : NULL;
  if (operation == DEQUANTIZE) {
    for (size_t row = 0; row < w.rows && !code; ++row) code = fo_dequantize_row(&w, row, y + row * w.cols, w.cols);
    return code;
  }
  if (operation == EMBEDDING) return fo_embedding(&w, (const uint32_t*)x, x_count, y, y_count);
  if (operation == LINEAR) return fo_linear(&w, add, (const float*)x, x_count, y, y_count);
  const size_t batch = w.cols ? x_count / w.cols : w.rows ? y_count / w.rows : 0;
  int8_t* n = (int8_t*)malloc(x_count + 1);
  float* scale = (float*)malloc(batch * sizeof(float) + 1);
  for (size_t b = 0; b < batch && !code; ++b) {
    code = fo_round_int8((const float*)x + b * w.cols, w.cols, n + b * w.cols, scale + b);
  }
  if (!code) code = fo_linear_int8(&w, add, n, scale, x_count, y, y_count);
  free(n), free(scale);
  return code;
}

int main(void) {
  uint32_t head[7], kept_size = 0;
  uint8_t* kept = NULL;
  while (fread(head, 4, 7, stdin) == 7) {
    char *name = take_name(head[2]), *bias = take_name(head[3]);
    if (head[4]) {
      free(kept);
      kept = take(kept_size = head[4], 0);
    }
    uint8_t *x = take(head[5], 0), *file = (uint8_t*)malloc(head[1] + kept_size + !(head[1] + kept_size)) + head[1];
    float* y = (float*)calloc(head[6] + 1, 1);
    int32_t code = 0;
    memcpy(file, kept, kept_size);
    if (head[0] == TRY) {
      fo_model model;
      code = fo_open(&model, file, kept_size);
      LLVMFuzzerTestOneInput(file, kept_size);
    } else {
      code = operate(head[0], file, kept_size, name, bias, x, head[5], y, head[6]);
    }
    fwrite(&code, 4, 1, stdout);
    fwrite(y, 1, head[6], stdout);
    free(name), free(bias), free(file - head[1]), free(x), free(y);
  }
  free(kept);
  return 0;
}
