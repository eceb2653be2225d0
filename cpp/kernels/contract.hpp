// The contract between the kernels and everything else: argument structs and one table of function pointers per
// instruction set. It is the only header that both sides see.
//
// A kernel is a pure function over a range: it allocates nothing, throws nothing, starts no thread and knows no
// Python. Pointers are valid, naturally aligned for their type and, where one of them is written, do not overlap;
// cpp/bindings/arrays.hpp has checked that. Every result is bit for bit that of tests/reference.py, on every
// instruction set and however a range is cut.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastopt {

// ---- optimizers ----------------------------------------------------------------------------------------------

enum class Float { f16, bf16, f32, f64 };

// The numbers of one step, shared by the tensors of a parameter group. Python computes them in double; kernels
// round each once to the type that they compute in: double for float64 parameters, else float.
struct Hyper {
  double step_size;     // lr; for Adam lr / (1 - beta1^t)
  double weight_decay;  // L2, added to the gradient: g + weight_decay * w
  double decay;         // decoupled: w * decay, with decay = 1 - lr * weight_decay
  double decay1;        // factor kept of the first state (momentum, beta1)
  double blend1;        // factor of the gradient in the first state (1 - dampening, 1 - beta1)
  double decay2;        // factor kept of the squares (beta2, alpha)
  double blend2;        // 1 - decay2
  double root_scale;    // Adam: 1 / sqrt(1 - beta2^t)
  double eps;
  double grad_scale;  // multiplies every gradient: loss scale, clipping, sign of `maximize`
  double shrink;      // proximal L1 after the step: |w| - shrink, exact zero below
  bool keep_zeros;    // a weight that is zero stays zero
};

inline constexpr std::size_t kMaxStates = 3;

// A state in 8 bits is a small float of its own: 3 bits of mantissa and 4 of exponent behind a sign, or 5 of exponent
// where the state is never negative. Elements of a block share the exponent that theirs count from.
inline constexpr std::size_t kStateBlock = 256;

enum class StateType { wide, bf16, u8 };  // wide: the type that is computed in

struct StepArgs {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  std::uint8_t* exponent[kMaxStates];  // of each block, for u8
  float* master;                       // float32 copy of float16 or bfloat16 parameters, or null
  Float param_type, grad_type;
  StateType state_type;
  bool stochastic;      // round float16 and bfloat16 parameters up or down by chance
  std::uint32_t noise;  // what chance is drawn from: with an element's index it gives that element's bits
};

// Ranges begin at a multiple of kStateBlock.
using StepKernel = void (*)(const Hyper&, const StepArgs&, std::size_t begin, std::size_t end);

// One optimizer: its update rule, and how many states it keeps, with a bit for each that is never negative.
struct Rule {
  const char* name;
  std::size_t states;
  unsigned positive;
  StepKernel step;
};

// ---- quantization --------------------------------------------------------------------------------------------

// W[r, c] ~ minimum[r, c / group] + scale[r, c / group] * code[r, c]. Codes lie row-major, lowest bits first, and
// each row starts on a byte. `param_stride` is the distance of one row's parameters from the next one's: `groups`,
// or 0 where the whole matrix shares one pair.
struct Quantized {
  const std::uint8_t* codes;
  const void* scale;
  const void* minimum;
  bool half;  // scale and minimum are float16, else float32
  int bits;   // 8, 4 or 2
  std::size_t rows, cols, row_bytes;
  std::size_t group, groups, param_stride;
};

struct Range {
  float min, max;
};

// x [batch, cols] as products with quantized weights take it; y is [batch, rows]. `prepared` holds a row of x each
// `prepared_bytes`, written by the kernel `prepare_x`; it is not needed where prepared_bytes() is 0.
struct Linear {
  const float* x;
  const std::uint8_t* prepared;
  std::size_t prepared_bytes;
  int limbs;  // bytes of a number that x is rounded to: 3 is as exact as float32, 1 is fast
  std::size_t batch;
  const float* bias;  // or null
  float* y;
};

// What quantizing a range found; bits of an `unsigned`.
inline constexpr unsigned kNonFinite = 1;   // NaN or infinity in the input
inline constexpr unsigned kHalfMisfit = 2;  // float16 cannot hold some scale or minimum closely enough

// ---- sparse --------------------------------------------------------------------------------------------------

