// A quick look at many tensors: has any of them changed?
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastres {

// So much of one tensor's memory: all `bytes` of it (step 0), or the words of 4 bytes that lie `step` bytes apart.
struct Sample {
  const unsigned char* data;
  int64_t bytes, step;
};

struct Samples {
  std::vector<Sample> all;
  uint64_t fingerprint() const;
};

}  // namespace fastres
