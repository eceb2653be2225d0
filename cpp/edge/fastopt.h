/* fastopt.h: reads the models that fastopt packs, and multiplies with their packed weights.

   C99 or C++11, one file. Before one of its includes say
       #define FASTOPT_IMPLEMENTATION
   Nothing is allocated, copied or written but the caller's buffers; of the C library memcpy and memset are called.
   Little-endian machines only. Thread-safe: there is no state.

   A tensor is seen as a matrix [rows, cols]: its first axis by all others, and as one row if it has one axis. Tensors
   come from a file in memory (fo_open, fo_find: everything is checked there, the bytes may come from anywhere and need
   no alignment) or from a .c file that `fastopt export --to c` wrote, which needs no parser.

   The compiler's macros choose the code for the CPU: SSE2, AVX2, NEON, NEON with dot product, the DSP instructions
   of Cortex-M. FO_NO_SIMD leaves this code out. */
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
   or is null. */
int fo_linear(const fo_tensor* w, const fo_tensor* bias, const float* x, size_t x_count, float* y, size_t y_count);

/* The same with x ~ x_scale * whole numbers, a scale for each row of x: integers alone in the inner loops. Each group
   of codes costs some operations on floats, so that few and large ones suit a CPU that has to emulate those. */
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

#define FO__CHUNK 32 /* sparse entries at a time, on the stack */
#define FO__BLOCK 16 /* columns of a block */
#define FO__SUMS 64  /* sums over runs of x, on the stack */
#define FO__TILE 4   /* rows of x at a time */
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
      return "x has NaN or infinity, which int8 cannot tell";
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
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 0x3ffu;
  if (exponent == 0) { /* subnormal: mantissa * 2^-24, exact */
    const float value = (float)mantissa * fo__from_bits(0x33800000u);
    return sign ? -value : value;
  }
  return fo__from_bits(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
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

/* A code of 8, 4 or 2 bits. */
static unsigned fo__code(const uint8_t* codes, unsigned bits, size_t index) {
  if (bits == 8) return codes[index];
  if (bits == 4) return (unsigned)codes[index >> 1] >> (index & 1) * 4 & 15u;
  return (unsigned)codes[index >> 2] >> (index & 3) * 2 & 3u;
}

/* Of 6, 5 and 3 bits 8 codes fill bytes together. */
static int fo__in_eights(unsigned bits) { return bits == 6 || bits == 5 || bits == 3; }

/* A code of 6, 5 or 3 bits. */
static unsigned fo__code_of_eight(const uint8_t* codes, unsigned bits, size_t index) {
  const unsigned at = (unsigned)(index & 7) * bits, below = at & 7;
  codes += (index >> 3) * bits + (at >> 3);
  const unsigned above = below + bits > 8 ? codes[1] : 0u; /* the row may end with codes[0] */
  return (codes[0] | above << 8) >> below & ((1u << bits) - 1);
}

/* Bytes of so many codes of 8, 4 or 2 bits, where they fill them. */
static size_t fo__code_bytes(unsigned bits, size_t codes) { return codes >> 4 / bits; }

/* minimum + scale * code, rounded twice: compilers may not make one FMA of it, as they do where they may. */
static float fo__affine(float scale, unsigned code, float minimum) {
  float product = scale * (float)(int)code;
#if defined(__GNUC__) && defined(__SSE2__)
  __asm__("" : "+x"(product));
#elif defined(__GNUC__) && (defined(__aarch64__) || (defined(__ARM_FP) && !defined(__SOFTFP__)))
  __asm__("" : "+w"(product));
#elif defined(__GNUC__)
  __asm__("" : "+m"(product));
#else
  volatile float rounded = product;
  product = rounded;
#endif
  return minimum + product;
}

static size_t fo__row_bytes(const fo_tensor* t) {
  if (fo__in_eights(t->bits)) return (t->cols >> 3) * t->bits + (((t->cols & 7) * t->bits + 7) >> 3);
  const size_t whole = fo__code_bytes(t->bits, t->cols);
  return whole + ((whole << 4 / t->bits) != t->cols);
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
      const unsigned code =
          fo__in_eights(t->bits) ? fo__code_of_eight(codes, t->bits, begin + i) : fo__code(codes, t->bits, begin + i);
      out[i] = fo__affine(scale, code, minimum);
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

/* ---- what differs by CPU: sixteen codes times sixteen numbers ----------------------------------- */

/* Codes count from the middle of their range, so that they fit a signed byte and little cancels in floats. */
#if !defined(FO_NO_SIMD) && defined(__SSE2__)
#define FO__SIMD
#include <immintrin.h>

typedef __m128i fo__bytes;

static fo__bytes fo__codes16(unsigned bits, const uint8_t* codes) {
  const __m128i nibble = _mm_set1_epi8(15), pair = _mm_set1_epi8(3);
  __m128i c;
  if (bits == 8) {
    c = _mm_loadu_si128((const __m128i*)(const void*)codes);
  } else if (bits == 4) {
    c = _mm_loadl_epi64((const __m128i*)(const void*)codes);
    c = _mm_unpacklo_epi8(_mm_and_si128(c, nibble), _mm_and_si128(_mm_srli_epi16(c, 4), nibble));
  } else {
    int word;
    FO__COPY(&word, codes, 4);
    c = _mm_cvtsi32_si128(word);
    c = _mm_unpacklo_epi8(_mm_and_si128(c, nibble), _mm_and_si128(_mm_srli_epi16(c, 4), nibble));
    c = _mm_unpacklo_epi8(_mm_and_si128(c, pair), _mm_and_si128(_mm_srli_epi16(c, 2), pair));
  }
  return _mm_sub_epi8(c, _mm_set1_epi8((char)(1 << (bits - 1))));
}

static __m128i fo__low16(__m128i c) { return _mm_srai_epi16(_mm_unpacklo_epi8(c, c), 8); }
static __m128i fo__high16(__m128i c) { return _mm_srai_epi16(_mm_unpackhi_epi8(c, c), 8); }

#if defined(__AVX2__)
typedef struct {
  __m256 low, high;
} fo__floats;

static fo__floats fo__add_floats(fo__floats sum, fo__bytes c, const float* x) {
  const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(c));
  const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(c, 8)));
