// Two weight tiles times rows of bf16 by AMX, included by tiles.inl. With KTFX_AMX 1 the tile registers are arrays, so
// that everything but the instructions themselves is tested on any machine.

#if KTFX_AMX == 1

struct EmulatedTile {
  int rows;
  uint8_t data[16][64];
};
thread_local EmulatedTile emulated[8];

inline void tile_zero(int t) { __builtin_memset(emulated[t].data, 0, sizeof emulated[t].data); }
inline void tile_load(int t, const void* p, int64_t stride) {
  for (int r = 0; r < emulated[t].rows; ++r) __builtin_memcpy(emulated[t].data[r], (const char*)p + r * stride, 64);
}
inline void tile_store(int t, void* p, int64_t stride) {
  for (int r = 0; r < emulated[t].rows; ++r) __builtin_memcpy((char*)p + r * stride, emulated[t].data[r], 64);
}
inline void tile_dot(int c, int a, int b) {
  for (int r = 0; r < emulated[c].rows; ++r)
    for (int n = 0; n < 16; ++n) {
      float sum;
      __builtin_memcpy(&sum, &emulated[c].data[r][4 * n], 4);
      for (int k = 0; k < 32; ++k) {
        uint16_t x, w;
        __builtin_memcpy(&x, &emulated[a].data[r][2 * k], 2);
        __builtin_memcpy(&w, &emulated[b].data[k / 2][4 * n + 2 * (k % 2)], 2);
        uint32_t xu = (uint32_t)x << 16, wu = (uint32_t)w << 16;
        float xf, wf;
        __builtin_memcpy(&xf, &xu, 4);
        __builtin_memcpy(&wf, &wu, 4);
        sum += xf * wf;
      }
      __builtin_memcpy(&emulated[c].data[r][4 * n], &sum, 4);
    }
}
#define TILE_ZERO(t) tile_zero(t)
#define TILE_LOAD(t, p, s) tile_load(t, p, s)
#define TILE_STORE(t, p, s) tile_store(t, p, s)
#define TILE_DOT(c, a, b) tile_dot(c, a, b)
// Bytes times signed bytes; those of a are signed or not.
template <class T>
inline void tile_dot_bytes(int c, int a, int b) {
  for (int r = 0; r < emulated[c].rows; ++r)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      __builtin_memcpy(&sum, &emulated[c].data[r][4 * n], 4);
      for (int k = 0; k < 64; ++k) sum += (T)emulated[a].data[r][k] * (int8_t)emulated[b].data[k / 4][4 * n + k % 4];
      __builtin_memcpy(&emulated[c].data[r][4 * n], &sum, 4);
    }
}
#define TILE_DOT_SIGNED(c, a, b) tile_dot_bytes<int8_t>(c, a, b)
#define TILE_DOT_UNSIGNED(c, a, b) tile_dot_bytes<uint8_t>(c, a, b)
void amx_configure(int rows0, int rows1) {
  const int rows[8] = {rows0, rows0, rows1, rows1, rows0, rows1, 16, 16};
  for (int t = 0; t < 8; ++t) emulated[t].rows = rows[t];
}
void amx_end() {}

#else

#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, s) _tile_loadd(t, p, s)
#define TILE_STORE(t, p, s) _tile_stored(t, p, s)
#define TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_DOT_SIGNED(c, a, b) _tile_dpbssd(c, a, b)
#define TILE_DOT_UNSIGNED(c, a, b) _tile_dpbusd(c, a, b)
void amx_configure(int rows0, int rows1) {
  struct __attribute__((packed, aligned(64))) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const int rows[8] = {rows0, rows0, rows1, rows1, rows0, rows1, 16, 16};
  for (int t = 0; t < 8; ++t) {
    config.bytes[t] = rows[t] ? 64 : 0;
    config.rows[t] = (uint8_t)rows[t];
  }
  _tile_loadconfig(&config);
}
void amx_end() { _tile_release(); }

#endif

void amx_begin() { amx_configure(16, 16); }

