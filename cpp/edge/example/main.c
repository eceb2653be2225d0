/* Classifies handwritten digits, once in floats, once in whole numbers of 8 bits, which suits a CPU without a
   floating-point unit. The network is that of `fastopt demo`, but narrower: three layers, four fifths of the weights
   pruned, the rest in 4 bits. With VISION it is one of depthwise convolutions. `fastopt export --to c` wrote the
   functions that run them; with FROM_FILE the layers are called here, with tensors of a safetensors file. */
#include "board.h"
#include "digits.h" /* images, their labels, and what Python takes them for */

#define FASTOPT_IMPLEMENTATION
#if defined(FROM_FILE)
#include "fastopt.h"
#include "file.h" /* the bytes of fastopt-demo.safetensors */

enum { LAYERS = 3, X_SIZE = 256, Y_SIZE = 256 }; /* of the widest layer */

static fo_tensor weights[LAYERS], biases[LAYERS];

/* Gets the tensors from the file; returns a code. */
static int load(void) {
  static const char* const names[][2] = {
      {"fc1.weight", "fc1.bias"}, {"fc2.weight", "fc2.bias"}, {"fc3.weight", "fc3.bias"}};
  fo_model model;
  int code = fo_open(&model, file_bytes, FILE_SIZE);
  for (int i = 0; i < LAYERS && !code; ++i) {
    code = fo_find(&model, names[i][0], &weights[i]);
    if (!code) code = fo_find(&model, names[i][1], &biases[i]);
  }
  return code;
}

/* Computes the scores of the classes; returns a code. */
static int run(float* x, int in_int8, float* y) {
  static int8_t rounded[X_SIZE];
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
  return FO_OK;
}

#else
#if defined(VISION)
#include "vision.h"
#define predictions vision_predictions
#define run_float vision_run
#define run_int8 vision_run_int8
#define SCRATCH_BYTES VISION_SCRATCH_BYTES
#else
#include "model.h"
#define run_float model_run
#define run_int8 model_run_int8
#define SCRATCH_BYTES MODEL_SCRATCH_BYTES
#endif

enum { X_SIZE = IMAGE_SIZE, Y_SIZE = CLASSES };

static int load(void) { return FO_OK; }

static int run(const float* x, int in_int8, float* y) {
  static float scratch[SCRATCH_BYTES / sizeof(float)];
  return in_int8 ? run_int8(x, y, scratch) : run_float(x, y, scratch);
}
#endif

/* Sets the class of an image of pixels from 0 to 16; returns a code. */
static int classify(const uint8_t* pixels, int in_int8, int* class_of_image) {
  static float x[X_SIZE], y[Y_SIZE];
  for (int i = 0; i < IMAGE_SIZE; ++i) x[i] = (float)pixels[i] / 16;
  const int code = run(x, in_int8, y);
  if (code) return code;
  *class_of_image = 0;
  for (int i = 1; i < CLASSES; ++i) {
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
