// The tile kernels, written once over GCC's vector extensions and compiled once for every instruction set.
//
// The including file defines KTFX_NAME (its namespace), KTFX_LANES (8 or 16 floats a vector), KTFX_INT (0 portable, 2
// AVX2, 5 AVX-512 with VNNI) and KTFX_AMX (0 none, 1 emulated, 2 real: such a file takes all but AMX from another
// table). Nothing here may use a template or inline
// function of the standard library: the linker could then take a copy with this file's instructions for all the others.
//
// A tile is 16 outputs, its bytes ordered by input so that one 64-byte row holds, for every output, the next 1 (F32,
// 2 for BF16 and F16, 4 for FP8 and INT8, 8 for the 4-bit formats) inputs. One 32-bit lane is one output, so a
// dot product needs no horizontal sum, and a BF16 or INT8 tile is an AMX B tile as it stands.
#include "kernel_table.h"

#if KTFX_INT > 0 || KTFX_AMX == 2
#include <immintrin.h>
#endif

// Sums live in arrays of vectors; every loop over one must unroll whole, or the array goes to memory.
#define UNROLL _Pragma("GCC unroll 16")

// Holds a sum in its register, at this point of the program: GCC otherwise hoists a tile's multiplications above its
// additions, and the sums that then lack a register go to memory.
#if KTFX_INT > 0
#define HOLD(v) asm volatile("" : "+v"(v))
#else
#define HOLD(v)
#endif

#define KTFX_INLINE static inline __attribute__((always_inline))
#define KTFX_MEMBER inline __attribute__((always_inline))

namespace ktfx {
namespace KTFX_NAME {
namespace {

constexpr int L = KTFX_LANES;
constexpr int V = kTile / L;  // vectors a tile row

typedef float vf __attribute__((vector_size(L * 4)));
typedef int32_t vi __attribute__((vector_size(L * 4)));
typedef uint32_t vu __attribute__((vector_size(L * 4)));
typedef uint16_t vh __attribute__((vector_size(L * 2)));
typedef uint8_t vb __attribute__((vector_size(L)));
typedef uint16_t vs __attribute__((vector_size(L * 4)));
typedef int16_t vw __attribute__((vector_size(L * 4)));

template <class T>
KTFX_INLINE T load(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
KTFX_INLINE void store(void* p, T v) {
  __builtin_memcpy(p, &v, sizeof v);
}
KTFX_INLINE vf splat(float x) {  // not vf{} + x, which costs an addition for the sake of -0
#if KTFX_LANES == 8
  return vf{x, x, x, x, x, x, x, x};
#else
  return vf{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#endif
}
KTFX_INLINE vi splat(int32_t x) { return vi{} + x; }
KTFX_INLINE vf as_float(vi v) { return (vf)v; }
KTFX_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
KTFX_INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
// b where either is a NaN.
KTFX_INLINE vf vmax(vf a, vf b) {
#if KTFX_INT == 2
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif KTFX_INT == 5
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return pick(a > b, a, b);
#endif
}
KTFX_INLINE vf vmin(vf a, vf b) {
#if KTFX_INT == 2
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif KTFX_INT == 5
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return pick(a < b, a, b);
#endif
}
KTFX_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
// To the nearest integer, ties to even, for |x| < 2^22.
KTFX_INLINE vi nearest(vf x) { return (vi)(x + 12582912.0f) - 0x4b400000; }

KTFX_INLINE vi widen(vh h) {
#if KTFX_INT == 2
  return (vi)_mm256_cvtepu16_epi32((__m128i)h);
#elif KTFX_INT == 5
  return (vi)_mm512_cvtepu16_epi32((__m256i)h);
#else
  return __builtin_convertvector(h, vi);
#endif
}
KTFX_INLINE vi widen(vb b) {
#if KTFX_INT == 2
  return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)b));
#elif KTFX_INT == 5
  return (vi)_mm512_cvtepu8_epi32((__m128i)b);
#else
  return __builtin_convertvector(b, vi);
#endif
}
KTFX_INLINE vf bf16_to_float(vh h) { return as_float(widen(h) << 16); }

// sum += v * x, for one row. With AVX2, twelve sums, two weights, a mask and x take all sixteen registers: GCC, left to
// choose, copies sums and sends some through memory, so x has a register of its own. AVX-512 takes x from memory.
KTFX_INLINE void multiply_add(vf (&sum)[V], const vf (&v)[V], const float* x) {
#if KTFX_INT == 2
  asm volatile("vbroadcastss %4, %%ymm15\n\tvfmadd231ps %2, %%ymm15, %0\n\tvfmadd231ps %3, %%ymm15, %1"
               : "+x"(sum[0]), "+x"(sum[1])
               : "x"(v[0]), "x"(v[1]), "m"(*x)
               : "xmm15");
#else
  UNROLL
  for (int t = 0; t < V; ++t) {
    sum[t] += v[t] * splat(*x);
    HOLD(sum[t]);
  }
#endif
}

KTFX_INLINE vf half_to_float(vh h) {
#if KTFX_INT == 2
  return (vf)_mm256_cvtph_ps((__m128i)h);
#elif KTFX_INT == 5
  return (vf)_mm512_cvtph_ps((__m256i)h);
#else
  vi u = widen(h);
  vf big = as_float((u & 0x7fff) << 13) * 0x1p112f;  // exact for subnormals too; inf and NaN are put right below
  big = pick((u & 0x7c00) == 0x7c00, as_float(((u & 0x7fff) << 13) | 0x7f800000), big);
  return as_float((vi)big | ((u & 0x8000) << 16));
#endif
}

KTFX_INLINE float half_to_float1(uint16_t h) {
  uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
  if ((h & 0x7c00) == 0x7c00) magnitude |= 0x7f800000;
  float f;
  __builtin_memcpy(&f, &magnitude, 4);
  if ((h & 0x7c00) != 0x7c00) f *= 0x1p112f;
  return h & 0x8000 ? -f : f;
}

// ---------------------------------------------------------------------------------------------------------------------
// Float tiles: c[mr][16] = sum over k of w[k][16] x[k][mr] (times the block's scale for FP8).

// Input 4 q + i of vector t, as floats.
template <int F>
KTFX_INLINE vf load1(const uint8_t* w, int64_t q, int i, int t) {
  if constexpr (F == KTFX_FMT_F32) return load<vf>(w + (q * 4 + i) * 64 + t * L * 4);
  if constexpr (F == KTFX_FMT_F16) return half_to_float(load<vh>(w + (q * 4 + i) * 32 + t * L * 2));
  if constexpr (F == KTFX_FMT_BF16) {
    const vi v = load<vi>(w + (q * 2 + i / 2) * 64 + t * L * 4);
    return as_float(i % 2 ? v & (int32_t)0xffff0000 : v << 16);
  }
  // e4m3 moved into a float's exponent and mantissa: 2^-120 times the value, subnormals included.
  const vi v = load<vi>(w + q * 64 + t * L * 4);
  return as_float(((v << (24 - 8 * i)) >> 4) & (int32_t)0x87f00000);
}

constexpr int row_bytes4(int format) {  // bytes of a tile for four inputs
  return format == KTFX_FMT_F32 ? 256 : format == KTFX_FMT_BF16 || format == KTFX_FMT_F16 ? 128 : 64;
}

// Fetches a tile's bytes some time before they are read, and past its end those of the tile that comes next: what lies
// behind it in memory is often another thread's.
//
// From kFarAhead on to the second cache: the first has room for a dozen lines on their way, which is less than memory
// that many cores share takes to answer. On two cores of an AMX machine, 4 KiB ahead: bf16 5 % faster than to the first
// cache, int8 8 to 10 %.
struct Fetcher {
  const uint8_t* end;
  int64_t skip, ahead;
  bool far;
  KTFX_MEMBER Fetcher(const TileArgs* a, int64_t bytes) {
    end = a->w + bytes;
    skip = (a->next ? a->next : a->w) - end;
    ahead = a->distance ? a->distance : kAhead;
    far = ahead >= kFarAhead;
  }
  KTFX_MEMBER void line(const uint8_t* at) const {
    const uint8_t* p = at + ahead;
    p = p < end ? p : p + skip;
    if (far) __builtin_prefetch(p, 0, 2);
    else
      __builtin_prefetch(p);
  }
};

KTFX_INLINE void fetch_ahead(Ahead& ahead) {
  __builtin_prefetch(ahead.at, 0, 2);
  ahead.at += ahead.step;
}

// Near: the weights were fetched before, and others are fetched meanwhile.
template <int F, int M, bool Near = false>
void float_tile(const TileArgs* a) {
  // Enough independent sums to hide the latency of a multiply-add, also for one row.
  constexpr int U = M * V >= 8 ? 1 : M * V >= 4 ? 2 : 4;
  const float* x = (const float*)a->x;
  const uint8_t* w = a->w;
  int32_t k = a->k0;
  bool first = a->first;
  const Fetcher fetch(a, Near ? 0 : (int64_t)a->m->Kp / 4 * row_bytes4(F));
  Ahead ahead = a->ahead;
  while (k < a->k1) {
    int32_t end = F == KTFX_FMT_FP8 && k + kFp8Block < a->k1 ? k + kFp8Block : a->k1;
    vf acc[U][M][V] = {};
    for (int64_t q = k / 4; q < end / 4; ++q) {
      if constexpr (Near) fetch_ahead(ahead);
      else
        for (int i = 0; i < row_bytes4(F); i += 64) fetch.line(w + q * row_bytes4(F) + i);
      UNROLL
      for (int i = 0; i < 4; ++i) {
        vf v[V];
        UNROLL
        for (int t = 0; t < V; ++t) {
          v[t] = load1<F>(w, q, i, t);
          HOLD(v[t]);
        }
        UNROLL
        for (int r = 0; r < M; ++r) multiply_add(acc[i % U][r], v, x + (q * 4 + i) * M + r);
      }
    }
    UNROLL
    for (int r = 0; r < M; ++r)
      UNROLL
      for (int t = 0; t < V; ++t) {
        vf sum = acc[0][r][t];
        UNROLL
        for (int u = 1; u < U; ++u) sum += acc[u][r][t];
        if constexpr (F == KTFX_FMT_FP8)
          sum *= load<vf>(w + a->m->scale_offset + ((int64_t)(k / kFp8Block) * kTile + t * L) * 4) * 0x1p60f;
        float* c = a->c + r * kTile + t * L;
        if (!first) sum += load<vf>(c);
        store(c, sum);
      }
    first = false;
    k = end;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Integer tiles: per block of activations an exact integer dot product, then one multiply-add with both scales.

// Pairs of int16: acc[lane] += a.lo b.lo + a.hi b.hi.
KTFX_INLINE vi dot16(vi acc, vi w, vi x) {
#if KTFX_INT == 2
  return (vi)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16((__m256i)w, (__m256i)x));
#elif KTFX_INT == 5
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#else
  return acc + ((w << 16) >> 16) * ((x << 16) >> 16) + (w >> 16) * (x >> 16);
#endif
}

#if KTFX_INT != 2
// Quads of an unsigned and a signed byte: acc[lane] += sum of four products.
KTFX_INLINE vi dot8(vi acc, vi w, vi x) {
#if KTFX_INT == 5
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#else
  UNROLL
  for (int j = 0; j < 32; j += 8) acc += ((w >> j) & 255) * ((x << (24 - j)) >> 24);
  return acc;
#endif
}
#endif

// Bytes of a row to int16 pairs: inputs 0 and 2 (odd false) or 1 and 3.
KTFX_INLINE vi widen_signed(vi v, bool odd) {
#if KTFX_INT == 2
  return (vi)_mm256_srai_epi16(odd ? (__m256i)v : _mm256_slli_epi16((__m256i)v, 8), 8);
#elif KTFX_INT == 5
  return (vi)_mm512_srai_epi16(odd ? (__m512i)v : _mm512_slli_epi16((__m512i)v, 8), 8);
#else
  return odd ? ((v << 16) >> 24 & 0xffff) | (v >> 24 << 16) : ((v << 24) >> 24 & 0xffff) | ((v << 8) >> 24 << 16);
#endif
}
KTFX_INLINE vi widen_unsigned(vi v, bool odd) { return (odd ? (vi)((vu)v >> 8) : v) & 0x00ff00ff; }

// e2m1 codes to twice their value plus 12, so that every 4-bit format is an unsigned byte less an offset.
KTFX_INLINE vi e2m1_bytes(vi codes) {
  constexpr uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
#if KTFX_INT == 2
  return (vi)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load<__m128i>(table)), (__m256i)codes);
#elif KTFX_INT == 5
  return (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load<__m128i>(table)), (__m512i)codes);
#else
  vi out = {};
  for (int i = 0; i < L; ++i)
    for (int b = 0; b < 32; b += 8) out[i] |= (int32_t)((uint32_t)table[codes[i] >> b & 15] << b);
  return out;
#endif
}

