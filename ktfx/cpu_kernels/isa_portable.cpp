// Any processor: GCC's vector extensions, which become SSE2 on x86-64 and NEON on aarch64.
#define KTFX_NAME portable
#define KTFX_LANES 16
#define KTFX_INT 0
#define KTFX_AMX 0

#include "tiles.inl"

namespace ktfx {
const KernelTable* table_portable() {
  static const KernelTable table = KTFX_NAME::make_table("portable");
  return &table;
}
}  // namespace ktfx