// Pairs of bf16 from two vectors of floats: even input in the low half. AMX takes subnormal bf16 as zero, and so may this.
KTFX_INLINE vi bf16_pair(vf even, vf odd) {
#if KTFX_AMX == 2
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vi)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
  vu e = (vu)even, o = (vu)odd;
  e += 0x7fff + ((e >> 16) & 1);
  o += 0x7fff + ((o >> 16) & 1);
  return (vi)((e >> 16) | (o & 0xffff0000u));
#endif
}

// The value of the nibble at bit `shift` of each lane: INT4's less its offset, INT4ZP's code, MXFP4's times two.
template <int F>
KTFX_INLINE vf nibble_value(vi v, int shift) {
#if KTFX_AMX == 2
  // A look-up reads the low four bits of each lane and no others.
  const __m512 of_int4 = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  const __m512 of_code = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 of_e2m1 = _mm512_set_ps(-12, -8, -6, -4, -3, -2, -1, 0, 12, 8, 6, 4, 3, 2, 1, 0);
  const __m512 table = F == KTFX_FMT_INT4 ? of_int4 : F == KTFX_FMT_INT4ZP ? of_code : of_e2m1;
  return (vf)_mm512_permutexvar_ps((__m512i)((vu)v >> shift), table);
#else
  const vi code = (vi)((vu)nibbles<F>(v, shift % 8 != 0) >> shift / 8 * 8 & 255);
  return to_float(F == KTFX_FMT_INT4ZP ? code : code - offset_of<F>());
#endif
}

// A tile of any other format to the BF16 layout. INT8 keeps its integers (the caller applies the scale).
template <int F, int S>
void tile_to_bf16(const ktfx_matrix* m, const uint8_t* w, uint16_t* out) {
  for (int t = 0; t < V; ++t) {
    vf scale = splat(1.0f);
    vf zero = {};
    const int32_t group = F == KTFX_FMT_INT8 ? m->Kp : F == KTFX_FMT_FP8 ? kFp8Block : m->group;
    for (int32_t k = 0; k < m->Kp; k += group) {
      const int32_t end = k + group < m->Kp ? k + group : m->Kp;
      const int64_t g = (int64_t)(k / group) * kTile + t * L;
      if constexpr (F == KTFX_FMT_FP8) scale = load<vf>(w + m->scale_offset + g * 4) * 0x1p120f;
      else if constexpr (F != KTFX_FMT_INT8) scale = load_scales<S>(w + m->scale_offset + g * scale_bytes(S));
      if constexpr (F == KTFX_FMT_INT4ZP) zero = to_float(widen(load<vb>(w + m->zero_offset + g)));
      constexpr int step = F == KTFX_FMT_FP8 || F == KTFX_FMT_INT8 ? 4 : 8;
      for (int64_t s = k / step; s < end / step; ++s) {
        const uint8_t* row = w + s * 64 + t * L * 4;
        uint16_t* to = out + s * step * kTile + t * L * 2;
        vi v = load<vi>(row);
        if constexpr (F == KTFX_FMT_FP8) {
          for (int i = 0; i < 4; i += 2)
            store(to + i * kTile, bf16_pair(load1<F>(w, s, i, t) * scale, load1<F>(w, s, i + 1, t) * scale));
        } else if constexpr (F == KTFX_FMT_INT8) {
          vf f[4];
          for (int i = 0; i < 4; ++i) f[i] = to_float((v << (24 - 8 * i)) >> 24);
          for (int i = 0; i < 4; i += 2) store(to + i * kTile, bf16_pair(f[i], f[i + 1]));  // exact: no rounding
        } else {
          UNROLL
          for (int i = 0; i < 8; i += 2) {
            // Inputs 0 to 3 are the low nibbles of the lane's bytes, 4 to 7 the high ones.
            const int shift = i % 4 * 8 + i / 4 * 4;
            vf even = nibble_value<F>(v, shift), odd = nibble_value<F>(v, shift + 8);
            if constexpr (F == KTFX_FMT_INT4ZP) even -= zero, odd -= zero;
            store(to + i * kTile, bf16_pair(even * scale, odd * scale));
          }
        }
      }
    }
  }
}

