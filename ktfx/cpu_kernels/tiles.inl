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

#define KTFX_INLINE static inline __attribute__((always_inline))

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
KTFX_INLINE vf splat(float x) { return vf{} + x; }
KTFX_INLINE vi splat(int32_t x) { return vi{} + x; }
KTFX_INLINE vf as_float(vi v) { return (vf)v; }
KTFX_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
KTFX_INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
KTFX_INLINE vf vmax(vf a, vf b) { return pick(a > b, a, b); }
KTFX_INLINE vf vmin(vf a, vf b) { return pick(a < b, a, b); }
KTFX_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
// To the nearest integer, ties to even, for |x| < 2^22.
KTFX_INLINE vi nearest(vf x) { return (vi)(x + 12582912.0f) - 0x4b400000; }

KTFX_INLINE vf half_to_float(vh h) {
#if KTFX_INT == 2
  return (vf)_mm256_cvtph_ps((__m128i)h);
#elif KTFX_INT == 5
  return (vf)_mm512_cvtph_ps((__m256i)h);
#else
  vi u = __builtin_convertvector(h, vi);
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

// Four inputs (4 q ... 4 q + 3) of vector t, as floats.
template <int F>
KTFX_INLINE void load4(const uint8_t* w, int64_t q, int t, vf (&out)[4]) {
  if constexpr (F == KTFX_FMT_F32) {
    for (int i = 0; i < 4; ++i) out[i] = load<vf>(w + (q * 4 + i) * 64 + t * L * 4);
  } else if constexpr (F == KTFX_FMT_BF16) {
    for (int p = 0; p < 2; ++p) {
      vi v = load<vi>(w + (q * 2 + p) * 64 + t * L * 4);
      out[2 * p] = as_float(v << 16);
      out[2 * p + 1] = as_float(v & (int32_t)0xffff0000);
    }
  } else if constexpr (F == KTFX_FMT_F16) {
    for (int i = 0; i < 4; ++i) out[i] = half_to_float(load<vh>(w + (q * 4 + i) * 32 + t * L * 2));
  } else {
    // e4m3 moved into a float's exponent and mantissa: 2^-120 times the value, subnormals included.
    vi v = load<vi>(w + q * 64 + t * L * 4);
    for (int i = 0; i < 4; ++i) out[i] = as_float(((v << (24 - 8 * i)) >> 4) & (int32_t)0x87f00000);
  }
}

constexpr int row_bytes4(int format) {  // bytes of a tile for four inputs
  return format == KTFX_FMT_F32 ? 256 : format == KTFX_FMT_BF16 || format == KTFX_FMT_F16 ? 128 : 64;
}

template <int F, int M>
void float_tile(const TileArgs* a) {
  // Enough independent sums to hide the latency of a multiply-add, also for one row.
  constexpr int U = M * V >= 8 ? 1 : M * V >= 4 ? 2 : 4;
  const float* x = (const float*)a->x;
  const uint8_t* w = a->w;
  constexpr int kAhead = 1024;
  int32_t k = a->k0;
  bool first = a->first;
  while (k < a->k1) {
    int32_t end = F == KTFX_FMT_FP8 && k + kFp8Block < a->k1 ? k + kFp8Block : a->k1;
    vf acc[U][M][V] = {};
    for (int64_t q = k / 4; q < end / 4; ++q) {
      const uint8_t* next = w + q * row_bytes4(F) + kAhead;
      for (int i = 0; i < row_bytes4(F); i += 64) __builtin_prefetch(next + i);
#pragma GCC unroll 2
      for (int t = 0; t < V; ++t) {
        vf v[4];
        load4<F>(w, q, t, v);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 12
          for (int r = 0; r < M; ++r) acc[i % U][r][t] += v[i] * x[(q * 4 + i) * M + r];
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 2
      for (int t = 0; t < V; ++t) {
        vf sum = acc[0][r][t];
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
KTFX_INLINE vi dot16(vi acc, vi w, int32_t x) {
#if KTFX_INT == 2
  return (vi)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x)));
#elif KTFX_INT == 5
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#else
  return acc + ((w << 16) >> 16) * (int32_t)(int16_t)x + (w >> 16) * (x >> 16);
#endif
}

// Signed bytes of a row to two vectors of int16 pairs: inputs (0, 2) and (1, 3).
KTFX_INLINE void widen_signed(vi v, vi& even, vi& odd) {
#if KTFX_INT == 2
  even = (vi)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)v, 8), 8);
  odd = (vi)_mm256_srai_epi16((__m256i)v, 8);
#elif KTFX_INT == 5
  even = (vi)_mm512_srai_epi16(_mm512_slli_epi16((__m512i)v, 8), 8);
  odd = (vi)_mm512_srai_epi16((__m512i)v, 8);
#else
  even = ((v << 24) >> 24 & 0xffff) | ((v << 8) >> 24 << 16);
  odd = ((v << 16) >> 24 & 0xffff) | (v >> 24 << 16);
#endif
}
KTFX_INLINE void widen_unsigned(vi v, vi& even, vi& odd) {
  even = v & 0x00ff00ff;
  odd = (vi)((vu)v >> 8) & 0x00ff00ff;
}

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

