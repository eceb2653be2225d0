/* Classifies handwritten digits with the network that `fastopt demo` packs: three layers, four fifths of the weights
   pruned, the rest in 4 bits. Once in floats, once in whole numbers of 8 bits, which suits a CPU without a
   floating-point unit. */
#include "board.h"
#include "digits.h" /* images, their labels, and what Python takes them for */

#define FASTOPT_IMPLEMENTATION
#include "fastopt.h"

#if defined(FROM_FILE)
#include "file.h" /* the bytes of fastopt-demo.safetensors */
#else
#include "model.h" /* what `fastopt export --to c` wrote */
#endif

enum { LAYERS = 3, WIDEST = 256 };

static fo_tensor weights[LAYERS], biases[LAYERS];

/* Gets the tensors, from the file or from the arrays; returns a code. */
static int load(void) {
#if defined(FROM_FILE)
  static const char* const names[][2] = {
      {"fc1.weight", "fc1.bias"}, {"fc2.weight", "fc2.bias"}, {"fc3.weight", "fc3.bias"}};
  fo_model model;
  int code = fo_open(&model, file_bytes, FILE_SIZE);
  for (int i = 0; i < LAYERS && !code; ++i) {
    code = fo_find(&model, names[i][0], &weights[i]);
    if (!code) code = fo_find(&model, names[i][1], &biases[i]);
  }
  return code;
#else
  weights[0] = model_fc1_weight, weights[1] = model_fc2_weight, weights[2] = model_fc3_weight;
  biases[0] = model_fc1_bias, biases[1] = model_fc2_bias, biases[2] = model_fc3_bias;
  return FO_OK;
#endif
}

/* Sets the class of an image of 64 pixels, each 0 to 16; returns a code. */
static int classify(const uint8_t* pixels, int in_int8, int* class_of_image) {
  static float x[WIDEST], y[WIDEST];
  static int8_t rounded[WIDEST];
  for (int i = 0; i < IMAGE_SIZE; ++i) x[i] = (float)pixels[i] / 16;
  for (int layer = 0; layer < LAYERS; ++layer) {
    const fo_tensor *w = &weights[layer], *bias = &biases[layer];
    float scale;
    int code;
    if (in_int8) {
      code = fo_round_int8(x, w->cols, rounded, &scale);
      if (!code) code = fo_linear_int8(w, bias, rounded, &scale, w->cols, y, w->rows);
    } else {
      code = fo_linear(w, bias, x, w->cols, y, w->rows);
    }
    if (code) return code;
    for (size_t i = 0; i < w->rows; ++i) x[i] = y[i] < 0 ? 0 : y[i]; /* ReLU */
  }
  *class_of_image = 0;
  for (int i = 1; i < (int)weights[LAYERS - 1].rows; ++i) {
    if (y[i] > y[*class_of_image]) *class_of_image = i;
  }
  return FO_OK;
}

static void print_number(unsigned number) {
  char text[11], *at = text + sizeof text;
  *--at = 0;
  do *--at = (char)('0' + number % 10);
  while ((number /= 10) != 0);
  board_print(at);
}

static void print_count(const char* before, unsigned count, const char* after) {
  board_print(before);
  print_number(count);
  board_print(after);
}

int main(void) {
  int code = load(), all_as_in_python = 1;
  for (int in_int8 = 0; in_int8 < 2 && !code; ++in_int8) {
    char found[IMAGES + 1];
    unsigned right = 0, as_in_python = 0;
    for (int i = 0; i < IMAGES && !code; ++i) {
      int digit = 0;
      code = classify(images[i], in_int8, &digit);
      found[i] = (char)('0' + digit);
      right += found[i] == labels[i];
      as_in_python += found[i] == predictions[i];
    }
    found[IMAGES] = 0;
    board_print(in_int8 ? "int8   " : "float  ");
    board_print(found);
    print_count("  ", right, " right, ");
    print_count("", as_in_python, " as in Python");
    print_count(" of ", IMAGES, "\n");
    if (!in_int8) all_as_in_python = as_in_python == IMAGES;
  }
  if (code) {
    board_print(fo_message(code));
    board_print("\n");
  }
  if (board_stack_used()) print_count("stack ", board_stack_used(), " bytes at most\n");
  return code || !all_as_in_python;
}