void tile_to_bf16_any(const ktfx_matrix* m, const uint8_t* w, uint16_t* out) {
  switch (m->format) {
    case KTFX_FMT_FP8: return tile_to_bf16<KTFX_FMT_FP8, KTFX_F32>(m, w, out);
    case KTFX_FMT_INT8: return tile_to_bf16<KTFX_FMT_INT8, KTFX_F32>(m, w, out);
    case KTFX_FMT_MXFP4: return tile_to_bf16<KTFX_FMT_MXFP4, KTFX_E8M0>(m, w, out);
    case KTFX_FMT_INT4:
      if (m->scale_dtype == KTFX_F32) return tile_to_bf16<KTFX_FMT_INT4, KTFX_F32>(m, w, out);
      if (m->scale_dtype == KTFX_BF16) return tile_to_bf16<KTFX_FMT_INT4, KTFX_BF16>(m, w, out);
      return tile_to_bf16<KTFX_FMT_INT4, KTFX_F16>(m, w, out);
    default:
      if (m->scale_dtype == KTFX_F32) return tile_to_bf16<KTFX_FMT_INT4ZP, KTFX_F32>(m, w, out);
      if (m->scale_dtype == KTFX_BF16) return tile_to_bf16<KTFX_FMT_INT4ZP, KTFX_BF16>(m, w, out);
      return tile_to_bf16<KTFX_FMT_INT4ZP, KTFX_F16>(m, w, out);
  }
}