// The low or high nibbles of a row as unsigned bytes.
template <int F>
KTFX_INLINE vi nibbles(vi v, bool high) {
  const vi codes = (high ? (vi)((vu)v >> 4) : v) & 0x0f0f0f0f;
  return F == KTFX_FMT_MXFP4 ? e2m1_bytes(codes) : codes;
}

// Pairs of int16, a quarter (4-bit formats) or half of a row: bits 0 and 1 of `piece` are odd inputs, high nibbles.
template <int F>
KTFX_INLINE vi pairs_of(vi v, int piece) {
  if constexpr (F == KTFX_FMT_INT8) return widen_signed(v, piece);
  if constexpr (F == KTFX_FMT_MXFP4) return widen_unsigned(nibbles<F>(v, piece / 2), piece % 2);
  return (vi)((vs)v >> (piece % 2 * 8 + piece / 2 * 4)) & 0x000f000f;
}

template <int S>
KTFX_INLINE vf load_scales(const uint8_t* p) {
  if constexpr (S == KTFX_F32) return load<vf>(p);
  if constexpr (S == KTFX_BF16) return bf16_to_float(load<vh>(p));
  if constexpr (S == KTFX_F16) return half_to_float(load<vh>(p));
  return as_float(widen(load<vb>(p)) << 23) * 0.5f;  // the codes are twice the value
}
constexpr int scale_bytes(int dtype) { return dtype == KTFX_F32 ? 4 : dtype == KTFX_E8M0 ? 1 : 2; }

template <int F>
constexpr int32_t offset_of() {
  return F == KTFX_FMT_INT4 ? 8 : F == KTFX_FMT_MXFP4 ? 12 : 0;
}

// The float sums of an integer tile, in registers where there are some left, else in c.
template <int F, int S, int M>
struct BlockSums {
  const TileArgs* a;
  const uint8_t *scales, *zeros, *next_scales;
  int group_shift;
  static constexpr bool kept = M <= 2 || L == 16;
  vf sum[kept ? M : 1][V];

  KTFX_MEMBER BlockSums(const TileArgs* args) : a(args) {
    scales = a->w + a->m->scale_offset;
    zeros = a->w + a->m->zero_offset;
    next_scales = (a->next ? a->next : a->w) + a->m->scale_offset;
    group_shift = F == KTFX_FMT_INT8 ? 0 : __builtin_ctz((unsigned)a->m->group);
    UNROLL
    for (int r = 0; r < M; ++r)
      UNROLL
      for (int t = 0; t < V; ++t) {
        if constexpr (kept) sum[r][t] = vf{};
        else if (a->first) store(a->c + r * kTile + t * L, vf{});
      }
  }

  // Scales lie behind the tile's bytes and are few: no stream of their own that the processor would notice. Fetches
  // those of the next tile, a line a while.
  KTFX_MEMBER void ahead(int32_t k) const {
    if constexpr (F != KTFX_FMT_INT8)
      __builtin_prefetch(next_scales + ((int64_t)(k >> group_shift) * kTile) * scale_bytes(S));
  }

