// The tile registers of AMX: eight, of 16 rows of 64 bytes.
#pragma once

#if defined(__AMX_BF16__)

#include "cpu_vec.h"

namespace fastres::FASTRES_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// For this thread, until _tile_release. The compiler takes only the first bytes of the configuration for read: all of it must be in memory.
FASTRES_INLINE void configure_tiles() {
  const TileConfig config;
  asm volatile("" : : "m"(config) : "memory");
  _tile_loadconfig(&config);
}

}  // namespace fastres::FASTRES_ISA

#endif  // __AMX_BF16__
