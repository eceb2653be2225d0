// The contract between the kernels and everything else: argument structs and one table of function pointers per
// instruction set. It is the only header that both sides see.
//
// A kernel is a pure function over a range: it allocates nothing, throws nothing, starts no thread and knows no
// Python. Pointers are valid, naturally aligned for their type and, where one of them is written, do not overlap;
// cpp/bindings/arrays.hpp has checked that. Every result is bit for bit that of tests/reference.py, on every
// instruction set and however a range is cut.
//
// Glossary: each of these words has one meaning in C++ and, where they occur there, in Python.
//
//   lane         one element of a vector
//   broadcast    to put one number into every lane
//   unroll       to write a loop out, so that its index is a constant
//   magnitude    the bits of a float without its sign, compared as an integer
//
//   code         the small integer that stands for a weight; `bits` wide, packed lowest bits first
//   group        the neighbouring columns of a row that share a scale and a minimum
//   scale, minimum   the parameters of a group: weight ~ minimum + scale * code
//   grid         the numbers that the codes of a group can stand for, ready to encode against
//   lot          up to kGroupsAtOnce groups of a row, which are quantized together
//   part         the neighbouring groups of a row whose scales and minima are codes under the same floats
//
//   strip        kStripRows rows that GPTQ quantizes side by side, each in a lane of its own
//   slab         kSlabColumns neighbouring columns of a matrix, stored row after row
//
//   x, y         the input and the output of a product, a vector in each row
//   limb         one byte of an integer that x was rounded to
//   span         the 16 or 32 neighbouring columns of x that share the scale of this rounding
//   word         32 bits of packed codes, or 8 codes of a width that does not divide 32: one lane multiplies them
//   run          16 words
//   panel        kPanelWidth rows of x that are multiplied together with quantized rows
//   slice        the rows of a panel whose sums are in registers at the same time
//   tile         16, 32 or 64 rows of x, transposed, that are multiplied together with sparse rows
//   band         the rows of W that are multiplied together with panels, or with a tile
//   stretch      the columns whose products are summed by themselves before their sum joins the total
//
//   entry        one stored element of a sparse row: its position and its number
//   block        kBlockLength neighbouring columns of a row that are pruned, and stored, as one
//   mask         one bit for each column of a row, or for each block
//   gap          the distance from one entry to the next, less one
//   kept         the mask of pruning: one byte for each element, 1 where it stays
//   key, tie     the magnitude at which pruning cuts, and an element that has exactly this magnitude
//
//   state        the numbers that an optimizer carries for each parameter from step to step
//   state block  kStateBlock neighbouring elements of a state, which share an exponent where it is stored in 8 bits
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastopt {

// ---- optimizers ----------------------------------------------------------------------------------------------

enum class Float { f16, bf16, f32, f64 };

constexpr std::size_t width_of(Float type) { return type == Float::f64 ? 8 : type == Float::f32 ? 4 : 2; }

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
  double eps;           // for Adam eps * sqrt(1 - beta2^t); not less than the smallest normal number
  double grad_scale;    // multiplies every gradient: loss scale, clipping, sign of `maximize`
  double shrink;        // proximal L1 after the step: |w| - shrink, exact zero below
  bool keep_zeros;      // a weight that is zero stays zero
  double rescale = 1;   // a second factor of every gradient, where grad_scale alone would be subnormal in float32
};

inline constexpr std::size_t kMaxStates = 3;

// A state in 8 bits is a small float of its own: 3 bits of mantissa and 4 of exponent behind a sign, or 5 of exponent
// where the state is never negative. The elements of a state block share the exponent that theirs count from. A few
// elements that are far larger than the block was, and NaN and infinity, do not set it: they are stored as the largest
// code.
inline constexpr std::size_t kStateBlock = 256;

enum class StateType { wide, bf16, u8 };  // wide: the type that is computed in

// In bytes, for a step that is computed in float32.
constexpr std::size_t width_of(StateType type) { return type == StateType::wide ? 4 : type == StateType::bf16 ? 2 : 1; }