  // Block number b, from input k on.
  KTFX_MEMBER void add(int64_t b, int32_t k, vi (&acc)[M][V]) {
    const float* dx = a->dx + b * M;
    const int32_t* sx = a->sx + b * M;
    const int64_t g = (int64_t)(k >> group_shift) * kTile;
    UNROLL
    for (int t = 0; t < V; ++t) {
      vf scale = splat(1.0f);
      vi zero = {};
      if constexpr (F != KTFX_FMT_INT8) scale = load_scales<S>(scales + (g + t * L) * scale_bytes(S));
      if constexpr (F == KTFX_FMT_INT4ZP) zero = widen(load<vb>(zeros + g + t * L));
      UNROLL
      for (int r = 0; r < M; ++r) {
        vi exact = acc[r][t];
        if constexpr (F == KTFX_FMT_INT4ZP) exact -= zero * sx[r];
        if constexpr (offset_of<F>() != 0) exact -= splat(offset_of<F>() * sx[r]);
        const vf factor = F == KTFX_FMT_INT8 ? splat(dx[r]) : scale * splat(dx[r]);
        if constexpr (kept) {
          sum[r][t] += to_float(exact) * factor;
        } else {
          float* c = a->c + r * kTile + t * L;
          store(c, to_float(exact) * factor + load<vf>(c));
        }
      }
    }
  }

  KTFX_MEMBER void finish() {
    if constexpr (!kept) return;
    UNROLL
    for (int r = 0; r < M; ++r)
      UNROLL
      for (int t = 0; t < V; ++t) {
        float* c = a->c + r * kTile + t * L;
        if constexpr (kept) store(c, a->first ? sum[r][t] : sum[r][t] + load<vf>(c));
      }
  }
};

// One row of an integer tile: 64 bytes times the next 4 or 8 inputs of every row.
//
// AVX-512's dot products take five cycles to add to a sum, so one row of one tile needs several sums side by side.
template <int M>
constexpr int chains() {
  return KTFX_INT != 5 || M >= 4 ? 1 : M >= 2 ? 2 : 4;
}

template <int M, int U>
KTFX_INLINE void join_chains(vi (&acc)[U][M][V]) {
  UNROLL
  for (int u = 1; u < U; ++u)
    UNROLL
    for (int r = 0; r < M; ++r)
      UNROLL
      for (int t = 0; t < V; ++t) acc[0][r][t] += acc[u][r][t];
}

template <int F, int M, int U>
KTFX_INLINE void int16_row(const uint8_t* row, const int32_t* x, int at, vi (&acc)[U][M][V]) {
  constexpr int pieces = F == KTFX_FMT_INT8 ? 2 : 4;  // vectors of pairs in a row
  UNROLL
  for (int i = 0; i < pieces; ++i) {
    vi v[V];
    UNROLL
    for (int t = 0; t < V; ++t) v[t] = pairs_of<F>(load<vi>(row + t * L * 4), i);
    const int32_t* p = x + i / 2 * M * 2 + i % 2;
    UNROLL
    for (int r = 0; r < M; ++r) {
      const vi xs = splat(p[2 * r]);
      UNROLL
      for (int t = 0; t < V; ++t) {
        vi& sum = acc[(at * pieces + i) % U][r][t];
        sum = dot16(sum, v[t], xs);
        HOLD(sum);
      }
    }
  }
}

template <int F, int S, int M>
void int16_tile(const TileArgs* a) {
  constexpr int step = F == KTFX_FMT_INT8 ? 4 : 8;  // inputs a row
  constexpr int xs = step / 4 * M * 2;              // words of x a row
  const int32_t* x = (const int32_t*)a->x + (int64_t)(a->k0 / step) * xs;  // pairs: [Kp / 4][M][2]
  const uint8_t* row = a->w + (int64_t)(a->k0 / step) * 64;
  BlockSums<F, S, M> sums(a);
  const Fetcher fetch(a, (int64_t)(a->m->Kp / step) * 64);
  int64_t b = a->k0 / a->block;
  for (int32_t k = a->k0; k < a->k1; k += a->block, ++b) {
    const int32_t n = k + a->block < a->k1 ? a->block : a->k1 - k;
    vi acc[chains<M>()][M][V] = {};
    sums.ahead(k);
    // A fixed number of rows, written out: a loop this short costs as much as what is in it.
    for (int32_t done = 0; done < n; done += 32) {
      UNROLL
      for (int s = 0; s < 32 / step; ++s, row += 64, x += xs) {
        fetch.line(row);
        int16_row<F, M>(row, x, s, acc);
      }
    }
    join_chains(acc);
    sums.add(b, k, acc[0]);
  }
  sums.finish();
}

// Unsigned bytes times signed bytes over a block of 32 inputs.
template <int F, int S, int M>
void int8_tile(const TileArgs* a) {
  constexpr int rows = kBlock8 / 8;  // all blocks are whole: Kp is a multiple of 32
  const int32_t* x = (const int32_t*)a->x + (int64_t)(a->k0 / 4) * M;  // quads: [Kp / 4][M]
  const uint8_t* row = a->w + (int64_t)(a->k0 / 8) * 64;
  BlockSums<F, S, M> sums(a);
  const Fetcher fetch(a, (int64_t)(a->m->Kp / 8) * 64);
  for (int32_t k = a->k0; k < a->k1; k += kBlock8, row += rows * 64, x += kBlock8 / 4 * M) {
    vi acc[chains<M>()][M][V] = {};
    sums.ahead(k);
#if KTFX_INT == 2
    // 16-bit sums: eight of 2 * 15 * 127 (INT4) or four of 2 * 24 * 127 (MXFP4) stay below 2^15.
    constexpr int halves = F == KTFX_FMT_MXFP4 ? 2 : 1;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i part[halves][M][V];
#endif
    UNROLL
    for (int s = 0; s < rows; ++s) {
      fetch.line(row + s * 64);
      UNROLL
      for (int i = 0; i < 2; ++i) {
        vi v[V];
        UNROLL
        for (int t = 0; t < V; ++t) v[t] = nibbles<F>(load<vi>(row + s * 64 + t * L * 4), i);
        const int32_t* p = x + (s * 2 + i) * M;
        UNROLL
        for (int r = 0; r < M; ++r) {
          const vi b = splat(p[r]);
          UNROLL
          for (int t = 0; t < V; ++t) {
#if KTFX_INT == 2
            __m256i& sum = part[i % halves][r][t];
            const __m256i products = _mm256_maddubs_epi16((__m256i)v[t], (__m256i)b);
            sum = s == 0 && i < halves ? products : _mm256_add_epi16(sum, products);
            HOLD(sum);
#else
            vi& sum = acc[(s * 2 + i) % chains<M>()][r][t];
            sum = dot8(sum, v[t], b);
            HOLD(sum);
#endif
          }
        }
      }
    }
    join_chains(acc);
#if KTFX_INT == 2
    UNROLL
    for (int h = 0; h < halves; ++h)
      UNROLL
      for (int r = 0; r < M; ++r)
        UNROLL
        for (int t = 0; t < V; ++t) {
          const vi whole = (vi)_mm256_madd_epi16(part[h][r][t], ones);
          acc[0][r][t] = h ? acc[0][r][t] + whole : whole;
        }
#endif
    sums.add(k / kBlock8, k, acc[0]);
  }
  sums.finish();
}

// ---------------------------------------------------------------------------------------------------------------------
// Many rows: a tile's next inputs are unpacked once into a panel that stays in the nearest cache, and every row block
// passes over it. The kernels below know nothing of formats.

// Floats, [k][16], with FP8's scale put on; 2^-60 undoes the factor on the inputs.
void unpack_f32(const ktfx_matrix* m, const uint8_t* w, int32_t k0, int32_t k1, float* out) {
  for (int32_t k = k0; k < k1; k += 4)
    for (int t = 0; t < V; ++t) {
      vf scale = splat(1.0f);
      if (m->format == KTFX_FMT_FP8)
        scale = load<vf>(w + m->scale_offset + ((int64_t)(k / kFp8Block) * kTile + t * L) * 4) * 0x1p60f;
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const vf v = m->format == KTFX_FMT_FP8 ? load1<KTFX_FMT_FP8>(w, k / 4, i, t) : load1<KTFX_FMT_F16>(w, k / 4, i, t);
        store(out + (int64_t)(k - k0 + i) * kTile + t * L, v * scale);
      }
    }
}

