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

// Pairs of bf16 from two vectors of floats: even input in the low half.
KTFX_INLINE vi bf16_pair(vf even, vf odd) {
  vu e = (vu)even, o = (vu)odd;
  e += 0x7fff + ((e >> 16) & 1);
  o += 0x7fff + ((o >> 16) & 1);
  return (vi)((e >> 16) | (o & 0xffff0000u));
}

// A tile of any other format to the BF16 layout. INT8 keeps its integers (the caller applies the scale).
template <int F, int S>
void tile_to_bf16(const ktfx_matrix* m, const uint8_t* w, uint16_t* out) {
  for (int t = 0; t < V; ++t) {
    vf scale = splat(1.0f);
    vi zero = splat((int32_t)offset_of<F>());
    const int32_t group = F == KTFX_FMT_INT8 ? m->Kp : F == KTFX_FMT_FP8 ? kFp8Block : m->group;
    for (int32_t k = 0; k < m->Kp; k += group) {
      const int32_t end = k + group < m->Kp ? k + group : m->Kp;
      const int64_t g = (int64_t)(k / group) * kTile + t * L;
      if constexpr (F == KTFX_FMT_FP8) scale = load<vf>(w + m->scale_offset + g * 4) * 0x1p120f;
      else if constexpr (F != KTFX_FMT_INT8) scale = load_scales<S>(w + m->scale_offset + g * scale_bytes(S));
      if constexpr (F == KTFX_FMT_INT4ZP) zero = widen(load<vb>(w + m->zero_offset + g));
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
          for (int i = 0; i < 4; i += 2)  // exact: no rounding
            store(to + i * kTile, (vi)(((vu)f[i] >> 16) | ((vu)f[i + 1] & 0xffff0000u)));
        } else {
          for (int h = 0; h < 2; ++h) {
            const vi half = nibbles<F>(v, h);
            vf f[4];
            for (int i = 0; i < 4; ++i) f[i] = to_float((vi)((vu)half >> (8 * i) & 255) - zero) * scale;
            store(to + (4 * h) * kTile, bf16_pair(f[0], f[1]));
            store(to + (4 * h + 2) * kTile, bf16_pair(f[2], f[3]));
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
  // The next two tiles are fetched while these are computed with, spread over all steps.
  const int passes = (rows + 31) / 32;
  const int64_t lines = 2 * m->tile_bytes / 64;
  const int share = (int)((lines + (int64_t)steps * passes - 1) / ((int64_t)steps * passes));
  const uint8_t* const next_end = next + lines * 64;
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
        for (int i = 0; i < share && next < next_end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
      }
    } else {
      for (int s = 0; s < steps; ++s) {
        TILE_LOAD(4, x0 + s * 32, stride);
        TILE_LOAD(6, b0 + s * 1024, 64);
        for (int i = 0; i < share && next < next_end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
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
