/* fastopt_nn.h: the layers around the products of fastopt.h, for the networks that `fastopt export --to c` writes.

   C99 or C++11, beside fastopt.h. The file that defines FASTOPT_IMPLEMENTATION before it includes fastopt.h includes
   this header, or the header of a network, there too. Nothing is allocated, and no function of the C library is called
   but memcpy and memset. The functions check nothing: sizes are known when a network is written. Buffers must not
   overlap, unless a function says that it works in place.

   Feature maps lie with the channels last, [height, width, channels]; a signal has the height 1. Do not compile with
   -ffast-math. */
#ifndef FASTOPT_NN_H
#define FASTOPT_NN_H

#include "fastopt.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FO_NN_PATCHES 4u /* positions of a convolution that are multiplied together */

/* A window that slides over a feature map. */
typedef struct fo_nn_window {
  uint32_t channels, height, width; /* of x */
  uint32_t out_height, out_width;
  uint32_t kernel_height, kernel_width;
  uint32_t stride_y, stride_x, dilation_y, dilation_x;
  uint32_t top, left;                /* padding before the first row and column */
  uint32_t channel_step, pixel_step; /* floats from one channel of x to the next, and from one column to the next */
} fo_nn_window;

/* A recurrent layer that starts from zeros. */
typedef struct fo_nn_recurrent {
  const fo_tensor *w, *r;           /* [gates * units, inputs] and [gates * units, units] */
  const fo_tensor *w_bias, *r_bias; /* null: none */
  uint32_t steps, inputs, units;
  uint32_t step;        /* floats from the output of one step to that of the next; 0: only the last one is written */
  uint8_t gate[4];      /* where in w the gates are: input, forget, cell, output; of a GRU reset, update, new */
  uint8_t backward;     /* from the last step to the first */
  uint8_t reset_before; /* of a GRU: the reset gate is applied before the product with r, not after it */
} fo_nn_recurrent;

/* Convolution with w [out, channels * kernel]; `patches` has FO_NN_PATCHES * w->cols floats. */
void fo_nn_conv(const fo_tensor* w, const fo_tensor* bias, const fo_nn_window* window, const float* x, float* y,
                float* patches);

/* The same in groups of channels, as depthwise, with w [out, channels / groups * kernel]; `scratch` has w->cols +
   w->rows floats. */
void fo_nn_conv_grouped(const fo_tensor* w, const fo_tensor* bias, const fo_nn_window* window, uint32_t groups,
                        const float* x, float* y, float* scratch);

void fo_nn_max_pool(const fo_nn_window* window, const float* x, float* y);

/* The mean; zeros of the padding are counted, or only what lies inside x. */
void fo_nn_average_pool(const fo_nn_window* window, int count_padding, const float* x, float* y);

/* y [cols, rows] = x [rows, cols].T */
void fo_nn_transpose(const float* x, size_t rows, size_t cols, float* y);

/* Copies rows of `cols` floats between places that are these steps apart. */
void fo_nn_copy(const float* x, size_t x_step, size_t rows, size_t cols, float* y, size_t y_step);

/* Element by element; y may be a or b. */
void fo_nn_add(const float* a, const float* b, size_t count, float* y);
void fo_nn_multiply(const float* a, const float* b, size_t count, float* y);

/* x [rows, cols] * factor [cols] + summand [cols], in place. Null is no factor, or no summand. */
void fo_nn_affine(float* x, size_t rows, size_t cols, const float* factor, const float* summand);

/* Activations, in place. */
void fo_nn_relu(float* x, size_t count);
void fo_nn_relu6(float* x, size_t count);
void fo_nn_leaky_relu(float* x, size_t count, float slope);
void fo_nn_sigmoid(float* x, size_t count);
void fo_nn_tanh(float* x, size_t count);
void fo_nn_silu(float* x, size_t count);
void fo_nn_gelu(float* x, size_t count);
void fo_nn_gelu_tanh(float* x, size_t count); /* the approximation by tanh */
void fo_nn_softmax(float* x, size_t rows, size_t cols);

/* Normalizes each row of x, in place; gain or shift may be null. */
void fo_nn_layer_norm(float* x, size_t rows, size_t cols, const float* gain, const float* shift, float epsilon);

/* x [steps, inputs], y [steps, units]; `scratch` has 10 * units floats. */
void fo_nn_lstm(const fo_nn_recurrent* layer, const float* x, float* y, float* scratch);