KTFX_INLINE vf any_scales(const ktfx_matrix* m, const uint8_t* w, int64_t g, int t) {
  const uint8_t* p = w + m->scale_offset;
  g = g * kTile + t * L;
  switch (m->scale_dtype) {
    case KTFX_F32: return load_scales<KTFX_F32>(p + g * 4);
    case KTFX_BF16: return load_scales<KTFX_BF16>(p + g * 2);
    case KTFX_F16: return load_scales<KTFX_F16>(p + g * 2);
    default: return load_scales<KTFX_E8M0>(p + g);
  }
}

template <int F>
void unpack_i16_as(const ktfx_matrix* m, const uint8_t* w, int32_t k0, int32_t k1, int block, char* out, float* scales) {
  constexpr int step = F == KTFX_FMT_INT8 ? 4 : 8;
  for (int32_t k = k0; k < k1; k += block) {
    const int32_t end = k + block < k1 ? k + block : k1;
    for (int t = 0; t < V; ++t) {
      vi zero = splat((int32_t)(offset_of<F>() * 0x10001));
      const int64_t g = F == KTFX_FMT_INT8 ? 0 : k / m->group;
      if constexpr (F == KTFX_FMT_INT4ZP) zero = widen(load<vb>(w + m->zero_offset + g * kTile + t * L)) * 0x10001;
      store(scales + (k - k0) / block * kTile + t * L, F == KTFX_FMT_INT8 ? splat(1.0f) : any_scales(m, w, g, t));
      for (int64_t s = k / step; s < end / step; ++s) {
        const vi row = load<vi>(w + s * 64 + t * L * 4);
        char* to = out + (s * step - k0) / 4 * 128 + t * L * 4;
        UNROLL
        for (int i = 0; i < step / 2; ++i) {
          const vi pairs = pairs_of<F>(row, i);
          store(to + i * 64, F == KTFX_FMT_INT8 ? pairs : (vi)((vs)pairs - (vs)zero));
        }
      }
    }
  }
}

// int16 pairs: [k / 4][inputs 0 2 | inputs 1 3][16][2], zero points taken off, and the scales of every block.
void unpack_i16(const ktfx_matrix* m, const uint8_t* w, int32_t k0, int32_t k1, int block, void* out, float* scales) {
  switch (m->format) {
    case KTFX_FMT_INT8: return unpack_i16_as<KTFX_FMT_INT8>(m, w, k0, k1, block, (char*)out, scales);
    case KTFX_FMT_INT4: return unpack_i16_as<KTFX_FMT_INT4>(m, w, k0, k1, block, (char*)out, scales);
    case KTFX_FMT_INT4ZP: return unpack_i16_as<KTFX_FMT_INT4ZP>(m, w, k0, k1, block, (char*)out, scales);
    default: return unpack_i16_as<KTFX_FMT_MXFP4>(m, w, k0, k1, block, (char*)out, scales);
  }
}

template <int F>
void unpack_i8_as(const ktfx_matrix* m, const uint8_t* w, int32_t k0, int32_t k1, char* out, float* scales) {
  for (int32_t k = k0; k < k1; k += kBlock8)
    for (int t = 0; t < V; ++t) {
      const int64_t g = k / m->group, b = (k - k0) / kBlock8;
      const vf scale = any_scales(m, w, g, t);
      vf zero = splat((float)offset_of<F>());
      if constexpr (F == KTFX_FMT_INT4ZP) zero = to_float(widen(load<vb>(w + m->zero_offset + g * kTile + t * L)));
      store(scales + b * 2 * kTile + t * L, scale);
      store(scales + (b * 2 + 1) * kTile + t * L, scale * zero);
      const int32_t end = k + kBlock8 < k1 ? k + kBlock8 : k1;
      for (int64_t s = k / 8; s < end / 8; ++s) {
        const vi row = load<vi>(w + s * 64 + t * L * 4);
        char* to = out + (s * 8 - k0) / 4 * 64 + t * L * 4;
        store(to, nibbles<F>(row, false));
        store(to + 64, nibbles<F>(row, true));
      }
    }
}

// Unsigned bytes: [k / 4][16][4], and for every block of 32 its scales and its scales times zero points.
void unpack_i8(const ktfx_matrix* m, const uint8_t* w, int32_t k0, int32_t k1, int, void* out, float* scales) {
  switch (m->format) {
    case KTFX_FMT_INT4: return unpack_i8_as<KTFX_FMT_INT4>(m, w, k0, k1, (char*)out, scales);
    case KTFX_FMT_INT4ZP: return unpack_i8_as<KTFX_FMT_INT4ZP>(m, w, k0, k1, (char*)out, scales);
    default: return unpack_i8_as<KTFX_FMT_MXFP4>(m, w, k0, k1, (char*)out, scales);
  }
}

template <int M>
void panel_i16(const PanelArgs* a) {
  const int32_t* x = (const int32_t*)a->x;
  const float* scales = a->scales;
  const char* w = (const char*)a->panel;
  Ahead ahead = a->ahead;
  int64_t b = a->k0 / a->block;
  bool first = a->first;
  for (int32_t k = a->k0; k < a->k1; k += a->block, ++b, scales += kTile) {
    const int32_t end = k + a->block < a->k1 ? k + a->block : a->k1;
    vi acc[M][V] = {};
    for (int64_t q = k / 2; q < end / 2; q += 2, w += 128) {
      fetch_ahead(ahead);
      UNROLL
      for (int i = 0; i < 2; ++i) {
        vi v[V];
        UNROLL
        for (int t = 0; t < V; ++t) v[t] = load<vi>(w + i * 64 + t * L * 4);
        UNROLL
        for (int r = 0; r < M; ++r) {
          const vi xs = splat(x[q * M + 2 * r + i]);
          UNROLL
          for (int t = 0; t < V; ++t) {
            acc[r][t] = dot16(acc[r][t], v[t], xs);
            HOLD(acc[r][t]);
          }
        }
      }
    }
    UNROLL
    for (int r = 0; r < M; ++r)
      UNROLL
      for (int t = 0; t < V; ++t) {
        float* c = a->c + r * kTile + t * L;
        vf y = to_float(acc[r][t]) * (load<vf>(scales + t * L) * splat(a->dx[b * M + r]));
        if (!first) y += load<vf>(c);
        store(c, y);
      }
    first = false;
  }
}