#if defined(__FMA__)
  sum.low = _mm256_fmadd_ps(low, _mm256_loadu_ps(x), sum.low);
  sum.high = _mm256_fmadd_ps(high, _mm256_loadu_ps(x + 8), sum.high);
#else
  sum.low = _mm256_add_ps(sum.low, _mm256_mul_ps(low, _mm256_loadu_ps(x)));
  sum.high = _mm256_add_ps(sum.high, _mm256_mul_ps(high, _mm256_loadu_ps(x + 8)));
#endif
  return sum;
}

static __m128 fo__fold(fo__floats sum) {
  const __m256 both = _mm256_add_ps(sum.low, sum.high);
  return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}

#else
typedef struct {
  __m128 low, high;
} fo__floats;

static __m128 fo__products(__m128i words, const float* x) {
  return _mm_mul_ps(_mm_cvtepi32_ps(_mm_srai_epi32(words, 16)), _mm_loadu_ps(x));
}

static fo__floats fo__add_floats(fo__floats sum, fo__bytes c, const float* x) {
  const __m128i low = fo__low16(c), high = fo__high16(c);
  sum.low = _mm_add_ps(sum.low, fo__products(_mm_unpacklo_epi16(low, low), x));
  sum.high = _mm_add_ps(sum.high, fo__products(_mm_unpackhi_epi16(low, low), x + 4));
  sum.low = _mm_add_ps(sum.low, fo__products(_mm_unpacklo_epi16(high, high), x + 8));
  sum.high = _mm_add_ps(sum.high, fo__products(_mm_unpackhi_epi16(high, high), x + 12));
  return sum;
}

static __m128 fo__fold(fo__floats sum) { return _mm_add_ps(sum.low, sum.high); }
#endif