template <int F>
KTFX_INLINE void nibbles(vi v, vi& low, vi& high) {
  low = v & 0x0f0f0f0f;
  high = (vi)((vu)v >> 4) & 0x0f0f0f0f;
  if constexpr (F == KTFX_FMT_MXFP4) {
    low = e2m1_bytes(low);
    high = e2m1_bytes(high);
  }
}

template <int S>
KTFX_INLINE vf load_scales(const uint8_t* p) {
  if constexpr (S == KTFX_F32) return load<vf>(p);
  if constexpr (S == KTFX_BF16) return as_float(__builtin_convertvector(load<vh>(p), vi) << 16);
  if constexpr (S == KTFX_F16) return half_to_float(load<vh>(p));
  return as_float(__builtin_convertvector(load<vb>(p), vi) << 23) * 0.5f;  // the codes are twice the value
}
constexpr int scale_bytes(int dtype) { return dtype == KTFX_F32 ? 4 : dtype == KTFX_E8M0 ? 1 : 2; }

template <int F>
constexpr int32_t offset_of() {
  return F == KTFX_FMT_INT4 ? 8 : F == KTFX_FMT_MXFP4 ? 12 : 0;
}

// Adds one block's integer sums to c, scaled.
template <int F, int S, int M>
KTFX_INLINE void add_block(const TileArgs* a, int32_t k, bool first, vi (&acc)[M][V]) {
  const int64_t b = k / a->block;
  const float* dx = a->dx + b * M;
  const int32_t* sx = a->sx + b * M;
#pragma GCC unroll 2
  for (int t = 0; t < V; ++t) {
    vf scale = splat(1.0f);
    vi zero = {};
    if constexpr (F != KTFX_FMT_INT8) {
      const int64_t g = (int64_t)(k / a->m->group) * kTile + t * L;
      scale = load_scales<S>(a->w + a->m->scale_offset + g * scale_bytes(S));
      if constexpr (F == KTFX_FMT_INT4ZP)
        zero = __builtin_convertvector(load<vb>(a->w + a->m->zero_offset + g), vi);
    }
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      vi sum = acc[r][t];
      if constexpr (F == KTFX_FMT_INT4ZP) sum -= zero * sx[r];
      if constexpr (offset_of<F>() != 0) sum -= offset_of<F>() * sx[r];
      vf y = to_float(sum) * (scale * dx[r]);
      float* c = a->c + r * kTile + t * L;
      if (!first) y += load<vf>(c);
      store(c, y);
    }
  }
}

template <int F, int S, int M>
void int16_tile(const TileArgs* a) {
  constexpr int step = F == KTFX_FMT_INT8 ? 4 : 8;  // inputs a row
  const int32_t* x = (const int32_t*)a->x;          // pairs: [Kp / 4][M][2]
  constexpr int kAhead = 1024;
  bool first = a->first;
  for (int32_t k = a->k0; k < a->k1; k += a->block) {
    const int32_t end = k + a->block < a->k1 ? k + a->block : a->k1;
    vi acc[M][V] = {};
    for (int64_t s = k / step; s < end / step; ++s) {
      const uint8_t* row = a->w + s * 64;
      __builtin_prefetch(row + kAhead);
#pragma GCC unroll 2
      for (int t = 0; t < V; ++t) {
        vi v = load<vi>(row + t * L * 4), even, odd;
        if constexpr (F == KTFX_FMT_INT8) {
          widen_signed(v, even, odd);
          const int32_t* p = x + s * M * 2;
#pragma GCC unroll 12
          for (int r = 0; r < M; ++r) acc[r][t] = dot16(dot16(acc[r][t], even, p[2 * r]), odd, p[2 * r + 1]);
        } else {
          vi low, high;
          nibbles<F>(v, low, high);
          const int32_t* p = x + s * 2 * M * 2;
          widen_unsigned(low, even, odd);
#pragma GCC unroll 12
          for (int r = 0; r < M; ++r) acc[r][t] = dot16(dot16(acc[r][t], even, p[2 * r]), odd, p[2 * r + 1]);
          p += M * 2;
          widen_unsigned(high, even, odd);
#pragma GCC unroll 12
          for (int r = 0; r < M; ++r) acc[r][t] = dot16(dot16(acc[r][t], even, p[2 * r]), odd, p[2 * r + 1]);
        }
      }
    }
    add_block<F, S, M>(a, k, first, acc);
    first = false;
  }
}

