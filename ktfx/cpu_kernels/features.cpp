// Which instruction sets this processor and its operating system allow, and which one is in force.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ktfx {
namespace {

#if defined(__x86_64__)
uint64_t xcr0() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

struct Features {
  bool avx2 = false, avx512 = false, amx = false;
  bool amx_built_in = false;  // whatever the operating system allows
  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!osxsave) return;
    const uint64_t state = xcr0();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    amx_built_in = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
    avx2 = (state & 0x6) == 0x6 && (b >> 5 & 1) && fma && f16c;
    avx512 = avx2 && (state & 0xe6) == 0xe6 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) &&
             (c >> 11 & 1);
    // Leaf 7's largest subleaf is in a; AVX512-BF16, which all AMX processors have, is told by its subleaf 1.
    const bool bf16 = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    // The kernel hands out the tile registers' state only when asked (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
    amx = avx512 && bf16 && amx_built_in && (state & 0x60000) == 0x60000 &&
          syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }
};
const Features& features() {
  static const Features f;
  return f;
}
#endif

// Best first.
const KernelTable* available(int i) {
#if defined(__x86_64__)
  const Features& f = features();
  if (f.amx && i-- == 0) return table_amx();
  if (f.avx512 && i-- == 0) return table_avx512();
  if (f.avx2 && i-- == 0) return table_avx2();
#endif
  if (i-- == 0) return table_portable();
  if (i-- == 0) return table_amx_emulated();
  return nullptr;
}

const KernelTable* find(const char* name) {
  for (int i = 0; const KernelTable* t = available(i); ++i)
    if (!strcmp(t->name, name)) return t;
  return nullptr;
}

std::atomic<const KernelTable*> in_force{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* t = in_force.load(std::memory_order_acquire);
  if (!t) {
    const char* wanted = getenv("KTFX_CPU_ISA");
    t = wanted && *wanted ? find(wanted) : nullptr;
    if (!t) t = available(0);
    in_force.store(t, std::memory_order_release);
  }
  return *t;
}

bool memory_is_far() {
#if defined(__x86_64__)
  return features().amx_built_in;
#else
  return false;
#endif
}

}  // namespace ktfx

extern "C" {

int32_t ktfx_abi(void) { return KTFX_ABI; }
const char* ktfx_isa(void) { return ktfx::kernels().name; }

const char* ktfx_isas(void) {
  static const std::string names = [] {
    std::string s;
    for (int i = 0; const ktfx::KernelTable* t = ktfx::available(i); ++i) s += (i ? "," : "") + std::string(t->name);
    return s;
  }();
  return names.c_str();
}

int32_t ktfx_set_isa(const char* name) {
  const ktfx::KernelTable* t = ktfx::find(name);
  if (!t) return KTFX_BAD_ARGUMENT;
  ktfx::in_force.store(t, std::memory_order_release);
  return KTFX_OK;
}

}  // extern "C"