/* `scratch` has 8 * units floats. */
void fo_nn_gru(const fo_nn_recurrent* layer, const float* x, float* y, float* scratch);

/* fo_linear of one row. Four arguments take less code where it is called. */
int fo_nn_linear(const fo_tensor* w, const fo_tensor* bias, const float* x, float* y);

/* The same with x rounded to whole numbers of 8 bits; returns a code. `rounded` has w->cols bytes. */
int fo_nn_linear_int8(const fo_tensor* w, const fo_tensor* bias, const float* x, float* y, int8_t* rounded);

/* The same of several rows. */
int fo_nn_rows_int8(const fo_tensor* w, const fo_tensor* bias, const float* x, size_t batch, float* y, int8_t* rounded);

/* fo_nn_conv in such numbers; `scratch` has w->cols floats, and w->cols bytes behind them. */
int fo_nn_conv_int8(const fo_tensor* w, const fo_tensor* bias, const fo_nn_window* window, const float* x, float* y,
                    float* scratch);

#ifdef __cplusplus
}
#endif
#endif /* FASTOPT_NN_H */

/* ============================================================================================== */
#if defined(FASTOPT_IMPLEMENTATION) && !defined(FASTOPT_NN_IMPLEMENTED)
#define FASTOPT_NN_IMPLEMENTED

#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- windows ------------------------------------------------------------------------------------ */

/* Where the window begins at a position of y. Rows and columns in the padding are counted on from below 0, which is
   above every size. */
static size_t fo_nn__top(const fo_nn_window* v, size_t position) {
  return position / v->out_width * v->stride_y - v->top;
}

static size_t fo_nn__left(const fo_nn_window* v, size_t position) {
  return position % v->out_width * v->stride_x - v->left;
}

static size_t fo_nn__positions(const fo_nn_window* v) { return (size_t)v->out_height * v->out_width; }

/* Copies what the window covers, [channels, kernel]. */
static void fo_nn__patch(const fo_nn_window* v, const float* x, size_t position, float* out) {
  const size_t top = fo_nn__top(v, position), left = fo_nn__left(v, position);
  for (size_t c = 0; c < v->channels; ++c) {
    for (size_t ky = 0; ky < v->kernel_height; ++ky) {
      const size_t row = top + ky * v->dilation_y;
      for (size_t kx = 0; kx < v->kernel_width; ++kx) {
        const size_t column = left + kx * v->dilation_x;
        const int inside = row < v->height && column < v->width;
        *out++ = inside ? x[c * v->channel_step + (row * v->width + column) * v->pixel_step] : 0;
      }
    }
  }
}

void fo_nn_conv(const fo_tensor* w, const fo_tensor* bias, const fo_nn_window* window, const float* x, float* y,
                float* patches) {
  const size_t positions = fo_nn__positions(window);
  for (size_t p = 0; p < positions; p += FO_NN_PATCHES) {
    const size_t n = positions - p < FO_NN_PATCHES ? positions - p : FO_NN_PATCHES;
    for (size_t i = 0; i < n; ++i) fo_nn__patch(window, x, p + i, patches + i * w->cols);
    fo_linear(w, bias, patches, n * w->cols, y + p * w->rows, n * w->rows);
  }
}

void fo_nn_conv_grouped(const fo_tensor* w, const fo_tensor* bias, const fo_nn_window* window, uint32_t groups,
                        const float* x, float* y, float* scratch) {
  const fo_nn_window* v = window;
  const size_t in = v->channels / groups, out = w->rows / groups, positions = fo_nn__positions(v);
  float *kernel = scratch, *biases = scratch + w->cols;
  memset(biases, 0, w->rows * sizeof *biases);
  if (bias) fo_dequantize_row(bias, 0, biases, w->rows);
  for (size_t o = 0; o < w->rows; ++o) {
    const float* first = x + o / out * in * v->channel_step;
    fo_dequantize_row(w, o, kernel, w->cols);
    for (size_t p = 0; p < positions; ++p) {
      const size_t top = fo_nn__top(v, p), left = fo_nn__left(v, p);
      float sum = biases[o];
      for (size_t ky = 0; ky < v->kernel_height; ++ky) {
        const size_t row = top + ky * v->dilation_y;
        if (row >= v->height) continue;
        for (size_t kx = 0; kx < v->kernel_width; ++kx) {
          const size_t column = left + kx * v->dilation_x;
          if (column >= v->width) continue;
          const float* from = first + (row * v->width + column) * v->pixel_step;
          const float* weight = kernel + ky * v->kernel_width + kx;
          for (size_t c = 0; c < in; ++c) {
            sum += weight[c * v->kernel_height * v->kernel_width] * from[c * v->channel_step];
          }
        }
      }
      y[p * w->rows + o] = sum;
    }
  }
}