static float fo__total_floats(fo__floats sum) {
  __m128 four = fo__fold(sum);
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

typedef __m128i fo__ints;

static fo__ints fo__add_ints(fo__ints sum, fo__bytes c, const int8_t* x) {
  const __m128i n = _mm_loadu_si128((const __m128i*)(const void*)x);
  sum = _mm_add_epi32(sum, _mm_madd_epi16(fo__low16(c), fo__low16(n)));
  return _mm_add_epi32(sum, _mm_madd_epi16(fo__high16(c), fo__high16(n)));
}

static int32_t fo__total_ints(fo__ints sum) {
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

#elif !defined(FO_NO_SIMD) && defined(__ARM_NEON)
#define FO__SIMD
#include <arm_neon.h>

typedef int8x16_t fo__bytes;

/* Low and high halves of bytes, of `bits` bits each, in turns. */
static uint8x8x2_t fo__halves(uint8x8_t c, unsigned bits) {
  const uint8x8_t mask = vdup_n_u8((uint8_t)((1u << bits) - 1));
  return vzip_u8(vand_u8(c, mask), vand_u8(vshl_u8(c, vdup_n_s8((int8_t)-(int)bits)), mask));
}

static fo__bytes fo__codes16(unsigned bits, const uint8_t* codes) {
  uint8x16_t c;
  if (bits == 8) {
    c = vld1q_u8(codes);
  } else {
    uint8x8x2_t two;
    if (bits == 4) {
      two = fo__halves(vld1_u8(codes), 4);
    } else {
      uint32_t word;
      FO__COPY(&word, codes, 4);
      two = fo__halves(fo__halves(vcreate_u8(word), 4).val[0], 2);
    }
    c = vcombine_u8(two.val[0], two.val[1]);
  }
  return vreinterpretq_s8_u8(vsubq_u8(c, vdupq_n_u8((uint8_t)(1u << (bits - 1)))));
}

typedef struct {
  float32x4_t low, high;
} fo__floats;

static fo__floats fo__add_floats(fo__floats sum, fo__bytes c, const float* x) {
  const int16x8_t low = vmovl_s8(vget_low_s8(c)), high = vmovl_s8(vget_high_s8(c));
  sum.low = vmlaq_f32(sum.low, vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vld1q_f32(x));
  sum.high = vmlaq_f32(sum.high, vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))), vld1q_f32(x + 4));
  sum.low = vmlaq_f32(sum.low, vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vld1q_f32(x + 8));
  sum.high = vmlaq_f32(sum.high, vcvtq_f32_s32(vmovl_s16(vget_high_s16(high))), vld1q_f32(x + 12));
  return sum;
}

static float fo__total_floats(fo__floats sum) {
  const float32x4_t four = vaddq_f32(sum.low, sum.high);
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(vpadd_f32(two, two), 0);
}

typedef int32x4_t fo__ints;

static fo__ints fo__add_ints(fo__ints sum, fo__bytes c, const int8_t* x) {
  const int8x16_t n = vld1q_s8(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, c, n);
#else
  sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(c), vget_low_s8(n)));
  return vpadalq_s16(sum, vmull_s8(vget_high_s8(c), vget_high_s8(n)));
#endif
}

static int32_t fo__total_ints(fo__ints sum) {
  const int32x2_t two = vadd_s32(vget_low_s32(sum), vget_high_s32(sum));
  return vget_lane_s32(vpadd_s32(two, two), 0);
}

#elif !defined(FO_NO_SIMD) && defined(__ARM_FEATURE_SIMD32)
#define FO__DSP /* two products an instruction, of halves of a register */
#include <arm_acle.h>

/* The dot product of all whole fours; each width gets an instance. */
static inline __attribute__((always_inline)) int32_t fo__dot_dsp(unsigned bits, const uint8_t* codes, const int8_t* x,
                                                                 size_t n) {
  const uint32_t mask = bits == 8 ? 0xff00ffu : bits == 4 ? 0xf000fu : 0x30003u;
  int32_t sum = 0;
  for (; n >= 4; n -= 4, x += 4, codes += bits / 2) {
    uint32_t c = 0, four;
    FO__COPY(&four, x, 4);
    FO__COPY(&c, codes, bits / 2);
    if (bits < 8) c |= c << (16 - 2 * bits); /* codes 0 and 2 in the halves of a register; 1 and 3 stand above them */
    sum = __smlad((int16x2_t)(c & mask), __sxtb16((int8x4_t)four), sum);
    sum = __smlad((int16x2_t)(c >> bits & mask), __sxtb16((int8x4_t)(four >> 8 | four << 24)), sum);
  }
  return sum;
}
#endif

