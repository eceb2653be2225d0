/* fastopt.h: reads the models that fastopt packs, and multiplies with their packed weights.

   C99 or C++11, one file. Before one of its includes say
       #define FASTOPT_IMPLEMENTATION
   Nothing is allocated, copied or written but the caller's buffers; of the C library memcpy and memset are called.
   Little-endian machines only. Thread-safe: there is no state.

   A tensor is seen as a matrix [rows, cols]: its first axis by all others, and as one row if it has one axis. Tensors
   come from a file in memory (fo_open, fo_find: everything is checked there, the bytes may come from anywhere and need
   no alignment) or from a .c file that `fastopt export --to c` wrote, which needs no parser.

   The compiler's macros choose the code for the CPU: vectors of SSE2, SSSE3, AVX2, VNNI, NEON, or NEON with dot product
   (-march=native, -march=armv8.2-a+dotprod), the DSP instructions of Cortex-M. FO_PORTABLE leaves this code out.
   Products with dense codes whose groups start on bytes have the same bits in any case. */
#ifndef FASTOPT_H
#define FASTOPT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The results of functions. */
enum {
  FO_OK,
  FO_NOT_FOUND,
  FO_TRUNCATED,
  FO_BAD_HEADER,
  FO_BAD_METADATA,
  FO_BAD_VERSION,
  FO_BAD_TENSOR,
  FO_TOO_LARGE,
  FO_UNSUPPORTED_DTYPE,
  FO_UNSUPPORTED_LAYOUT,
  FO_UNSUPPORTED_OUTLIERS,
  FO_BAD_ROW,
  FO_BAD_SIZE,
  FO_NOT_FINITE
};

const char* fo_message(int code); /* in words, never null */

/* The types of stored numbers. Codes stand for minimum + scale * code. */
typedef enum { FO_F32, FO_F16, FO_BF16, FO_CODES, FO_OTHER } fo_type;

/* Where the values of a row are. Mask: a bit for each column, lowest first, rows on bytes; block: the same for blocks
   of 16 columns, of which all values are stored; index16: the column of each value; index8: its distance from the one
   before (from -1 for the first of a row), less one. */
typedef enum { FO_DENSE, FO_MASK, FO_BLOCK, FO_INDEX16, FO_INDEX8 } fo_layout;

typedef struct fo_tensor {
  size_t rows, cols;
  size_t count;       /* of values: rows * cols if dense */
  size_t group;       /* codes that share scale and minimum; 0: all */
  size_t groups;      /* in a row; 0 where all share one */
  const void* values; /* floats, or codes of `bits` bits, lowest first; rows of dense codes start on a byte */
  const void* scale;  /* [rows, groups]; where sparse, groups run through the rows */
  const void* minimum;
  const void* positions;     /* by the layout */
  const void* row_offsets;   /* [rows + 1]: row r has the entries from its offset to the next */
  const void* outlier_index; /* rising places in the matrix where outlier_value is added after decoding */
  const void* outlier_value; /* float32 */
  size_t outliers;
  uint8_t layout, type, bits;
  uint8_t param_type;   /* of scale and minimum: FO_F16 or FO_F32 */
  uint8_t offset_bytes; /* of a row offset: 4 or 8 */
  uint8_t index_bytes;  /* of an outlier index: 4 or 8 */
} fo_tensor;

typedef struct fo_model {
  const uint8_t* header; /* JSON */
  size_t header_size;
  const uint8_t* data;
  size_t data_size;
  const uint8_t* metadata; /* JSON inside a JSON string; null if the file is not fastopt's */
  size_t metadata_size;
} fo_model;

/* Checks a safetensors file of `size` bytes in memory, which must stay there. */
int fo_open(fo_model* model, const void* bytes, size_t size);

/* Finds a tensor, and checks that its parts fit together: of a sparse one that reads all of it but the values, so find
   it once. `tensor` points into the file. A tied tensor is found under each of its names, if the one that it is stored
   under has less than 256 bytes. */
int fo_find(const fo_model* model, const char* name, fo_tensor* tensor);

/* Decodes a row to `cols` floats; of codes to the same bits as Python's `dequantize`. */
int fo_dequantize_row(const fo_tensor* w, size_t row, float* out, size_t out_count);

/* Decodes rows of a table: out [count, cols]. */
int fo_embedding(const fo_tensor* w, const uint32_t* ids, size_t count, float* out, size_t out_count);

/* y [batch, rows] = x [batch, cols] @ w.T + bias; the counts are those of floats in x and y. `bias` has `rows` values,
   or is null. With dense codes the inner loops have integers alone: x is rounded to 23 bits of its largest number. */
int fo_linear(const fo_tensor* w, const fo_tensor* bias, const float* x, size_t x_count, float* y, size_t y_count);

/* The same with x ~ x_scale * whole numbers, a scale for each row of x. Each group of codes costs some operations on
   floats, so that few and large ones suit a CPU that has to emulate those. */
int fo_linear_int8(const fo_tensor* w, const fo_tensor* bias, const int8_t* x, const float* x_scale, size_t x_count,
                   float* y, size_t y_count);

/* Rounds a row of x to such numbers, -127 to 127. */
int fo_round_int8(const float* x, size_t count, int8_t* out, float* scale);

#ifdef __cplusplus
}
#endif
#endif /* FASTOPT_H */

/* ============================================================================================== */
#if defined(FASTOPT_IMPLEMENTATION) && !defined(FASTOPT_IMPLEMENTED)
#define FASTOPT_IMPLEMENTED

#include <string.h>

#if defined(__BYTE_ORDER__) && defined(__ORDER_BIG_ENDIAN__)
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "fastopt.h: files are little-endian, and are read where they lie"
#endif
#endif

#if defined(__GNUC__) /* -ffreestanding would make calls of them, also for 4 bytes */
#define FO__COPY __builtin_memcpy
#define FO__CLEAR(p, n) __builtin_memset(p, 0, n)
#else
#define FO__COPY memcpy
#define FO__CLEAR(p, n) memset(p, 0, n)
#endif

#if defined(__GNUC__) && defined(__SSE2__)
#define FO__IN_REGISTER(value) "+x"(value)
#elif defined(__GNUC__) && (defined(__aarch64__) || (defined(__ARM_FP) && !defined(__SOFTFP__)))
#define FO__IN_REGISTER(value) "+w"(value)
#elif defined(__GNUC__)
#define FO__IN_REGISTER(value) "+m"(value)
#endif

#if !defined(FO_PORTABLE) && defined(__GNUC__) && defined(__SSE2__)
#define FO__SIMD
#include <immintrin.h>
#elif !defined(FO_PORTABLE) && defined(__GNUC__) && defined(__ARM_NEON)
#define FO__SIMD
#include <arm_neon.h>
#elif !defined(FO_PORTABLE) && defined(__GNUC__) && defined(__ARM_FEATURE_SIMD32)
#define FO__DSP
#include <arm_acle.h>
#endif

/* Of dense products, on the stack: rows of x at a time, runs of columns, and columns. */
#if defined(FO__SIMD)
#define FO__TILE 4
#define FO__RUNS 64
#define FO__COLUMNS 1024
#define FO__ROOM(kind) ((kind)->width == 1 ? (size_t)FO__COLUMNS * 2 : (size_t)FO__COLUMNS)
#else
#define FO__TILE 1
#define FO__RUNS 16
#define FO__COLUMNS 128
#define FO__ROOM(kind) ((kind)->width == 1 ? (size_t)-1 : (size_t)FO__COLUMNS)
#endif

#define FO__CHUNK 32 /* sparse entries at a time, on the stack */
#define FO__BLOCK 16 /* columns of a block */
#define FO__DEPTH 24 /* of JSON */
#define FO__MAX_AXES 32
#define FO__NAME 256 /* bytes of the name that a tied tensor is stored under, with the 0 behind it */

