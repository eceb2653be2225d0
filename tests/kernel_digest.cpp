// Runs every kernel of one table on the same pseudo-random inputs and prints, case by case, a hash of all it wrote.
// Two tables agree to the bit when their texts are equal; tests/core/test_isa.py compares them.
//
//   kernel_digest        prints the tables that this CPU runs
//   kernel_digest NAME   prints the digest of one
//
// Built with -DFASTOPT_DIGEST=ON. It needs no Python, so it also runs in an emulator of another CPU.
#include <algorithm>
#include <cfloat>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch.hpp"
#include "kernels/contract.hpp"

namespace {

using namespace fastopt;
using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kSizes[] = {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 10007};
constexpr std::size_t kOffsets[] = {0, 3};
constexpr std::size_t kGuard = 16;  // elements behind the range; hashed too, as none may be written

// One line of the text. The seed comes from the name: a case does not depend on those before it.
class Case {
 public:
  explicit Case(const std::string& name) : name_(name) {
    add(name.data(), name.size());
    random_ = hash_ | 1;
  }
  ~Case() { std::printf("%s\t%016llx\n", name_.c_str(), static_cast<unsigned long long>(hash_)); }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  std::uint64_t random() {  // xorshift64
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_;
  }

  void add(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    for (; size >= 8; bytes += 8, size -= 8) {
      std::uint64_t word;
      std::memcpy(&word, bytes, 8);
      mix(word);
    }
    for (std::size_t i = 0; i < size; ++i) mix(bytes[i]);
  }
  template <class T>
  void add(T value) {
    // The contract fixes where a NaN comes out, not its sign and payload: CPUs differ in them.
    if constexpr (std::is_floating_point_v<T>) {
      if (value != value) value = std::numeric_limits<T>::quiet_NaN();
    }
    std::uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    mix(word);
  }
  template <class T>
  void add(const std::vector<T>& values) {
    if constexpr (std::is_floating_point_v<T>) {
      for (const T& value : values) add(value);
    } else {
      add(values.data(), values.size() * sizeof(T));
    }
  }

 private:
  void mix(std::uint64_t word) {  // FNV-1a by words; the shift lets high bits count too
    hash_ = (hash_ ^ word) * 0x100000001b3;
    hash_ ^= hash_ >> 32;
  }

