// Large aligned memory, for scratch, packed weights and arenas alike.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <string>

namespace fastres {

// Why memory could not be had; MemoryError in Python.
class MemoryShortage : public std::bad_alloc {
 public:
  explicit MemoryShortage(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

std::string mebibytes(int64_t bytes);

// Uninitialised memory aligned to 64 bytes, or, from 2 MiB on, to 2 MiB and in huge pages where the system has them.
class Block {
 public:
  Block() = default;
  explicit Block(int64_t bytes);  // throws MemoryShortage
  char* get() const { return memory_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> memory_;
  int64_t bytes_ = 0;
};

}  // namespace fastres