#ifdef __cplusplus
extern "C" {
#endif

const char* fo_message(int code) {
  switch (code) {
    case FO_OK:
      return "done";
    case FO_NOT_FOUND:
      return "the file has no tensor of this name";
    case FO_TRUNCATED:
      return "the file ends before its tensors do";
    case FO_BAD_HEADER:
      return "not a safetensors file: its header is not what it should be";
    case FO_BAD_METADATA:
      return "the entry \"fastopt\" of the metadata is not what it should be";
    case FO_BAD_VERSION:
      return "the file is of a version of the format that this fastopt.h does not know";
    case FO_BAD_TENSOR:
      return "the parts of the tensor do not fit together";
    case FO_TOO_LARGE:
      return "the tensor is too large for this machine";
    case FO_UNSUPPORTED_DTYPE:
      return "the tensor is not of float32, float16, bfloat16 or codes";
    case FO_UNSUPPORTED_LAYOUT:
      return "the layout is none of mask, index16, index8, 1x16, N:M";
    case FO_UNSUPPORTED_OUTLIERS:
      return "outliers of sparse values are not supported";
    case FO_BAD_ROW:
      return "the tensor has no such row";
    case FO_BAD_SIZE:
      return "the sizes of x, y, bias or out do not fit the tensor";
    case FO_NOT_FINITE:
      return "x has NaN or infinity";
    default:
      return "unknown code";
  }
}

static size_t fo__min(size_t a, size_t b) { return a < b ? a : b; }

/* ---- numbers at any address --------------------------------------------------------------------- */

static float fo__from_bits(uint32_t bits) {
  float value;
  FO__COPY(&value, &bits, 4);
  return value;
}

static float fo__from_half(uint32_t half) {
#if defined(FO__DSP) && (defined(__ARM_ARCH_7EM__) || defined(__ARM_ARCH_8M_MAIN__)) && defined(__ARM_FP)
  float value = fo__from_bits(half);
  __asm__("vcvtb.f32.f16 %0, %0" : "+t"(value));
  return value;
#else
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 0x3ffu;
  if (exponent == 0) { /* subnormal: mantissa * 2^-24, exact */
    const float value = (float)mantissa * fo__from_bits(0x33800000u);
    return sign ? -value : value;
  }
  return fo__from_bits(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
#endif
}

static float fo__float(const void* values, unsigned type, size_t index) {
  uint32_t word = 0;
  uint16_t half;
  if (type == FO_F32) {
    FO__COPY(&word, (const uint8_t*)values + 4 * index, 4);
    return fo__from_bits(word);
  }
  FO__COPY(&half, (const uint8_t*)values + 2 * index, 2);
  return type == FO_F16 ? fo__from_half(half) : fo__from_bits((uint32_t)half << 16);
}

static uint64_t fo__whole(const void* values, unsigned bytes, size_t index) {
  uint64_t value;
  uint32_t word;
  if (bytes == 8) {
    FO__COPY(&value, (const uint8_t*)values + 8 * index, 8);
    return value;
  }
  FO__COPY(&word, (const uint8_t*)values + 4 * index, 4);
  return word;
}

static uint32_t fo__index16(const uint8_t* positions, size_t index) {
  return positions[2 * index] | (uint32_t)positions[2 * index + 1] << 8;
}

static unsigned fo__code(const uint8_t* codes, unsigned bits, size_t index) {
  const unsigned at = (unsigned)(index & 7) * bits, below = at & 7;
  codes += (index >> 3) * bits + (at >> 3);
  const unsigned above = below + bits > 8 ? codes[1] : 0u; /* the row may end with codes[0] */
  return (codes[0] | above << 8) >> below & ((1u << bits) - 1);
}

/* Bytes of so many codes, where they fill them; a part of a byte is not counted. */
static size_t fo__code_bytes(unsigned bits, size_t codes) { return (codes >> 3) * bits + ((codes & 7) * bits >> 3); }

/* A product, rounded: compilers may not make one FMA of it and a sum, as they do where they may. */
static float fo__rounded(float product) {
#if defined(FO__IN_REGISTER)
  __asm__("" : FO__IN_REGISTER(product));
  return product;
#else
  volatile float rounded = product;
  return rounded;
#endif
}

static float fo__affine(float scale, unsigned code, float minimum) {
  return minimum + fo__rounded(scale * (float)(int)code);
}

static size_t fo__row_bytes(const fo_tensor* t) {
  return (t->cols >> 3) * t->bits + (((t->cols & 7) * t->bits + 7) >> 3);
}

/* Values [begin, begin + count) of a row of dense values, or of the one row that sparse values are. */
static void fo__decode(const fo_tensor* t, size_t row, size_t begin, size_t count, float* out) {
  size_t i = 0;
  if (t->type == FO_F32) {
    FO__COPY(out, (const uint8_t*)t->values + 4 * (row * t->cols + begin), 4 * count);
    return;
  }
  if (t->type != FO_CODES) {
    for (; i < count; ++i) out[i] = fo__float(t->values, t->type, row * t->cols + begin + i);
    return;
  }
  const uint8_t* codes = (const uint8_t*)t->values + row * fo__row_bytes(t);
  while (i < count) {
    const size_t group = t->group ? (begin + i) / t->group : 0;
    const size_t left = t->group ? t->group - (begin + i) % t->group : count, end = i + fo__min(left, count - i);
    const float scale = fo__float(t->scale, t->param_type, row * t->groups + group);
    const float minimum = fo__float(t->minimum, t->param_type, row * t->groups + group);
    for (; i < end; ++i) {
      out[i] = fo__affine(scale, fo__code(codes, t->bits, begin + i), minimum);
    }
  }
}

/* ---- where the values of a row are -------------------------------------------------------------- */

typedef struct {
  const fo_tensor* t;
  size_t row, at, end; /* values of the row that are left: [at, end) */
  size_t next;         /* column that the search goes on from, or block */
} fo__entries;

static fo__entries fo__entries_of(const fo_tensor* t, size_t row) {
  fo__entries e;
  const size_t width = t->layout == FO_BLOCK ? FO__BLOCK : 1;
  e.t = t, e.row = row, e.next = 0;
  e.at = t->layout == FO_DENSE ? 0 : (size_t)fo__whole(t->row_offsets, t->offset_bytes, row) * width;
  e.end = t->layout == FO_DENSE ? t->cols : (size_t)fo__whole(t->row_offsets, t->offset_bytes, row + 1) * width;
  return e;
}

/* The columns of the next values, FO__CHUNK at most, and the index of the first of them; 0 at the end of the row. */
static size_t fo__columns(fo__entries* e, uint32_t* columns, size_t* first) {
  const uint8_t* positions = (const uint8_t*)e->t->positions;
  size_t n = 0, most = fo__min(e->end - e->at, FO__CHUNK);
  const size_t bits = e->t->layout == FO_BLOCK ? (e->t->cols + FO__BLOCK - 1) / FO__BLOCK : e->t->cols;
  *first = e->at;
  switch (e->t->layout) {
    case FO_DENSE:
      for (; n < most; ++n) columns[n] = (uint32_t)(e->at + n);
      break;
    case FO_INDEX16:
      for (; n < most; ++n) columns[n] = fo__index16(positions, e->at + n);
      break;
    case FO_INDEX8:
      for (; n < most; ++n, ++e->next) columns[n] = (uint32_t)(e->next += positions[e->at + n]);
      break;
    default: /* masks */
      positions += e->row * ((bits + 7) / 8);
      if (e->t->layout == FO_BLOCK) most = fo__min(most, 1);
      while (n < most && e->next < bits) {
        const unsigned rest = (unsigned)positions[e->next / 8] >> e->next % 8;
        if (rest == 0) {
          e->next = (e->next | 7) + 1;
        } else {
          if (rest & 1) columns[n++] = (uint32_t)e->next;
          ++e->next;
        }
      }
      if (e->t->layout == FO_BLOCK && n) { /* the last block may reach beyond the last column */
        const size_t begin = columns[0] * (size_t)FO__BLOCK, end = fo__min(begin + FO__BLOCK, e->t->cols);
        for (n = 0; begin + n < end; ++n) columns[n] = (uint32_t)(begin + n);
        e->at += FO__BLOCK;
        return n;
      }
  }
  e->at += n;
  return n;
}

int fo_dequantize_row(const fo_tensor* w, size_t row, float* out, size_t out_count) {
  if (row >= w->rows) return FO_BAD_ROW;
  if (out_count != w->cols) return FO_BAD_SIZE;
  if (w->type == FO_OTHER) return FO_UNSUPPORTED_DTYPE;
  if (w->layout == FO_DENSE) {
    size_t low = 0, high = w->outliers;
    fo__decode(w, row, 0, w->cols, out);
    while (low < high) { /* the first outlier of the row */
      const size_t middle = low + (high - low) / 2;
      if (fo__whole(w->outlier_index, w->index_bytes, middle) < row * w->cols) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    for (; low < w->outliers; ++low) {
      const size_t column = (size_t)fo__whole(w->outlier_index, w->index_bytes, low) - row * w->cols;
      if (column >= w->cols) break;
      out[column] += fo__float(w->outlier_value, FO_F32, low);
    }
    return FO_OK;
  }
  uint32_t columns[FO__CHUNK];
  float values[FO__CHUNK];
  fo__entries e = fo__entries_of(w, row);
  size_t first, n, i;
  FO__CLEAR(out, w->cols * sizeof(float));
  while ((n = fo__columns(&e, columns, &first)) != 0) {
    fo__decode(w, 0, first, n, values);
    for (i = 0; i < n; ++i) out[columns[i]] = values[i];
  }
  return FO_OK;
}

int fo_embedding(const fo_tensor* w, const uint32_t* ids, size_t count, float* out, size_t out_count) {
  size_t i;
  if (w->cols ? out_count / w->cols != count || out_count % w->cols : out_count) return FO_BAD_SIZE;
  for (i = 0; i < count; ++i) {
    const int code = fo_dequantize_row(w, ids[i], out + i * w->cols, w->cols);
    if (code) return code;
  }
  return FO_OK;
}

/* ---- products with dense codes ------------------------------------------------------------------- */

/* y = sum over runs of  scale * (sum of code * n) + (minimum + scale * middle) * (sum of n)

   where n are whole numbers: x itself in 8 bits, or x in units of a power of two, which 24 bits hold. A run has the
   columns of one group, so many at most as its fo__kind says. Codes count from the middle of their range, so that
   little cancels. The sums of a run are exact. So every CPU may add them up in its own order, and all get the same
   bits: this text defines the floats that are made of a run, and that runs are added from the first to the last. */

/* The kind of x: floats, or whole numbers of 8 bits. */
typedef struct {
  size_t width; /* bytes of an element of x */
  size_t run;   /* columns of a run at most */
  /* The sum of codes times x in the columns that are given, and codes from number `at` on; and with weights in floats,
     in all columns from the first on where none are given. */
  float (*dot_at)(unsigned bits, const uint8_t* codes, size_t at, const void* x, const uint32_t* columns, size_t n,
                  float* sum_of_x);
  float (*dot_floats)(const float* w, const void* x, const uint32_t* columns, size_t n);
} fo__kind;

static float fo__dot_at_f32(unsigned bits, const uint8_t* codes, size_t at, const void* x, const uint32_t* columns,
                            size_t n, float* sum_of_x) {
  const float* from = (const float*)x;
  const int middle = 1 << (bits - 1);
  float sum = 0, sum_x = 0;
  for (size_t i = 0; i < n; ++i) {
    const float number = from[columns[i]];
    sum += number * (float)((int)fo__code(codes, bits, at + i) - middle);
    sum_x += number;
  }
  *sum_of_x = sum_x;
  return sum;
}

static float fo__dot_floats_f32(const float* w, const void* x, const uint32_t* columns, size_t n) {
  const float* from = (const float*)x;
  float a = 0, b = 0, c = 0, d = 0;
  size_t i = 0;
  for (; !columns && i + 4 <= n; i += 4) {
    a += w[i] * from[i], b += w[i + 1] * from[i + 1];
    c += w[i + 2] * from[i + 2], d += w[i + 3] * from[i + 3];
  }
  for (; i < n; ++i) a += w[i] * from[columns ? columns[i] : i];
  return (a + b) + (c + d);
}

static float fo__dot_at_s8(unsigned bits, const uint8_t* codes, size_t at, const void* x, const uint32_t* columns,
                           size_t n, float* sum_of_x) {
  const int8_t* from = (const int8_t*)x;
  const int middle = 1 << (bits - 1);
  int32_t sum = 0, sum_x = 0;
  for (size_t i = 0; i < n; ++i) {
    const int number = from[columns[i]];
    sum += number * ((int)fo__code(codes, bits, at + i) - middle);
    sum_x += number;
  }
  *sum_of_x = (float)sum_x;
  return (float)sum;
}

static float fo__dot_floats_s8(const float* w, const void* x, const uint32_t* columns, size_t n) {
  const int8_t* from = (const int8_t*)x;
  float sum = 0;
  for (size_t i = 0; i < n; ++i) sum += w[i] * (float)from[columns ? columns[i] : i];
  return sum;
}

static const fo__kind fo__kind_f32 = {4, 128, fo__dot_at_f32, fo__dot_floats_f32};
static const fo__kind fo__kind_s8 = {1, 2048, fo__dot_at_s8, fo__dot_floats_s8};

/* The bits of the largest |x|; NaN is above infinity. */
static uint32_t fo__largest(const float* x, size_t n) {
  uint32_t largest = 0, bits;
  for (size_t i = 0; i < n; ++i) {
    FO__COPY(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    if (bits > largest) largest = bits;
  }
  return largest;
}

/* The power of two that x is counted in, so that its largest number is below 2^23; 0 where x has NaN or infinity, or
   is so large or small that its products may leave the range of float. */
static float fo__unit(const float* x, size_t n) {
  const uint32_t largest = fo__largest(x, n);
  uint32_t bits;
  if (largest == 0) return 1;
  const float above = fo__from_bits(largest) * 1.0078125f; /* then n <= 0x7f7f7f: it has three signed bytes */
  FO__COPY(&bits, &above, 4);
  bits >>= 23;
  return bits < 67 || bits > 187 ? 0.0f : fo__from_bits((bits - 22) << 23);
}

/* 1 / unit, which is a power of two. */
static float fo__per_unit(float unit) {
  uint32_t bits;
  FO__COPY(&bits, &unit, 4);
  return fo__from_bits(0x7f000000u - bits);
}

/* x in units, rounded half away from zero. */
static int32_t fo__count_units(float x, float per_unit) {
  const float units = x * per_unit;
  return (int32_t)(units < 0 ? units - 0.5f : units + 0.5f);
}

/* Where a walk along the columns is: in which group, and how many of its columns are still to come. */
typedef struct {
  size_t group, left;
} fo__walk;

static fo__walk fo__walk_from(const fo_tensor* w, size_t column) {
  fo__walk walk;
  walk.group = w->group ? column / w->group : 0;
  walk.left = w->group ? w->group - column % w->group : w->cols;
  return walk;
}

/* Goes on by some columns of the group, `most` at most; returns how many. */
static size_t fo__step(const fo_tensor* w, fo__walk* walk, size_t most) {
  const size_t n = fo__min(walk->left, most);
  walk->left -= n;
  if (walk->left == 0) walk->left = w->group, ++walk->group;
  return n;
}

/* Some runs of all rows. */
typedef struct {
  fo__walk start;
  size_t begin, end; /* columns */
} fo__stretch;

/* The share of a run in y; `middle` is the value of the code in the middle. */
static float fo__share(float scale, float middle, float dot, float sum) {
  return fo__rounded(scale * dot) + fo__rounded(middle * sum);
}

static float fo__middle_value(const fo_tensor* w, float scale, size_t param) {
  return fo__float(w->minimum, w->param_type, param) + fo__rounded(scale * (float)(1 << (w->bits - 1)));
}

#if !defined(FO__SIMD)
#if defined(FO__DSP)
/* ---- the same with the DSP instructions of Cortex-M: two products each, of halves of a register ---- */

/* The room that a run takes of FO__ROOM. */
static size_t fo__room_of(const fo_tensor* w, size_t n) {
  (void)w;
  return (n + 7) & ~(size_t)7;
}

/* A row of x in the columns of a stretch. Numbers of floats are 4096 * high + low: of four columns come the high parts
   of the first, the third, the second and the fourth, then the low parts; behind a run zeros up to a multiple of 8. */
typedef struct {
  int16_t parts[2 * FO__COLUMNS];
  const int8_t* x; /* of 8 bits */
  float unit;
  int32_t sum[FO__RUNS]; /* of each run */
} fo__numbers;

static void fo__prepare(const fo_tensor* w, const fo__kind* kind, const fo__stretch* at, const void* x, float unit,
                        fo__numbers* to) {
  const float per_unit = fo__per_unit(unit);
  fo__walk walk = at->start;
  int16_t* parts = to->parts;
  size_t i = at->begin;
  to->x = (const int8_t*)x + i;
  to->unit = unit;
  for (size_t run = 0, n; i < at->end; ++run, i += n) {
    int32_t sum = 0;
    n = fo__step(w, &walk, fo__min(kind->run, at->end - i));
    for (size_t k = 0; kind->width == 1 && k < n; ++k) sum += ((const int8_t*)x)[i + k];
    for (size_t k = 0; kind->width != 1 && k < fo__room_of(w, n); ++k) {
      const int32_t number = k < n ? fo__count_units(((const float*)x)[i + k], per_unit) : 0;
      const int32_t high = (number + 2048) >> 12;
      int16_t* const place = parts + (k & ~(size_t)3) * 2 + 2 * (k & 1) + (k >> 1 & 1);
      place[0] = (int16_t)high, place[4] = (int16_t)(number - high * 4096);
      sum += number;
    }
    if (kind->width != 1) parts += 2 * fo__room_of(w, n);
    to->sum[run] = sum;
  }
}

static float fo__sum_of(const fo__numbers* x, size_t run) { return (float)x->sum[run] * x->unit; }

/* Of the first four codes of a word the first and the third, in halves of the result, and above them the second and
   the fourth; `up` is 16 less the bits of two codes. */
static inline uint32_t fo__pairs(uint32_t word, unsigned up) {
  uint32_t pairs;
  __asm__("pkhbt %0, %1, %2" : "=r"(pairs) : "r"(word), "r"(word << up));
  return pairs;
}

static inline int32_t fo__add_pairs(int32_t sum, uint32_t codes, const void* x) {
  int16x2_t two;
  FO__COPY(&two, x, 4);
  return __smlad((int16x2_t)codes, two, sum);
}

/* Sum += products with columns of 8 bits: of bytes 0 and 2 of a word, and of bytes 1 and 3. */
static inline int32_t fo__add_bytes(int32_t sum, uint32_t even, uint32_t odd, const int8_t* x) {
  int8x4_t four;
  int16x2_t odd_x;
  FO__COPY(&four, x, 4);
  __asm__("sxtb16 %0, %1, ror #8" : "=r"(odd_x) : "r"(four));
  return __smlad((int16x2_t)odd, odd_x, __smlad((int16x2_t)even, __sxtb16(four), sum));
}

/* The sum of codes times n of some eights of codes, which start with the first and the fifth in two words. The words
   may reach 4 bytes behind the codes. */
static void fo__add_eights(unsigned bits, const uint8_t* codes, size_t eights, const int16_t* x, int32_t* sums) {
  const uint32_t mask = 0x10001u * ((1u << bits) - 1);
  const unsigned up = 16 - 2 * bits, down = (bits & 1) * 4;
  int32_t high = sums[1], low = sums[0];
  for (; eights; --eights, codes += bits, x += 16) {
    uint32_t word, pairs;
    FO__COPY(&word, codes, 4);
    pairs = fo__pairs(word, up);
    high = fo__add_pairs(high, pairs & mask, x), low = fo__add_pairs(low, pairs & mask, x + 4);
    pairs = pairs >> bits & mask;
    high = fo__add_pairs(high, pairs, x + 2), low = fo__add_pairs(low, pairs, x + 6);
    FO__COPY(&word, codes + (bits >> 1), 4);
    pairs = fo__pairs(word >> down, up);
    high = fo__add_pairs(high, pairs & mask, x + 8), low = fo__add_pairs(low, pairs & mask, x + 12);
    pairs = pairs >> bits & mask;
    high = fo__add_pairs(high, pairs, x + 10), low = fo__add_pairs(low, pairs, x + 14);
  }
  sums[1] = high, sums[0] = low;
}

static void fo__add_eight_bytes(unsigned bits, const uint8_t* codes, size_t eights, const int8_t* x, int32_t* sum) {
  const uint32_t mask = 0x10001u * ((1u << bits) - 1);
  const unsigned up = 16 - 2 * bits, down = (bits & 1) * 4;
  int32_t dot = *sum;
  for (; eights; --eights, codes += bits, x += 8) {
    uint32_t word, pairs;
    FO__COPY(&word, codes, 4);
    pairs = fo__pairs(word, up);
    dot = fo__add_bytes(dot, pairs & mask, pairs >> bits & mask, x);
    FO__COPY(&word, codes + (bits >> 1), 4);
    pairs = fo__pairs(word >> down, up);
    dot = fo__add_bytes(dot, pairs & mask, pairs >> bits & mask, x + 4);
  }
  *sum = dot;
}

/* The sum of (code - middle) * n of a run, of 8 bits where `parts` is null. */
static float fo__dot_run(unsigned bits, const uint8_t* codes, const uint8_t* end, const int16_t* parts, const int8_t* x,
                         size_t count, int32_t sum, float unit) {
  const size_t bytes = (count * bits + 7) >> 3;
  size_t eights = parts ? (count + 7) >> 3 : count >> 3;
  int32_t sums[2] = {0, 0};
  /* The last ones are copied where what is behind them may not be read. */
  if ((size_t)(end - codes) < bytes + 8) eights -= fo__min(eights, 3);
  if (parts) {
    fo__add_eights(bits, codes, eights, parts, sums);
  } else {
    fo__add_eight_bytes(bits, codes, eights, x, sums);
  }
  if (eights * 8 < count) {
    const size_t done = eights * bits, left = count - eights * 8;
    uint8_t copy[40];
    int8_t last[32];
    FO__CLEAR(copy, sizeof copy);
    FO__COPY(copy, codes + done, bytes - done);
    if (parts) {
      fo__add_eights(bits, copy, (left + 7) >> 3, parts + 16 * eights, sums);
    } else {
      FO__CLEAR(last, sizeof last);
      FO__COPY(last, x + 8 * eights, left);
      fo__add_eight_bytes(bits, copy, (left + 7) >> 3, last, sums);
    }
  }
  if (!parts) return (float)(sums[0] - sum * (1 << (bits - 1)));
  const int64_t dot = (int64_t)sums[1] * 4096 + sums[0] - (int64_t)sum * (1 << (bits - 1));
  return ((float)(int32_t)(dot >> 8) * 256.0f + (float)(int32_t)(dot & 255)) * unit;
}

#else /* portable */
/* The room that a run takes of FO__ROOM. */
static size_t fo__room_of(const fo_tensor* w, size_t n) {
  (void)w;
  return n;
}

/* A row of x in the columns of a stretch. */
typedef struct {
  int32_t units[FO__COLUMNS]; /* of floats */
  const int8_t* x;            /* of 8 bits */
  float unit;
  float sum[FO__RUNS]; /* of each run */
} fo__numbers;

static void fo__prepare(const fo_tensor* w, const fo__kind* kind, const fo__stretch* at, const void* x, float unit,
                        fo__numbers* to) {
  const float per_unit = fo__per_unit(unit);
  fo__walk walk = at->start;
  size_t i = at->begin;
  to->x = (const int8_t*)x + i;
  to->unit = unit;
  for (size_t run = 0; i < at->end; ++run) {
    int32_t sum = 0;
    for (const size_t end = i + fo__step(w, &walk, fo__min(kind->run, at->end - i)); i < end; ++i) {
      if (kind->width == 1) {
        sum += ((const int8_t*)x)[i];
      } else {
        sum += to->units[i - at->begin] = fo__count_units(((const float*)x)[i], per_unit);
      }
    }
    to->sum[run] = (float)sum * unit;
  }
}

static float fo__sum_of(const fo__numbers* x, size_t run) { return x->sum[run]; }

/* Codes are read four at a time. The last of a tensor come one by one, as no byte behind them may be read. */
static int fo__four_exist(const uint8_t* codes, const uint8_t* end, size_t bit) {
  return end - codes >= (ptrdiff_t)(bit >> 3) + 4;
}

/* The sum of (code - middle) * n. Codes less their middle are in two's complement; the topmost is shifted down first.
 */
static float fo__dot_units(unsigned bits, const uint8_t* codes, const uint8_t* end, const int32_t* n, size_t count,
                           float unit) {
  const int middle = 1 << (bits - 1);
  const uint32_t middles = ((1u << bits | 1u) << 2 * bits | 1u << bits | 1u) << (bits - 1);
  int64_t dot = 0;
  size_t i = 0;
  for (size_t bit = 0; i + 4 <= count && fo__four_exist(codes, end, bit); i += 4, bit += 4 * bits) {
    uint32_t word;
    FO__COPY(&word, codes + (bit >> 3), 4);
    word = ((word >> (bit & 7)) ^ middles) << (32 - 4 * bits);
    dot += (int64_t)n[i + 3] * ((int32_t)word >> (32 - bits));
    dot += (int64_t)n[i + 2] * ((int32_t)(word <<= bits) >> (32 - bits));
    dot += (int64_t)n[i + 1] * ((int32_t)(word <<= bits) >> (32 - bits));
    dot += (int64_t)n[i] * ((int32_t)(word << bits) >> (32 - bits));
  }
  for (; i < count; ++i) dot += (int64_t)n[i] * ((int)fo__code(codes, bits, i) - middle);
  return ((float)(int32_t)(dot >> 8) * 256.0f + (float)(int32_t)(dot & 255)) * unit;
}

static float fo__dot_bytes(unsigned bits, const uint8_t* codes, const uint8_t* end, const int8_t* n, size_t count,
                           int32_t sum) {
  const uint32_t mask = (1u << bits) - 1;
  int32_t dot = 0;
  size_t i = 0;
  for (size_t bit = 0; i + 4 <= count && fo__four_exist(codes, end, bit); i += 4, bit += 4 * bits) {
    uint32_t word;
    FO__COPY(&word, codes + (bit >> 3), 4);
    word >>= bit & 7;
    dot += n[i] * (int32_t)(word & mask);
    dot += n[i + 1] * (int32_t)((word >>= bits) & mask);
    dot += n[i + 2] * (int32_t)((word >>= bits) & mask);
    dot += n[i + 3] * (int32_t)(word >> bits & mask);
  }
  for (; i < count; ++i) dot += n[i] * (int32_t)fo__code(codes, bits, i);
  return (float)(dot - sum * (1 << (bits - 1)));
}

#endif /* portable */

/* y [rows] += the products in a stretch, for one row of x: a tile has no more. */
static void fo__add_stretch(const fo_tensor* w, const fo__kind* kind, const fo__stretch* at, const fo__numbers* x,
                            size_t batch, float* y) {
  const size_t row_bytes = fo__row_bytes(w);
  const uint8_t *codes = (const uint8_t*)w->values, *end = codes + w->rows * row_bytes;
  codes += fo__code_bytes(w->bits, at->begin);
  (void)batch;
  fo__walk walk = at->start;
  for (size_t run = 0, first = 0, room = 0, n; first < at->end - at->begin; ++run, first += n) {
    const uint8_t* from = codes;
    const float sum = fo__sum_of(x, run);
    size_t param = walk.group;
    n = fo__step(w, &walk, fo__min(kind->run, at->end - at->begin - first));
    for (size_t row = 0; row < w->rows; ++row, from += row_bytes, param += w->groups) {
      const float scale = fo__float(w->scale, w->param_type, param), middle = fo__middle_value(w, scale, param);
#if defined(FO__DSP)
      const int16_t* parts = kind->width == 1 ? NULL : x->parts + 2 * room;
      const float dot = fo__dot_run(w->bits, from, end, parts, x->x + first, n, x->sum[run], x->unit);
#else
      const float dot = kind->width == 1 ? fo__dot_bytes(w->bits, from, end, x->x + first, n, (int32_t)sum)
                                         : fo__dot_units(w->bits, from, end, x->units + room, n, x->unit);
#endif
      y[row] += fo__share(scale, middle, dot, sum);
    }
    codes += fo__code_bytes(w->bits, n);
    room += fo__room_of(w, n);
  }
}

#else /* FO__SIMD */

/* ---- the same with vectors ----------------------------------------------------------------------- */

/* Blocks of 32 codes are unpacked to bytes, and multiplied with bytes of x that stand in the same order. A number of x
   is three signed bytes, 65536 * high + 256 * middle + low, and each of them has a dot product of its own. Where codes
   end before a block does, x has zeros. A CPU that cannot multiply such bytes, FO__WORDS, has words of 16 bits: a
   number is two of them, 4096 * high + low.

   For each CPU:  fo__codes, fo__unpack      32 codes, as bytes below 128 but for those of 8 bits, or as words
                  fo__ints, fo__dot          lanes of sums += products of 32 bytes or words
                  fo__add, fo__times256      of all lanes; fo__times16 with words
                  fo__totals                 the totals of four
                  fo__half_totals            of two, those of bytes 0 to 3 and 4 to 7 of every eight */
/* Copies for each width are fastest. Most tests do without, since compilers take long for them. */
#if !defined(FO__INLINE)
#define FO__INLINE static inline __attribute__((always_inline))
#endif

typedef int32_t fo__int4 __attribute__((vector_size(16)));
typedef uint32_t fo__uint4 __attribute__((vector_size(16)));
typedef float fo__float4 __attribute__((vector_size(16)));

/* Of 3, 5 and 6 bits, codes 2 * i and 2 * i + 1 of 16 start in this byte, and are raised to the top of 16 bits by this
   factor. */
static const uint8_t fo__pair_bytes[3][16] = {{0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, 6},
                                              {0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9},
                                              {0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11}};
static const uint16_t fo__pair_factors[3][8] = {
    {1024, 16, 64, 256, 1024, 16, 64, 256}, {64, 16, 4, 1, 64, 16, 4, 1}, {16, 1, 16, 1, 16, 1, 16, 1}};

/* Where the second 16 codes of 3, 5 and 6 bits can be loaded, and how far behind they start. */
#define FO__SECOND(bits) ((bits) == 3 ? 4 : 4 * (bits) - 16)
#define FO__BEHIND(bits) (2 * (bits) - FO__SECOND(bits))

#if defined(__SSE2__)
#define FO__BASE(bits) \
  (1 << ((bits) - 1)) /* codes are multiplied as they are; the middle is subtracted from the sums */

FO__INLINE __m128i fo__load16(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
FO__INLINE __m128i fo__load8(const void* p) { return _mm_loadl_epi64((const __m128i*)p); }

#if !defined(__SSSE3__)
#define FO__WORDS(bits) 1
#elif (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || (defined(__AVX2__) && defined(__AVXVNNI__))
#define FO__WORDS(bits) 0
#else
#define FO__WORDS(bits) ((bits) == 8) /* the sum of two products is more than 16 bits */
#endif

#if defined(__AVX2__)
typedef __m256i fo__codes, fo__ints;

FO__INLINE fo__codes fo__unpack(unsigned bits, const uint8_t* codes) {
  const __m256i mask = _mm256_set1_epi8((char)((1u << bits) - 1));
  if (bits == 8) return _mm256_loadu_si256((const __m256i*)(const void*)codes);
  if (bits == 4) {
    const __m256i twice = _mm256_broadcastsi128_si256(fo__load16(codes));
    return _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4)), mask);
  }
  if (bits == 2) {
    const __m256i four_times = _mm256_broadcastq_epi64(fo__load8(codes));
    return _mm256_and_si256(_mm256_srlv_epi64(four_times, _mm256_setr_epi64x(0, 2, 4, 6)), mask);
  }
#if defined(__AVX512VBMI__) && defined(__AVX512VL__)
  /* Eight codes to 64 bits, of which each byte takes its own. */
  const int64_t order = 0x0706050403020100, step = (int64_t)(bits * 0x0101010101010101u);
  const __m256i index = _mm256_setr_epi64x(order, order + step, order + 2 * step, order + 3 * step);
  const __m256i eights = _mm256_permutexvar_epi8(index, _mm256_maskz_loadu_epi8((1u << 4 * bits) - 1, codes));
  return _mm256_and_si256(_mm256_multishift_epi64_epi8(_mm256_set1_epi64x(order * (int64_t)bits), eights), mask);
#else
  const size_t table = (bits >> 1) - 1;
  const __m256i mask_low = _mm256_set1_epi16((int16_t)((1 << bits) - 1));
  const __m128i first = bits == 3 ? fo__load8(codes) : fo__load16(codes),
                behind = _mm_set1_epi8((char)FO__BEHIND(bits));
  const __m128i second = bits == 3 ? fo__load8(codes + 4) : fo__load16(codes + FO__SECOND(bits));
  const __m128i index = fo__load16(fo__pair_bytes[table]), factor = fo__load16(fo__pair_factors[table]);
  __m256i c = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
  c = _mm256_shuffle_epi8(c, _mm256_inserti128_si256(_mm256_castsi128_si256(index), _mm_add_epi8(index, behind), 1));
  c = _mm256_mullo_epi16(c, _mm256_broadcastsi128_si256(factor));
  const __m256i low = _mm256_and_si256(_mm256_srli_epi16(c, 16 - 2 * (int)bits), mask_low);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(c, 8 - (int)bits), _mm256_slli_epi16(mask_low, 8));
  return _mm256_or_si256(low, high);
#endif
}

FO__INLINE fo__ints fo__dot(unsigned bits, fo__ints sum, fo__codes c, const int8_t* x) {
  const __m256i n = _mm256_loadu_si256((const __m256i*)(const void*)x);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  (void)bits;
  return _mm256_dpbusd_epi32(sum, c, n);
#elif defined(__AVXVNNI__)
  (void)bits;
  return _mm256_dpbusd_avx_epi32(sum, c, n);
#else
  if (bits < 8) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(c, n), _mm256_set1_epi16(1)));
  const __m256i even = _mm256_and_si256(c, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(c, 8);
  const __m256i m = _mm256_loadu_si256((const __m256i*)(const void*)(x + 32));
  return _mm256_add_epi32(_mm256_add_epi32(sum, _mm256_madd_epi16(even, n)), _mm256_madd_epi16(odd, m));
#endif
}