struct StepArgs {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  std::uint8_t* exponent[kMaxStates];  // of each state block, for u8
  float* master;                       // float32 copy of float16 or bfloat16 parameters, or null; where it does not
                                       // round to the parameter, the parameter was changed and takes its place
  Float param_type, grad_type;
  StateType state_type;
  bool stochastic;      // round float16 and bfloat16 parameters up or down by chance
  std::uint32_t noise;  // the seed of stochastic rounding: with an element's index it gives that element's bits
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
inline constexpr int kCodeBits[] = {8, 4, 2, 6, 5, 3};

// The bytes of n packed codes. Where n is a multiple of 8, the next code starts on a byte.
constexpr std::size_t packed_bytes(std::size_t n, int bits) {
  const std::size_t width = static_cast<std::size_t>(bits);
  return n / 8 * width + (n % 8 * width + 7) / 8;
}

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
// or 0 where the whole matrix shares one pair. Kernels that read a weight take Quantized; the one that writes it takes
// QuantizedOut.
template <class Byte, class Params>
struct QuantizedArrays {
  Byte* codes;
  Params* scale;
  Params* minimum;
  bool half;  // scale and minimum are float16, else float32
  int bits;   // one of kCodeBits
  std::size_t rows, cols, row_bytes;
  std::size_t group, groups, param_stride;
  float limit;  // for quantizing: no code of finite weights stands for a value beyond +-limit
};
using Quantized = QuantizedArrays<const std::uint8_t, const void>;
using QuantizedOut = QuantizedArrays<std::uint8_t, void>;

// Scales and minima of the groups in two levels: both are packed codes of `bits` bits, row after row, each row on a
// byte, which count in the floats of their part:
//
//   scale = d * code         minimum = m0 - dm * code
//
// Each part, `part` groups, has its d, dm and, where `count` is 3, m0 in `floats`; where `count` is 2, m0 is 0.
template <class Byte, class Params>
struct TwoLevelArrays {
  Byte* scale;
  Byte* minimum;
  Params* floats;
  bool half;  // floats are float16, else float32
  int bits;   // one of kCodeBits
  std::size_t count, part, parts, row_bytes;
};
using TwoLevel = TwoLevelArrays<const std::uint8_t, const void>;
using TwoLevelOut = TwoLevelArrays<std::uint8_t, void>;

struct Range {
  float min, max;
};

struct Pair {
  float scale, minimum;
};

// How scale and minimum of a group follow from its values: by their range or, if `least_squares`, by the least sum of
// squared errors, each times its importance. Row r of x has the importance at `importance` + r * `stride`; with a
// stride of 0 all rows have the same. If `importance` is null, all errors count alike.
struct Fit {
  bool least_squares;
  const float* importance;
  std::size_t stride;

  const float* of_row(std::size_t r) const { return importance ? importance + r * stride : nullptr; }
};

// The grid of a whole matrix: its range and, where it was fitted to the values, a pair (otherwise of scale 0).
struct Shared {
  Range range;
  Pair pair;
};

// Findings while a range was quantized; bits of an `unsigned`.
inline constexpr unsigned kNonFinite = 1;  // NaN or infinity in the input
// For GPTQ: a weight x of `cols` columns, and what is known of its inputs. Columns and groups are visited in the order
// of `order` and `group_order`, one whole group after the other; `h`, `m` and `importance` are in that order. `h` holds
// the products of the inputs and `m` their factor, as gptq.inl has it, both in slabs; `importance` is the diagonal of
// h. With `two_level`, the pair of a group is fitted under the floats that are there, and its codes are written.
struct Gptq {
  const float* x;
  std::size_t cols, group;
  const std::uint32_t *order, *group_order;
  const float *h, *m, *importance;
  int sweeps;                    // over all codes, at the end
  const TwoLevelOut* two_level;  // or null
};
inline constexpr std::size_t kStripRows = 64, kSlabColumns = 32;

// A symmetric matrix a [n, n] on the way to its lower Cholesky factor, block after block of kCholeskyBlock columns,
// here the one from column `first` on. `before` [first][kCholeskyBlock] holds the block's rows of the columns before
// it, transposed; `block` [kCholeskyBlock][kCholeskyBlock] takes the block itself, transposed.
struct Cholesky {
  double* a;
  std::size_t n, first;
  const double* before;
  double* block;
};
inline constexpr std::size_t kCholeskyBlock = 64;

inline constexpr unsigned kHalfMisfit = 2;  // float16 cannot hold some scale or minimum closely enough
inline constexpr unsigned kBeyond = 4;      // codes stand for values beyond the limit

// ---- products ------------------------------------------------------------------------------------------------

// Products add floats in an order that depends on nothing but the shapes: so they have the same bits on every
// instruction set and for any number of threads. All orders follow one pattern. The products of a stretch go to
// partial sums in turn, and partial sums are added as a tree: the upper half to the lower one, until one is left.
// Python has these sizes as _core.SUMS; tests/reference.py says how each product uses them.
inline constexpr std::size_t kPartials = 16;             // partial sums of a stretch
inline constexpr std::size_t kFloatStretch = 512;        // columns, where quantized weights are multiplied as floats
inline constexpr std::size_t kRunStretch = 32;           // runs, where few rows of x meet packed codes
inline constexpr std::size_t kPanelStretch = 1024;       // columns, where panels of x meet packed codes
inline constexpr std::size_t kSparseStretch = 1024;      // columns or entries, where few rows of x meet sparse rows
inline constexpr std::size_t kTileNumbers = 8192;        // of a tile: a stretch has kTileNumbers / width columns
inline constexpr std::size_t kTilePartials = 64;         // of all columns of a tile: each has kTilePartials / width
inline constexpr std::size_t kLeastTile = 5;             // with fewer rows of x, sparse products do without tiles
inline constexpr std::size_t kFewRows = kLeastTile - 1;  // that many are multiplied at a time

// Rows of x meet quantized rows in panels. A remainder of fewer than kLeastPanel rows is multiplied four rows or one
// row at a time.
inline constexpr std::size_t kPanelWidth = 16, kLeastPanel = 12;
constexpr std::size_t panel_rows(std::size_t batch) {
  return batch % kPanelWidth < kLeastPanel ? batch - batch % kPanelWidth : batch;
}

struct Linear;
using LinearFloats = void (*)(const Quantized& w, const Linear&, std::size_t batch, std::size_t count,
                              std::size_t begin, std::size_t end);

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
  LinearFloats floats;  // the kernel `linear_floats`, for results that are not finite
};

