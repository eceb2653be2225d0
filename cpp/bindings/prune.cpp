// Magnitude pruning: find the exact k-th magnitude by counting, then write zeros in one pass.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <memory>

#include "bindings/storage.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastopt {
namespace {

constexpr std::size_t kPruneChunk = 1 << 16;  // elements

struct Weights {
  char* data;
  std::size_t size;
  Float type;
  int width;  // bits
};

Weights weights(py::handle object, Access access, const Label& label) {
  const auto* array = array_of(object, label);
  const Float type = float_of(array, label);
  check_layout(object, array, access, label);
  return {array->data, size_of(array), type, 8 * static_cast<int>(width_of(type))};
}

// Checks that all arrays can be changed in place together, before the first of them is changed.
void check_weights(const py::list& names, const py::list& arrays) {
  Disjoint memory;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    const Label label{"array", names[i]};
    const Weights w = weights(arrays[i], Access::write, label);
    memory.writes(w.data, w.size * static_cast<std::size_t>(w.width) / 8, label);
  }
  memory.check();
}

double bytes_of(const Weights& w) { return static_cast<double>(w.size) * w.width / 8; }

struct Rank {
  std::uint64_t key, below, ties;
};

// The k-th smallest magnitude by counting digits of 16 bits, the highest first: one pass for each digit.
Rank count_digits(const std::vector<Weights>& all, std::uint64_t k) {
  const Kernels& table = kernels();
  Rank rank{0, 0, 0};
  const std::size_t slices = num_threads();
  std::vector<std::uint64_t> bins(slices * kHistogramBins);
  for (int shift = all.front().width - 16; shift >= 0; shift -= 16) {
    std::fill(bins.begin(), bins.end(), 0);
    for (const Weights& w : all) {
      parallel_for(slices, bytes_of(w), [&](std::size_t begin, std::size_t end) {
        table.prune.magnitude_histogram(w.type, w.data, w.size * begin / slices, w.size * end / slices, rank.key, shift,
                                        bins.data() + begin * kHistogramBins);
      });
    }
    for (std::size_t digit = 0;; ++digit) {
      rank.ties = 0;
      for (std::size_t s = 0; s < slices; ++s) rank.ties += bins[s * kHistogramBins + digit];
      if (rank.below + rank.ties >= k) {
        rank.key = rank.key << 16 | digit;
        break;
      }
      rank.below += rank.ties;
    }
  }
  return rank;
}

template <class Key>
class Selection {
 public:
  Selection(const std::vector<Weights>& all, std::size_t total) : all_(all), total_(total) {}

  // The k-th smallest magnitude: a sample gives a bracket, and one pass counts the magnitudes below it and collects
  // those in it. Returns false if the sample was misleading, as that of a sorted or clustered weight can be.
  bool find(std::uint64_t k, Rank& rank) {
    bracket(k);
    std::uint64_t below = 0;
    std::vector<Key> found;
    for (const Weights& w : all_) {
      if (!collect(w, below, found)) return false;
    }
    if (k <= below || k > below + found.size()) return false;
    rank = {select(found, k - below), below, 0};
    for (const Key key : found) {
      rank.below += key < rank.key;
      rank.ties += key == rank.key;
    }
    return true;
  }

 private:
  static constexpr std::size_t kSlices = 4096;
  static constexpr std::size_t kRun = 16, kRuns = 4096;  // a sample takes cache lines, not single elements

  // The k-th smallest magnitude in the bracket: find its slice among equal slices of the bracket, then select in that.
  Key select(const std::vector<Key>& found, std::uint64_t k) const {
    int shift = 0;
    while ((high_ - low_) >> shift >= kSlices) ++shift;
    const auto slice_of = [&](Key key) { return (key - low_) >> shift; };
    std::vector<std::uint64_t> counts(kSlices);
    for (const Key key : found) ++counts[slice_of(key)];
    std::size_t slice = 0;
    for (; k > counts[slice]; ++slice) k -= counts[slice];
    std::vector<Key> few;
    for (const Key key : found) {
      if (slice_of(key) == slice) few.push_back(key);
    }
    const auto middle = few.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(few.begin(), middle, few.end());
    return *middle;
  }

  void bracket(std::uint64_t k) {
    low_ = 0;
    high_ = std::numeric_limits<Key>::max() >> 1;
    if (total_ <= 2 * kRun * kRuns) return;
    std::vector<Key> sample(kRun * kRuns);
    std::size_t n = 0;
    for (const Weights& w : all_) {
      const std::size_t runs = w.size / kRun,
                        want = static_cast<std::size_t>(static_cast<double>(w.size) / static_cast<double>(total_) *
                                                        static_cast<double>(kRuns));
      for (std::size_t i = 0; i < want; ++i) {
        const std::size_t at = kRun * (runs * i / want);
        n += kernels().prune.collect_magnitudes(w.type, w.data, at, at + kRun, 0, high_, sample.data() + n, kRun).found;
      }
    }
    if (n < kRun * kRuns / 2) return;
    sample.resize(n);
    // Six standard deviations of an independent sample.
    const double size = static_cast<double>(n), at = static_cast<double>(k) / static_cast<double>(total_) * size;
    const double margin = 3 * std::sqrt(size);
    auto from = sample.begin();
    const auto pick = [&](double place) {
      const auto nth = sample.begin() + static_cast<std::ptrdiff_t>(place);
      std::nth_element(from, nth, sample.end());
      from = nth;  // smaller ones lie before it
      return *nth;
    };
    if (at - margin > 0) low_ = pick(at - margin);
    if (at + margin < size) high_ = pick(at + margin);
  }