FO__INLINE fo__ints fo__add(fo__ints a, fo__ints b) { return _mm256_add_epi32(a, b); }
FO__INLINE fo__ints fo__times16(fo__ints sum) { return _mm256_slli_epi32(sum, 4); }
FO__INLINE fo__ints fo__times256(fo__ints sum) { return _mm256_slli_epi32(sum, 8); }

FO__INLINE __m128i fo__fold(fo__ints sum) {
  return _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}

FO__INLINE fo__int4 fo__totals(fo__ints a, fo__ints b, fo__ints c, fo__ints d) {
  const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  return (fo__int4)fo__fold(_mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd)));
}

#else
typedef __m128i fo__ints;

#if defined(__SSSE3__)
typedef struct {
  __m128i first, second; /* 16 codes each */
} fo__codes;

FO__INLINE __m128i fo__unpack_pairs(unsigned bits, __m128i c, int behind) {
  const size_t table = (bits >> 1) - 1;
  c = _mm_shuffle_epi8(c, _mm_add_epi8(fo__load16(fo__pair_bytes[table]), _mm_set1_epi8((char)behind)));
  c = _mm_mullo_epi16(c, fo__load16(fo__pair_factors[table]));
  const __m128i mask = _mm_set1_epi16((int16_t)((1 << bits) - 1));
  const __m128i low = _mm_and_si128(_mm_srli_epi16(c, 16 - 2 * (int)bits), mask);
  return _mm_or_si128(low, _mm_and_si128(_mm_srli_epi16(c, 8 - (int)bits), _mm_slli_epi16(mask, 8)));
}