// Wide bytes go up to 24 (MXFP4), others to 15: with AVX2, 16-bit sums hold 16 inputs of the one and 32 of the other.
template <int M, bool Wide>
void panel_i8(const PanelArgs* a) {
  const int32_t* x = (const int32_t*)a->x;
  const float* scales = a->scales;
  const char* w = (const char*)a->panel;
  Ahead ahead = a->ahead;
  int64_t b = a->k0 / kBlock8;
  bool first = a->first;
  for (int32_t k = a->k0; k < a->k1; k += kBlock8, ++b, scales += 2 * kTile) {
    vi acc[M][V] = {};
    const int32_t end = k + kBlock8 < a->k1 ? k + kBlock8 : a->k1;
#if KTFX_INT == 2
    constexpr int32_t most = Wide ? 16 : 32;
    UNROLL
    for (int32_t from = k; from < k + kBlock8; from += most) {
      const int32_t to = from + most < end ? from + most : end;
      __m256i part[M][V];
      UNROLL
      for (int r = 0; r < M; ++r)
        UNROLL
        for (int t = 0; t < V; ++t) part[r][t] = _mm256_setzero_si256();
      for (int64_t q = from / 4; q < to / 4; ++q, w += 64) {
        fetch_ahead(ahead);
        __m256i v[V];
        UNROLL
        for (int t = 0; t < V; ++t) v[t] = load<__m256i>(w + t * L * 4);
        UNROLL
        for (int r = 0; r < M; ++r) {
          const __m256i xs = _mm256_set1_epi32(x[q * M + r]);
          UNROLL
          for (int t = 0; t < V; ++t) {
            part[r][t] = _mm256_add_epi16(part[r][t], _mm256_maddubs_epi16(v[t], xs));
            HOLD(part[r][t]);
          }
        }
      }
      UNROLL
      for (int r = 0; r < M; ++r)
        UNROLL
        for (int t = 0; t < V; ++t) acc[r][t] += (vi)_mm256_madd_epi16(part[r][t], _mm256_set1_epi16(1));
    }
#else
    for (int64_t q = k / 4; q < end / 4; ++q, w += 64) {
      fetch_ahead(ahead);
      vi v[V];
      UNROLL
      for (int t = 0; t < V; ++t) v[t] = load<vi>(w + t * L * 4);
      UNROLL
      for (int r = 0; r < M; ++r) {
        const vi xs = splat(x[q * M + r]);
        UNROLL
        for (int t = 0; t < V; ++t) {
          acc[r][t] = dot8(acc[r][t], v[t], xs);
          HOLD(acc[r][t]);
        }
      }
    }
#endif
    UNROLL
    for (int r = 0; r < M; ++r)
      UNROLL
      for (int t = 0; t < V; ++t) {
        float* c = a->c + r * kTile + t * L;
        const vf offset = load<vf>(scales + kTile + t * L) * splat((float)a->sx[b * M + r]);
        vf y = (to_float(acc[r][t]) * load<vf>(scales + t * L) - offset) * splat(a->dx[b * M + r]);
        if (!first) y += load<vf>(c);
        store(c, y);
      }
    first = false;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of activations.

void to_f32(const void* x, int dtype, float* out, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    vf v;
    if (dtype == KTFX_F32) v = load<vf>((const float*)x + i);
    else if (dtype == KTFX_BF16) v = bf16_to_float(load<vh>((const uint16_t*)x + i));
    else v = half_to_float(load<vh>((const uint16_t*)x + i));
    store(out + i, v * factor);
  }
  for (; i < n; ++i) {
    float f;
    if (dtype == KTFX_F32) f = ((const float*)x)[i];
    else if (dtype == KTFX_BF16) {
      uint32_t u = (uint32_t)((const uint16_t*)x)[i] << 16;
      __builtin_memcpy(&f, &u, 4);
    } else f = half_to_float1(((const uint16_t*)x)[i]);
    out[i] = f * factor;
  }
}

KTFX_INLINE vh to_bf16(vf v) {  // nearest, ties to even; a NaN stays one
  vi u = (vi)v;
  vi rounded = (vi)((vu)(u + 0x7fff + (vi)(((vu)u >> 16) & 1)) >> 16);
  vi nan = (u & 0x7fffffff) > 0x7f800000;
  return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
}

KTFX_INLINE vh to_half(vf v) {
#if KTFX_INT == 2
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif KTFX_INT == 5
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
  vi sign = (vi)((vu)((vi)v & (int32_t)0x80000000) >> 16), u = (vi)v & 0x7fffffff;
  // Normal halves round by adding; subnormal ones by adding 2^-1, whose unit in the last place is a half's smallest.
  vi normal = (vi)((vu)(u - (112 << 23) + 0xfff + (vi)(((vu)u >> 13) & 1)) >> 13);
  vi small = (vi)((vf)u + 0.5f) - 0x3f000000;
  vi tiny = u < (113 << 23), inf = u >= 0x47800000 - 0x1000, nan = u > 0x7f800000;
  vi h = (tiny & small) | (~tiny & normal);
  h = (inf & 0x7c00) | (~inf & h);
  h = (nan & 0x7e00) | (~nan & h);
  return __builtin_convertvector(h | sign, vh);
#endif
}

void from_f32(const float* x, void* out, int dtype, int64_t n) {
  if (dtype == KTFX_F32) {
    __builtin_memcpy(out, x, n * 4);
    return;
  }
  uint16_t* o = (uint16_t*)out;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    vf v = load<vf>(x + i);
    store(o + i, dtype == KTFX_BF16 ? to_bf16(v) : to_half(v));
  }
  if (i < n) {
    vf v = {};
    __builtin_memcpy(&v, x + i, (n - i) * 4);
    vh h = dtype == KTFX_BF16 ? to_bf16(v) : to_half(v);
    __builtin_memcpy(o + i, &h, (n - i) * 2);
  }
}