  bool collect(const Weights& w, std::uint64_t& below, std::vector<Key>& found) const {
    const std::size_t slices = std::min<std::size_t>(num_threads(), 1 + w.size / kPruneChunk);
    const bool everything = total_ <= 2 * kRun * kRuns;
    const std::size_t room = everything ? w.size : w.size / slices / 8 + kPruneChunk;
    std::vector<std::unique_ptr<Key[]>> keys(slices);
    std::vector<Collected> counts(slices);
    for (auto& part : keys) part.reset(new Key[room]);
    parallel_for(slices, bytes_of(w), [&](std::size_t begin, std::size_t end) {
      for (std::size_t s = begin; s < end; ++s) {
        counts[s] = kernels().prune.collect_magnitudes(w.type, w.data, w.size * s / slices, w.size * (s + 1) / slices,
                                                       low_, high_, keys[s].get(), room);
      }
    });
    for (std::size_t s = 0; s < slices; ++s) {
      if (counts[s].found > room) return false;
      below += counts[s].below;
      found.insert(found.end(), keys[s].get(), keys[s].get() + counts[s].found);
    }
    return true;
  }

  const std::vector<Weights>& all_;
  std::size_t total_;
  std::uint64_t low_ = 0, high_ = 0;
};

// The k-th smallest magnitude (k from 1) of all arrays: its bits, and how many magnitudes are smaller and equal.
py::tuple kth_magnitude(const py::list& arrays, std::uint64_t k) {
  std::vector<Weights> all;
  std::size_t total = 0;
  for (const py::handle object : arrays) {
    all.push_back(weights(object, Access::read, {"w"}));
    if (all.back().type != all.front().type)
      throw py::type_error("w: arrays that are pruned together must have one dtype");
    total += all.back().size;
  }
  if (k < 1 || k > total)
    throw py::value_error("k: expected 1 to " + std::to_string(total) + ", got " + std::to_string(k));
  Rank rank{};
  {
    const py::gil_scoped_release released;
    const Float type = all.front().type;
    const bool found = type == Float::f32   ? Selection<std::uint32_t>(all, total).find(k, rank)
                       : type == Float::f64 ? Selection<std::uint64_t>(all, total).find(k, rank)
                                            : false;
    if (!found) rank = count_digits(all, k);
  }
  return py::make_tuple(rank.key, rank.below, rank.ties);
}

std::uint8_t* flags_of(py::handle kept, std::size_t size) {
  const View<bool> v = view<bool>(kept, {"kept"});
  require_size(v.size, size, {"kept"});
  return reinterpret_cast<std::uint8_t*>(v.data);
}

// Prunes elements whose magnitude is below `key`, and all but the first `keep_ties` of those equal to it. Writes +0 to
// them if `write` is set, and the mask of the others to `kept` if that is not None. Returns how many ties are kept.
std::size_t prune(const py::array& w, bool write, const py::object& kept, std::uint64_t key, std::size_t keep_ties) {
  const Weights to = weights(w, write ? Access::write : Access::read, {"w"});
  std::uint8_t* flags = kept.is_none() ? nullptr : flags_of(kept, to.size);
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  std::vector<std::size_t> ties(ceil_div(to.size, kPruneChunk));
  std::size_t total = 0;
  if (keep_ties > 0) {
    for_chunks(to.size, kPruneChunk, bytes_of(to), [&](std::size_t i, std::size_t begin, std::size_t end) {
      ties[i] = k.prune.count_ties(to.type, to.data, begin, end, key);
    });
    for (std::size_t& count : ties) {  // the first `keep_ties` of them stay
      count = std::min(count, keep_ties - total);
      total += count;
    }
  }
  for_chunks(to.size, kPruneChunk, bytes_of(to), [&](std::size_t i, std::size_t begin, std::size_t end) {
    k.prune.prune(to.type, {to.data, write ? to.data : nullptr, flags, key, ties[i]}, begin, end);
  });
  return total;
}

// Writes to `kept` the mask of the n largest of every m elements of a row.
void keep_largest(const py::array& w, std::size_t n, std::size_t m, const py::array& kept) {
  require_2d(w, {"w"});
  const Weights from = weights(w, Access::read, {"w"});
  std::uint8_t* flags = flags_of(kept, from.size);
  if (m == 0) throw py::value_error("m: expected at least 1, got 0");
  const std::size_t rows = dimension(w, 0), cols = dimension(w, 1),
                    row_bytes = cols * static_cast<std::size_t>(from.width) / 8;
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(rows, bytes_of(from), [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r) {
      k.prune.keep_largest(from.type, from.data + r * row_bytes, cols, n, m, flags + r * cols);
    }
  });
}

// Writes +0 where kept is false.
void clear(const py::array& w, const py::array& kept) {
  const Weights to = weights(w, Access::write, {"w"});
  const std::uint8_t* flags = flags_of(kept, to.size);
  const Kernels& k = kernels();
  const py::gil_scoped_release released;
  parallel_for(to.size, bytes_of(to),
               [&](std::size_t begin, std::size_t end) { k.prune.clear(to.width / 8, to.data, flags, begin, end); });
}

}  // namespace

void bind_prune(py::module_& m) {
  m.def("check_weights", &check_weights, py::arg("names"), py::arg("arrays"));
  m.def("kth_magnitude", &kth_magnitude, py::arg("arrays"), py::arg("k"));
  m.def("prune", &prune, py::arg("w"), py::arg("write"), py::arg("kept"), py::arg("key"), py::arg("keep_ties"));
  m.def("keep_largest", &keep_largest, py::arg("w"), py::arg("n"), py::arg("m"), py::arg("kept"));
  m.def("clear", &clear, py::arg("w"), py::arg("kept"));
}

}  // namespace fastopt