FO__INLINE fo__codes fo__unpack(unsigned bits, const uint8_t* codes) {
  const __m128i mask = _mm_set1_epi8((char)((1u << bits) - 1));
  fo__codes c;
  if (bits == 8) {
    c.first = fo__load16(codes), c.second = fo__load16(codes + 16);
  } else if (bits == 4) {
    const __m128i both = fo__load16(codes);
    c.first = _mm_and_si128(both, mask), c.second = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
  } else if (bits == 2) {
    const __m128i four = fo__load8(codes), two = _mm_unpacklo_epi64(four, _mm_srli_epi64(four, 2));
    c.first = _mm_and_si128(two, mask), c.second = _mm_and_si128(_mm_srli_epi64(two, 4), mask);
  } else {
    c.first = fo__unpack_pairs(bits, bits == 3 ? fo__load8(codes) : fo__load16(codes), 0);
    c.second = fo__unpack_pairs(bits, bits == 3 ? fo__load8(codes + 4) : fo__load16(codes + FO__SECOND(bits)),
                                (int)FO__BEHIND(bits));
  }
  return c;
}

FO__INLINE fo__ints fo__dot(unsigned bits, fo__ints sum, fo__codes c, const int8_t* x) {
  const __m128i n = fo__load16(x), m = fo__load16(x + 16);
  if (bits < 8) { /* four products fit 16 bits */
    const __m128i fours = _mm_add_epi16(_mm_maddubs_epi16(c.first, n), _mm_maddubs_epi16(c.second, m));
    return _mm_add_epi32(sum, _mm_madd_epi16(fours, _mm_set1_epi16(1)));
  }
  const __m128i mask = _mm_set1_epi16(255);
  sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_and_si128(c.first, mask), n));
  sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_and_si128(c.second, mask), m));
  sum = _mm_add_epi32(sum, _mm_madd_epi16(_mm_srli_epi16(c.first, 8), fo__load16(x + 32)));
  return _mm_add_epi32(sum, _mm_madd_epi16(_mm_srli_epi16(c.second, 8), fo__load16(x + 48)));
}

#else
typedef struct {
  __m128i words[4]; /* 8 codes each */
} fo__codes;

/* Words of 32 bits that start with codes 0, 8, 4 and 12 of 5 or 6 bits, from words of 64 that start with 0 and 8. */
FO__INLINE __m128i fo__four_words(unsigned bits, __m128i eights) {
  return (__m128i)_mm_shuffle_ps((__m128)eights, (__m128)_mm_srli_epi64(eights, 4 * (int)bits), 0x88);
}

FO__INLINE __m128i fo__load4(const uint8_t* p) {
  int32_t word;
  FO__COPY(&word, p, 4);
  return _mm_cvtsi32_si128(word);
}

/* Of every word of 32 bits two of 16, which start `step` bits apart. */
FO__INLINE __m128i fo__two_words(__m128i c, int step) {
  return _mm_or_si128(_mm_and_si128(c, _mm_set1_epi32(0xffff)), _mm_slli_epi32(_mm_srli_epi32(c, step), 16));
}

FO__INLINE fo__codes fo__unpack(unsigned bits, const uint8_t* codes) {
  const __m128i mask = _mm_set1_epi16((int16_t)((1u << bits) - 1));
  fo__codes c;
  if (bits == 8) {
    const __m128i first = fo__load16(codes), second = fo__load16(codes + 16);
    c.words[0] = _mm_and_si128(first, mask), c.words[1] = _mm_and_si128(second, mask);
    c.words[2] = _mm_srli_epi16(first, 8), c.words[3] = _mm_srli_epi16(second, 8);
  } else if (bits <= 4) {
    __m128i fours = bits == 4 ? fo__load16(codes) : fo__load8(codes);
    if (bits == 3) {
      const __m128i last = _mm_unpacklo_epi32(fo__load4(codes + 6), _mm_srli_epi32(fo__load4(codes + 8), 8));
      fours = _mm_unpacklo_epi64(_mm_unpacklo_epi32(fo__load4(codes), fo__load4(codes + 3)), last);
      fours = fo__two_words(fours, 12);
    }
    if (bits == 2) fours = _mm_unpacklo_epi64(fours, _mm_srli_epi16(fours, 8));
    c.words[0] = _mm_and_si128(fours, mask);
    c.words[1] = _mm_and_si128(_mm_srli_epi16(fours, (int)bits), mask);
    c.words[2] = _mm_and_si128(_mm_srli_epi16(fours, 2 * (int)bits), mask);
    c.words[3] = _mm_and_si128(_mm_srli_epi16(fours, 3 * (int)bits), mask);
  } else {
    const __m128i last = _mm_srli_epi64(fo__load8(codes + 4 * bits - 8), 64 - 8 * (int)bits);
    __m128i first = _mm_unpacklo_epi64(fo__load8(codes), fo__load8(codes + bits));
    __m128i second = _mm_unpacklo_epi64(fo__load8(codes + 2 * bits), last);
    first = fo__two_words(fo__four_words(bits, first), 2 * (int)bits);
    second = fo__two_words(fo__four_words(bits, second), 2 * (int)bits);
    c.words[0] = _mm_and_si128(first, mask), c.words[1] = _mm_and_si128(_mm_srli_epi16(first, (int)bits), mask);
    c.words[2] = _mm_and_si128(second, mask), c.words[3] = _mm_and_si128(_mm_srli_epi16(second, (int)bits), mask);
  }
  return c;
}

FO__INLINE fo__ints fo__dot(unsigned bits, fo__ints sum, fo__codes c, const int8_t* x) {
  (void)bits; /* no loop: not every compiler unrolls it */
  const __m128i a = _mm_madd_epi16(c.words[0], fo__load16(x)), b = _mm_madd_epi16(c.words[1], fo__load16(x + 16));
  const __m128i d = _mm_madd_epi16(c.words[2], fo__load16(x + 32)), e = _mm_madd_epi16(c.words[3], fo__load16(x + 48));
  return _mm_add_epi32(sum, _mm_add_epi32(_mm_add_epi32(a, b), _mm_add_epi32(d, e)));
}
#endif

FO__INLINE fo__ints fo__times16(fo__ints sum) { return _mm_slli_epi32(sum, 4); }
FO__INLINE fo__ints fo__add(fo__ints a, fo__ints b) { return _mm_add_epi32(a, b); }
FO__INLINE fo__ints fo__times256(fo__ints sum) { return _mm_slli_epi32(sum, 8); }
FO__INLINE __m128i fo__fold(fo__ints sum) { return sum; }

FO__INLINE fo__int4 fo__totals(fo__ints a, fo__ints b, fo__ints c, fo__ints d) {
  const __m128i ab = _mm_add_epi32(_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
  const __m128i cd = _mm_add_epi32(_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
  return (fo__int4)_mm_add_epi32(_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd));
}
#endif

FO__INLINE void fo__transpose(fo__float4 a, fo__float4 b, fo__float4 c, fo__float4 d, fo__float4* to) {
  const __m128 ab = _mm_unpacklo_ps((__m128)a, (__m128)b), cd = _mm_unpacklo_ps((__m128)c, (__m128)d);
  const __m128 ef = _mm_unpackhi_ps((__m128)a, (__m128)b), gh = _mm_unpackhi_ps((__m128)c, (__m128)d);
  to[0] = (fo__float4)_mm_movelh_ps(ab, cd), to[1] = (fo__float4)_mm_movehl_ps(cd, ab);
  to[2] = (fo__float4)_mm_movelh_ps(ef, gh), to[3] = (fo__float4)_mm_movehl_ps(gh, ef);
}

/* Numbers with even places, and those with odd ones. */
FO__INLINE void fo__split_halves(fo__int4 a, fo__int4 b, fo__int4* to) {
  to[0] = (fo__int4)_mm_shuffle_ps((__m128)a, (__m128)b, 0x88);
  to[1] = (fo__int4)_mm_shuffle_ps((__m128)a, (__m128)b, 0xdd);
}

FO__INLINE fo__int4 fo__half_totals(fo__ints a, fo__ints b) {
  const __m128i first = fo__fold(a), second = fo__fold(b);
  return (fo__int4)_mm_add_epi32(_mm_unpacklo_epi64(first, second), _mm_unpackhi_epi64(first, second));
}

#else                                                        /* NEON */
#define FO__BASE(bits) ((bits) == 8 ? 0 : 1 << ((bits) - 1)) /* of 8 bits, unpacked codes count from their middle */
#define FO__WORDS(bits) 0
#define fo__times16(sum) (sum)

typedef struct {
  uint8x16_t first, second; /* 16 codes each */
} fo__codes;
typedef int32x4_t fo__ints;

/* Codes of 3, 5 and 6 bits: 16 bytes, or 8 of 3 bits, have 16 of them. */
FO__INLINE uint8x16_t fo__unpack_pairs(unsigned bits, const uint8_t* codes, unsigned behind) {
  const size_t table = (bits >> 1) - 1;
  const uint8x16_t index = vaddq_u8(vld1q_u8(fo__pair_bytes[table]), vdupq_n_u8((uint8_t)behind));
  const uint8x16_t mask = vdupq_n_u8((uint8_t)((1u << bits) - 1));
  const uint8x16_t bytes = bits == 3 ? vcombine_u8(vld1_u8(codes), vdup_n_u8(0)) : vld1q_u8(codes);
#if defined(__aarch64__)
  const uint8x16_t pairs = vqtbl1q_u8(bytes, index);
#else
  const uint8x8x2_t both = {{vget_low_u8(bytes), vget_high_u8(bytes)}};
  const uint8x16_t pairs = vcombine_u8(vtbl2_u8(both, vget_low_u8(index)), vtbl2_u8(both, vget_high_u8(index)));
#endif
  const uint16x8_t c = vmulq_u16(vreinterpretq_u16_u8(pairs), vld1q_u16(fo__pair_factors[table]));
  const uint16x8_t low = vandq_u16(vshlq_u16(c, vdupq_n_s16((int16_t)(2 * (int)bits - 16))), vdupq_n_u16(255));
  const uint16x8_t high = vandq_u16(vshlq_u16(c, vdupq_n_s16((int16_t)((int)bits - 8))), vdupq_n_u16(0xff00));
  return vandq_u8(vreinterpretq_u8_u16(vorrq_u16(low, high)), mask);
}

FO__INLINE fo__codes fo__unpack(unsigned bits, const uint8_t* codes) {
  const uint8x16_t mask = vdupq_n_u8((uint8_t)((1u << bits) - 1));
  fo__codes c;
  if (bits == 8) {
    c.first = veorq_u8(vld1q_u8(codes), vdupq_n_u8(128)), c.second = veorq_u8(vld1q_u8(codes + 16), vdupq_n_u8(128));
  } else if (bits == 4) {
    const uint8x16_t both = vld1q_u8(codes);
    c.first = vandq_u8(both, mask), c.second = vshrq_n_u8(both, 4);
  } else if (bits == 2) {
    const uint8x8_t four = vld1_u8(codes);
    c.first = vandq_u8(vcombine_u8(four, vshr_n_u8(four, 2)), mask);
    c.second = vandq_u8(vcombine_u8(vshr_n_u8(four, 4), vshr_n_u8(four, 6)), mask);
  } else {
    c.first = fo__unpack_pairs(bits, codes, 0);
    c.second = fo__unpack_pairs(bits, codes + FO__SECOND(bits), FO__BEHIND(bits));
  }
  return c;
}

#if !defined(__ARM_FEATURE_DOTPROD)
/* Sums += products of the upper halves. */
FO__INLINE int16x8_t fo__add_upper(int16x8_t sum, int8x16_t a, int8x16_t b) {
#if defined(__aarch64__)
  return vmlal_high_s8(sum, a, b);
#else
  return vmlal_s8(sum, vget_high_s8(a), vget_high_s8(b));
#endif
}
#endif

FO__INLINE fo__ints fo__dot(unsigned bits, fo__ints sum, fo__codes c, const int8_t* x) {
  const int8x16_t a = vreinterpretq_s8_u8(c.first), b = vreinterpretq_s8_u8(c.second), n = vld1q_s8(x),
                  m = vld1q_s8(x + 16);
#if defined(__ARM_FEATURE_DOTPROD)
  (void)bits;
  return vdotq_s32(vdotq_s32(sum, a, n), b, m);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(n)), high = vmull_s8(vget_low_s8(b), vget_low_s8(m));
  if (bits < 8) { /* four products fit 16 bits */
    return vpadalq_s16(sum, vaddq_s16(fo__add_upper(low, a, n), fo__add_upper(high, b, m)));
  }
  const int16x8_t none = vdupq_n_s16(0);
  sum = vpadalq_s16(vpadalq_s16(sum, low), high);
  return vpadalq_s16(vpadalq_s16(sum, fo__add_upper(none, a, n)), fo__add_upper(none, b, m));
#endif
}

FO__INLINE fo__ints fo__add(fo__ints a, fo__ints b) { return vaddq_s32(a, b); }
FO__INLINE fo__ints fo__times256(fo__ints sum) { return vshlq_n_s32(sum, 8); }

FO__INLINE int32x4_t fo__add_neighbours(int32x4_t a, int32x4_t b) {
#if defined(__aarch64__)
  return vpaddq_s32(a, b);
#else
  return vcombine_s32(vpadd_s32(vget_low_s32(a), vget_high_s32(a)), vpadd_s32(vget_low_s32(b), vget_high_s32(b)));
#endif
}

FO__INLINE fo__int4 fo__totals(fo__ints a, fo__ints b, fo__ints c, fo__ints d) {
  return (fo__int4)fo__add_neighbours(fo__add_neighbours(a, b), fo__add_neighbours(c, d));
}