void fo_nn_max_pool(const fo_nn_window* window, const float* x, float* y) {
  const fo_nn_window* v = window;
  const size_t positions = fo_nn__positions(v);
  for (size_t p = 0; p < positions; ++p) {
    const size_t top = fo_nn__top(v, p), left = fo_nn__left(v, p);
    for (size_t c = 0; c < v->channels; ++c) {
      float largest = 0;
      int any = 0;
      for (size_t ky = 0; ky < v->kernel_height; ++ky) {
        const size_t row = top + ky * v->dilation_y;
        for (size_t kx = 0; kx < v->kernel_width; ++kx) {
          const size_t column = left + kx * v->dilation_x;
          if (row >= v->height || column >= v->width) continue;
          const float value = x[c * v->channel_step + (row * v->width + column) * v->pixel_step];
          if (!any || value > largest || value != value) largest = value;
          any = 1;
        }
      }
      *y++ = largest;
    }
  }
}

void fo_nn_average_pool(const fo_nn_window* window, int count_padding, const float* x, float* y) {
  const fo_nn_window* v = window;
  const size_t positions = fo_nn__positions(v);
  for (size_t p = 0; p < positions; ++p) {
    const size_t top = fo_nn__top(v, p), left = fo_nn__left(v, p);
    for (size_t c = 0; c < v->channels; ++c) {
      float sum = 0;
      size_t count = 0;
      for (size_t ky = 0; ky < v->kernel_height; ++ky) {
        const size_t row = top + ky * v->dilation_y;
        for (size_t kx = 0; kx < v->kernel_width; ++kx) {
          const size_t column = left + kx * v->dilation_x;
          if (row >= v->height || column >= v->width) continue;
          sum += x[c * v->channel_step + (row * v->width + column) * v->pixel_step];
          ++count;
        }
      }
      if (count_padding) count = (size_t)v->kernel_height * v->kernel_width;
      *y++ = count ? sum / (float)(uint32_t)count : 0;
    }
  }
}

/* ---- element by element ------------------------------------------------------------------------- */

void fo_nn_transpose(const float* x, size_t rows, size_t cols, float* y) {
  for (size_t c = 0; c < cols; ++c) {
    for (size_t r = 0; r < rows; ++r) *y++ = x[r * cols + c];
  }
}

void fo_nn_copy(const float* x, size_t x_step, size_t rows, size_t cols, float* y, size_t y_step) {
  for (; rows--; x += x_step, y += y_step) memcpy(y, x, cols * sizeof *y);
}

void fo_nn_add(const float* a, const float* b, size_t count, float* y) {
  for (size_t i = 0; i < count; ++i) y[i] = a[i] + b[i];
}

void fo_nn_multiply(const float* a, const float* b, size_t count, float* y) {
  for (size_t i = 0; i < count; ++i) y[i] = a[i] * b[i];
}

void fo_nn_affine(float* x, size_t rows, size_t cols, const float* factor, const float* summand) {
  for (; rows--; x += cols) {
    for (size_t c = 0; factor && c < cols; ++c) x[c] *= factor[c];
    for (size_t c = 0; summand && c < cols; ++c) x[c] += summand[c];
  }
}

void fo_nn_relu(float* x, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (x[i] < 0) x[i] = 0;
  }
}

void fo_nn_relu6(float* x, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] = x[i] < 0 ? 0 : x[i] > 6 ? 6 : x[i];
}

void fo_nn_leaky_relu(float* x, size_t count, float slope) {
  for (size_t i = 0; i < count; ++i) x[i] = x[i] < 0 ? slope * x[i] : x[i];
}

/* Sets `power` to 2^k and returns e^r - 1, where x = k ln 2 + r and |r| <= ln 2 / 2. x is brought to [-87, 88]. */
static float fo_nn__exponent(float x, float* power) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: a sum with it is a whole number, in its last bits */
  uint32_t bits;
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float sum = x * 1.44269504f + magic, k = sum - magic;
  const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f; /* ln 2 in two parts; k times the first is exact */
  memcpy(&bits, &sum, 4);
  bits = (bits << 23) + 0x3f800000u;
  memcpy(power, &bits, 4);
  float p = 1.98412698e-4f; /* 1/7!, 1/6!, ... */
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  return r + r * r * p;
}

