// AVX-512 F, BW, VL, DQ and VNNI (Cascade Lake, Ice Lake, Zen 4 and later).
#define KTFX_NAME avx512
#define KTFX_LANES 16
#define KTFX_INT 5
#define KTFX_AMX 0

#if defined(__x86_64__)
#include "tiles.inl"

namespace ktfx {
const KernelTable* table_avx512() {
  static const KernelTable table = KTFX_NAME::make_table("avx512");
  return &table;
}
}  // namespace ktfx
#endif
