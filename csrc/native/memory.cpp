#include "memory.h"

#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastres {

std::string mebibytes(int64_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

Block::Block(int64_t bytes) {
  constexpr int64_t kHugePage = 2 << 20;
  if (bytes <= 0) return;
  const int64_t alignment = bytes >= kHugePage ? kHugePage : 64;
  bytes_ = (bytes + alignment - 1) / alignment * alignment;
  memory_.reset(static_cast<char*>(std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(bytes_))));
  if (!memory_) throw MemoryShortage("fastres could not allocate " + mebibytes(bytes));
#ifdef __linux__
  if (alignment == kHugePage) madvise(memory_.get(), static_cast<size_t>(bytes_), MADV_HUGEPAGE);  // a wish: refusing it is fine
#endif
}

void Block::Free::operator()(char* p) const { std::free(p); }

}  // namespace fastres