static float fo_nn__exp(float x) {
  float power;
  const float rest = fo_nn__exponent(x, &power);
  return power + power * rest;
}

static float fo_nn__sigmoid(float x) { return 1 / (1 + fo_nn__exp(-x)); }

static float fo_nn__tanh(float x) {
  float power;
  const float rest = fo_nn__exponent(x < 0 ? -2 * x : 2 * x, &power);
  const float e = power * rest + (power - 1), result = e / (e + 2); /* e: exp(2 |x|) - 1 */
  return x < 0 ? -result : result;
}

/* The part of a normal distribution beyond t >= 0 standard deviations. */
static float fo_nn__beyond(float t) {
  const float a = t * 0.707106781f, s = a * a;
  if (a > 0.927734375f) { /* erfc(a) = e^p(a) */
    const float b = a > 10.0f ? 10.0f : a;
    float p = -1.72853470e-5f;
    p = p * b + 3.83197126e-4f;
    p = p * b - 3.88396438e-3f;
    p = p * b + 2.42546219e-2f;
    p = p * b - 1.06777877e-1f;
    p = p * b - 6.34846687e-1f;
    p = p * b - 1.28717512e-1f;
    return 0.5f * fo_nn__exp(p * b - b);
  }
  float p = -5.96761703e-4f; /* erf(a) = a + a p(a a) */
  p = p * s + 4.99119423e-3f;
  p = p * s - 2.67681349e-2f;
  p = p * s + 1.12819925e-1f;
  p = p * s - 3.76125336e-1f;
  p = p * s + 1.28379166e-1f;
  return 0.5f - 0.5f * (p * a + a);
}

void fo_nn_sigmoid(float* x, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] = fo_nn__sigmoid(x[i]);
}

void fo_nn_tanh(float* x, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] = fo_nn__tanh(x[i]);
}

void fo_nn_silu(float* x, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] *= fo_nn__sigmoid(x[i]);
}

void fo_nn_gelu(float* x, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] *= x[i] < 0 ? fo_nn__beyond(-x[i]) : 1 - fo_nn__beyond(x[i]);
}

void fo_nn_gelu_tanh(float* x, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] *= fo_nn__sigmoid(1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
}

void fo_nn_softmax(float* x, size_t rows, size_t cols) {
  for (; rows--; x += cols) {
    float largest = x[0], sum = 0;
    for (size_t c = 1; c < cols; ++c) {
      if (x[c] > largest) largest = x[c];
    }
    for (size_t c = 0; c < cols; ++c) sum += x[c] = fo_nn__exp(x[c] - largest);
    for (size_t c = 0; c < cols; ++c) x[c] /= sum;
  }
}

/* The square root of a positive number: halves its exponent, then takes steps of Newton. */
static float fo_nn__sqrt(float x) {
  uint32_t bits;
  float root;
  memcpy(&bits, &x, 4);
  bits = (bits >> 1) + 0x1fbd1df5u;
  memcpy(&root, &bits, 4);
  for (int i = 0; i < 3; ++i) root = 0.5f * (root + x / root);
  return root;
}

void fo_nn_layer_norm(float* x, size_t rows, size_t cols, const float* gain, const float* shift, float epsilon) {
  const float size = (float)(uint32_t)cols;
  for (; rows--; x += cols) {
    float mean = 0, squares = 0;
    for (size_t c = 0; c < cols; ++c) mean += x[c];
    mean /= size;
    for (size_t c = 0; c < cols; ++c) x[c] -= mean, squares += x[c] * x[c];
    const float variance = squares / size + epsilon, factor = variance > 0 ? 1 / fo_nn__sqrt(variance) : 0;
    for (size_t c = 0; c < cols; ++c) x[c] = x[c] * factor * (gain ? gain[c] : 1) + (shift ? shift[c] : 0);
  }
}

/* ---- recurrent layers --------------------------------------------------------------------------- */

/* The step of the input that is read in a turn. */
static size_t fo_nn__turn(const fo_nn_recurrent* layer, size_t turn) {
  return layer->backward ? layer->steps - 1 - turn : turn;
}

