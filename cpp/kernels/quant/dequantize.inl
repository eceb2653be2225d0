// Packed codes, scales and minima to floats.

inline float param_at(const Quantized& q, const void* params, std::size_t at) {
  return q.half ? float_of_half(static_cast<const std::uint16_t*>(params)[at]) : static_cast<const float*>(params)[at];
}

// Parameters [at, at + n) as float32, filled up with zeros to a multiple of 16. Whole vectors are read, but never
// beyond the last parameter of the matrix: memory may end there.
[[gnu::noinline]] void load_params(const Quantized& q, const void* params, std::size_t at, std::size_t n, float* out) {
  constexpr std::size_t lanes = kLanes<float>;
  const std::size_t all = q.param_stride ? q.rows * q.groups : q.groups;
  const std::uint16_t* halves = static_cast<const std::uint16_t*>(params) + at;
  const float* floats = static_cast<const float*>(params) + at;
  std::size_t i = 0;
  for (; i < n && at + i + lanes <= all; i += lanes) {
    Vec<float> v = q.half ? float_of_halves(halves + i) : load<Vec<float>>(floats + i);
    if (n - i < lanes)
      v = lane_numbers() < static_cast<std::int32_t>(n - i) ? v : Vec<float>{};  // not those of the next row
    store(out + i, v);
  }
  for (; i < n; ++i) out[i] = param_at(q, params, at + i);
  for (; i % 16 != 0; ++i) out[i] = 0.0f;
}

// The values of n codes of one group.
inline void decode(const std::uint8_t* codes, std::size_t n, float scale, float minimum, float* out) {
  constexpr std::size_t lanes = kLanes<float>;
  const Decoder value(scale, minimum);
  std::size_t i = 0;
  if (value.twice == 1.0f) {
    for (; i + lanes <= n; i += lanes) store(out + i, minimum + scale * float_of_bytes(codes + i));
  }
  for (; i + lanes <= n; i += lanes) store(out + i, value(float_of_bytes(codes + i)));
  for (; i < n; ++i) out[i] = value(static_cast<float>(codes[i]));
}

// Columns [begin, end) of one row. Codes are unpacked a buffer at a time, and parameters loaded kGroupsAtOnce at a
// time; neither boundary needs to be that of a group.
template <int Bits>
void dequantize(const Quantized& q, std::size_t row, std::size_t begin, std::size_t end, float* out) {
  const std::uint8_t* packed = q.codes + row * q.row_bytes;
  std::uint8_t buffer[kCodesAtOnce];
  PerGroup scale, minimum;
  std::size_t group = begin / q.group, group_end = (group + 1) * q.group, first = group, known = group;
  for (std::size_t at = begin; at < end;) {
    const std::size_t skip = at % 8;
    const std::size_t n = end - at < kCodesAtOnce - skip ? end - at : kCodesAtOnce - skip;
    unpack<Bits>(packed + packed_bytes(at - skip, Bits), skip + n, buffer);
    const std::uint8_t* codes = buffer + skip;
    for (const std::size_t stop = at + n; at < stop;) {
      if (group == known) {
        first = group;
        known = q.groups - group < kGroupsAtOnce ? q.groups : group + kGroupsAtOnce;
        load_params(q, q.scale, row * q.param_stride + group, known - group, scale);
        load_params(q, q.minimum, row * q.param_stride + group, known - group, minimum);
      }
      const std::size_t size = (group_end < stop ? group_end : stop) - at;
      decode(codes, size, scale[group - first], minimum[group - first], out);
      codes += size;
      out += size;
      at += size;
      if (at == group_end) {
        ++group;
        group_end += q.group;
      }
    }
  }
}

void dequantize_any(const Quantized& q, std::size_t row, std::size_t begin, std::size_t end, float* out) {
  by_bits(q.bits, [&](auto b) { dequantize<b.value>(q, row, begin, end, out); });
}