KTFX_INLINE float highest(vf v) {
  float m = v[0];
  for (int i = 1; i < L; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// x has n floats, n a multiple of 32. An inf or NaN makes its block's scale NaN, so that it reaches the result.
void quantize(const float* x, int64_t n, int block, int bits, void* q, int64_t q_stride, float* dx, int32_t* sx,
              int64_t stride) {
  const float top = bits == 8 ? 127.0f : 32767.0f;
  for (int64_t b = 0; b * block < n; ++b) {
    const int64_t begin = b * block, end = begin + block < n ? begin + block : n;
    vf peak = {}, bad = {};
    for (int64_t i = begin; i < end; i += L) {
      vf v = load<vf>(x + i);
      peak = vmax(vabs(v), peak);
      bad += v * 0.0f;
    }
    const float amax = highest(peak);
    float wrong = 0.0f;
    for (int i = 0; i < L; ++i) wrong += bad[i];
    const float inverse = amax > 1e-30f && wrong == 0.0f ? top / amax : 0.0f;
    dx[b * stride] = (inverse == 0.0f ? 0.0f : amax / top) + wrong;
    vi total = {};
    for (int64_t i = begin; i < end; i += L) {
      vi v = nearest(load<vf>(x + i) * inverse);
      total += v;
      int32_t r[L];
      store(r, v);
      for (int j = 0; j < L; j += 4) {
        char* to = (char*)q + (i + j) / 4 * q_stride;
        if (bits == 8) {
          uint32_t quad = (r[j] & 255) | (r[j + 1] & 255) << 8 | (r[j + 2] & 255) << 16 | (uint32_t)r[j + 3] << 24;
          __builtin_memcpy(to, &quad, 4);
        } else {
          uint32_t pairs[2] = {(uint32_t)(r[j] & 0xffff) | (uint32_t)r[j + 2] << 16,
                               (uint32_t)(r[j + 1] & 0xffff) | (uint32_t)r[j + 3] << 16};
          __builtin_memcpy(to, pairs, 8);
        }
      }
    }
    int32_t sum = 0;
    for (int i = 0; i < L; ++i) sum += total[i];
    sx[b * stride] = sum;
  }
}

template <int M>
void interleave_as(const float* const* rows, int64_t n, float* out) {
  const float* row[M];
  for (int r = 0; r < M; ++r) row[r] = rows[r];
  for (int64_t k = 0; k < n; ++k, out += M)
    UNROLL
    for (int r = 0; r < M; ++r) out[r] = row[r][k];
}

void interleave(const float* const* rows, int mr, int64_t n, float* out) {
  switch (mr) {
    case 2: return interleave_as<2>(rows, n, out);
    case 3: return interleave_as<3>(rows, n, out);
    case 4: return interleave_as<4>(rows, n, out);
    case 5: return interleave_as<5>(rows, n, out);
    case 6: return interleave_as<6>(rows, n, out);
  }
  for (int64_t k = 0; k < n; ++k)
    for (int r = 0; r < mr; ++r) out[k * mr + r] = rows[r][k];
}

void axpy(float* out, const float* y, const float* scale, const float* bias, float a, int64_t n) {
  for (int64_t i = 0; i < n; i += L) {
    vf v = load<vf>(y + i);
    if (scale) v *= load<vf>(scale + i);
    if (bias) v += load<vf>(bias + i);
    store(out + i, load<vf>(out + i) + v * a);
  }
}

// exp by 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7.
KTFX_INLINE vf vexp(vf x) {
  vi nan = x != x;
  vf clamped = vmin(vmax(x, splat(-87.0f)), splat(88.0f));
  vi n = nearest(clamped * 1.44269504088896341f);
  vf r = clamped - to_float(n) * 0.693359375f + to_float(n) * 2.12194440e-4f;
  vf p = splat(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vf y = (vf)((vi)p + (n << 23));
  y = pick(x < -87.0f, splat(0.0f), y);
  return pick(nan, x, y);
}
KTFX_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
KTFX_INLINE vf vtanh(vf x) { return 1.0f - 2.0f / (vexp(2.0f * x) + 1.0f); }

// erfc(z) for z >= 0: Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
KTFX_INLINE vf gelu(vf x) {
  vf z = vabs(x) * 0.70710678118654752f;
  vf t = 1.0f / (1.0f + 0.3275911f * z);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  vf tail = 0.5f * p * t * vexp(-z * z);  // the normal distribution beyond |x|
  return x * pick(x < 0.0f, tail, 1.0f - tail);
}

KTFX_INLINE vf act(int kind, vf x) {
  switch (kind) {
    case KTFX_SILU: return x * sigmoid(x);
    case KTFX_GELU: return gelu(x);
    case KTFX_GELU_TANH: return 0.5f * x * (1.0f + vtanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case KTFX_RELU: return pick(x < 0.0f, splat(0.0f), x);
    case KTFX_RELU2: {
      vf r = pick(x < 0.0f, splat(0.0f), x);
      return r * r;
    }
    default: return x;
  }
}

void activate(const ktfx_layer* layer, const float* gate, const float* up, const float* s_gate, const float* s_up,
              const float* b_gate, const float* b_up, float* h) {
  for (int i = 0; i < kTile; i += L) {
    vf u = load<vf>(up + i);
    if (s_up) u *= load<vf>(s_up + i);
    if (b_up) u += load<vf>(b_up + i);
    if (layer->gate == KTFX_GATE_NONE) {
      store(h + i, act(layer->activation, u));
      continue;
    }
    vf g = load<vf>(gate + i);
    if (s_gate) g *= load<vf>(s_gate + i);
    if (b_gate) g += load<vf>(b_gate + i);
    if (layer->gate == KTFX_GATE_CLAMPED) {
      // Written so that a NaN stays one, as torch.clamp keeps it.
      g = pick(g > layer->limit, splat(layer->limit), g);
      u = pick(u > layer->limit, splat(layer->limit), u);
      u = pick(u < -layer->limit, splat(-layer->limit), u);
      store(h + i, (u + 1.0f) * (g * sigmoid(g * layer->alpha)));
    } else {
      store(h + i, act(layer->activation, g) * u);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing. A tile's source rows are transposed first, so that one lane is one output: [K][16] floats, or [K / 2][16]
// words that hold two 16-bit floats of one row. Scales are then vectors, and codes combine to a tile's words in place.

void transpose(const uint32_t* const* rows, int64_t n, uint32_t* out) {
  int64_t k = 0;
#if KTFX_INT == 2 || KTFX_INT == 5
  // Eight rows at a time, and whole lines of them: rows are often a power of two apart, where the nearest cache has room
  // for eight lines only.
  for (; k + 16 <= n; k += 16)
    for (int part = 0; part < 4; ++part) {
      const int h = part / 2;
      const int64_t at = k + part % 2 * 8;
      __m256i r[8], s[8];  // 8 x 8 words by unpacking
      for (int i = 0; i < 8; ++i) r[i] = load<__m256i>(rows[8 * h + i] + at);
      for (int i = 0; i < 4; ++i) {
        s[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
      }
      for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm256_unpacklo_epi64(s[4 * i], s[4 * i + 2]);
        r[4 * i + 1] = _mm256_unpackhi_epi64(s[4 * i], s[4 * i + 2]);
        r[4 * i + 2] = _mm256_unpacklo_epi64(s[4 * i + 1], s[4 * i + 3]);
        r[4 * i + 3] = _mm256_unpackhi_epi64(s[4 * i + 1], s[4 * i + 3]);
      }
      for (int i = 0; i < 4; ++i) {
        store(out + (at + i) * 16 + 8 * h, _mm256_permute2x128_si256(r[i], r[4 + i], 0x20));
        store(out + (at + 4 + i) * 16 + 8 * h, _mm256_permute2x128_si256(r[i], r[4 + i], 0x31));
      }
    }
#endif
  for (; k < n; ++k)
    for (int r = 0; r < kTile; ++r) out[k * kTile + r] = load<uint32_t>(rows[r] + k);
}

// A float's bits of 16 in the upper half of a word (the lower half is not looked at) to a float.
template <int D>
KTFX_INLINE vf float_of_top(vi v) {
  if constexpr (D == KTFX_BF16) return as_float(v & (int32_t)0xffff0000);
  return as_float((v >> 3) & (int32_t)0x8fffe000) * 0x1p112f;  // exact for subnormals too
}

// Input 4 q + i of vector t of transposed rows.
template <int D>
KTFX_INLINE vf source_value(const char* x, int64_t q, int i, int t) {
  if constexpr (D == KTFX_F32) return load<vf>(x + (q * 4 + i) * 64 + t * L * 4);
  const vi pair = load<vi>(x + (q * 2 + i / 2) * 64 + t * L * 4);
  if constexpr (D == KTFX_BF16) return as_float(i % 2 ? pair & (int32_t)0xffff0000 : pair << 16);
  return float_of_top<D>(i % 2 ? pair : pair << 16);
}

KTFX_INLINE vi imax(vi a, vi b) { return a > b ? a : b; }
KTFX_INLINE vi imin(vi a, vi b) { return a < b ? a : b; }
KTFX_INLINE vw imax(vw a, vw b) { return a > b ? a : b; }

// Bits of floats that are inf or NaN, of a source's dtype, its sign taken off and moved to the top.
template <int D>
KTFX_INLINE vi not_finite(vi bits) {
  return bits >= (D == KTFX_F16 ? 0x7c000000 : 0x7f800000);
}

// The largest magnitudes over inputs [k0, k1): of all values (above, below unused), or of those above and of those below
// zero. Magnitudes compare as their bits do.
template <int D, bool Signed>
KTFX_INLINE void peaks(const char* x, int64_t k0, int64_t k1, int t, vf& above, vf& below, vi& bad) {
  if constexpr (D == KTFX_F32) {
    vi up = {}, down = {};
    for (int64_t k = k0; k < k1; ++k) {
      const vi v = load<vi>(x + k * 64 + t * L * 4);
      up = imax(up, Signed ? v : v & 0x7fffffff);
      if constexpr (Signed) down = imax(down, v ^ (int32_t)0x80000000);
    }
    bad |= not_finite<D>(imax(up, down));
    above = as_float(up);
    below = as_float(down);
  } else {
    vw up = {}, down = {};
    for (int64_t k = k0 / 2; k < k1 / 2; ++k) {
      const vw v = load<vw>(x + k * 64 + t * L * 4);
      up = imax(up, Signed ? v : v & 0x7fff);
      if constexpr (Signed) down = imax(down, v ^ (int16_t)0x8000);
    }
    const vi high = imax((vi)up << 16, (vi)up & (int32_t)0xffff0000);
    const vi low = imax((vi)down << 16, (vi)down & (int32_t)0xffff0000);
    bad |= not_finite<D>(imax(high, low));
    above = float_of_top<D>(high);
    below = float_of_top<D>(low);
  }
}

// Non-negative floats to a float format of `mantissa` bits whose smallest normal exponent is `least`: nearest, ties to
// even. Adding a power of two whose last place is the format's step rounds; what was added to it counts the steps.
// The code stands minifloat_base above zero.
template <int mantissa, int least>
KTFX_INLINE vi minifloat(vf v) {
  const vu exponent = (vu)vmax(v, splat(least == 0 ? 1.0f : 0x1p-6f)) & 0x7f800000u;
  const vu shift = exponent + ((23u - mantissa) << 23);  // wraps for inf, which is refused elsewhere
  return (vi)((vu)(v + as_float((vi)shift)) - shift + (exponent >> (23 - mantissa)));
}
constexpr uint32_t minifloat_base(int mantissa, int least) { return (uint32_t)(127 + least) << mantissa; }

// How far above zero the codes of a tile's word stand, all of them summed in their places.
template <int F>
constexpr uint32_t word_base() {
  constexpr uint32_t one = F == KTFX_FMT_FP8     ? minifloat_base(3, -6)
                           : F == KTFX_FMT_MXFP4 ? minifloat_base(1, 0)
                                                 : 0x4b400000u;  // the bits of 12582912, whose last place is 1
  constexpr uint32_t bytes = one * 0x01010101u;
  return F == KTFX_FMT_INT8 || F == KTFX_FMT_FP8 ? bytes : bytes + (bytes << 4);
}

// Plain: no scale of the group was itself rounded so far that a code would leave its range.
template <int F, bool Plain>
KTFX_INLINE vi code_of(vf x, vf divisor, vf zero) {
  if constexpr (F == KTFX_FMT_MXFP4)  // here a factor: divisors are powers of two
    return imin(minifloat<1, 0>(vabs(x) * divisor), splat((int32_t)minifloat_base(1, 0) + 7)) + (((vi)x >> 28) & 8);
  if constexpr (F == KTFX_FMT_FP8) {
    const vf v = vabs(x) / divisor;
    return minifloat<3, -6>(Plain ? v : vmin(v, splat(448.0f))) + (((vi)x >> 24) & 0x80);
  }
  vf v = x / divisor;
  if constexpr (F == KTFX_FMT_INT4ZP) v += zero;
  constexpr float low = F == KTFX_FMT_INT8 ? -127.0f : F == KTFX_FMT_INT4 ? -8.0f : 0.0f;
  constexpr float high = F == KTFX_FMT_INT8 ? 127.0f : F == KTFX_FMT_INT4 ? 7.0f : 15.0f;
  if constexpr (!Plain || F == KTFX_FMT_INT4ZP) v = vmin(vmax(v, splat(low)), splat(high));
  else if constexpr (F == KTFX_FMT_INT4) v = vmin(v, splat(high));  // the range has one code less on this side
  // The addition rounds to the nearest integer and makes it positive; INT8's sign is put right in the whole word.
  constexpr float positive = F == KTFX_FMT_INT8 ? 128.0f : F == KTFX_FMT_INT4 ? 8.0f : 0.0f;
  return (vi)(v + (12582912.0f + positive));
}

// A group's scale from its peaks, rounded as it is stored; stores it.
KTFX_INLINE vf store_scale(vf scale, int dtype, uint8_t* out) {
  if (dtype == KTFX_F32) {
    store(out, scale);
    return scale;
  }
  const vh h = dtype == KTFX_BF16 ? to_bf16(scale) : to_half(scale);
  store(out, h);
  return dtype == KTFX_BF16 ? bf16_to_float(h) : half_to_float(h);
}

constexpr int encode_step(int format) {  // inputs a row of the tile
  return format == KTFX_FMT_INT8 || format == KTFX_FMT_FP8 ? 4 : 8;
}

// n inputs of vector t, which share a scale.
template <int F, int D, bool Plain>
KTFX_INLINE void encode_group(const char* x, int64_t n, int t, vf divisor, vf zero, uint8_t* out) {
  constexpr int step = encode_step(F);
  for (int64_t s = 0; s < n / step; ++s) {
    vu word = {};
    UNROLL
    for (int i = 0; i < step; ++i) {
      const vf v = source_value<D>(x, s * (step / 4) + i / 4, i % 4, t);
      word += (vu)code_of<F, Plain>(v, divisor, zero) << (i % 4 * 8 + i / 4 * 4);
      HOLD(word);
    }
    word -= word_base<F>();
    if constexpr (F == KTFX_FMT_INT8) word ^= 0x80808080u;
    store(out + s * 64 + t * L * 4, word);
  }
}

// Inputs [k0, k1) of a tile; x begins at k0, a multiple of 128.
template <int F, int D>
bool encode_as(const ktfx_matrix* m, const char* x, int32_t k0, int32_t k1, const float* scale_in,
               const char* const* ahead, uint8_t* tile) {
  constexpr int step = encode_step(F), bytes = D == KTFX_F32 ? 4 : 2;
  const int64_t group = step == 4 ? kFp8Block : m->group;  // INT8's scale is one, its inputs are taken like FP8's
  vi bad = {};
  for (int64_t k = k0; k < k1; k += group) {
    const int64_t end = k + group < k1 ? k + group : k1;
    const int64_t g = F == KTFX_FMT_INT8 ? 0 : k / group;
    for (int t = 0; t < V; ++t) {
      if (ahead)
        for (int r = t * L; r < (t + 1) * L; ++r)
          for (int64_t b = (k - k0) * bytes; b < (end - k0) * bytes; b += 64) __builtin_prefetch(ahead[r] + b, 0, 2);
      vf above = {}, below = {}, zero = {}, divisor;
      if constexpr (step == 8) peaks<D, F != KTFX_FMT_MXFP4>(x, k - k0, end - k0, t, above, below, bad);
      uint8_t* scales = tile + m->scale_offset;
      const int64_t at = g * kTile + t * L;
      if constexpr (step == 4) {
        divisor = load<vf>(scale_in + at);
        store(scales + at * 4, divisor);
      } else if constexpr (F == KTFX_FMT_MXFP4) {
        // The largest e2m1 value is 1.5 * 2^2, so the exponent is two below that of the largest magnitude.
        const vi exponent = ((vi)vmax(above, splat(0x1p-120f)) >> 23) - 2;
        int32_t each[L];
        store(each, exponent);
        for (int i = 0; i < L; ++i) scales[at + i] = (uint8_t)each[i];
        divisor = as_float((254 - exponent) << 23);
      } else {
        // INT4's largest magnitude becomes -8, by a scale of the other sign where it lies above zero.
        const vf scale = F == KTFX_FMT_INT4 ? pick(above >= below, above, -below) / -8.0f : (above + below) / 15.0f;
        divisor = store_scale(scale, m->scale_dtype, scales + at * scale_bytes(m->scale_dtype));
      }
      divisor = pick(divisor == 0.0f, splat(1.0f), divisor);
      if constexpr (F == KTFX_FMT_INT4ZP) {
        zero = vmin(to_float(nearest(below / divisor)), splat(15.0f));
        int32_t each[L];
        store(each, nearest(zero));
        for (int i = 0; i < L; ++i) tile[m->zero_offset + at + i] = (uint8_t)each[i];
      }
      const vi coarse = vabs(divisor) < (step == 8 && m->scale_dtype == KTFX_F16 ? 0x1p-18f : 0x1p-100f);
      int32_t any = 0;
      for (int i = 0; i < L; ++i) any |= coarse[i];
      const char* from = x + (k - k0) * kTile * bytes;
      if (F == KTFX_FMT_MXFP4 || !any) encode_group<F, D, true>(from, end - k, t, divisor, zero, tile + k / step * 64);
      else encode_group<F, D, false>(from, end - k, t, divisor, zero, tile + k / step * 64);
    }
  }
  for (int i = 0; i < L; ++i)
    if (bad[i]) return false;
  return true;
}

template <int F>
KTFX_INLINE bool encode_from(const ktfx_matrix* m, int dtype, const char* x, int32_t k0, int32_t k1,
                             const float* scale_in, const char* const* ahead, uint8_t* tile) {
  if (dtype == KTFX_F32) return encode_as<F, KTFX_F32>(m, x, k0, k1, scale_in, ahead, tile);
  if (dtype == KTFX_BF16) return encode_as<F, KTFX_BF16>(m, x, k0, k1, scale_in, ahead, tile);
  return encode_as<F, KTFX_F16>(m, x, k0, k1, scale_in, ahead, tile);
}

bool encode(const ktfx_matrix* m, int dtype, const void* x, int32_t k0, int32_t k1, const float* scale_in,
            const char* const* ahead, uint8_t* tile) {
  const char* from = (const char*)x;
  switch (m->format) {
    case KTFX_FMT_FP8: return encode_from<KTFX_FMT_FP8>(m, dtype, from, k0, k1, scale_in, ahead, tile);
    case KTFX_FMT_INT8: return encode_from<KTFX_FMT_INT8>(m, dtype, from, k0, k1, scale_in, ahead, tile);
    case KTFX_FMT_INT4: return encode_from<KTFX_FMT_INT4>(m, dtype, from, k0, k1, scale_in, ahead, tile);
    case KTFX_FMT_INT4ZP: return encode_from<KTFX_FMT_INT4ZP>(m, dtype, from, k0, k1, scale_in, ahead, tile);
    default: return encode_from<KTFX_FMT_MXFP4>(m, dtype, from, k0, k1, scale_in, ahead, tile);
  }
}

// The bits of the largest magnitudes of one row per `group` inputs, as floats or as halves in the upper half of a word, where
// they are larger than what stands there; in any of 16 words.
template <int D>
KTFX_INLINE void row_peaks_of(const char* row, int64_t n, int64_t group, int32_t* peaks) {
  constexpr int e = D == KTFX_F32 ? 4 : 2, step = L * 4 / e;
  for (int64_t k = 0; k < n; k += group, peaks += kTile) {
    const int64_t end = k + group < n ? k + group : n;
    vi top = load<vi>(peaks);
    vw most = {};
    int64_t i = k;
    for (; i + step <= end; i += step) {
      if constexpr (D == KTFX_F32) top = imax(top, load<vi>(row + i * e) & 0x7fffffff);
      else most = imax(most, load<vw>(row + i * e) & 0x7fff);
    }
    if (i < end) {
      vi rest = {};
      __builtin_memcpy(&rest, row + i * e, (end - i) * e);
      if constexpr (D == KTFX_F32) top = imax(top, rest & 0x7fffffff);
      else most = imax(most, (vw)rest & 0x7fff);
    }
    if constexpr (D != KTFX_F32) top = imax(top, imax((vi)most << 16, (vi)most & (int32_t)0xffff0000));
    store(peaks, top);
  }
}

void row_peaks(const void* row, int dtype, int64_t n, int64_t group, int32_t* peaks) {
  if (dtype == KTFX_F32) row_peaks_of<KTFX_F32>((const char*)row, n, group, peaks);
  else if (dtype == KTFX_BF16) row_peaks_of<KTFX_BF16>((const char*)row, n, group, peaks);
  else row_peaks_of<KTFX_F16>((const char*)row, n, group, peaks);
}

// ---------------------------------------------------------------------------------------------------------------------
// What the machine can do, measured with this file's instructions.

// Reads every byte, in one of two ways; which is the faster depends on the processor, so a yardstick tries both: four
// places at once and no prefetch instructions, or one stream fetched to the second cache 8 KiB ahead.
double sum(const uint8_t* data, int64_t bytes, bool fetch) {
  constexpr int places = 4;
  const int64_t part = fetch ? 0 : bytes / (places * 64) * 64;
  vi a[places] = {};
  for (int64_t i = 0; i < part; i += 64)
    for (int s = 0; s < places; ++s)
      for (int j = 0; j < 64; j += (int)sizeof(vi)) a[s] ^= load<vi>(data + s * part + i + j);
  int64_t i = places * part;
  for (; i + 64 <= bytes; i += 64) {
    if (i + 2 * kFarAhead < bytes) __builtin_prefetch(data + i + 2 * kFarAhead, 0, 2);
    for (int j = 0; j < 64; j += (int)sizeof(vi)) a[j / sizeof(vi) % places] ^= load<vi>(data + i + j);
  }
  for (; i + (int64_t)sizeof(vi) <= bytes; i += sizeof(vi)) a[0] ^= load<vi>(data + i);
  const vi all = a[0] ^ a[1] ^ a[2] ^ a[3];
  double total = 0;
  for (int j = 0; j < L; ++j) total += all[j];
  return total;
}

double fma(int64_t rounds) {
  vf a[10];
  UNROLL
  for (int i = 0; i < 10; ++i) a[i] = splat((float)i);
  vf b = splat(0.999f), c = splat(0.001f);
  for (int64_t n = 0; n < rounds; ++n) {
    UNROLL
    for (int i = 0; i < 10; ++i) a[i] = a[i] * b + c;
  }
  vf all = {};
  UNROLL
  for (int i = 0; i < 10; ++i) all += a[i];
  volatile float keep = all[0];
  (void)keep;
  return (double)rounds * 10 * L * 2;
}

// ---------------------------------------------------------------------------------------------------------------------

#if KTFX_AMX
#include "amx.inl"

// Everything else as in `base`.
KernelTable make_table(const char* name, const KernelTable* base) {
  KernelTable t = *base;
  t.name = name;
  t.amx = amx_tiles;
  t.amx_int8 = amx_int8_tiles;
  t.amx_peak = amx_peak;
  t.amx_halves = amx_halves;
  t.amx_begin = amx_begin;
  t.amx_end = amx_end;
  return t;
}
#else

// Rows a register tile: 16 registers hold 6 x 2 sums (AVX2), 32 hold 12 (AVX-512).
constexpr int kRowsFloat = KTFX_INT == 5 ? 12 : KTFX_INT == 2 ? 6 : 4;
constexpr int kRowsInteger = 4;
// More rows than these take a panel. With 16 registers unpacking is so cheap beside the products that several row blocks
// do better with the tile itself, measured on AVX2, but for MXFP4's table look-ups.
#if KTFX_INT == 2
constexpr int kMostDirect[4] = {48, 96, 96, 16};
#else
constexpr int kMostDirect[4] = {kRowsInteger, kRowsInteger, kRowsInteger, kRowsInteger};
#endif

template <int M>
struct Fill {
  static void rows(KernelTable& t) {
    if constexpr (M >= 1) {
      t.f32[0][M] = float_tile<KTFX_FMT_F32, M>;
      t.f32[1][M] = float_tile<KTFX_FMT_BF16, M>;
      t.f32[2][M] = float_tile<KTFX_FMT_F16, M>;
      t.f32[3][M] = float_tile<KTFX_FMT_FP8, M>;
      t.f32_near[0][M] = float_tile<KTFX_FMT_F32, M, true>;
      t.f32_near[1][M] = float_tile<KTFX_FMT_BF16, M, true>;
      t.panel_i16[M] = panel_i16<M>;
      t.panel_i8[0][M] = panel_i8<M, false>;
      t.panel_i8[1][M] = panel_i8<M, true>;
      if constexpr (M <= kRowsInteger) {
        t.i16[0][0][M] = int16_tile<KTFX_FMT_INT8, KTFX_F32, M>;
        t.i16[1][0][M] = int16_tile<KTFX_FMT_INT4, KTFX_F32, M>;
        t.i16[1][1][M] = int16_tile<KTFX_FMT_INT4, KTFX_BF16, M>;
        t.i16[1][2][M] = int16_tile<KTFX_FMT_INT4, KTFX_F16, M>;
        t.i16[2][0][M] = int16_tile<KTFX_FMT_INT4ZP, KTFX_F32, M>;
        t.i16[2][1][M] = int16_tile<KTFX_FMT_INT4ZP, KTFX_BF16, M>;
        t.i16[2][2][M] = int16_tile<KTFX_FMT_INT4ZP, KTFX_F16, M>;
        t.i16[3][0][M] = int16_tile<KTFX_FMT_MXFP4, KTFX_E8M0, M>;
        t.i8[1][0][M] = int8_tile<KTFX_FMT_INT4, KTFX_F32, M>;
        t.i8[1][1][M] = int8_tile<KTFX_FMT_INT4, KTFX_BF16, M>;
        t.i8[1][2][M] = int8_tile<KTFX_FMT_INT4, KTFX_F16, M>;
        t.i8[2][0][M] = int8_tile<KTFX_FMT_INT4ZP, KTFX_F32, M>;
        t.i8[2][1][M] = int8_tile<KTFX_FMT_INT4ZP, KTFX_BF16, M>;
        t.i8[2][2][M] = int8_tile<KTFX_FMT_INT4ZP, KTFX_F16, M>;
        t.i8[3][0][M] = int8_tile<KTFX_FMT_MXFP4, KTFX_E8M0, M>;
      }
      Fill<M - 1>::rows(t);
    }
  }
};

KernelTable make_table(const char* name) {
  KernelTable t = {};
  t.name = name;
  t.rows = kRowsFloat;
  t.rows_direct = kRowsInteger;
  for (int f = 0; f < 4; ++f) t.most_direct[f] = kMostDirect[f];
  t.unpack_f32 = unpack_f32;
  t.unpack_i16 = unpack_i16;
  t.unpack_i8 = unpack_i8;
  Fill<kRowsFloat>::rows(t);
  t.to_f32 = to_f32;
  t.from_f32 = from_f32;
  t.quantize = quantize;
  t.activate = activate;
  t.axpy = axpy;
  t.interleave = interleave;
  t.transpose = transpose;
  t.encode = encode;
  t.row_peaks = row_peaks;
  t.sum = sum;
  t.fma = fma;
  return t;
}
#endif

}  // namespace
}  // namespace KTFX_NAME
}  // namespace ktfx