FO__INLINE void fo__transpose(fo__float4 a, fo__float4 b, fo__float4 c, fo__float4 d, fo__float4* to) {
  const float32x4x2_t ab = vtrnq_f32((float32x4_t)a, (float32x4_t)b), cd = vtrnq_f32((float32x4_t)c, (float32x4_t)d);
  to[0] = (fo__float4)vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0]));
  to[1] = (fo__float4)vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1]));
  to[2] = (fo__float4)vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0]));
  to[3] = (fo__float4)vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1]));
}

FO__INLINE void fo__split_halves(fo__int4 a, fo__int4 b, fo__int4* to) {
  const int32x4x2_t halves = vuzpq_s32((int32x4_t)a, (int32x4_t)b);
  to[0] = (fo__int4)halves.val[0], to[1] = (fo__int4)halves.val[1];
}

FO__INLINE fo__int4 fo__half_totals(fo__ints a, fo__ints b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return (fo__int4)vcombine_s32(vadd_s32(vget_low_s32(a), vget_high_s32(a)),
                                vadd_s32(vget_low_s32(b), vget_high_s32(b)));
#else
  return (fo__int4)fo__add_neighbours(a, b);
#endif
}
#endif

#define FO__LIMB(bits) (FO__WORDS(bits) ? 64 : 32) /* bytes of the high, middle or low parts of a block */
#define FO__BLOCK_BYTES(bits, floats) ((size_t)(floats ? FO__WORDS(bits) ? 128 : 96 : FO__LIMB(bits)))

/* A row of x in the columns of a stretch. */
typedef struct {
  int8_t blocks[4 * FO__COLUMNS + 128]; /* of 32 columns; of floats 32 high parts, 32 middle and 32 low ones */
  /* Of each run: its sum, and minus the base times the sums of high and middle parts, in units of 256, of low ones, and
     of all, modulo 2^32. */
  float unit, sum[FO__RUNS];
  int32_t high[FO__RUNS], low[FO__RUNS];
  uint32_t all[FO__RUNS];
} fo__numbers;

/* Two groups of 16 codes of 2 bits share a block, in lanes of their own. */
static int fo__two_a_block(const fo_tensor* w) { return w->bits == 2 && w->group == 16; }

static size_t fo__room_of(const fo_tensor* w, size_t n) { return fo__two_a_block(w) ? n : (n + 31) & ~(size_t)31; }

/* The column of a block whose code is the i-th of fo__unpack. */
static size_t fo__column_of(unsigned bits, size_t i) {
  if (FO__WORDS(bits) && bits == 8) return 2 * (i & 15) + (i >> 4);
  if (FO__WORDS(bits) && (bits == 4 || bits == 3)) return 4 * (i & 7) + (i >> 3);
  if (FO__WORDS(bits) && bits == 2) return 8 * (i & 3) + (i & 4) + (i >> 3);
  if (FO__WORDS(bits)) return (i & 16) + (i & 4) + 4 * (i & 2) + 2 * (i & 1) + (i >> 3 & 1);
  return bits == 4 ? 2 * (i & 15) + (i >> 4) : bits == 2 ? 4 * (i & 7) + (i >> 3) : i;
}

/* Fills a block, and adds to the sums of its first and last 16 columns. */
static void fo__fill_block(unsigned bits, const fo__kind* kind, const void* x, size_t count, float per_unit, int8_t* to,
                           int32_t high[2], int32_t low[2]) {
  int32_t n[32] = {0}; /* in the order of fo__unpack */
  for (size_t i = 0; i < 32; ++i) {
    const size_t column = fo__column_of(bits, i);
    if (column >= count) continue;
    n[i] = kind->width == 1 ? ((const int8_t*)x)[column] : fo__count_units(((const float*)x)[column], per_unit);
    const int32_t low_part = FO__WORDS(bits) ? ((n[i] + 2048) & 4095) - 2048 : ((n[i] + 128) & 255) - 128;
    high[column >> 4] += (n[i] - low_part) / 256, low[column >> 4] += low_part;
  }
  for (size_t i = 0; i < 32; ++i) {
    const int32_t above = FO__WORDS(bits) ? (n[i] + 2048) >> 12 : (n[i] + 128) >> 8;
    if (FO__WORDS(bits)) {
      const int16_t parts[2] = {(int16_t)above, (int16_t)(n[i] - above * 4096)};
      if (kind->width != 1) FO__COPY(to + 2 * i, parts, 2);
      FO__COPY(to + (kind->width == 1 ? 0 : 64) + 2 * i, parts + 1, 2);
    } else {
      if (kind->width != 1) to[i] = (int8_t)((above + 128) >> 8), to[32 + i] = (int8_t)(uint8_t)above;
      to[(kind->width == 1 ? 0 : 64) + i] = (int8_t)(uint8_t)n[i];
    }
  }
}

static void fo__prepare(const fo_tensor* w, const fo__kind* kind, const fo__stretch* at, const void* x, float unit,
                        fo__numbers* to) {
  const float per_unit = fo__per_unit(unit);
  const size_t size = FO__BLOCK_BYTES(w->bits, kind->width != 1);
  const int32_t base = FO__BASE(w->bits);
  fo__walk walk = at->start;
  int8_t* blocks = to->blocks;
  size_t run = 0;
  to->unit = unit;
  for (size_t i = at->begin; i < at->end;) {
    size_t columns = fo__step(w, &walk, fo__min(kind->run, at->end - i)), runs = 1;
    if (fo__two_a_block(w)) columns += fo__step(w, &walk, at->end - i - columns), runs = 2;
    int32_t high[2] = {0, 0}, low[2] = {0, 0};
    for (const size_t end = i + columns; i < end; blocks += size) {
      const size_t count = fo__min(end - i, 32);
      fo__fill_block(w->bits, kind, (const char*)x + i * kind->width, count, per_unit, blocks, high, low);
      i += count;
    }
    if (runs == 1) high[0] += high[1], low[0] += low[1];
    for (size_t r = 0; r < runs; ++r, ++run) {
      to->sum[run] = (float)(256 * high[r] + low[r]) * unit;
      to->high[run] = -base * high[r], to->low[run] = -base * low[r];
      to->all[run] = (uint32_t)to->high[run] * 256 + (uint32_t)to->low[run];
    }
  }
  FO__CLEAR(blocks, size); /* the last run of two blocks may have one */
}

FO__INLINE fo__float4 fo__float4_of(fo__int4 n) { return __builtin_convertvector(n, fo__float4); }

FO__INLINE fo__float4 fo__rounded4(fo__float4 product) {
  __asm__("" : FO__IN_REGISTER(product));
  return product;
}

/* 256 * high + low as fo__dot_units rounds it. */
FO__INLINE fo__float4 fo__join(fo__int4 high, fo__int4 low, float unit) {
  return fo__float4_of(high + (low >> 8)) * (256.0f * unit) + fo__float4_of(low & 255) * unit;
}

/* Four scales or minima of a row from `at` on, of which `n` are used. */
FO__INLINE fo__float4 fo__four_params(const void* params, unsigned type, size_t at, size_t n) {
  fo__float4 four = {0, 0, 0, 0};
  const uint8_t* from = (const uint8_t*)params + at * (type == FO_F32 ? 4 : 2);
  if (n >= 4 && type == FO_F32) {
    FO__COPY(&four, from, 16);
    return four;
  }
#if defined(__F16C__)
  if (n >= 4) return (fo__float4)_mm_cvtph_ps(fo__load8(from));
#elif defined(__aarch64__)
  if (n >= 4) return (fo__float4)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
#elif !defined(__ARM_NEON) /* whose vectors flush subnormal numbers in ARMv7 */
  if (n >= 4) {
    uint16_t halves[4];
    FO__COPY(halves, from, 8);
    const fo__int4 half = {halves[0], halves[1], halves[2], halves[3]}, size = half & 0x7fff;
    const fo__int4 number = (fo__int4)((fo__float4)(size << 13) * fo__from_bits(0x77800000u)), infinite = size > 0x7bff;
    return (fo__float4)(number | (infinite & 0x7f800000) | (half & 0x8000) << 16);
  }
#endif
  for (size_t i = 0; i < n; ++i) four[i] = fo__float(params, type, at + i);
  return four;
}

/* The dot products of a run: `high` of high and middle parts, in units of 256, and `low`. */
typedef struct {
  fo__ints high, low;
} fo__dots;

/* Of a run of few blocks and few bits: all of it fits `low`, though it may overflow on the way. */
FO__INLINE int fo__fits(unsigned bits, size_t blocks) { return blocks <= 16u >> bits; }

FO__INLINE void fo__add_block(unsigned bits, int floats, const uint8_t* codes, const int8_t* x, fo__dots* dots,
                              fo__ints* middle) {
  const fo__codes c = fo__unpack(bits, codes);
  if (floats) dots->high = fo__dot(bits, dots->high, c, x), x += FO__LIMB(bits);
  if (floats && !FO__WORDS(bits)) *middle = fo__dot(bits, *middle, c, x), x += FO__LIMB(bits);
  dots->low = fo__dot(bits, dots->low, c, x);
}

FO__INLINE fo__dots fo__dot_run(unsigned bits, int floats, size_t blocks, const uint8_t* codes, const int8_t* x) {
  fo__dots dots;
  FO__CLEAR(&dots, sizeof dots);
  fo__ints middle = dots.high;
  for (size_t i = 0; i < blocks; ++i, codes += 4 * bits, x += FO__BLOCK_BYTES(bits, floats)) {
    fo__add_block(bits, floats, codes, x, &dots, &middle);
  }
  if (floats) dots.high = FO__WORDS(bits) ? fo__times16(dots.high) : fo__add(fo__times256(dots.high), middle);
  return dots;
}

/* The same of one or two blocks, a constant, that are unpacked; all of it in `low` if it fits. */
FO__INLINE fo__dots fo__dot_unpacked(unsigned bits, int floats, size_t blocks, const fo__codes* c, const int8_t* x) {
  const int8_t* second = x + FO__BLOCK_BYTES(bits, floats);
  fo__dots dots;
  FO__CLEAR(&dots, sizeof dots);
  if (floats) {
    dots.high = fo__dot(bits, dots.high, c[0], x), x += FO__LIMB(bits);
    if (blocks > 1) dots.high = fo__dot(bits, dots.high, c[1], second), second += FO__LIMB(bits);
    if (FO__WORDS(bits)) {
      dots.high = fo__times16(dots.high);
    } else {
      dots.high = fo__dot(bits, fo__times256(dots.high), c[0], x), x += FO__LIMB(bits);
      if (blocks > 1) dots.high = fo__dot(bits, dots.high, c[1], second), second += FO__LIMB(bits);
    }
    if (fo__fits(bits, blocks)) dots.low = fo__times256(dots.high);
  }
  dots.low = fo__dot(bits, dots.low, c[0], x);
  if (blocks > 1) dots.low = fo__dot(bits, dots.low, c[1], second);
  return dots;
}

/* Adds a run of any length to y. */
FO__INLINE float fo__add_run(unsigned bits, int floats, size_t n, const uint8_t* codes, const uint8_t* end,
                             const int8_t* blocks, const fo__numbers* x, size_t run, float scale, float middle,
                             float y) {
  const size_t size = 4 * bits, whole = fo__min((n + 31) / 32, (size_t)(end - codes) / size);
  fo__dots dots = fo__dot_run(bits, floats, whole, codes, blocks);
  if (whole * 32 < n) { /* the tensor ends in the last block */
    uint8_t copy[32];
    FO__CLEAR(copy, sizeof copy);
    FO__COPY(copy, codes + whole * size, (size_t)(end - codes) - whole * size);
    const fo__dots last = fo__dot_run(bits, floats, 1, copy, blocks + whole * FO__BLOCK_BYTES(bits, floats));
    dots.high = fo__add(dots.high, last.high), dots.low = fo__add(dots.low, last.low);
  }
  const fo__int4 totals = fo__totals(dots.high, dots.high, dots.low, dots.low);
  const int32_t low = totals[2] + x->low[run], high = totals[0] + x->high[run] + (low >> 8);
  const float dot = floats ? (float)high * (256.0f * x->unit) + (float)(low & 255) * x->unit : (float)low;
  return y + fo__share(scale, middle, dot, x->sum[run]);
}

/* ---- four rows of W at a time: each has a lane of y, of scales and of minima ---- */

/* Four scales or minima of each row, of which `n` are used; the k-th of all rows become to[k]. */
FO__INLINE void fo__load_params(const void* params, unsigned type, const size_t* at, size_t n, fo__float4* to) {
  const fo__float4 a = fo__four_params(params, type, at[0], n), b = fo__four_params(params, type, at[1], n);
  const fo__float4 c = fo__four_params(params, type, at[2], n), d = fo__four_params(params, type, at[3], n);
  fo__transpose(a, b, c, d, to);
}

/* Adds to the total of four rows a run, of which `dots` are the products. */
FO__INLINE fo__float4 fo__add_share(fo__float4 total, fo__float4 scale, fo__float4 middle, fo__float4 dot, float sum) {
  return total + (fo__rounded4(scale * dot) + fo__rounded4(middle * sum));
}

/* The products of a run with four rows as floats. */
FO__INLINE fo__float4 fo__four_dots(int floats, int fits, const fo__dots* a, const fo__dots* b, const fo__dots* c,
                                    const fo__dots* d, const fo__numbers* x, size_t run) {
  const fo__uint4 low = (fo__uint4)fo__totals(a->low, b->low, c->low, d->low);
  if (!floats) return fo__float4_of((fo__int4)(low + (uint32_t)x->low[run]));
  if (fits) return fo__float4_of((fo__int4)(low + x->all[run])) * x->unit;
  const fo__int4 high = fo__totals(a->high, b->high, c->high, d->high) + x->high[run];
  return fo__join(high, (fo__int4)low + x->low[run], x->unit);
}

/* Adds the products of four rows of W from `row` on, the last one again where there are fewer, in a stretch. Runs have
   `blocks` blocks, a constant; any number if 0; if `paired`, half a block. */
