/* Decodes and multiplies the tensors of an exported model, on machines without files too; tests/edge/test_edge.py makes
   model.c and digits.h, which names the tensors and holds x, and reads the bits that are printed. */
#include "board.h"

#define FASTOPT_IMPLEMENTATION
#include "fastopt.h"
#include "model.h"

enum { WIDEST = 1200 };

#include "digits.h" /* const fo_tensor *const tensors[]; const uint32_t x_bits[WIDEST] */

static float x[WIDEST], y[WIDEST];
static int8_t n[WIDEST];

static void print_words(const void* words, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    char text[10];
    uint32_t word;
    memcpy(&word, (const uint8_t*)words + 4 * i, 4);
    for (int digit = 0; digit < 8; ++digit) text[digit] = "0123456789abcdef"[word >> (28 - 4 * digit) & 15];
    text[8] = ' ', text[9] = 0;
    board_print(text);
  }
}

int main(void) {
  for (size_t i = 0; i < sizeof tensors / sizeof *tensors; ++i) {
    const fo_tensor* w = tensors[i];
    uint32_t low = 1, high = 0; /* Adler-32 of the decoded rows */
    float scale;
    int code = FO_OK;
    for (size_t row = 0; row < w->rows && !code; ++row) {
      code = fo_dequantize_row(w, row, y, w->cols);
      for (size_t at = 0; at < 4 * w->cols; ++at) {
        low = (low + ((const uint8_t*)y)[at]) % 65521;
        high = (high + low) % 65521;
      }
    }
    low |= high << 16;
    print_words(&low, 1);
    memcpy(x, x_bits, 4 * w->cols);
    if (!code) code = fo_linear(w, NULL, x, w->cols, y, w->rows);
    print_words(y, w->rows);
    if (!code) code = fo_round_int8(x, w->cols, n, &scale);
    if (!code) code = fo_linear_int8(w, NULL, n, &scale, w->cols, y, w->rows);
    print_words(y, w->rows);
    board_print(fo_message(code));
    board_print("\n");
  }
  return 0;
}