void fo_nn_lstm(const fo_nn_recurrent* layer, const float* x, float* y, float* scratch) {
  const size_t n = layer->units, in = layer->inputs;
  float *h = scratch, *cell = h + n, *gates = cell + n, *more = gates + 4 * n;
  const float *input = gates + layer->gate[0] * n, *forget = gates + layer->gate[1] * n;
  const float *fresh = gates + layer->gate[2] * n, *output = gates + layer->gate[3] * n;
  memset(h, 0, 2 * n * sizeof *h);
  for (size_t turn = 0; turn < layer->steps; ++turn) {
    const size_t t = fo_nn__turn(layer, turn);
    fo_linear(layer->w, layer->w_bias, x + t * in, in, gates, 4 * n);
    fo_linear(layer->r, layer->r_bias, h, n, more, 4 * n);
    fo_nn_add(gates, more, 4 * n, gates);
    for (size_t i = 0; i < n; ++i) {
      cell[i] = fo_nn__sigmoid(forget[i]) * cell[i] + fo_nn__sigmoid(input[i]) * fo_nn__tanh(fresh[i]);
      h[i] = fo_nn__sigmoid(output[i]) * fo_nn__tanh(cell[i]);
    }
    if (layer->step || turn + 1 == layer->steps) memcpy(y + t * layer->step, h, n * sizeof *h);
  }
}

void fo_nn_gru(const fo_nn_recurrent* layer, const float* x, float* y, float* scratch) {
  const size_t n = layer->units, in = layer->inputs;
  const size_t reset = layer->gate[0] * n, update = layer->gate[1] * n, fresh = layer->gate[2] * n;
  float *h = scratch, *gates = h + n, *more = gates + 3 * n, *held = more + 3 * n;
  memset(h, 0, n * sizeof *h);
  for (size_t turn = 0; turn < layer->steps; ++turn) {
    const size_t t = fo_nn__turn(layer, turn);
    fo_linear(layer->w, layer->w_bias, x + t * in, in, gates, 3 * n);
    fo_linear(layer->r, layer->r_bias, h, n, more, 3 * n);
    for (size_t i = 0; i < n; ++i) {
      gates[reset + i] = fo_nn__sigmoid(gates[reset + i] + more[reset + i]);
      gates[update + i] = fo_nn__sigmoid(gates[update + i] + more[update + i]);
      held[i] = gates[reset + i] * h[i];
    }
    if (layer->reset_before) fo_linear(layer->r, layer->r_bias, held, n, more, 3 * n);
    for (size_t i = 0; i < n; ++i) {
      const float share = layer->reset_before ? 1 : gates[reset + i], z = gates[update + i];
      const float candidate = fo_nn__tanh(gates[fresh + i] + share * more[fresh + i]);
      h[i] = candidate + z * (h[i] - candidate);
    }
    if (layer->step || turn + 1 == layer->steps) memcpy(y + t * layer->step, h, n * sizeof *h);
  }
}

/* ---- whole numbers ------------------------------------------------------------------------------ */

int fo_nn_linear(const fo_tensor* w, const fo_tensor* bias, const float* x, float* y) {
  return fo_linear(w, bias, x, w->cols, y, w->rows);
}

int fo_nn_linear_int8(const fo_tensor* w, const fo_tensor* bias, const float* x, float* y, int8_t* rounded) {
  float scale;
  const int code = fo_round_int8(x, w->cols, rounded, &scale);
  return code ? code : fo_linear_int8(w, bias, rounded, &scale, w->cols, y, w->rows);
}

int fo_nn_rows_int8(const fo_tensor* w, const fo_tensor* bias, const float* x, size_t batch, float* y,
                    int8_t* rounded) {
  int code = FO_OK;
  for (; batch-- && !code; x += w->cols, y += w->rows) code = fo_nn_linear_int8(w, bias, x, y, rounded);
  return code;
}

int fo_nn_conv_int8(const fo_tensor* w, const fo_tensor* bias, const fo_nn_window* window, const float* x, float* y,
                    float* scratch) {
  const size_t positions = fo_nn__positions(window);
  for (size_t p = 0; p < positions; ++p) {
    fo_nn__patch(window, x, p, scratch);
    const int code = fo_nn_linear_int8(w, bias, scratch, y + p * w->rows, (int8_t*)(scratch + w->cols));
    if (code) return code;
  }
  return FO_OK;
}

#ifdef __cplusplus
}
#endif
#endif /* FASTOPT_IMPLEMENTATION */