/* ---- products ----------------------------------------------------------------------------------- */

/* The kind of x: floats, or whole numbers of 8 bits. Sums of codes times x count codes from the middle. */
typedef struct {
  size_t width; /* bytes of an element of x */
  size_t run;   /* columns whose products are added up before they are scaled */
  float (*sum)(const void* x, size_t n);
  float (*dot)(unsigned bits, const uint8_t* codes, const void* x, size_t n, float sum_of_x);
  /* The same with the columns that are given, and codes from number `at` on; and with weights in floats, in all columns
     from the first on where none are given. */
  float (*dot_at)(unsigned bits, const uint8_t* codes, size_t at, const void* x, const uint32_t* columns, size_t n,
                  float* sum_of_x);
  float (*dot_floats)(const float* w, const void* x, const uint32_t* columns, size_t n);
} fo__kind;

static float fo__sum_f32(const void* x, size_t n) {
  const float* from = (const float*)x;
  float sum = 0;
  for (size_t i = 0; i < n; ++i) sum += from[i];
  return sum;
}

static float fo__dot_f32(unsigned bits, const uint8_t* codes, const void* x, size_t n, float sum_of_x) {
  const float* from = (const float*)x;
  const int middle = 1 << (bits - 1);
  float sum = 0;
  size_t i = 0;
#if defined(FO__SIMD)
  fo__floats sums;
  FO__CLEAR(&sums, sizeof sums);
  for (; i + 16 <= n; i += 16)
    sums = fo__add_floats(sums, fo__codes16(bits, codes + fo__code_bytes(bits, i)), from + i);
  sum = fo__total_floats(sums);
#else
  const size_t per_word = 32 / bits;
  const uint32_t middles = bits == 8 ? 0x80808080u : bits == 4 ? 0x88888888u : 0xaaaaaaaau;
  for (; i + per_word <= n; i += per_word) {
    uint32_t word;
    FO__COPY(&word, codes + fo__code_bytes(bits, i), 4);
    word ^= middles; /* codes less their middle, in two's complement; the topmost first, shifted down with its sign */
    for (const float* at = from + i + per_word; at > from + i; word <<= bits) {
      float four = *--at * (float)((int32_t)word >> (32 - bits));
      four += *--at * (float)((int32_t)(word <<= bits) >> (32 - bits));
      four += *--at * (float)((int32_t)(word <<= bits) >> (32 - bits));
      four += *--at * (float)((int32_t)(word <<= bits) >> (32 - bits));
      sum += four;
    }
  }
#endif
  for (; i < n; ++i) sum += from[i] * (float)((int)fo__code(codes, bits, i) - middle);
  (void)sum_of_x;
  return sum;
}

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

static const fo__kind fo__kind_f32 = {4, 64, fo__sum_f32, fo__dot_f32, fo__dot_at_f32, fo__dot_floats_f32};

/* 255 * 128 * 16384 fits 32 bits; and a float holds the sum of a run of x. */
static float fo__sum_s8(const void* x, size_t n) {
  const int8_t* from = (const int8_t*)x;
  int32_t sum = 0;
  for (size_t i = 0; i < n; ++i) sum += from[i];
  return (float)sum;
}