// Unsigned bytes times signed bytes over a block of 32 inputs.
template <int F, int S, int M>
void int8_tile(const TileArgs* a) {
  const int32_t* x = (const int32_t*)a->x;  // quads: [Kp / 4][M]
  constexpr int kAhead = 1024;
  bool first = a->first;
  for (int32_t k = a->k0; k < a->k1; k += kBlock8) {
    const int32_t end = k + kBlock8 < a->k1 ? k + kBlock8 : a->k1;
    vi acc[M][V] = {};
#if KTFX_INT == 2
    // 16-bit sums: eight of 2 * 15 * 127 (INT4) or four of 2 * 24 * 127 (MXFP4) stay below 2^15.
    constexpr int halves = F == KTFX_FMT_MXFP4 ? 2 : 1;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i part[halves][M][V];
    for (auto& h : part)
      for (auto& r : h)
        for (auto& v : r) v = _mm256_setzero_si256();
#endif
    for (int64_t s = k / 8; s < end / 8; ++s) {
      const uint8_t* row = a->w + s * 64;
      __builtin_prefetch(row + kAhead);
#pragma GCC unroll 2
      for (int t = 0; t < V; ++t) {
        vi low, high;
        nibbles<F>(load<vi>(row + t * L * 4), low, high);
        const int32_t *p = x + s * 2 * M, *p2 = p + M;
#pragma GCC unroll 12
        for (int r = 0; r < M; ++r) {
#if KTFX_INT == 2
          part[0][r][t] =
              _mm256_add_epi16(part[0][r][t], _mm256_maddubs_epi16((__m256i)low, _mm256_set1_epi32(p[r])));
          part[halves - 1][r][t] =
              _mm256_add_epi16(part[halves - 1][r][t], _mm256_maddubs_epi16((__m256i)high, _mm256_set1_epi32(p2[r])));
#elif KTFX_INT == 5
          acc[r][t] = (vi)_mm512_dpbusd_epi32((__m512i)acc[r][t], (__m512i)low, _mm512_set1_epi32(p[r]));
          acc[r][t] = (vi)_mm512_dpbusd_epi32((__m512i)acc[r][t], (__m512i)high, _mm512_set1_epi32(p2[r]));
#else
          for (int b = 0; b < 32; b += 8)
            acc[r][t] += ((low >> b) & 255) * (int32_t)(int8_t)(p[r] >> b) +
                         ((high >> b) & 255) * (int32_t)(int8_t)(p2[r] >> b);
#endif
        }
      }
    }
#if KTFX_INT == 2
    for (int h = 0; h < halves; ++h)
      for (int r = 0; r < M; ++r)
        for (int t = 0; t < V; ++t) acc[r][t] += (vi)_mm256_madd_epi16(part[h][r][t], ones);
#endif
    add_block<F, S, M>(a, k, first, acc);
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
    else if (dtype == KTFX_BF16) v = as_float(__builtin_convertvector(load<vh>((const uint16_t*)x + i), vi) << 16);
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

void interleave(const float* const* rows, int mr, int64_t n, float* out) {
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
// Packing.

void transpose(const uint32_t* const* rows, int64_t n, uint32_t* out) {
  int64_t k = 0;
#if KTFX_INT == 2 || KTFX_INT == 5
  for (; k + 8 <= n; k += 8)
    for (int h = 0; h < 2; ++h) {  // 8 x 8 words by unpacking
      __m256i r[8], s[8];
      for (int i = 0; i < 8; ++i) r[i] = load<__m256i>(rows[8 * h + i] + k);
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
        store(out + (k + i) * 16 + 8 * h, _mm256_permute2x128_si256(r[i], r[4 + i], 0x20));
        store(out + (k + 4 + i) * 16 + 8 * h, _mm256_permute2x128_si256(r[i], r[4 + i], 0x31));
      }
    }
#endif
  for (; k < n; ++k)
    for (int r = 0; r < kTile; ++r) out[k * kTile + r] = rows[r][k];
}

KTFX_INLINE vi e4m3(vf x) {  // nearest, ties to even, for |x| <= 448
  vi sign = (vi)((vu)((vi)x & (int32_t)0x80000000) >> 24), u = (vi)x & 0x7fffffff;
  vi normal = (vi)((vu)(u - (120 << 23) + 0x7ffff + (vi)(((vu)u >> 20) & 1)) >> 20);
  vi small = nearest((vf)u * 512.0f);
  vi tiny = u < (121 << 23);
  return sign | (tiny & small) | (~tiny & normal);
}

KTFX_INLINE vi e2m1(vf x) {  // nearest, ties to the even code, for x >= 0
  vi code = {};
  // Between codes c and c + 1 the middle belongs to the even one.
  const float middle[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
  for (int c = 0; c < 7; ++c) code -= c % 2 == 0 ? (vi)(x > middle[c]) : (vi)(x >= middle[c]);
  return code;
}

KTFX_INLINE float round_scale(float s, int dtype, void* out, int64_t i) {
  vf v = splat(s);
  if (dtype == KTFX_F32) {
    ((float*)out)[i] = s;
    return s;
  }
  vh h = dtype == KTFX_BF16 ? to_bf16(v) : to_half(v);
  ((uint16_t*)out)[i] = h[0];
  vf back = dtype == KTFX_BF16 ? as_float(__builtin_convertvector(h, vi) << 16) : half_to_float(h);
  return back[0];
}

bool encode(const ktfx_matrix* m, const float* x, const float* scale_in, uint32_t* words, void* scales,
            uint8_t* zeros) {
  const int64_t Kp = m->Kp;
  vf bad = {};
  for (int64_t i = 0; i < Kp; i += L) bad += load<vf>(x + i) * 0.0f;
  for (int i = 0; i < L; ++i)
    if (bad[i] != 0.0f) return false;
  if (m->format == KTFX_FMT_FP8) {
    for (int64_t k = 0; k < Kp; k += L) {
      const float s = scale_in[k / kFp8Block];
      int32_t r[L];
      store(r, e4m3(load<vf>(x + k) / (s == 0.0f ? 1.0f : s)));
      for (int i = 0; i < L; i += 4)
        words[(k + i) / 4] = r[i] | r[i + 1] << 8 | r[i + 2] << 16 | (uint32_t)r[i + 3] << 24;
    }
    return true;
  }
  const int64_t group = m->format == KTFX_FMT_INT8 ? Kp : m->group;
  for (int64_t g = 0; g * group < Kp; ++g) {
    const float* p = x + g * group;
    vf low = {}, high = {};
    for (int64_t i = 0; i < group; i += L) {
      vf v = load<vf>(p + i);
      low = vmin(v, low);
      high = vmax(v, high);
    }
    const float lowest = -highest(-low), top = highest(high), amax = top > -lowest ? top : -lowest;
    float scale, zero = 0.0f;
    switch (m->format) {
      case KTFX_FMT_INT8: scale = round_scale(amax / 127.0f, KTFX_F32, scales, g); break;
      case KTFX_FMT_INT4: scale = round_scale(amax / 7.0f, m->scale_dtype, scales, g); break;
      case KTFX_FMT_INT4ZP: {
        scale = round_scale((top - lowest) / 15.0f, m->scale_dtype, scales, g);
        vi z = nearest(splat(-lowest / (scale == 0.0f ? 1.0f : scale)));
        zero = (float)(z[0] < 0 ? 0 : z[0] > 15 ? 15 : z[0]);
        zeros[g] = (uint8_t)zero;
        break;
      }
      default: {
        // The largest e2m1 value is 1.5 * 2^2, so the exponent is two below that of the largest magnitude.
        uint32_t bits;
        float floor_ = amax < 0x1p-120f ? 0x1p-120f : amax;
        __builtin_memcpy(&bits, &floor_, 4);
        int e = (int)(bits >> 23) - 2;
        e = e < 0 ? 0 : e > 254 ? 254 : e;
        ((uint8_t*)scales)[g] = (uint8_t)e;
        bits = (uint32_t)e << 23;
        __builtin_memcpy(&scale, &bits, 4);
      }
    }
    const float safe = scale == 0.0f ? 1.0f : scale;
    for (int64_t i = 0; i < group; i += 8) {
      int32_t r[8];
      for (int j = 0; j < 8; j += L < 8 ? L : 8) {
        vf v = {};
        __builtin_memcpy(&v, p + i + j, 32);
        v /= safe;
        vi c;
        if (m->format == KTFX_FMT_MXFP4) c = e2m1(vabs(v)) | ((vi)((vu)(vi)v >> 31) << 3);
        else {
          const int lo = m->format == KTFX_FMT_INT8 ? -127 : m->format == KTFX_FMT_INT4 ? -8 : 0;
          const int hi = m->format == KTFX_FMT_INT8 ? 127 : m->format == KTFX_FMT_INT4 ? 7 : 15;
          v = vmin(vmax(v, splat(-1024.0f)), splat(1024.0f));
          c = nearest(v + zero);
          c = c < lo ? splat((int32_t)lo) : c;
          c = c > hi ? splat((int32_t)hi) : c;
          if (m->format == KTFX_FMT_INT4) c += 8;
        }
        __builtin_memcpy(r + j, &c, 32);
      }
      const int64_t k = g * group + i;
      if (m->format == KTFX_FMT_INT8) {
        for (int j = 0; j < 8; j += 4)
          words[(k + j) / 4] = (r[j] & 255) | (r[j + 1] & 255) << 8 | (r[j + 2] & 255) << 16 | (uint32_t)r[j + 3] << 24;
      } else {
        uint32_t word = 0;
        for (int j = 0; j < 4; ++j) word |= (uint32_t)(r[j] | r[j + 4] << 4) << (8 * j);
        words[k / 8] = word;
      }
    }
  }
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// What the machine can do, measured with this file's instructions.

double sum(const uint8_t* data, int64_t bytes) {
  vi a[4] = {};
  int64_t i = 0;
  for (; i + 4 * (int64_t)sizeof(vi) <= bytes; i += 4 * sizeof(vi)) {
    for (int j = 0; j < 4 * (int)sizeof(vi); j += 64) __builtin_prefetch(data + i + j + 2048);
    for (int j = 0; j < 4; ++j) a[j] ^= load<vi>(data + i + j * sizeof(vi));
  }
  vi all = a[0] ^ a[1] ^ a[2] ^ a[3];
  double total = 0;
  for (int j = 0; j < L; ++j) total += all[j];
  return total;
}

double fma(int64_t rounds) {
  vf a[10];
  for (int i = 0; i < 10; ++i) a[i] = splat((float)i);
  vf b = splat(0.999f), c = splat(0.001f);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 10
    for (int i = 0; i < 10; ++i) a[i] = a[i] * b + c;
    asm volatile("" : "+m"(*(char*)&b));
  }
  vf all = {};
  for (auto& v : a) all += v;
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
  t.amx_begin = amx_begin;
  t.amx_end = amx_end;
  return t;
}
#else

// Rows a register tile: 16 registers hold 6 x 2 sums (AVX2), 32 hold 12 (AVX-512).
constexpr int kRowsFloat = KTFX_INT == 5 ? 12 : KTFX_INT == 2 ? 6 : 4;
constexpr int kRowsInteger = KTFX_INT == 5 ? 8 : 4;

template <int M>
struct Fill {
  static void rows(KernelTable& t) {
    if constexpr (M >= 1) {
      t.f32[0][M] = float_tile<KTFX_FMT_F32, M>;
      t.f32[1][M] = float_tile<KTFX_FMT_BF16, M>;
      t.f32[2][M] = float_tile<KTFX_FMT_F16, M>;
      t.f32[3][M] = float_tile<KTFX_FMT_FP8, M>;
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
  t.rows_f32 = kRowsFloat;
  t.rows_i16 = t.rows_i8 = kRowsInteger;
  Fill<kRowsFloat>::rows(t);
  t.to_f32 = to_f32;
  t.from_f32 = from_f32;
  t.quantize = quantize;
  t.activate = activate;
  t.axpy = axpy;
  t.interleave = interleave;
  t.transpose = transpose;
  t.encode = encode;
  t.sum = sum;
  t.fma = fma;
  return t;
}
#endif

}  // namespace
}  // namespace KTFX_NAME
}  // namespace ktfx
