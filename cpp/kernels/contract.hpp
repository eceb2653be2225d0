// The contract between the kernels and everything else: argument structs and one table of function pointers per
// instruction set. It is the only header that both sides see.
//
// A kernel is a pure function over a range: it allocates nothing, throws nothing, starts no thread and knows no
// Python. Pointers are valid, naturally aligned for their type and, where one of them is written, do not overlap;
// cpp/bindings/arrays.hpp has checked that. Every result is bit for bit that of tests/reference.py, on every
// instruction set and however a range is cut.
//
// Glossary of the words that the kernels share:
//   code       the small integer that stands for a weight; `bits` wide, packed lowest bits first
//   scale, minimum   the parameters of a group: weight ~ minimum + scale * code
//   group      the neighbouring columns of a row that share a scale and a minimum
//   grid       the numbers that the codes of a group can stand for, ready to encode against
//   entry      one stored element of a sparse row: its position and its number
//   mask       one bit for each column of a row, or for each block of kBlockLength columns
//   gap        the distance from one entry to the next, less one
//   state      what an optimizer keeps for each parameter from step to step
//   magnitude  the bits of a float without its sign, compared as an integer
//   key, tie   the magnitude at which pruning cuts, and an element that has exactly this magnitude
//   limb       one byte of an integer that x was rounded to
//   run, word  64 bytes of packed codes, and the 32 bits of them that one lane multiplies
//   panel      kPanelWidth rows of x that are multiplied together
//   tile       rows of x, transposed, that are multiplied with sparse rows
//   lane       one element of a vector
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastopt {

// ---- optimizers ----------------------------------------------------------------------------------------------

enum class Float { f16, bf16, f32, f64 };

// The numbers of one step, shared by the tensors of a parameter group. Python computes them in double; kernels
// round each once to the type that they compute in: double for float64 parameters, else float.
struct Hyper {
  double step_size;     // lr; for Adam lr * sqrt(1 - beta2^t) / (1 - beta1^t)
  double weight_decay;  // L2, added to the gradient: g + weight_decay * w
  double decay;         // decoupled: w * decay, with decay = 1 - lr * weight_decay
  double decay1;        // factor kept of the first state (momentum, beta1)
  double blend1;        // factor of the gradient in the first state (1 - dampening, 1 - beta1)
  double decay2;        // factor kept of the squares (beta2, alpha)
  double blend2;        // 1 - decay2
  double eps;           // for Adam eps * sqrt(1 - beta2^t)
  double grad_scale;    // multiplies every gradient: loss scale, clipping, sign of `maximize`
  double shrink;        // proximal L1 after the step: |w| - shrink, exact zero below
  bool keep_zeros;      // a weight that is zero stays zero
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

// A number as a type, to choose a template by.
template <int N>
struct Int {
  static constexpr int value = N;
};

// The widths of codes, in bits.
inline constexpr int kCodeBits[] = {8, 4, 2};

// Calls f(Int<bits>{}) for a width that is known at run time; it must be one of kCodeBits. The kernels pass lambdas of
// their own, so tables for two instruction sets never share an instance.
template <std::size_t At = 0, class F>
[[gnu::always_inline]] inline auto by_bits(int bits, const F& f) {
  if constexpr (At + 1 < sizeof kCodeBits / sizeof *kCodeBits) {
    return bits == kCodeBits[At] ? f(Int<kCodeBits[At]>{}) : by_bits<At + 1>(bits, f);
  } else {
    return f(Int<kCodeBits[At]>{});
  }
}

// W[r, c] ~ minimum[r, c / group] + scale[r, c / group] * code[r, c]. Codes lie row-major, lowest bits first, and
// each row starts on a byte. `param_stride` is the distance of one row's parameters from the next one's: `groups`,
// or 0 where the whole matrix shares one pair.
struct Quantized {
  const std::uint8_t* codes;
  const void* scale;
  const void* minimum;
  bool half;  // scale and minimum are float16, else float32
  int bits;   // one of kCodeBits
  std::size_t rows, cols, row_bytes;
  std::size_t group, groups, param_stride;
  float limit;  // for quantizing: no code of finite weights stands for a value beyond +-limit
};

struct Range {
  float min, max;
};

struct Pair {
  float scale, minimum;
};

// What the whole matrix shares: its range and, where it was fitted to the values, a pair (else of scale 0).
struct Shared {
  Range range;
  Pair pair;
};

// Rows of x are multiplied sixteen at a time, as panels; what is left over, if fewer than twelve, by four or one.
inline constexpr std::size_t kPanelWidth = 16;
constexpr std::size_t panel_rows(std::size_t batch) { return batch % 16 < 12 ? batch - batch % 16 : batch; }

// x [batch, cols] as products with quantized weights take it; y is [batch, rows]. `prepared` holds a row of x each
// `prepared_bytes`, written by the kernel `prepare_x`, `panels` the first panel_rows(batch) of them again, written by
// `prepare_panel`; neither is needed where prepared_bytes() is 0.
struct Linear {
  const float* x;
  const std::uint8_t* prepared;
  std::size_t prepared_bytes;
  const std::uint8_t* panels;
  std::size_t panel_bytes;
  int limbs;  // bytes of a number that x is rounded to: 3 is as exact as float32, 1 is fast
  std::size_t batch;
  const float* bias;  // or null
  float* y;
};

// What quantizing a range found; bits of an `unsigned`.
inline constexpr unsigned kNonFinite = 1;   // NaN or infinity in the input
inline constexpr unsigned kHalfMisfit = 2;  // float16 cannot hold some scale or minimum closely enough

// ---- sparse --------------------------------------------------------------------------------------------------

// Where the entries of a row are: its own bit for each column, or for each block of kBlockLength columns (lowest
// first, rows start on a byte); the column of each entry; or the distance of each entry from the one before, less one.
enum class Layout { mask, block, index16, index8 };

inline constexpr std::size_t kBlockLength = 16;
inline constexpr std::size_t kIndexColumns = 1 << 16;  // as many as index16 and index8 can tell apart

// Row r has the entries row_offsets[r] up to row_offsets[r + 1], each one number, or under a mask of blocks
// kBlockLength. `values` is null where they are quantized: then `quantized` holds them as one row.
struct Sparse {
  Layout layout;
  const void* positions;
  const std::int64_t* row_offsets;
  const void* values;
  Float type;
  const Quantized* quantized;
  std::size_t count;  // numbers in all
  std::size_t rows, cols, row_bytes;
};

// ---- pruning -------------------------------------------------------------------------------------------------

// Magnitudes are compared as the integers that their bits make: ordered like the numbers, NaN above infinity, and
// the same for every float type. All NaN count as equal.
inline constexpr std::size_t kHistogramBins = 1 << 16;

// Magnitudes of a range: how many are below a bracket, and how many are in it. More may be found than there was room
// for.
struct Collected {
  std::size_t below, found;
};

// Keeps where the magnitude of `from` is above `key`, and the first `keep_ties` of those equal to it. Writes +0 to w
// elsewhere; w is `from`, or null.
struct PruneArgs {
  const void* from;
  void* w;
  std::uint8_t* kept;  // one byte per element: 1 kept, 0 pruned; may be null
  std::uint64_t key;
  std::size_t keep_ties;
};

// ---- the table -----------------------------------------------------------------------------------------------

struct OptimKernels {
  const Rule* rules;
  std::size_t rule_count;
  // Sum of squares in double: element i of a range goes to partial sum i % 16, the sixteen are added as a tree. Of
  // float16 and bfloat16 each block of kStateBlock is a range of its own, added in order.
  double (*sum_squares)(Float, const void* x, std::size_t begin, std::size_t end);
};

struct QuantKernels {
  // Smallest and largest of n > 0 values; returns kNonFinite or 0.
  unsigned (*range)(const float* x, std::size_t n, Range*);
  // The pair that is best for n values in the sense of least squares; of scale 0 if that of the range is to be kept.
  Pair (*fit)(const float* x, std::size_t n, int bits, Range);
  // Rows [begin, end) of x into codes, scale and minimum of `q`, which are written. Where param_stride is 0 `shared` is
  // given, otherwise null; `refit` fits every group. Returns flags.
  unsigned (*quantize)(const float* x, const Quantized& q, const Shared* shared, bool refit, std::size_t begin,
                       std::size_t end);
  // Columns [col_begin, col_end) of one row.
  void (*dequantize)(const Quantized& q, std::size_t row, std::size_t col_begin, std::size_t col_end, float* out);
  // n codes of one byte each, to and from packed bytes.
  void (*pack)(int bits, const std::uint8_t* codes, std::size_t n, std::uint8_t* packed);
  void (*unpack)(int bits, const std::uint8_t* packed, std::size_t n, std::uint8_t* codes);
};

// Products with quantized weights. An instruction set that adds nothing but dot products of bytes to another brings
// these alone.
struct Products {
  // y[b, r] = sum over c of x[b, c] * W[r, c] (+ bias[r]) for rows [begin, end). x is prepared first, a row into
  // prepared_bytes() aligned to 64; 0 means that these groups need no preparation.
  std::size_t (*prepared_bytes)(const Quantized& w, int limbs);
  void (*prepare_x)(const Quantized& w, const float* x, int limbs, std::uint8_t* out);
  std::size_t (*panel_bytes)(const Quantized& w, int limbs);
  // kPanelWidth rows, or the last `count`, of those that prepare_x wrote.
  void (*prepare_panel)(const Quantized& w, const std::uint8_t* rows, std::size_t row_bytes, std::size_t count,
                        int limbs, std::uint8_t* out);
  void (*linear_quantized)(const Quantized& w, const Linear&, std::size_t begin, std::size_t end);
};

struct SparseKernels {
  // The same y for sparse weights; rows of x are `stride` apart and zero up to a multiple of kBlockLength columns.
  void (*linear)(const Sparse& w, const float* x, std::size_t stride, std::size_t batch, const float* bias, float* y,
                 std::size_t begin, std::size_t end);
  // `width` (64, 32 or 16) rows of x from `first`, transposed to [cols][width], zero behind the last: columns
  // [begin, end) of it, and the product with rows [begin, end) of a weight.
  void (*transpose_tile)(const float* x, std::size_t batch, std::size_t cols, std::size_t first, std::size_t width,
                         std::size_t begin, std::size_t end, float* tile);
  void (*linear_tile)(const Sparse& w, const float* tile, std::size_t width, std::size_t batch, std::size_t first,
                      const float* bias, float* y, std::size_t begin, std::size_t end);

  // Elements are taken as integers of `width` bytes; zero of either sign is not stored. A row has `count` entries.
  std::size_t (*nonzero_mask)(int width, const void* x, std::size_t n, std::uint8_t* mask);  // returns the count
  std::size_t (*count_bits)(const std::uint8_t* mask, std::size_t n);
  void (*compress_row)(int width, const void* x, const std::uint8_t* mask, std::size_t cols, std::size_t count,
                       void* values);
  void (*expand_row)(int width, const std::uint8_t* mask, const void* values, std::size_t count, std::size_t cols,
                     void* out);
  void (*scatter_row)(int width, const std::uint16_t* columns, const void* values, std::size_t count, std::size_t cols,
                      void* out);
  // Columns of a row from its mask and from its gaps, the first counted from `next`; 7 more are written.
  std::size_t (*mask_columns)(const std::uint8_t* mask, std::size_t cols, std::uint16_t* columns);
  void (*gap_columns)(const std::uint8_t* gaps, std::size_t count, std::uint16_t next, std::uint16_t* columns);
  // Gaps of a row from its columns; returns how many entries it takes. `gaps` may be null.
  std::size_t (*column_gaps)(const std::uint16_t* columns, std::size_t count, std::uint8_t* gaps);
};

struct PruneKernels {
  // Counts, by the 16 bits above `shift`, the magnitudes whose bits above those equal `prefix`.
  void (*magnitude_histogram)(Float, const void* w, std::size_t begin, std::size_t end, std::uint64_t prefix, int shift,
                              std::uint64_t* bins);
  std::size_t (*count_ties)(Float, const void* w, std::size_t begin, std::size_t end, std::uint64_t key);
  // Copies the magnitudes from `low` to `high` to `out`. Float32 and float64 only, fewer than 2^32.
  Collected (*collect_magnitudes)(Float, const void* w, std::size_t begin, std::size_t end, std::uint64_t low,
                                  std::uint64_t high, void* out, std::size_t room);
  void (*prune)(Float, const PruneArgs&, std::size_t begin, std::size_t end);
  // For one row: keeps the n largest of every m.
  void (*keep_largest)(Float, const void* w, std::size_t cols, std::size_t n, std::size_t m, std::uint8_t* kept);
  // Writes +0 to w, of elements of `width` bytes, where kept is 0.
  void (*clear)(int width, void* w, const std::uint8_t* kept, std::size_t begin, std::size_t end);
};

struct LimitKernels {
  // What the memory allows; the benchmarks print their share of it.
  float (*read)(const float* x, std::size_t n);
  void (*write)(float* x, std::size_t n);
  // Reads x[0..reads) and writes back the first `writes` of them, one multiply-add for each stream.
  void (*update)(float* const* x, std::size_t reads, std::size_t writes, std::size_t begin, std::size_t end);
};

struct Kernels {
  const char* isa;
  OptimKernels optim;
  QuantKernels quant;
  Products products;
  SparseKernels sparse;
  PruneKernels prune;
  LimitKernels limits;
};

}  // namespace fastopt