static float fo__dot_s8(unsigned bits, const uint8_t* codes, const void* x, size_t n, float sum_of_x) {
  const int8_t* from = (const int8_t*)x;
  int32_t sum = 0;
  size_t i = 0;
#if defined(FO__SIMD)
  const int middle = 1 << (bits - 1);
  fo__ints sums;
  FO__CLEAR(&sums, sizeof sums);
  for (; i + 16 <= n; i += 16) sums = fo__add_ints(sums, fo__codes16(bits, codes + fo__code_bytes(bits, i)), from + i);
  sum = fo__total_ints(sums);
  for (; i < n; ++i) sum += from[i] * ((int)fo__code(codes, bits, i) - middle);
  (void)sum_of_x;
  return (float)sum;
#else
#if defined(FO__DSP)
  sum = bits == 8   ? fo__dot_dsp(8, codes, from, n)
        : bits == 4 ? fo__dot_dsp(4, codes, from, n)
                    : fo__dot_dsp(2, codes, from, n);
  i = n & ~(size_t)3;
#else
  const size_t per_word = 32 / bits;
  while (i + per_word <= n) {
    const uint32_t mask = (1u << bits) - 1;
    uint32_t word;
    FO__COPY(&word, codes + fo__code_bytes(bits, i), 4);
    for (const size_t end = i + per_word; i < end; i += 4, word >>= bits) {
      sum += from[i] * (int)(word & mask);
      sum += from[i + 1] * (int)((word >>= bits) & mask);
      sum += from[i + 2] * (int)((word >>= bits) & mask);
      sum += from[i + 3] * (int)((word >>= bits) & mask);
    }
  }
#endif
  for (; i < n; ++i) sum += from[i] * (int)fo__code(codes, bits, i);
  return (float)(sum - (int32_t)sum_of_x * (1 << (bits - 1)));
#endif
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

static const fo__kind fo__kind_s8 = {1, 16384, fo__sum_s8, fo__dot_s8, fo__dot_at_s8, fo__dot_floats_s8};

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

/* Dense codes whose groups start on bytes: y [batch, rows] += x @ w.T. */
static void fo__multiply_codes(const fo_tensor* w, const fo__kind* kind, const uint8_t* x, size_t batch, float* y) {
  enum { RUNS = FO__SUMS / FO__TILE };
  const size_t row_bytes = fo__row_bytes(w), x_bytes = w->cols * kind->width;
  float sums[FO__TILE][RUNS];
  for (size_t tile; batch; batch -= tile, x += tile * x_bytes, y += tile * w->rows) {
    tile = fo__min(batch, FO__TILE);
    for (size_t begin = 0, end = 0; begin < w->cols; begin = end) {
      const fo__walk start = fo__walk_from(w, begin);
      fo__walk walk = start;
      for (size_t run = 0, n; run < RUNS && end < w->cols; ++run, end += n) {
        n = fo__step(w, &walk, fo__min(kind->run, w->cols - end));
        for (size_t b = 0; b < tile; ++b) sums[b][run] = kind->sum(x + b * x_bytes + end * kind->width, n);
      }
      for (size_t row = 0; row < w->rows; ++row) {
        const uint8_t* codes = (const uint8_t*)w->values + row * row_bytes;
        walk = start;
        for (size_t run = 0, at = begin, n; at < end; ++run, at += n) {
          const size_t param = row * w->groups + walk.group;
          n = fo__step(w, &walk, fo__min(kind->run, end - at));
          const float scale = fo__float(w->scale, w->param_type, param);
          const float middle = fo__float(w->minimum, w->param_type, param) + scale * (float)(1 << (w->bits - 1));
          for (size_t b = 0; b < tile; ++b) {
            const uint8_t* from = x + b * x_bytes + at * kind->width;
            const float sum = sums[b][run];
            y[b * w->rows + row] +=
                scale * kind->dot(w->bits, codes + fo__code_bytes(w->bits, at), from, n, sum) + middle * sum;
          }
        }
      }
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
      if (w->type != FO_CODES || fo__in_eights(w->bits)) {
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
  const int codes = w->layout == FO_DENSE && w->type == FO_CODES && !fo__in_eights(w->bits);
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
      y[b * w->rows + row] = (x_scale ? product * x_scale[b] : product) + add;
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
  const float largest_float = fo__from_bits(0x7f7fffffu);
  float largest = 0, step;
  for (size_t i = 0; i < count; ++i) {
    const float size = x[i] < 0 ? -x[i] : x[i];
    if (!(size <= largest_float)) return FO_NOT_FINITE;
    if (size > largest) largest = size;
  }
  step = largest / 127;
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