// ---- sparse --------------------------------------------------------------------------------------------------

// The forms of positions: a bit for each column, or for each block (lowest bits first, rows start on a byte); the
// column of each entry; or its gap.
enum class Layout { mask, block, index16, index8 };

inline constexpr std::size_t kBlockLength = 16;
inline constexpr std::size_t kIndexColumns = 1 << 16;  // the most that index16 and index8 can tell apart

// Row r has the entries row_offsets[r] up to row_offsets[r + 1], each one number; or, under a mask of blocks, so many
// blocks of kBlockLength numbers. `values` is null where they are quantized: then `quantized` holds them as one row.
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

// An element stays where the magnitude of `from` is above `key`, and so do the first `keep_ties` of those equal to it.
// Elsewhere +0 is written to w; w is `from`, or null.
struct PruneArgs {
  const void* from;
  void* w;
  std::uint8_t* kept;  // may be null
  std::uint64_t key;
  std::size_t keep_ties;
};

// ---- the table -----------------------------------------------------------------------------------------------

struct OptimKernels {
  const Rule* rules;
  std::size_t rule_count;
  // Sum of squares in double: element i of a range goes to partial sum i % kPartials, and these are added as a tree.
  // Ranges of float16 and bfloat16 are cut into ranges of kStateBlock elements, whose sums are added in order.
  double (*sum_squares)(Float, const void* x, std::size_t begin, std::size_t end);
};

struct QuantKernels {
  // Smallest and largest of n > 0 values; returns kNonFinite or 0.
  unsigned (*range)(const float* x, std::size_t n, Range*);
  // The pair that is best for n values in the sense of least squares; of scale 0 if that of the range is better.
  // `importance` has n values too, or is null.
  Pair (*fit)(const float* x, const float* importance, std::size_t n, int bits, Range);
  // Rows [begin, end) of x into codes, scale and minimum of `q`, which are written. Where param_stride is 0 `shared` is
  // given, otherwise null; otherwise `fit` says how every group is fitted. Returns flags.
  unsigned (*quantize)(const float* x, const QuantizedOut& q, const Shared* shared, const Fit& fit, std::size_t begin,
                       std::size_t end);
  // Columns [col_begin, col_end) of one row.
  void (*dequantize)(const Quantized& q, std::size_t row, std::size_t col_begin, std::size_t col_end, float* out);
  // n codes of one byte each, to and from packed bytes.
  void (*pack)(int bits, const std::uint8_t* codes, std::size_t n, std::uint8_t* packed);
  void (*unpack)(int bits, const std::uint8_t* packed, std::size_t n, std::uint8_t* codes);
};

struct TwoLevelKernels {
  // Scales and minima of groups [begin, end) of a row, `begin` a multiple of 8; up to 15 more of each are written.
  void (*decode)(const TwoLevel&, std::size_t row, std::size_t begin, std::size_t end, float* scale, float* minimum);
  // The memory that `quantize` needs.
  std::size_t (*bytes)(const QuantizedOut&, const TwoLevelOut&);
  // Rows [begin, end) of x by least squares into the codes of `q` and its parameters in two levels. Returns flags.
  unsigned (*quantize)(const float* x, const QuantizedOut& q, const TwoLevelOut&, const Fit& fit, std::size_t begin,
                       std::size_t end, void* memory);
};