// One bit per element, lowest first, rows start on a byte; the non-zeros of row r are values[row_offsets[r]] up to
// values[row_offsets[r + 1]]. `values` is null where the non-zeros are quantized: then `quantized` holds them as
// one row.
struct Masked {
  const std::uint8_t* mask;
  const std::int64_t* row_offsets;
  const void* values;
  const Quantized* quantized;
  std::size_t rows, cols, row_bytes;
};

// ---- pruning -------------------------------------------------------------------------------------------------

// Magnitudes are compared as the integers that their bits make: ordered like the numbers, NaN above infinity, and
// the same for every float type. All NaN count as equal.
inline constexpr std::size_t kHistogramBins = 1 << 16;

// Keeps what is above `key`, and the first `keep_ties` of those equal to it. Writes +0 elsewhere.
struct PruneArgs {
  void* w;
  std::uint8_t* kept;  // one byte per element: 1 kept, 0 pruned; may be null
  std::uint64_t key;
  std::size_t keep_ties;
};

// ---- the table -----------------------------------------------------------------------------------------------

struct Kernels {
  const char* isa;

  const Rule* rules;
  std::size_t rule_count;
  // Sum of squares in double: element i of a range goes to partial sum i % 16, the sixteen are added as a tree. Of
  // float16 and bfloat16 each block of kStateBlock is a range of its own, added in order.
  double (*sum_squares)(Float, const void* x, std::size_t begin, std::size_t end);

  // Smallest and largest of n > 0 values; returns kNonFinite or 0.
  unsigned (*range)(const float* x, std::size_t n, Range*);
  // Rows [begin, end) of x into codes, scale and minimum of `q`, which are written. Where param_stride is 0 the
  // range of the whole is given, otherwise `shared` is null. Returns flags.
  unsigned (*quantize)(const float* x, const Quantized& q, const Range* shared, std::size_t begin, std::size_t end);
  // Columns [col_begin, col_end) of one row.
  void (*dequantize)(const Quantized& q, std::size_t row, std::size_t col_begin, std::size_t col_end, float* out);
  // n codes of one byte each, to and from packed bytes.
  void (*pack)(int bits, const std::uint8_t* codes, std::size_t n, std::uint8_t* packed);
  void (*unpack)(int bits, const std::uint8_t* packed, std::size_t n, std::uint8_t* codes);

  // y[b, r] = sum over c of x[b, c] * W[r, c] (+ bias[r]) for rows [begin, end). x is prepared first, a row into
  // prepared_bytes() aligned to 64; 0 means that these groups need no preparation.
  std::size_t (*prepared_bytes)(const Quantized& w, int limbs);
  void (*prepare_x)(const Quantized& w, const float* x, int limbs, std::uint8_t* out);
  void (*linear_quantized)(const Quantized& w, const Linear&, std::size_t begin, std::size_t end);
  void (*linear_masked)(const Masked& w, const float* x, std::size_t batch, const float* bias, float* y,
                        std::size_t begin, std::size_t end);

  // Counts, by the 16 bits above `shift`, the magnitudes whose bits above those equal `prefix`.
  void (*magnitude_histogram)(Float, const void* w, std::size_t begin, std::size_t end, std::uint64_t prefix, int shift,
                              std::uint64_t* bins);
  std::size_t (*count_ties)(Float, const void* w, std::size_t begin, std::size_t end, std::uint64_t key);
  void (*prune)(Float, const PruneArgs&, std::size_t begin, std::size_t end);

  // Elements are taken as integers of `width` bytes; zero of either sign is not stored.
  std::size_t (*count_nonzero)(int width, const void* x, std::size_t n);
  void (*compress_row)(int width, const void* x, std::size_t cols, std::uint8_t* mask, void* values);
  void (*expand_row)(int width, const std::uint8_t* mask, const void* values, std::size_t cols, void* out);

  // What the memory allows; the benchmarks print their share of it.
  float (*limit_read)(const float* x, std::size_t n);
  void (*limit_write)(float* x, std::size_t n);
  // Reads x[0..reads) and writes back the first `writes` of them, one multiply-add for each stream.
  void (*limit_update)(float* const* x, std::size_t reads, std::size_t writes, std::size_t begin, std::size_t end);
};

}  // namespace fastopt
