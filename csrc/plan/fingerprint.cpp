#include "fingerprint.h"

#include <cstring>

namespace fastres {
namespace {

constexpr uint64_t kPrime = 0x9e3779b97f4a7c15ull;

// Each step is a bijection of the state for a given word, so one changed word always changes the state.
uint64_t mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * kPrime;
  return state ^ (state >> 29);
}

// Four chains, so that the multiplications overlap.
uint64_t dense(const unsigned char* p, int64_t bytes, uint64_t seed) {
  uint64_t chain[4] = {seed, seed + 1, seed + 2, seed + 3};
  const int64_t words = bytes / 8;
  int64_t i = 0;
  for (; i + 4 <= words; i += 4) {
    for (int64_t k = 0; k < 4; ++k) {
      uint64_t word;
      std::memcpy(&word, p + 8 * (i + k), 8);
      chain[k] = mix(chain[k], word);
    }
  }
  for (i *= 8; i < bytes; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, p + i, static_cast<size_t>(bytes - i < 8 ? bytes - i : 8));
    chain[0] = mix(chain[0], word);
  }
  return mix(mix(mix(chain[0], chain[1]), chain[2]), chain[3]);
}

}  // namespace

uint64_t Samples::fingerprint() const {
  uint64_t state = kPrime;
  for (const Sample& s : all) {
    if (s.step == 0) {
      state = dense(s.data, s.bytes, state);
      continue;
    }
    for (int64_t i = 0; i + 4 <= s.bytes; i += s.step) {
      uint32_t word;
      std::memcpy(&word, s.data + i, 4);
      state = mix(state, word);
    }
  }
  return state;
}

}  // namespace fastres