FO__INLINE void fo__add_four_rows(unsigned bits, int floats, int paired, size_t blocks, const fo_tensor* w,
                                  const fo__stretch* at, size_t row, const uint8_t* codes, size_t row_bytes,
                                  const fo__numbers* x, size_t batch, float* y) {
  const size_t x_block = FO__BLOCK_BYTES(bits, floats);
  const size_t run_most = floats ? fo__kind_f32.run : fo__kind_s8.run, rows = fo__min(w->rows - row, 4);
  const uint8_t* from[4];
  size_t param[4], code_at = 0, x_at = 0, run = 0;
  fo__float4 total[FO__TILE];
  for (size_t r = 0; r < 4; ++r) {
    const size_t down = fo__min(r, rows - 1);
    from[r] = codes + down * row_bytes;
    param[r] = (row + down) * w->groups + at->start.group;
  }
  for (size_t b = 0; b < batch; ++b) {
    FO__CLEAR(&total[b], sizeof total[b]);
    for (size_t r = 0; r < rows; ++r) total[b][r] = y[b * w->rows + row + r];
  }
  size_t group_left = at->start.left, left_groups = 1; /* columns of the group, groups */
  if (at->end - at->begin > group_left) left_groups += (at->end - at->begin - group_left + w->group - 1) / w->group;
  for (size_t i = at->begin, n, groups; left_groups; left_groups -= groups) {
    fo__float4 scale[4], middle[4];
    groups = fo__min(left_groups, 4);
    fo__load_params(w->scale, w->param_type, param, groups, scale);
    fo__load_params(w->minimum, w->param_type, param, groups, middle);
    for (size_t r = 0; r < 4; ++r) param[r] += 4;
    for (size_t g = 0; g < groups; ++g) {
      middle[g] += fo__rounded4(scale[g] * (float)(1 << (bits - 1)));
      if (blocks == 0) { /* runs of any length */
        for (size_t left = fo__min(group_left, at->end - i); left; left -= n, i += n, ++run) {
          n = fo__min(left, run_most);
          const size_t count = (n + 31) / 32;
          for (size_t b = 0; b < batch; ++b) {
            const int8_t* numbers = x[b].blocks + x_at;
            const fo__dots first = fo__dot_run(bits, floats, count, from[0] + code_at, numbers);
            const fo__dots second = fo__dot_run(bits, floats, count, from[1] + code_at, numbers);
            const fo__dots third = fo__dot_run(bits, floats, count, from[2] + code_at, numbers);
            const fo__dots fourth = fo__dot_run(bits, floats, count, from[3] + code_at, numbers);
            const fo__float4 dot = fo__four_dots(floats, 0, &first, &second, &third, &fourth, x + b, run);
            total[b] = fo__add_share(total[b], scale[g], middle[g], dot, x[b].sum[run]);
          }
          code_at += count * 4 * bits, x_at += count * x_block;
        }
        group_left = w->group;
        continue;
      }
      fo__codes c[4][2];
      c[0][0] = fo__unpack(bits, from[0] + code_at), c[1][0] = fo__unpack(bits, from[1] + code_at);
      c[2][0] = fo__unpack(bits, from[2] + code_at), c[3][0] = fo__unpack(bits, from[3] + code_at);
      if (blocks > 1) {
        c[0][1] = fo__unpack(bits, from[0] + code_at + 4 * bits),
        c[1][1] = fo__unpack(bits, from[1] + code_at + 4 * bits);
        c[2][1] = fo__unpack(bits, from[2] + code_at + 4 * bits),
        c[3][1] = fo__unpack(bits, from[3] + code_at + 4 * bits);
      }
      if (blocks == 1) c[0][1] = c[0][0], c[1][1] = c[1][0], c[2][1] = c[2][0], c[3][1] = c[3][0]; /* not used */
      if (paired && g + 1 < groups) middle[g + 1] += fo__rounded4(scale[g + 1] * (float)(1 << (bits - 1)));
      for (size_t b = 0; b < batch; ++b) {
        const int8_t* numbers = x[b].blocks + x_at;
        const fo__dots first = fo__dot_unpacked(bits, floats, blocks, c[0], numbers);
        const fo__dots second = fo__dot_unpacked(bits, floats, blocks, c[1], numbers);
        const fo__dots third = fo__dot_unpacked(bits, floats, blocks, c[2], numbers);
        const fo__dots fourth = fo__dot_unpacked(bits, floats, blocks, c[3], numbers);
        if (paired) {
          fo__int4 halves[2];
          fo__split_halves(fo__half_totals(first.low, second.low), fo__half_totals(third.low, fourth.low), halves);
          for (size_t k = 0; k < 2 && g + k < groups; ++k) {
            const fo__uint4 low = (fo__uint4)halves[k] + (floats ? x[b].all[run + k] : (uint32_t)x[b].low[run + k]);
            const fo__float4 dot = fo__float4_of((fo__int4)low) * x[b].unit;
            total[b] = fo__add_share(total[b], scale[g + k], middle[g + k], dot, x[b].sum[run + k]);
          }
        } else {
          const fo__float4 dot =
              fo__four_dots(floats, fo__fits(bits, blocks), &first, &second, &third, &fourth, x + b, run);
          total[b] = fo__add_share(total[b], scale[g], middle[g], dot, x[b].sum[run]);
        }
      }
      code_at += blocks * 4 * bits, x_at += blocks * x_block;
      n = paired ? fo__min(groups - g, 2) : 1;
      run += n, g += n - 1;
    }
  }
  for (size_t b = 0; b < batch; ++b) {
    for (size_t r = 0; r < rows; ++r) y[b * w->rows + row + r] = total[b][r];
  }
}

/* Adds the products of a row of W in a stretch, whose runs may be of any length, and end with the tensor. */
static void fo__add_row(unsigned bits, int floats, const fo_tensor* w, const fo__stretch* at, size_t row,
                        const uint8_t* codes, const fo__numbers* x, float* y) {
  const uint8_t* end = (const uint8_t*)w->values + w->rows * fo__row_bytes(w);
  const size_t run_most = floats ? fo__kind_f32.run : fo__kind_s8.run, columns = at->end - at->begin;
  const int8_t* blocks = x->blocks;
  fo__walk walk = at->start;
  for (size_t i = 0, run = 0, n; i < columns; ++run, i += n) {
    const size_t param = row * w->groups + walk.group;
    const float scale = fo__float(w->scale, w->param_type, param), middle = fo__middle_value(w, scale, param);
    n = fo__step(w, &walk, fo__min(run_most, columns - i));
    const uint8_t* from = codes + fo__code_bytes(bits, i);
    *y = fo__add_run(bits, floats, n, from, end, blocks, x, run, scale, middle, *y);
    blocks += (n + 31) / 32 * FO__BLOCK_BYTES(bits, floats);
  }
}

FO__INLINE void fo__add_rows(unsigned bits, int floats, const fo_tensor* w, const fo__stretch* at, const fo__numbers* x,
                             size_t batch, float* y) {
  const size_t columns = at->end - at->begin, padded = fo__code_bytes(bits, (columns + 63) & ~(size_t)63);
  const size_t bytes = fo__code_bytes(bits, columns) + (columns * bits % 8 != 0), row_bytes = fo__row_bytes(w);
  const uint8_t *codes = (const uint8_t*)w->values, *end = codes + w->rows * row_bytes;
  codes += fo__code_bytes(bits, at->begin);
  if (!fo__two_a_block(w) && w->group % 32 && w->groups > 1) { /* no whole blocks */
    for (size_t row = 0; row < w->rows; ++row, codes += row_bytes) {
      for (size_t b = 0; b < batch; ++b) fo__add_row(bits, floats, w, at, row, codes, x + b, y + b * w->rows + row);
    }
    return;
  }
  for (size_t row = 0; row < w->rows; row += 4, codes += 4 * row_bytes) {
    const size_t rows = fo__min(w->rows - row, 4);
    const uint8_t* from = codes;
    size_t from_bytes = row_bytes;
    uint8_t copy[4][2 * FO__COLUMNS + 64];
    if ((size_t)(end - codes) < (rows - 1) * row_bytes + padded) { /* the tensor ends in a block */
      for (size_t r = 0; r < rows; ++r) {
        FO__COPY(copy[r], codes + r * row_bytes, bytes);
        FO__CLEAR(copy[r] + bytes, 64);
      }
      from = copy[0], from_bytes = sizeof copy[0];
    }
    if (bits == 2 && w->group == 16) {
      fo__add_four_rows(bits, floats, 1, 1, w, at, row, from, from_bytes, x, batch, y);
    } else if (w->group == 32) {
      fo__add_four_rows(bits, floats, 0, 1, w, at, row, from, from_bytes, x, batch, y);
    } else if (bits == 2 && w->group == 64) {
      fo__add_four_rows(bits, floats, 0, 2, w, at, row, from, from_bytes, x, batch, y);
    } else {
      fo__add_four_rows(bits, floats, 0, 0, w, at, row, from, from_bytes, x, batch, y);
    }
  }
}

/* y [rows] of each row of x += the products in a stretch. */
static void fo__add_stretch(const fo_tensor* w, const fo__kind* kind, const fo__stretch* at, const fo__numbers* x,
                            size_t batch, float* y) {
#define FO__CASE(bits)                           \
  case bits:                                     \
    if (kind->width == 1) {                      \
      fo__add_rows(bits, 0, w, at, x, batch, y); \
    } else {                                     \
      fo__add_rows(bits, 1, w, at, x, batch, y); \
    }                                            \
    break
  switch (w->bits) {
    FO__CASE(8);
    FO__CASE(6);
    FO__CASE(5);
    FO__CASE(4);
    FO__CASE(3);
    FO__CASE(2);
    default:
      break;
  }
#undef FO__CASE
}
#endif

static void fo__multiply_entries(const fo_tensor* w, const fo__kind* kind, const uint8_t* x, size_t batch, float* y);

/* Dense codes whose groups start on bytes: y [batch, rows] += x @ w.T, where y is zero. */
static void fo__multiply_codes(const fo_tensor* w, const fo__kind* kind, const uint8_t* x, size_t batch, float* y) {
  const size_t x_bytes = w->cols * kind->width;
  fo__numbers numbers[FO__TILE];
  float unit[FO__TILE];
  for (size_t tile; batch; batch -= tile, x += tile * x_bytes, y += tile * w->rows) {
    for (tile = 0; tile < fo__min(batch, FO__TILE); ++tile) {
      unit[tile] = kind->width == 1 ? 1.0f : fo__unit((const float*)(const void*)(x + tile * x_bytes), w->cols);
      if (unit[tile] == 0) break;
    }
    if (tile == 0) { /* no such row, or one that has no unit */
      fo__multiply_entries(w, kind, x, tile = 1, y);
      continue;
    }
    for (fo__stretch at = {{0, 0}, 0, 0}; at.end < w->cols; at.begin = at.end) {
      fo__walk walk = at.start = fo__walk_from(w, at.begin);
      for (size_t runs = 0, room = FO__ROOM(kind); runs < FO__RUNS && at.end < w->cols; ++runs) {
        const size_t n = fo__min(fo__min(walk.left, kind->run), w->cols - at.end);
        const size_t need = fo__room_of(w, n);
        if (need > room) break;
        room -= need;
        at.end += fo__step(w, &walk, n);
      }
      for (size_t b = 0; b < tile; ++b) fo__prepare(w, kind, &at, x + b * x_bytes, unit[b], &numbers[b]);
      fo__add_stretch(w, kind, &at, numbers, tile, y);
    }
  }
}

/* The same for any tensor, some entries at a time. */
static void fo__multiply_entries(const fo_tensor* w, const fo__kind* kind, const uint8_t* x, size_t batch, float* y) {
  uint32_t columns[FO__CHUNK];
  float values[FO__CHUNK];
  for (size_t row = 0; row < w->rows; ++row) {
    const size_t values_row = w->layout == FO_DENSE ? row : 0;
    const uint8_t* codes = (const uint8_t*)w->values + (w->type == FO_CODES ? values_row * fo__row_bytes(w) : 0);
    fo__entries e = fo__entries_of(w, row);
    size_t first, n;
    while ((n = fo__columns(&e, columns, &first)) != 0) {
      if (w->type != FO_CODES) {
        const uint32_t* given = w->layout == FO_DENSE ? NULL : columns;
        const uint8_t* from = x + (given ? 0 : first * kind->width);
        fo__decode(w, values_row, first, n, values);
        for (size_t b = 0; b < batch; ++b, from += w->cols * kind->width) {
          y[b * w->rows + row] += kind->dot_floats(values, from, given, n);
        }
        continue;
      }
      for (size_t i = 0, part; i < n; i += part) { /* of one group each */
        const size_t at = first + i, param = values_row * w->groups + (w->group ? at / w->group : 0);
        part = w->group ? fo__min(n - i, w->group - at % w->group) : n - i;
        const float scale = fo__float(w->scale, w->param_type, param);
        const float middle = fo__float(w->minimum, w->param_type, param) + scale * (float)(1 << (w->bits - 1));
        for (size_t b = 0; b < batch; ++b) {
          float sum;
          const float dot = kind->dot_at(w->bits, codes, at, x + b * w->cols * kind->width, columns + i, part, &sum);
          y[b * w->rows + row] += scale * dot + middle * sum;
        }
      }
    }
  }
}

static int fo__linear(const fo_tensor* w, const fo_tensor* bias, const fo__kind* kind, const uint8_t* x,
                      const float* x_scale, size_t x_count, float* y, size_t y_count) {
  const size_t batch = w->cols ? x_count / w->cols : w->rows ? y_count / w->rows : 0;
  if (w->type == FO_OTHER || (bias && bias->type == FO_OTHER)) return FO_UNSUPPORTED_DTYPE;
  if (w->cols ? x_count % w->cols : x_count) return FO_BAD_SIZE;
  if (w->rows ? y_count / w->rows != batch || y_count % w->rows : y_count) return FO_BAD_SIZE;
  if (bias && (bias->layout != FO_DENSE || bias->rows != 1 || bias->cols != w->rows)) return FO_BAD_SIZE;
  if (bias && bias->outliers) return FO_UNSUPPORTED_OUTLIERS;
  FO__CLEAR(y, y_count * sizeof(float));
  const int codes = w->layout == FO_DENSE && w->type == FO_CODES;
  if (codes && (w->groups <= 1 || w->group * w->bits % 8 == 0)) {
    fo__multiply_codes(w, kind, x, batch, y);
  } else {
    fo__multiply_entries(w, kind, x, batch, y);
  }
  for (size_t i = 0; i < w->outliers; ++i) {
    const size_t place = (size_t)fo__whole(w->outlier_index, w->index_bytes, i), row = place / w->cols;
    const uint32_t column = (uint32_t)(place % w->cols);
    const float value = fo__float(w->outlier_value, FO_F32, i);
    for (size_t b = 0; b < batch; ++b) {
      y[b * w->rows + row] += kind->dot_floats(&value, x + b * w->cols * kind->width, &column, 1);
    }
  }
  for (size_t row = 0; row < w->rows; ++row) {
    float add = 0;
    if (bias) fo__decode(bias, 0, row, 1, &add);
    for (size_t b = 0; b < batch; ++b) {
      const float product = y[b * w->rows + row];
      y[b * w->rows + row] = (x_scale ? fo__rounded(product * x_scale[b]) : product) + add;
    }
  }
  return FO_OK;
}