// The next two tiles, fetched while these are computed with, spread over all steps.
struct Coming {
  const uint8_t *next, *end;
  int share;
  Coming(const ktfx_matrix* m, const uint8_t* from, int64_t steps) {
    const int64_t lines = 2 * m->tile_bytes / 64;
    next = from;
    end = from + lines * 64;
    share = (int)((lines + steps - 1) / steps);
  }
  KTFX_MEMBER void fetch() {
    for (int i = 0; i < share && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// c0, c1: [rows][16]. scratch: 2 Kp x 16 bf16, used by all formats but BF16. w1 may be null.
void amx_tiles(const ktfx_matrix* m, const uint8_t* w0, const uint8_t* w1, const uint16_t* x, int64_t ldx, int rows,
               float* c0, float* c1, uint16_t* scratch, const uint8_t* next) {
  const uint8_t *b0 = w0, *b1 = w1;
  if (m->format != KTFX_FMT_BF16) {
    b0 = (const uint8_t*)scratch;
    tile_to_bf16_any(m, w0, scratch);
    if (w1) {
      b1 = b0 + (int64_t)m->Kp * kTile * 2;
      tile_to_bf16_any(m, w1, scratch + (int64_t)m->Kp * kTile);
    }
  }
  const int steps = m->Kp / 32;
  const int64_t stride = ldx * 2;
  Coming coming(m, next, (int64_t)steps * ((rows + 31) / 32));
  for (int r = 0; r < rows; r += 32) {
    const int left = rows - r;
    const int r0 = left < 16 ? left : 16, r1 = left >= 32 ? 16 : left - r0;
    amx_configure(r0, r1);
    const uint16_t *x0 = x + r * ldx, *x1 = x0 + 16 * ldx;
    TILE_ZERO(0);
    if (w1) TILE_ZERO(1);
    if (r1) {
      TILE_ZERO(2);
      if (w1) TILE_ZERO(3);
    }
    if (w1 && r1) {
      for (int s = 0; s < steps; ++s) {
        TILE_LOAD(4, x0 + s * 32, stride);
        TILE_LOAD(6, b0 + s * 1024, 64);
        TILE_LOAD(7, b1 + s * 1024, 64);
        TILE_LOAD(5, x1 + s * 32, stride);
        coming.fetch();
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
      }
    } else {
      for (int s = 0; s < steps; ++s) {
        TILE_LOAD(4, x0 + s * 32, stride);
        TILE_LOAD(6, b0 + s * 1024, 64);
        coming.fetch();
        TILE_DOT(0, 4, 6);
        if (w1) {
          TILE_LOAD(7, b1 + s * 1024, 64);
          TILE_DOT(1, 4, 7);
        }
        if (r1) {
          TILE_LOAD(5, x1 + s * 32, stride);
          TILE_DOT(2, 5, 6);
        }
      }
    }
    TILE_STORE(0, c0 + r * kTile, 64);
    if (w1) TILE_STORE(1, c1 + r * kTile, 64);
    if (r1) {
      TILE_STORE(2, c0 + (r + 16) * kTile, 64);
      if (w1) TILE_STORE(3, c1 + (r + 16) * kTile, 64);
    }
  }
}

// INT8 tiles as they are stored times rows of int16 in two halves: x = dx (256 high + low), high signed, low not. Both
// products are exact. x: in each row Kp high bytes and from Kp on the low ones, ldx bytes a row; Kp is a multiple of 64.
// c0, c1: [rows][16], without the weights' scale. w1 may be null.
void amx_int8_tiles(const ktfx_matrix* m, const uint8_t* w0, const uint8_t* w1, const uint8_t* x, int64_t ldx, int rows,
                    const float* dx, float* c0, float* c1, const uint8_t* next) {
  const int steps = m->Kp / 64;
  Coming coming(m, next, (int64_t)steps * ((rows + 15) / 16));
  alignas(64) int32_t sums[4][16][16];
  for (int r = 0; r < rows; r += 16) {
    const int n = rows - r < 16 ? rows - r : 16;
    amx_configure(n, n);
    const uint8_t *high = x + r * ldx, *low = high + m->Kp;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int s = 0; s < steps; ++s) {
      TILE_LOAD(4, high + s * 64, ldx);
      TILE_LOAD(6, w0 + s * 1024, 64);
      TILE_LOAD(5, low + s * 64, ldx);
      coming.fetch();
      TILE_DOT_SIGNED(0, 4, 6);
      TILE_DOT_UNSIGNED(1, 5, 6);
      if (w1) {
        TILE_LOAD(7, w1 + s * 1024, 64);
        TILE_DOT_SIGNED(2, 4, 7);
        TILE_DOT_UNSIGNED(3, 5, 7);
      }
    }
    TILE_STORE(0, sums[0], 64);
    TILE_STORE(1, sums[1], 64);
    TILE_STORE(2, sums[2], 64);
    TILE_STORE(3, sums[3], 64);
    for (int i = 0; i < n; ++i) {
      const vf d = splat(dx[r + i]);
      for (int t = 0; t < V; ++t) {
        const int64_t at = (int64_t)(r + i) * kTile + t * L;
        store(c0 + at, (to_float(load<vi>(&sums[0][i][t * L])) * 256.0f + to_float(load<vi>(&sums[1][i][t * L]))) * d);
        if (w1)
          store(c1 + at, (to_float(load<vi>(&sums[2][i][t * L])) * 256.0f + to_float(load<vi>(&sums[3][i][t * L]))) * d);
      }
    }
  }
}

// The largest magnitude of n floats, a multiple of 16; NaN if one of them is not finite.
float amx_peak(const float* x, int64_t n) {
  vf peak = {}, bad = {};
  for (int64_t i = 0; i < n; i += L) {
    const vf v = load<vf>(x + i);
    peak = vmax(vabs(v), peak);
    bad += v * 0.0f;
  }
  float all = highest(peak);
  for (int i = 0; i < L; ++i) all += bad[i];
  return all;
}

// x times inverse, at most 32767 of magnitude, as halves of int16. n: a multiple of 16.
void amx_halves(const float* x, int64_t n, float inverse, uint8_t* high, uint8_t* low) {
  for (int64_t i = 0; i < n; i += L) {
    const vi q = nearest(load<vf>(x + i) * inverse);
    store(high + i, __builtin_convertvector(q >> 8, vb));
    store(low + i, __builtin_convertvector(q, vb));
  }
}
