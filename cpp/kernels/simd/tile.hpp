// AMX: eight registers, each a tile of up to 16 rows of 64 bytes, and products of whole matrices of bytes.

#if defined(__AMX_INT8__)
// The tiles of a thread while it multiplies [16 rows][bytes] with [bytes / 4][16 columns][4 bytes]: sums in tiles 0 to
// 3, left factors in tiles 4 and 5, right ones in tiles 6 and 7. The end of its life returns the registers, as a thread
// switch that must save them takes longer.
class TileRegisters {
 public:
  explicit TileRegisters(std::size_t bytes) {
    struct {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 0, 0, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 0, 0};
    } config;
    for (int i = 0; i < 2; ++i) {
      config.row_bytes[4 + i] = static_cast<std::uint16_t>(bytes);
      config.rows[6 + i] = static_cast<std::uint8_t>(bytes / 4);
    }
    static_assert(sizeof config == 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int Tile>
inline void tile_load(const void* from, std::size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
inline void tile_store(void* to, std::size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}

// Tile Sum = tile A * tile B, of signed bytes.
template <int Sum, int A, int B>
inline void tile_product() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Sum));
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}
#endif