int fo_linear(const fo_tensor* w, const fo_tensor* bias, const float* x, size_t x_count, float* y, size_t y_count) {
  return fo__linear(w, bias, &fo__kind_f32, (const uint8_t*)x, NULL, x_count, y, y_count);
}

int fo_linear_int8(const fo_tensor* w, const fo_tensor* bias, const int8_t* x, const float* x_scale, size_t x_count,
                   float* y, size_t y_count) {
  return fo__linear(w, bias, &fo__kind_s8, (const uint8_t*)x, x_scale, x_count, y, y_count);
}

int fo_round_int8(const float* x, size_t count, int8_t* out, float* scale) {
  const uint32_t largest = fo__largest(x, count);
  if (largest >= 0x7f800000u) return FO_NOT_FINITE;
  float step = fo__from_bits(largest) / 127;
  if (step < fo__from_bits(0x00800000u)) step = fo__from_bits(0x00800000u); /* all are zero, or nearly */
  for (size_t i = 0; i < count; ++i) {
    const float number = x[i] / step;
    out[i] = (int8_t)(number < 0 ? number - 0.5f : number + 0.5f); /* half away from zero */
  }
  *scale = step;
  return FO_OK;
}

/* ---- JSON, where it lies ------------------------------------------------------------------------ */

/* A text whose next character is `next`, or -1. The text in a JSON string is read through its escapes. */
typedef struct {
  const uint8_t *at, *end;
  int next;
  uint8_t in_string, held, utf8[4]; /* UTF-8 of an escape, of which the last `held` bytes are still to come */
} fo__text;

static int fo__raw(fo__text* t) { return t->at < t->end ? *t->at++ : -1; }