  std::string name_;
  std::uint64_t hash_ = 0xcbf29ce484222325, random_ = 0;
};

std::string text(std::size_t n) { return std::to_string(n); }

// ---- inputs --------------------------------------------------------------------------------------------------

enum Kind { plain, tiny, wide, constant, special };
constexpr const char* kKindNames[] = {"plain", "tiny", "wide", "constant", "special"};
constexpr Kind kFinite[] = {plain, tiny, wide, constant};
constexpr Kind kAll[] = {plain, tiny, wide, constant, special};

template <class T>
T number(Case& c, Kind kind) {
  using Limits = std::numeric_limits<T>;
  const T unit = static_cast<T>(static_cast<double>(static_cast<std::int32_t>(c.random())) * 0x1p-31);
  switch (kind) {
    case tiny:  // mostly subnormal
      return unit * Limits::min();
    case wide: {  // any finite number
      T value;
      do {
        const std::uint64_t bits = c.random();
        std::memcpy(&value, &bits, sizeof value);
      } while (!(value - value == 0));
      return value;
    }
    case constant:
      return static_cast<T>(-0.3);
    case special: {
      const T rare[] = {Limits::quiet_NaN(),
                        Limits::infinity(),
                        -Limits::infinity(),
                        Limits::max(),
                        Limits::denorm_min(),
                        -Limits::min(),
                        T{0},
                        -T{0}};
      const std::uint64_t pick = c.random() % 32;
      return pick < 8 ? rare[pick] : unit;
    }
    default:
      return unit;
  }
}

template <class T>
std::vector<T> numbers(Case& c, std::size_t n, Kind kind) {
  std::vector<T> values(n);
  for (T& value : values) value = number<T>(c, kind);
  return values;
}

// Random bits, of which some are zeros of either sign and some are equal: elements to prune and to compress.
template <class U>
std::vector<U> patterns(Case& c, std::size_t n) {
  constexpr U sign = static_cast<U>(U{1} << (8 * sizeof(U) - 1));
  constexpr U rare[] = {0, sign, static_cast<U>(sign >> 2), static_cast<U>(sign | sign >> 2)};
  std::vector<U> values(n);
  for (U& value : values) {
    const std::uint64_t pick = c.random() % 8;
    value = pick < 4 ? rare[pick] : static_cast<U>(c.random());
  }
  return values;
}

// ---- optimizers ----------------------------------------------------------------------------------------------

constexpr Hyper kHypers[] = {
    {0.01, 0.0, 1.0, 0.9, 1.0, 0.999, 0.001, 1e-8, 1.0, 0.0, false},
    {0.003, 0.1, 1.0, 0.9, 0.1, 0.99, 0.01, 1e-8, -1.0 / 1024, 0.0, false},
    {0.1, 0.0, 0.999, 0.5, 0.5, 0.95, 0.05, 1e-3, 0.7, 0.01, true},
};

template <class T>
void digest_step(const std::string& name, const Rule& rule, const Hyper& hyper, std::size_t offset, std::size_t n,
                 Kind kind) {
  Case c(name);
  const std::size_t size = offset + n + kGuard;
  std::vector<T> param = numbers<T>(c, size, kind), states[kMaxStates];
  StepArgs args = {};
  args.param = param.data() + offset;
  args.param_type = args.grad_type = sizeof(T) == 8 ? Float::f64 : Float::f32;
  for (std::size_t s = 0; s < rule.states; ++s) {
    states[s] = numbers<T>(c, size, plain);
    for (T& value : states[s]) value = value < 0 ? -value : value;  // the second is a mean of squares
    args.state[s] = states[s].data() + offset;
  }
  for (int step = 0; step < 3; ++step) {
    const std::vector<T> grad = numbers<T>(c, size, kind);
    args.grad = grad.data() + offset;
    rule.step(hyper, args, 0, n);
  }
  c.add(param);
  for (const auto& state : states) c.add(state);
}

// Narrow parameters, gradients and states, with and without chance.
void digest_narrow(const Rule& rule, std::size_t n, Float param_type, StateType state_type, bool stochastic) {
  Case c(std::string(rule.name) + " narrow n=" + text(n) + " param=" + text(static_cast<std::size_t>(param_type)) +
         " state=" + text(static_cast<std::size_t>(state_type)) + (stochastic ? " stochastic" : ""));
  std::vector<std::uint16_t> param(n + 1), grad(n + 1);
  std::vector<std::uint8_t> states[kMaxStates], exponents[kMaxStates];
  const auto fill = [&](std::vector<std::uint16_t>& values) {  // ordinary numbers of either sign
    for (auto& value : values) value = static_cast<std::uint16_t>((c.random() & 0x83ff) | 0x3000);
  };
  fill(param);
  StepArgs args = {};
  args.param = param.data();
  args.grad = grad.data();
  args.param_type = args.grad_type = param_type;
  args.state_type = state_type;
  args.stochastic = stochastic;
  const std::size_t width = state_type == StateType::u8 ? 1 : state_type == StateType::bf16 ? 2 : 4;
  for (std::size_t s = 0; s < rule.states; ++s) {
    states[s].resize(n * width + 1);
    exponents[s].resize(n / kStateBlock + 1);
    args.state[s] = states[s].data();
    args.exponent[s] = exponents[s].data();
  }
  for (std::uint32_t step = 0; step < 3; ++step) {
    fill(grad);
    args.noise = step * 77;
    rule.step(kHypers[step], args, 0, n);
  }
  c.add(param);
  for (const auto& state : states) c.add(state);
  for (const auto& exponent : exponents) c.add(exponent);
}

void digest_optimizers(const Kernels& k) {
  for (std::size_t r = 0; r < k.optim.rule_count; ++r) {
    const Rule& rule = k.optim.rules[r];
    for (std::size_t n : kSizes) {
      for (std::size_t offset : kOffsets) {
        for (Kind kind : kAll) {
          if (n > 1000 && (kind != plain || offset != kOffsets[0])) continue;  // emulators are slow
          for (const Hyper& hyper : kHypers) {
            const std::string name = std::string(rule.name) + " n=" + text(n) + " offset=" + text(offset) + " " +
                                     kKindNames[kind] + " lr=" + std::to_string(hyper.step_size);
            digest_step<float>(name + " f32", rule, hyper, offset, n, kind);
            digest_step<double>(name + " f64", rule, hyper, offset, n, kind);
          }
        }
      }
      for (Float param : {Float::f16, Float::bf16}) {
        for (StateType state : {StateType::wide, StateType::bf16, StateType::u8}) {
          for (bool stochastic : {false, true}) digest_narrow(rule, n, param, state, stochastic);
        }
      }
      Case c(std::string("sum_squares n=") + text(n));
      const std::vector<float> x = numbers<float>(c, n + 1, plain);
      c.add(k.optim.sum_squares(Float::f32, x.data(), 1, n + 1));
    }
  }
}

// ---- quantization --------------------------------------------------------------------------------------------

void digest_range(const Kernels& k, std::size_t n, std::size_t offset, Kind kind) {
  Case c("range n=" + text(n) + " offset=" + text(offset) + " " + kKindNames[kind]);
  const std::vector<float> x = numbers<float>(c, offset + n, kind);
  Range range = {};
  c.add(k.quant.range(x.data() + offset, n, &range));
  c.add(range.min);
  c.add(range.max);
}

void digest_packing(const Kernels& k, int bits, std::size_t n, std::size_t offset) {
  Case c("pack bits=" + text(static_cast<std::size_t>(bits)) + " n=" + text(n) + " offset=" + text(offset));
  Bytes codes(offset + n), packed(offset + n + kGuard), unpacked(offset + n + kGuard);
  for (auto& code : codes) code = static_cast<std::uint8_t>(c.random() % (1u << bits));
  k.quant.pack(bits, codes.data() + offset, n, packed.data() + offset);
  k.quant.unpack(bits, packed.data() + offset, n, unpacked.data() + offset);
  c.add(packed);
  c.add(unpacked);
}

void digest_linear(Case& c, const Kernels& k, const Quantized& q) {
  constexpr std::size_t batch = kPanelWidth + 6;  // a panel, four rows and two; the last row is special
  std::vector<float> x = numbers<float>(c, (batch - 1) * q.cols, plain);
  const std::vector<float> last = numbers<float>(c, q.cols, special), bias = numbers<float>(c, q.rows, plain);
  x.insert(x.end(), last.begin(), last.end());
  std::vector<float> y(batch * q.rows);
  for (int limbs : {1, 3}) {
    const std::size_t bytes = k.products.prepared_bytes(q, limbs);
    Bytes prepared(batch * bytes);
    for (std::size_t b = 0; b < batch && bytes > 0; ++b) {
      k.products.prepare_x(q, x.data() + b * q.cols, limbs, prepared.data() + b * bytes);
    }
    const std::size_t panel_bytes = bytes > 0 ? k.products.panel_bytes(q, limbs) : 0;
    Bytes panel(panel_bytes);
    if (bytes > 0) k.products.prepare_panel(q, prepared.data(), bytes, kPanelWidth, limbs, panel.data());
    for (const float* b : {static_cast<const float*>(nullptr), bias.data()}) {
      const Linear io = {x.data(), prepared.data(), bytes, panel.data(), panel_bytes,
                         limbs,    batch,           b,     y.data(),     k.products.linear_floats};
      k.products.linear_quantized(q, io, 0, q.rows);
      c.add(y);
    }
  }
}

// Group 0: the whole matrix shares its parameters.
void digest_quantized(const Kernels& k, int bits, std::size_t cols, std::size_t group, bool half, bool refit,
                      Kind kind) {
  Case c("quantize bits=" + text(static_cast<std::size_t>(bits)) + " cols=" + text(cols) + " group=" + text(group) +
         (half ? " f16 " : " f32 ") + (refit ? "lsq " : "") + kKindNames[kind]);
  constexpr std::size_t rows = 3;
  const std::size_t length = group ? group : cols, groups = (cols + length - 1) / length;
  const std::size_t row_bytes = (cols * static_cast<std::size_t>(bits) + 7) / 8;
  const std::vector<float> x = numbers<float>(c, rows * cols, kind);
  Bytes codes(rows * row_bytes + kGuard);
  std::vector<float> scale(rows * groups), minimum(rows * groups), out(cols + kGuard);
  const std::size_t stride = group ? groups : 0;
  const QuantizedOut to = {codes.data(), scale.data(), minimum.data(), half,   bits,   rows,
                           cols,         row_bytes,    length,         groups, stride, FLT_MAX};
  const Quantized q = {codes.data(), scale.data(), minimum.data(), half,   bits,   rows,
                       cols,         row_bytes,    length,         groups, stride, FLT_MAX};

  Shared shared = {};
  unsigned flags = group ? 0 : k.quant.range(x.data(), x.size(), &shared.range);
  if (!group && refit && !flags) shared.pair = k.quant.fit(x.data(), nullptr, x.size(), bits, shared.range);
  flags |= k.quant.quantize(x.data(), to, group ? nullptr : &shared, Fit{refit, nullptr, 0}, 0, rows);
  c.add(flags);
  if (flags) return;  // nobody looks at the rest
  c.add(codes);
  c.add(scale.data(), scale.size() * sizeof(float));
  c.add(minimum.data(), minimum.size() * sizeof(float));
  for (std::size_t begin : {std::size_t{0}, cols / 3}) {
    k.quant.dequantize(q, rows - 1, begin, cols, out.data());
    c.add(out);
  }
  if (kind == plain && !refit) digest_linear(c, k, q);
}

// A fit that weighs errors, with an importance for each column or for each weight.
void digest_weighted(const Kernels& k, int bits, std::size_t cols, std::size_t group, bool shared) {
  Case c("quantize weighted bits=" + text(static_cast<std::size_t>(bits)) + " cols=" + text(cols) +
         " group=" + text(group) + (shared ? " columns" : ""));
  constexpr std::size_t rows = 3;
  const std::size_t groups = (cols + group - 1) / group;
  const std::size_t row_bytes = (cols * static_cast<std::size_t>(bits) + 7) / 8;
  const std::vector<float> x = numbers<float>(c, rows * cols, plain);
  std::vector<float> importance = numbers<float>(c, shared ? cols : rows * cols, plain);
  for (float& weight : importance) weight = weight > 0 ? weight : 0.0f;
  Bytes codes(rows * row_bytes + kGuard);
  std::vector<float> scale(rows * groups), minimum(rows * groups);
  const QuantizedOut q = {codes.data(), scale.data(), minimum.data(), false,  bits,   rows,
                          cols,         row_bytes,    group,          groups, groups, FLT_MAX};
  c.add(k.quant.quantize(x.data(), q, nullptr, Fit{true, importance.data(), shared ? 0 : cols}, 0, rows));
  c.add(codes);
  c.add(scale);
  c.add(minimum);
}

// Parameters in two levels: for 256 columns, or for a row.
void digest_two_level(const Kernels& k, int bits, std::size_t cols, std::size_t group, int param_bits, bool weighted) {
  const bool row = 256 % group != 0;
  Case c("two levels bits=" + text(static_cast<std::size_t>(bits)) + " cols=" + text(cols) + " group=" + text(group) +
         " params=" + text(static_cast<std::size_t>(param_bits)) + (weighted ? " weighted" : ""));
  constexpr std::size_t rows = 3;
  const std::size_t groups = (cols + group - 1) / group, part = row ? groups : 256 / group, count = row ? 3 : 2;
  const std::size_t parts = (groups + part - 1) / part, param_bytes = packed_bytes(groups, param_bits);
  const std::size_t row_bytes = packed_bytes(cols, bits);
  const std::vector<float> x = numbers<float>(c, rows * cols, plain);
  std::vector<float> importance = numbers<float>(c, cols, plain), floats(rows * parts * count);
  for (float& weight : importance) weight = weight > 0 ? weight : 0.0f;
  Bytes codes(rows * row_bytes), scale(rows * param_bytes), minimum(rows * param_bytes);
  const QuantizedOut q = {codes.data(), nullptr,   nullptr, false,  bits,   rows,
                          cols,         row_bytes, group,   groups, groups, FLT_MAX};
  const TwoLevelOut to = {scale.data(), minimum.data(), floats.data(), false,      param_bits,
                          count,        part,           parts,         param_bytes};
  const TwoLevel from = {scale.data(), minimum.data(), floats.data(), false,      param_bits,
                         count,        part,           parts,         param_bytes};
  std::vector<float> memory(k.two_level.bytes(q, to) / sizeof(float));
  const Fit fit{true, weighted ? importance.data() : nullptr, 0};
  c.add(k.two_level.quantize(x.data(), q, to, fit, 0, rows, memory.data()));
  c.add(codes);
  c.add(scale);
  c.add(minimum);
  c.add(floats);
  std::vector<float> pairs[2] = {std::vector<float>(groups + kGuard), std::vector<float>(groups + kGuard)};
  k.two_level.decode(from, rows - 1, 0, groups, pairs[0].data(), pairs[1].data());
  for (const std::vector<float>& numbers : pairs) c.add(numbers.data(), groups * sizeof(float));
}

// GPTQ with groups and columns visited backwards, and factors that are small beside the diagonal.
void digest_gptq(const Kernels& k, int bits, std::size_t cols, std::size_t group) {
  Case c("gptq bits=" + text(static_cast<std::size_t>(bits)) + " cols=" + text(cols) + " group=" + text(group));
  constexpr std::size_t rows = 5;
  const std::size_t groups = (cols + group - 1) / group, slabs = (cols + kSlabColumns - 1) / kSlabColumns;
  const std::size_t row_bytes = (cols * static_cast<std::size_t>(bits) + 7) / 8;
  const std::vector<float> x = numbers<float>(c, rows * cols, plain);
  std::vector<float> h = numbers<float>(c, slabs * cols * kSlabColumns, plain), importance(cols, 1.0f);
  for (float& number : h) number *= 0.01f;
  for (std::size_t p = 0; p < cols; ++p) h[(p / kSlabColumns * cols + p) * kSlabColumns + p % kSlabColumns] = 1.0f;
  std::vector<std::uint32_t> order, group_order;
  for (std::size_t g = groups; g-- > 0;) {
    group_order.push_back(static_cast<std::uint32_t>(g));
    for (std::size_t i = std::min(group, cols - g * group); i-- > 0;) {
      order.push_back(static_cast<std::uint32_t>(g * group + i));
    }
  }
  Bytes codes(rows * row_bytes + kGuard);
  std::vector<float> scale(rows * groups), minimum(rows * groups);
  const QuantizedOut q = {codes.data(), scale.data(), minimum.data(), false,  bits,   rows,
                          cols,         row_bytes,    group,          groups, groups, FLT_MAX};
  const Gptq g = {x.data(),          cols, group,  order.data(), group_order.data(), h.data(), h.data(),
                  importance.data(), 1,    nullptr};
  std::vector<double> memory(k.gptq.bytes(g, q) / sizeof(double) + 1);
  c.add(k.gptq.rows(g, q, 0, memory.data()));
  c.add(codes);
  c.add(scale);
  c.add(minimum);
}

void digest_cholesky(const Kernels& k, std::size_t n) {
  Case c("cholesky n=" + text(n));
  std::vector<double> a = numbers<double>(c, n * n, plain);
  for (double& number : a) number *= 0.001;
  for (std::size_t i = 0; i < n; ++i) a[i * n + i] = 1.0;
  for (std::size_t first = 0; first < n; first += kCholeskyBlock) {
    const std::size_t end = std::min(first + kCholeskyBlock, n);
    std::vector<double> before(first * kCholeskyBlock + 1), block(kCholeskyBlock * kCholeskyBlock);
    for (std::size_t i = 0; i < first; ++i) {
      for (std::size_t j = first; j < end; ++j) before[i * kCholeskyBlock + j - first] = a[j * n + i];
    }
    const Cholesky part = {a.data(), n, first, before.data(), block.data()};
    c.add(k.gptq.cholesky(part, first, end));
    c.add(k.gptq.cholesky(part, end, n));
  }
  c.add(a);
}

void digest_quantization(const Kernels& k) {
  for (int bits : kCodeBits) {
    for (std::size_t n : {std::size_t{1}, std::size_t{33}, std::size_t{100}, std::size_t{320}}) {
      for (std::size_t group : {std::size_t{5}, std::size_t{16}, std::size_t{64}, n}) {
        digest_gptq(k, bits, n, group);
        for (bool shared : {false, true}) {
          digest_weighted(k, bits, n, group, shared);
          digest_two_level(k, bits, n, group, group == 16 ? 4 : 6, shared);
        }
      }
    }
  }
  for (std::size_t n : {1, 4, 63, 64, 65, 150}) digest_cholesky(k, n);
  constexpr std::size_t cols = 1088, sizes[] = {0, 4, 8, 16, 32, 64, cols};  // groups that fill vectors of any width
  for (std::size_t group : sizes) {
    for (Kind kind : kAll) {
      for (bool half : {false, true}) {
        for (int bits : kCodeBits) digest_quantized(k, bits, cols, group, half, false, kind);
      }
    }
  }
  for (std::size_t n : kSizes) {
    for (int bits : kCodeBits) {
      for (std::size_t offset : kOffsets) digest_packing(k, bits, n, offset);
    }
    if (n == 0) continue;  // a range has at least one element
    for (Kind kind : kAll) {
      for (std::size_t offset : kOffsets) digest_range(k, n, offset, kind);
      for (int bits : kCodeBits) {
        const bool few = bits == 6 || bits == 5;  // the code of 3 bits with other shifts, and emulators are slow
        for (bool half : {false, true}) {
          if (few && !half) continue;
          for (std::size_t group : {std::size_t{0}, std::size_t{5}, std::size_t{32}, std::size_t{48}, n}) {
            digest_quantized(k, bits, n, group, half, false, kind);
            if (!few && (group == 5 || group == n)) digest_quantized(k, bits, n, group, half, true, kind);
          }
        }
      }
    }
  }
}

// ---- pruning and sparse --------------------------------------------------------------------------------------

template <class U>
void digest_prune(const Kernels& k, Float type, const std::string& type_name, std::size_t n, std::size_t offset) {
  Case c("prune " + type_name + " n=" + text(n) + " offset=" + text(offset));
  const std::vector<U> w = patterns<U>(c, offset + n + kGuard);
  std::vector<std::uint64_t> bins(kHistogramBins);
  for (int shift = static_cast<int>(8 * sizeof(U)) - 16; shift >= 0; shift -= 16) {
    const std::uint64_t prefix = shift + 16 < static_cast<int>(8 * sizeof(U)) ? 1u : 0u;
    k.prune.magnitude_histogram(type, w.data(), offset, offset + n, prefix, shift, bins.data());
  }
  c.add(bins.data(), bins.size() * sizeof bins[0]);

  const std::uint64_t key = std::uint64_t{1} << (8 * sizeof(U) - 3);  // the magnitude that `patterns` repeats
  const std::size_t ties = k.prune.count_ties(type, w.data(), offset, offset + n, key);
  c.add(ties);
  for (std::size_t keep : {std::size_t{0}, ties / 2, ties}) {
    for (bool want_kept : {false, true}) {
      std::vector<U> pruned = w;
      Bytes kept(w.size());
      const PruneArgs args = {pruned.data(), pruned.data(), want_kept ? kept.data() : nullptr, key, keep};
      k.prune.prune(type, args, offset, offset + n);
      c.add(pruned);
      c.add(kept);
    }
  }
}

template <class U>
void digest_bracket(const Kernels& k, Float type, std::size_t n, std::size_t offset) {
  Case c("collect_magnitudes width=" + text(sizeof(U)) + " n=" + text(n) + " offset=" + text(offset));
  const std::vector<U> w = patterns<U>(c, offset + n);
  constexpr U high = static_cast<U>(~U{0}) >> 1;
  for (const U low : {U{0}, static_cast<U>(high / 2)}) {
    std::vector<U> found(n + kGuard);
    const Collected some =
        k.prune.collect_magnitudes(type, w.data(), offset, offset + n, low, low + high / 8, found.data(), n);
    c.add(some.below);
    c.add(some.found);
    c.add(found);
  }
  Bytes kept(offset + n + kGuard);
  std::vector<U> cleared = w;
  k.prune.keep_largest(type, w.data() + offset, n, 2, 5, kept.data() + offset);
  k.prune.clear(sizeof(U), cleared.data(), kept.data(), offset, offset + n);
  c.add(kept);
  c.add(cleared);
}

template <class U>
void digest_rows(const Kernels& k, std::size_t n, std::size_t offset) {
  Case c("compress width=" + text(sizeof(U)) + " n=" + text(n) + " offset=" + text(offset));
  const std::vector<U> x = patterns<U>(c, offset + n);
  Bytes mask((n + 7) / 8 + kGuard);
  const std::size_t count = k.sparse.nonzero_mask(sizeof(U), x.data() + offset, n, mask.data());
  std::vector<U> values(count + kGuard), out(offset + n + kGuard);
  k.sparse.compress_row(sizeof(U), x.data() + offset, mask.data(), n, count, values.data());
  k.sparse.expand_row(sizeof(U), mask.data(), values.data(), count, n, out.data() + offset);
  c.add(count);
  c.add(mask);
  c.add(values);
  c.add(out);
  if (n > kIndexColumns) return;
  std::vector<std::uint16_t> columns(n + 8), back(n + 8);
  Bytes gaps(n);
  c.add(k.sparse.mask_columns(mask.data(), n, columns.data()));
  const std::size_t entries = k.sparse.column_gaps(columns.data(), count, gaps.data());
  c.add(entries);
  k.sparse.gap_columns(gaps.data(), entries, 0, back.data());
  k.sparse.scatter_row(sizeof(U), columns.data(), values.data(), count, n, out.data() + offset);
  c.add(columns.data(), count * sizeof columns[0]);
  c.add(gaps);
  c.add(back.data(), entries * sizeof back[0]);
  c.add(out);
}

// Two rows in every layout, their numbers in every type, by vectors and by tiles.
void digest_linear_sparse(const Kernels& k, std::size_t cols) {
  if (cols > kIndexColumns) return;
  constexpr std::size_t rows = 6, batch = 19;
  const std::size_t stride = (cols + kBlockLength - 1) / kBlockLength * kBlockLength;
  for (Layout layout : {Layout::mask, Layout::block, Layout::index16, Layout::index8}) {
    Case c("linear_sparse cols=" + text(cols) + " layout=" + text(static_cast<std::size_t>(layout)));
    const bool block = layout == Layout::block;
    const std::size_t places = block ? stride / kBlockLength : cols, row_bytes = (places + 7) / 8;
    Bytes mask(rows * row_bytes + 8), gaps;
    std::vector<std::uint16_t> columns;
    std::vector<std::int64_t> offsets = {0};
    for (std::size_t r = 0; r < rows; ++r) {
      std::vector<std::uint16_t> row;
      for (std::size_t i = 0; i < places; ++i) {
        if (c.random() % (r == 0 ? 3 : 40)) continue;
        mask[r * row_bytes + i / 8] = static_cast<std::uint8_t>(mask[r * row_bytes + i / 8] | 1u << i % 8);
        row.push_back(static_cast<std::uint16_t>(i));
      }
      Bytes row_gaps(cols + 1);
      const std::size_t entries = k.sparse.column_gaps(row.data(), row.size(), row_gaps.data());
      gaps.insert(gaps.end(), row_gaps.begin(), row_gaps.begin() + static_cast<std::ptrdiff_t>(entries));
      columns.insert(columns.end(), row.begin(), row.end());
      offsets.push_back(static_cast<std::int64_t>(layout == Layout::index8 ? gaps.size() : columns.size()));
    }
    const std::size_t count = static_cast<std::size_t>(offsets.back()) * (block ? kBlockLength : 1);
    const std::vector<float> values = numbers<float>(c, count, plain), bias = numbers<float>(c, rows, plain);
    std::vector<std::uint16_t> halves(count);
    for (auto& half : halves) half = static_cast<std::uint16_t>(c.random() & 0xbbffu);  // finite
    Bytes codes(count);
    for (auto& code : codes) code = static_cast<std::uint8_t>(c.random());
    const float scale = 0.01f, minimum = -1.0f;
    const Quantized q = {codes.data(), &scale, &minimum, false, 8, 1, count, count, count ? count : 1, 1, 0, 0};
    const std::vector<float> x = numbers<float>(c, batch * cols, plain);
    std::vector<float> one(stride), few(kFewRows * stride), tile(cols * 32), y(batch * rows);
    std::memcpy(one.data(), x.data(), cols * sizeof(float));
    if (layout == Layout::index16 || layout == Layout::index8) {
      k.sparse.transpose_tile(x.data(), 3, cols, 0, kFewRows, 0, cols, few.data());
    } else {
      for (std::size_t b = 0; b < 3; ++b) std::memcpy(&few[b * stride], &x[b * cols], cols * sizeof(float));
    }
    k.sparse.transpose_tile(x.data(), batch, cols, 0, 32, 0, cols, tile.data());
    c.add(tile);
    const void* positions = layout == Layout::index16  ? static_cast<const void*>(columns.data())
                            : layout == Layout::index8 ? static_cast<const void*>(gaps.data())
                                                       : static_cast<const void*>(mask.data());
    for (int kind = 0; kind < 4; ++kind) {
      constexpr Float types[] = {Float::f32, Float::f16, Float::bf16, Float::f32};
      const void* numbers_of_kind = kind == 0   ? static_cast<const void*>(values.data())
                                    : kind == 3 ? nullptr
                                                : static_cast<const void*>(halves.data());
      const Sparse w = {layout, positions, offsets.data(), numbers_of_kind, types[kind], kind == 3 ? &q : nullptr,
                        count,  rows,      cols,           row_bytes};
      k.sparse.linear(w, few.data(), stride, 3, bias.data(), y.data(), 0, rows);
      c.add(y);
      k.sparse.linear(w, one.data(), stride, 1, bias.data(), y.data(), 0, rows);
      c.add(y);
      k.sparse.linear_tile(w, tile.data(), 32, batch, 0, nullptr, y.data(), 0, rows);
      c.add(y);
    }
  }
}

void digest_sparse(const Kernels& k) {
  for (std::size_t n : kSizes) {
    for (std::size_t offset : kOffsets) {
      digest_prune<std::uint16_t>(k, Float::f16, "f16", n, offset);
      digest_prune<std::uint16_t>(k, Float::bf16, "bf16", n, offset);
      digest_prune<std::uint32_t>(k, Float::f32, "f32", n, offset);
      digest_prune<std::uint64_t>(k, Float::f64, "f64", n, offset);
      digest_bracket<std::uint32_t>(k, Float::f32, n, offset);
      digest_bracket<std::uint64_t>(k, Float::f64, n, offset);
      digest_rows<std::uint16_t>(k, n, offset);
      digest_rows<std::uint32_t>(k, n, offset);
      digest_rows<std::uint64_t>(k, n, offset);
    }
    digest_linear_sparse(k, n);
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    for (const std::string& isa : available_isas()) std::puts(isa.c_str());
    return 0;
  }
  use_isa(argv[1]);
  digest_optimizers(kernels());
  digest_quantization(kernels());
  digest_sparse(kernels());
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