struct GptqKernels {
  // The memory that `rows` needs.
  std::size_t (*bytes)(const Gptq&, const QuantizedOut& q);
  // Quantizes the strip of rows from row `first` on. Returns flags.
  unsigned (*rows)(const Gptq&, const QuantizedOut& q, std::size_t first, void* memory);
  // Rows [begin, end) of a block; its own rows, in order, come before all others. Returns false if the matrix is not
  // positive definite.
  bool (*cholesky)(const Cholesky&, std::size_t begin, std::size_t end);
};

// Products with quantized weights.
struct Products {
  // y[b, r] = sum over c of x[b, c] * W[r, c] (+ bias[r]) for rows [begin, end). x is prepared first, each row into
  // prepared_bytes() of memory, aligned to 64; 0 means that these groups need no preparation.
  std::size_t (*prepared_bytes)(const Quantized& w, int limbs);
  void (*prepare_x)(const Quantized& w, const float* x, int limbs, std::uint8_t* out);
  // Rows [begin, end) of W by rows [batch, batch + count) of x, in float32.
  LinearFloats linear_floats;
  // An instruction set that only adds dot products of bytes to another one overrides just the rest, and has null above.
  std::size_t (*panel_bytes)(const Quantized& w, int limbs);
  // kPanelWidth rows, or the last `count`, of those that prepare_x wrote.
  void (*prepare_panel)(const Quantized& w, const std::uint8_t* rows, std::size_t row_bytes, std::size_t count,
                        int limbs, std::uint8_t* out);
  void (*linear_quantized)(const Quantized& w, const Linear&, std::size_t begin, std::size_t end);
};

struct SparseKernels {
  // y as above, for sparse weights and at most kFewRows rows of x. These are `stride` apart and zero up to a multiple
  // of kBlockLength columns. If there are more than one, kFewRows exist for Layout::mask, zero behind the last, and for
  // columns and gaps x is [cols][kFewRows] instead, as transpose_tile() writes it.
  void (*linear)(const Sparse& w, const float* x, std::size_t stride, std::size_t batch, const float* bias, float* y,
                 std::size_t begin, std::size_t end);
  // Writes columns [begin, end) of a tile: `width` rows of x from `first` on, transposed to [cols][width], zero behind
  // the last row. linear_tile multiplies one of 64, 32 or 16 rows with rows [begin, end) of a weight.
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
  // Counts the magnitudes whose bits above `shift` + 16 equal `prefix`, by the 16 bits above `shift`.
  void (*magnitude_histogram)(Float, const void* w, std::size_t begin, std::size_t end, std::uint64_t prefix, int shift,
                              std::uint64_t* bins);
  std::size_t (*count_ties)(Float, const void* w, std::size_t begin, std::size_t end, std::uint64_t key);
  // Copies the magnitudes from `low` to `high` to `out`. Float32 and float64 only, fewer than 2^32.
  Collected (*collect_magnitudes)(Float, const void* w, std::size_t begin, std::size_t end, std::uint64_t low,
                                  std::uint64_t high, void* out, std::size_t room);
  void (*prune)(Float, const PruneArgs&, std::size_t begin, std::size_t end);
  // Writes `kept` of one row: the n largest of every m elements stay.
  void (*keep_largest)(Float, const void* w, std::size_t cols, std::size_t n, std::size_t m, std::uint8_t* kept);
  // Writes +0 to w, of elements of `width` bytes, where kept is 0.
  void (*clear)(int width, void* w, const std::uint8_t* kept, std::size_t begin, std::size_t end);
};

struct LimitKernels {
  // Loops that only move memory: benchmarks print which share of this speed a kernel has.
  float (*read)(const float* x, std::size_t n);
  void (*write)(float* x, std::size_t n);
  // Reads x[0..reads) and writes back the first `writes` of them, one multiply-add for each stream.
  void (*update)(float* const* x, std::size_t reads, std::size_t writes, std::size_t begin, std::size_t end);
};

struct Kernels {
  const char* isa;
  OptimKernels optim;
  QuantKernels quant;
  TwoLevelKernels two_level;
  GptqKernels gptq;
  Products products;
  SparseKernels sparse;
  PruneKernels prune;
  LimitKernels limits;
};

}  // namespace fastopt