/* The four hexadecimal digits of an escape, or -1. */
static long fo__hex(fo__text* t, int (*get)(fo__text*)) {
  long value = 0;
  for (int i = 0; i < 4; ++i) {
    const int c = get(t);
    const int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

/* The UTF-8 of an escape whose backslash has been read, its last byte first; returns how many bytes, 0 if it is none.
 */
static int fo__escape(fo__text* t, int (*get)(fo__text*), uint8_t* utf8) {
  static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
  const int c = get(t);
  long point;
  for (int i = 0; from[i]; ++i) {
    if (c == from[i]) {
      utf8[0] = (uint8_t)to[i];
      return 1;
    }
  }
  if (c != 'u' || (point = fo__hex(t, get)) < 0) return 0;
  if (point >= 0xd800 && point < 0xe000) { /* one of two halves */
    long low = -1;
    if (point < 0xdc00 && get(t) == '\\' && get(t) == 'u') low = fo__hex(t, get);
    if (low < 0xdc00 || low >= 0xe000) return 0;
    point = 0x10000 + (point - 0xd800) * 0x400 + (low - 0xdc00);
  }
  if (point < 0x80) {
    utf8[0] = (uint8_t)point;
    return 1;
  }
  const int bytes = point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
  for (int i = 0; i < bytes - 1; ++i, point >>= 6) utf8[i] = (uint8_t)(0x80 | (point & 0x3f));
  utf8[bytes - 1] = (uint8_t)((0xf00 >> bytes & 0xff) | point);
  return bytes;
}

/* Returns the next character, and goes on to the one behind it. */
static int fo__take(fo__text* t) {
  const int taken = t->next;
  if (t->held) {
    t->next = t->utf8[--t->held];
  } else {
    t->next = fo__raw(t);
    if (t->in_string && t->next == '\\') {
      const int bytes = fo__escape(t, fo__raw, t->utf8);
      t->held = (uint8_t)(bytes ? bytes - 1 : 0);
      t->next = bytes ? t->utf8[t->held] : -1;
      if (!bytes) t->at = t->end;
    }
  }
  return taken;
}

static fo__text fo__text_of(const uint8_t* begin, size_t size, int in_string) {
  fo__text t;
  FO__CLEAR(&t, sizeof t);
  t.at = begin, t.end = begin + size, t.in_string = (uint8_t)in_string;
  fo__take(&t);
  return t;
}

static void fo__space(fo__text* t) {
  while (t->next == ' ' || t->next == '\n' || t->next == '\r' || t->next == '\t') fo__take(t);
}

/* Skips space and the character `c`; returns whether it was there. */
static int fo__accept(fo__text* t, int c) {
  fo__space(t);
  if (t->next != c) return 0;
  fo__take(t);
  return 1;
}

/* Reads a character inside a string, its last byte first; returns the number of bytes, 0 at the end of the string, -1
   if no string has it. */
static int fo__character(fo__text* t, uint8_t* utf8) {
  const int c = fo__take(t);
  if (c < 0x20) return -1; /* or the end of the text */
  if (c == '"') return 0;
  utf8[0] = (uint8_t)c;
  if (c != '\\') return 1;
  const int bytes = fo__escape(t, fo__take, utf8);
  return bytes ? bytes : -1;
}

/* Reads a string; returns whether it is `a` followed by `b`, or -1 if it is no string. */
static int fo__string(fo__text* t, const char* a, const char* b) {
  uint8_t utf8[4];
  int same = 1, bytes;
  if (!fo__accept(t, '"')) return -1;
  while ((bytes = fo__character(t, utf8)) > 0) {
    while (bytes--) {
      if (*a == 0) a = b, b = "";
      same = same && *a != 0 && (uint8_t)*a == utf8[bytes];
      if (same) ++a;
    }
  }
  return bytes < 0 ? -1 : same && *a == 0 && *b == 0;
}

/* Copies a string and a 0; returns whether it is a string without 0 and fits. */
static int fo__copy_name(fo__text* t, char name[FO__NAME]) {
  uint8_t utf8[4];
  size_t size = 0;
  int bytes;
  if (!fo__accept(t, '"')) return 0;
  while ((bytes = fo__character(t, utf8)) > 0) {
    while (bytes--) {
      if (utf8[bytes] == 0 || size == FO__NAME - 1) return 0;
      name[size++] = (char)utf8[bytes];
    }
  }
  name[size] = 0;
  return bytes == 0;
}

static int fo__digits(fo__text* t) {
  int n = 0;
  for (; t->next >= '0' && t->next <= '9'; ++n) fo__take(t);
  return n;
}

/* Skips a value; returns whether it is one. */
static int fo__skip(fo__text* t, int depth) {
  fo__space(t);
  if (t->next == '"') return fo__string(t, "", "") >= 0;
  if (t->next == '{' || t->next == '[') {
    const int open = fo__take(t), close = open + 2;
    if (depth == 0) return 0;
    if (fo__accept(t, close)) return 1;
    do {
      if (open == '{' && (fo__string(t, "", "") < 0 || !fo__accept(t, ':'))) return 0;
      if (!fo__skip(t, depth - 1)) return 0;
    } while (fo__accept(t, ','));
    return fo__accept(t, close);
  }
  const char* word = t->next == 't' ? "true" : t->next == 'f' ? "false" : t->next == 'n' ? "null" : NULL;
  if (word) {
    while (*word && t->next == *word) fo__take(t), ++word;
    return *word == 0;
  }
  if (t->next == '-') fo__take(t);
  const int zero = t->next == '0', whole = fo__digits(t);
  if (whole == 0 || (zero && whole > 1)) return 0;
  if (t->next == '.') {
    fo__take(t);
    if (!fo__digits(t)) return 0;
  }
  if ((t->next | 32) == 'e' && t->next > 0) {
    fo__take(t);
    if (t->next == '+' || t->next == '-') fo__take(t);
    if (!fo__digits(t)) return 0;
  }
  return 1;
}

/* Reads a whole number that is not negative; returns whether it is one. */
static int fo__number(fo__text* t, uint64_t* value) {
  fo__space(t);
  if (t->next < '0' || t->next > '9') return 0;
  for (*value = 0; t->next >= '0' && t->next <= '9';) {
    const unsigned digit = (unsigned)(fo__take(t) - '0');
    if (*value > (UINT64_MAX - digit) / 10) return 0;
    *value = *value * 10 + digit;
  }
  return t->next != '.' && t->next != 'e' && t->next != 'E';
}

/* Goes from an object to the value of its key, `a` followed by `b`; returns 1 if it is there, 0 if not, -1 if the text
   is no object or has the key twice. */
static int fo__seek(fo__text* t, const char* a, const char* b) {
  fo__text at = *t;
  int found = 0;
  if (!fo__accept(&at, '{')) return -1;
  if (fo__accept(&at, '}')) return 0;
  do {
    const int same = fo__string(&at, a, b);
    if (same < 0 || !fo__accept(&at, ':') || (same && found)) return -1;
    if (same) found = 1, *t = at;
    if (!fo__skip(&at, FO__DEPTH)) return -1;
  } while (fo__accept(&at, ','));
  return fo__accept(&at, '}') ? found : -1;
}

/* Returns true if the value of a key is this string; fo__has_number if it is a number. */
static int fo__says(fo__text object, const char* key, const char* value) {
  return fo__seek(&object, key, "") == 1 && fo__string(&object, value, "") == 1;
}

static int fo__has_number(fo__text object, const char* key, uint64_t* value) {
  return fo__seek(&object, key, "") == 1 && fo__number(&object, value);
}

/* ---- the file ----------------------------------------------------------------------------------- */

typedef struct {
  uint64_t axes[FO__MAX_AXES];
  size_t rank, rows, cols, count;
} fo__shape;

static int fo__multiply_sizes(size_t a, size_t b, size_t* product) {
  if (b && a > SIZE_MAX / b) return 0;
  *product = a * b;
  return 1;
}

/* Reads the shape that an object has under "shape". */
static int fo__read_shape(fo__text object, fo__shape* shape) {
  FO__CLEAR(shape, sizeof *shape);
  if (fo__seek(&object, "shape", "") != 1 || !fo__accept(&object, '[')) return FO_BAD_HEADER;
  if (!fo__accept(&object, ']')) {
    do {
      if (shape->rank == FO__MAX_AXES || !fo__number(&object, &shape->axes[shape->rank++])) return FO_BAD_HEADER;
    } while (fo__accept(&object, ','));
    if (!fo__accept(&object, ']')) return FO_BAD_HEADER;
  }
  shape->rows = shape->cols = 1;
  for (size_t i = 0; i < shape->rank; ++i) {
    size_t* size = i == 0 && shape->rank > 1 ? &shape->rows : &shape->cols;
    if (shape->axes[i] > SIZE_MAX || !fo__multiply_sizes(*size, (size_t)shape->axes[i], size)) return FO_TOO_LARGE;
  }
  return fo__multiply_sizes(shape->rows, shape->cols, &shape->count) ? FO_OK : FO_TOO_LARGE;
}

/* Something stored in the file: its dtype as a number and bytes of an element, shape and bytes. */
typedef enum { FO__F32, FO__F16, FO__BF16, FO__U8, FO__U16, FO__U32, FO__I64, FO__OTHER } fo__dtype;

typedef struct {
  fo__dtype dtype;
  fo__shape shape;
  const uint8_t* bytes;
  size_t size;
} fo__stored;

/* Reads what the header says of a stored tensor: its bytes are inside the file. */
static int fo__read_stored(const fo_model* model, fo__text entry, fo__stored* stored) {
  static const struct {
    char name[8];
    uint8_t bits, dtype;
  } dtypes[] = {{"F32", 32, FO__F32},   {"F16", 16, FO__F16},   {"BF16", 16, FO__BF16},    {"U8", 8, FO__U8},
                {"U16", 16, FO__U16},   {"U32", 32, FO__U32},   {"I64", 64, FO__I64},      {"BOOL", 8, FO__OTHER},
                {"I8", 8, FO__OTHER},   {"I16", 16, FO__OTHER}, {"I32", 32, FO__OTHER},    {"U64", 64, FO__OTHER},
                {"F64", 64, FO__OTHER}, {"C64", 64, FO__OTHER}, {"F8_E4M3", 8, FO__OTHER}, {"F8_E5M2", 8, FO__OTHER}};
  fo__text offsets = entry;
  uint64_t begin, end;
  int code = fo__read_shape(entry, &stored->shape);
  if (code) return code;
  if (fo__seek(&offsets, "data_offsets", "") != 1 || !fo__accept(&offsets, '[') || !fo__number(&offsets, &begin) ||
      !fo__accept(&offsets, ',') || !fo__number(&offsets, &end) || !fo__accept(&offsets, ']') || begin > end) {
    return FO_BAD_HEADER;
  }
  if (end > model->data_size) return FO_TRUNCATED;
  stored->bytes = model->data + begin;
  stored->size = (size_t)(end - begin);
  for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; ++i) {
    if (!fo__says(entry, "dtype", dtypes[i].name)) continue;
    size_t size;
    stored->dtype = (fo__dtype)dtypes[i].dtype;
    if (!fo__multiply_sizes(stored->shape.count, dtypes[i].bits / 8u, &size)) return FO_TOO_LARGE;
    return size == stored->size ? FO_OK : FO_BAD_HEADER;
  }
  stored->dtype = FO__OTHER; /* a dtype of a later day: it can be skipped */
  return fo__seek(&entry, "dtype", "") == 1 && fo__string(&entry, "", "") >= 0 ? FO_OK : FO_BAD_HEADER;
}

static fo__text fo__header(const fo_model* model) { return fo__text_of(model->header, model->header_size, 0); }

static fo__text fo__metadata(const fo_model* model) { return fo__text_of(model->metadata, model->metadata_size, 1); }

int fo_open(fo_model* model, const void* bytes, size_t size) {
  uint64_t header_size;
  size_t total = 0;
  fo_model opened;
  FO__CLEAR(model, sizeof *model);
  FO__CLEAR(&opened, sizeof opened);
  if (size < 8) return FO_TRUNCATED;
  header_size = fo__whole(bytes, 8, 0);
  if (header_size > size - 8) return FO_TRUNCATED;
  opened.header = (const uint8_t*)bytes + 8;
  opened.header_size = (size_t)header_size;
  opened.data = opened.header + opened.header_size;
  opened.data_size = size - 8 - opened.header_size;

  fo__text t = fo__header(&opened), metadata = t;
  if (!fo__skip(&t, FO__DEPTH)) return FO_BAD_HEADER;
  fo__space(&t);
  if (t.next >= 0) return FO_BAD_HEADER;

  t = fo__header(&opened);
  if (!fo__accept(&t, '{')) return FO_BAD_HEADER;
  if (!fo__accept(&t, '}')) {
    do {
      fo__stored stored;
      const int is_metadata = fo__string(&t, "__metadata__", "");
      fo__accept(&t, ':');
      if (!is_metadata) {
        const int code = fo__read_stored(&opened, t, &stored);
        if (code) return code;
        if (stored.size > opened.data_size - total) return FO_BAD_HEADER;
        total += stored.size;
      }
      fo__skip(&t, FO__DEPTH);
    } while (fo__accept(&t, ','));
  }
  if (total != opened.data_size) return FO_BAD_HEADER; /* tensors fill the file */

  int found = fo__seek(&metadata, "__metadata__", "");
  if (found == 1) found = fo__seek(&metadata, "fastopt", "");
  if (found < 0) return FO_BAD_HEADER;
  if (found) {
    uint64_t version;
    fo__space(&metadata);
    if (metadata.next != '"') return FO_BAD_METADATA;
    opened.metadata = metadata.at; /* behind the quotation mark */
    fo__string(&metadata, "", "");
    opened.metadata_size = (size_t)(metadata.at - opened.metadata) - (metadata.next >= 0 ? 2 : 1);
    t = fo__metadata(&opened);
    if (!fo__skip(&t, FO__DEPTH)) return FO_BAD_METADATA;
    fo__space(&t);
    if (t.next >= 0 || t.at != t.end) return FO_BAD_METADATA;
    if (!fo__has_number(fo__metadata(&opened), "version", &version)) return FO_BAD_METADATA;
    if (version < 1 || version > 3) return FO_BAD_VERSION;
  }
  *model = opened;
  return FO_OK;
}

/* ---- tensors ------------------------------------------------------------------------------------ */

/* Finds a part that must be of this dtype; sets a pointer to it and its number of elements. */
static int fo__part(const fo_model* model, const char* name, const char* suffix, fo__dtype dtype, const void** bytes,
                    size_t* count) {
  fo__text entry = fo__header(model);
  fo__stored stored;
  if (fo__seek(&entry, name, suffix) != 1) return FO_BAD_TENSOR;
  const int code = fo__read_stored(model, entry, &stored);
  if (code) return code;
  if (stored.dtype != dtype) return FO_BAD_TENSOR;
  *bytes = stored.bytes;
  *count = stored.shape.count;
  return FO_OK;
}

/* The same with the number of elements that it must have. */
static int fo__part_of(const fo_model* model, const char* name, const char* suffix, fo__dtype dtype, size_t count,
                       const void** bytes) {
  size_t found = 0;
  const int code = fo__part(model, name, suffix, dtype, bytes, &found);
  return code ? code : found == count ? FO_OK : FO_BAD_TENSOR;
}

static int fo__find_outliers(const fo_model* model, const char* name, uint64_t count, fo_tensor* tensor) {
  if (count > SIZE_MAX) return FO_TOO_LARGE;
  tensor->outliers = (size_t)count;
  tensor->index_bytes = 4;
  int code = fo__part_of(model, name, ".outlier_index", FO__U32, tensor->outliers, &tensor->outlier_index);
  if (code) {
    tensor->index_bytes = 8;
    code = fo__part_of(model, name, ".outlier_index", FO__I64, tensor->outliers, &tensor->outlier_index);
  }
  if (!code) code = fo__part_of(model, name, ".outlier_value", FO__F32, tensor->outliers, &tensor->outlier_value);
  if (code) return code;
  for (size_t i = 0; i < tensor->outliers; ++i) {
    const uint64_t place = fo__whole(tensor->outlier_index, tensor->index_bytes, i);
    if (place >= tensor->count || (i && place <= fo__whole(tensor->outlier_index, tensor->index_bytes, i - 1))) {
      return FO_BAD_TENSOR;
    }
  }
  return FO_OK;
}

/* Finds the codes of `rows` rows of `cols`, with their parameters; `values` is "" or ".values". */
static int fo__find_codes(const fo_model* model, const char* name, int sparse, fo__text entry, size_t rows, size_t cols,
                          fo_tensor* tensor) {
  uint64_t number;
  fo__text group_size = entry;
  size_t params, size;
  fo_tensor row; /* codes of these rows and columns */
  if (!fo__has_number(entry, "bits", &number) || number < 2 || number > 8 || number == 7) return FO_BAD_TENSOR;
  tensor->type = FO_CODES;
  tensor->bits = (uint8_t)number;
  if (fo__seek(&group_size, "group_size", "") != 1) return FO_BAD_TENSOR;
  fo__space(&group_size);
  if (group_size.next == 'n') { /* null: the whole tensor */
    tensor->group = tensor->groups = 0, params = 1;
  } else {
    if (group_size.next == '-') { /* -1: a row */
      fo__take(&group_size);
      if (!fo__number(&group_size, &number) || number != 1) return FO_BAD_TENSOR;
      number = cols;
    } else if (!fo__number(&group_size, &number) || number == 0) {
      return FO_BAD_TENSOR;
    }
    tensor->group = number < cols ? (size_t)number : cols ? cols : 1;
    tensor->groups = cols / tensor->group + (cols % tensor->group != 0);
    if (!fo__multiply_sizes(rows, tensor->groups, &params)) return FO_TOO_LARGE;
  }
  row.bits = tensor->bits, row.cols = cols;
  if (!fo__multiply_sizes(rows, fo__row_bytes(&row), &size)) return FO_TOO_LARGE;
  int code = fo__part_of(model, name, sparse ? ".values.codes" : ".codes", FO__U8, size, &tensor->values);
  if (code) return code;
  tensor->param_type = FO_F16;
  const char *scale = sparse ? ".values.scale" : ".scale", *minimum = sparse ? ".values.minimum" : ".minimum";
  code = fo__part_of(model, name, scale, FO__F16, params, &tensor->scale);
  if (code) {
    tensor->param_type = FO_F32;
    code = fo__part_of(model, name, scale, FO__F32, params, &tensor->scale);
  }
  if (code) return code;
  return fo__part_of(model, name, minimum, tensor->param_type == FO_F16 ? FO__F16 : FO__F32, params, &tensor->minimum);
}

/* Returns true if the entries of a row are valid: as many as its offsets say, in rising columns. */
static int fo__row_fits(const fo_tensor* t, size_t row) {
  const size_t width = t->layout == FO_BLOCK ? FO__BLOCK : 1;
  const uint64_t begin = fo__whole(t->row_offsets, t->offset_bytes, row);
  const uint64_t end = fo__whole(t->row_offsets, t->offset_bytes, row + 1);
  const uint8_t* positions = (const uint8_t*)t->positions;
  if (begin > end || end > t->count / width || (row == 0 && begin != 0)) return 0;
  size_t columns = 0; /* index: one more than the column before */
  if (t->layout == FO_INDEX16 || t->layout == FO_INDEX8) {
    for (size_t i = (size_t)begin; i < (size_t)end; ++i) {
      const size_t column = t->layout == FO_INDEX8 ? columns + positions[i] : fo__index16(positions, i);
      if (column < columns || column >= t->cols) return 0;
      columns = column + 1;
    }
    return 1;
  }
  const size_t bits = t->layout == FO_BLOCK ? t->cols / FO__BLOCK + (t->cols % FO__BLOCK != 0) : t->cols;
  const size_t bytes = bits / 8 + (bits % 8 != 0);
  for (size_t i = 0; i < bytes; ++i) {
    for (unsigned byte = positions[row * bytes + i]; byte; byte &= byte - 1) ++columns;
  }
  if (bits % 8 && positions[row * bytes + bytes - 1] >> bits % 8) return 0;
  return columns == end - begin;
}

static int fo__find_sparse(const fo_model* model, const char* name, fo__text entry, fo_tensor* tensor) {
  fo__text values = entry;
  size_t entries, positions, bits = tensor->cols;
  fo__dtype dtype = FO__U8;
  tensor->layout = FO_MASK; /* also N:M */
  if (fo__says(entry, "layout", "index16")) {
    tensor->layout = FO_INDEX16, dtype = FO__U16;
  } else if (fo__says(entry, "layout", "index8")) {
    tensor->layout = FO_INDEX8;
  } else if (fo__says(entry, "layout", "1x16")) {
    tensor->layout = FO_BLOCK, bits = tensor->cols / FO__BLOCK + (tensor->cols % FO__BLOCK != 0);
  } else if (!fo__says(entry, "layout", "mask")) {
    static const char patterns[][4] = {"1:2", "1:4", "2:4", "3:4", "1:8", "2:8", "3:8", "4:8", "5:8", "6:8", "7:8"};
    size_t i = 0;
    while (i < sizeof patterns / sizeof *patterns && !fo__says(entry, "layout", patterns[i])) ++i;
    if (i == sizeof patterns / sizeof *patterns) return FO_UNSUPPORTED_LAYOUT;
  }
  tensor->offset_bytes = 8;
  if (tensor->rows == SIZE_MAX) return FO_TOO_LARGE;
  int code = fo__part_of(model, name, ".row_offsets", FO__I64, tensor->rows + 1, &tensor->row_offsets);
  if (code) return code;
  const uint64_t last = fo__whole(tensor->row_offsets, 8, tensor->rows);
  if (last > tensor->count) return FO_BAD_TENSOR; /* of blocks too: there are fewer of them than elements */
  entries = (size_t)last;
  const size_t width = tensor->layout == FO_BLOCK ? FO__BLOCK : 1;
  if (!fo__multiply_sizes(entries, width, &tensor->count)) return FO_TOO_LARGE;
  if (tensor->layout == FO_INDEX16 || tensor->layout == FO_INDEX8) {
    positions = entries;
  } else if (!fo__multiply_sizes(tensor->rows, bits / 8 + (bits % 8 != 0), &positions)) {
    return FO_TOO_LARGE;
  }
  code = fo__part_of(model, name, ".positions", dtype, positions, &tensor->positions);
  if (code) return code;
  for (size_t row = 0; row < tensor->rows; ++row) {
    if (!fo__row_fits(tensor, row)) return FO_BAD_TENSOR;
  }
  const int quantized = fo__seek(&values, "values", "");
  if (quantized < 0) return FO_BAD_METADATA;
  if (quantized) {
    fo__text outliers = values;
    if (fo__seek(&outliers, "outliers", "") != 0) return FO_UNSUPPORTED_OUTLIERS;
    return fo__find_codes(model, name, 1, values, 1, tensor->count, tensor);
  }
  static const fo__dtype floats[] = {FO__F32, FO__F16, FO__BF16}; /* as fo_type counts them */
  for (tensor->type = 0; tensor->type < 3; ++tensor->type) {
    size_t count;
    code = fo__part(model, name, ".values", floats[tensor->type], &tensor->values, &count);
    if (!code) return count == tensor->count ? FO_OK : FO_BAD_TENSOR;
  }
  return FO_UNSUPPORTED_DTYPE;
}

static int fo__find_packed(const fo_model* model, const char* name, fo__text entry, fo_tensor* tensor) {
  fo__shape shape;
  fo__text outliers = entry;
  uint64_t count;
  int code = fo__read_shape(entry, &shape);
  if (code) return code == FO_BAD_HEADER ? FO_BAD_METADATA : code;
  if (shape.cols > UINT32_MAX) return FO_TOO_LARGE;
  tensor->rows = shape.rows, tensor->cols = shape.cols, tensor->count = shape.count;
  if (fo__says(entry, "kind", "sparse")) return fo__find_sparse(model, name, entry, tensor);
  if (!fo__says(entry, "kind", "quantized")) return FO_BAD_METADATA;
  code = fo__find_codes(model, name, 0, entry, tensor->rows, tensor->cols, tensor);
  if (code) return code;
  const int has_outliers = fo__seek(&outliers, "outliers", "");
  if (has_outliers == 0) return FO_OK;
  if (has_outliers < 0 || !fo__number(&outliers, &count)) return FO_BAD_METADATA;
  return fo__find_outliers(model, name, count, tensor);
}

/* Finds a tensor under the name that it is stored under. */
static int fo__find_stored(const fo_model* model, const char* name, fo_tensor* tensor) {
  fo_tensor found;
  fo__stored stored;
  int code;
  FO__CLEAR(tensor, sizeof *tensor);
  tensor->type = FO_OTHER;
  FO__CLEAR(&found, sizeof found);
  if (model->metadata) {
    fo__text entry = fo__metadata(model);
    if (fo__seek(&entry, "tensors", "") != 1) return FO_BAD_METADATA;
    const int packed = fo__seek(&entry, name, "");
    if (packed < 0) return FO_BAD_METADATA;
    if (packed) {
      code = fo__find_packed(model, name, entry, &found);
      if (!code) *tensor = found;
      return code;
    }
  }
  fo__text entry = fo__header(model);
  if (fo__seek(&entry, name, "") != 1) return FO_NOT_FOUND;
  code = fo__read_stored(model, entry, &stored);
  if (code) return FO_NOT_FOUND; /* fo_open has read all tensors: it is the metadata */
  if (stored.shape.cols > UINT32_MAX) return FO_TOO_LARGE;
  found.rows = stored.shape.rows, found.cols = stored.shape.cols, found.count = stored.shape.count;
  found.type = stored.dtype <= FO__BF16 ? (uint8_t)stored.dtype : (uint8_t)FO_OTHER;
  found.values = stored.bytes;
  *tensor = found;
  return FO_OK;
}

int fo_find(const fo_model* model, const char* name, fo_tensor* tensor) {
  char stored[FO__NAME];
  const int code = fo__find_stored(model, name, tensor);
  if (code != FO_NOT_FOUND) return code;
  /* In a file that is not fastopt's, the metadata itself maps tied names, between texts of any meaning. */
  fo__text tied = model->metadata ? fo__metadata(model) : fo__header(model);
  if (fo__seek(&tied, model->metadata ? "tied" : "__metadata__", "") != 1 || fo__seek(&tied, name, "") != 1 ||
      !fo__copy_name(&tied, stored)) {
    return FO_NOT_FOUND;
  }
  return fo__find_stored(model, stored, tensor);
}

#ifdef __cplusplus
}
#endif
#endif /* FASTOPT_IMPLEMENTATION */
