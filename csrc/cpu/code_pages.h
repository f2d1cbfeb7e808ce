// What machine code of a mask needs, whatever product it computes: the mask's survivors in the order in which code
// meets them, memory that executes, and a cache of what was generated.
#pragma once
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tensors.h"

namespace sparsekit {

// "yes", or why no code is generated in this process.
const std::string& code_available();

// Memory that is written first and executed later, never both; empty where the system forbids it.
class CodePages {
 public:
  explicit CodePages(const std::vector<uint8_t>& code);
  ~CodePages();
  CodePages(const CodePages&) = delete;
  CodePages& operator=(const CodePages&) = delete;

  explicit operator bool() const { return data_ != nullptr; }
  char* data() const { return static_cast<char*>(data_); }
  size_t size() const { return size_; }
  size_t held() const;  // bytes of memory
  // Processors look ahead in data much better than in code: fetches share `part` of `parts` of some of it.
  void prefetch(Span bytes, int64_t parts, int64_t part) const {
    const Span share = cut(bytes.end - bytes.begin, parts, part, 64);
    for (int64_t i = share.begin; i < share.end; i += 64) __builtin_prefetch(data() + bytes.begin + i, 0, 2);
  }

 private:
  void* data_;
  size_t size_;
};

// First and last index of every row, and where rows end: a mask hardly changes and keeps them all.
class Outline {
 public:
  explicit Outline(const Lists& lists);
  bool describes(const Lists& lists) const;

 private:
  std::vector<int32_t> all_;
};

// What the kernels require of lists, and a generator must not take on trust.
bool ascend(const Lists& lists);

// Pairs of a block of rows and an index that meet, if nnz survivors lie at random among `places` such pairs.
double meetings(double nnz, double places);

// The survivors of some rows and a range of indices, sorted by index, then row.
class PieceSorter {
 public:
  struct Survivor {
    int32_t row, index, value;  // both relative to the piece; which value
  };

  // The value of survivor p is values[perm[p]], without perm values[p].
  PieceSorter(const Lists& lists, const int32_t* perm)
      : lists_(lists), perm_(perm), cursor_(lists.crow, lists.crow + lists.rows) {}

  // Pieces of the same rows must be taken in ascending order of indices, from the first.
  const std::vector<Survivor>& take(Span rows, Span indices);
  // The survivors of rows [rows.begin, rows.end) in the last piece taken.
  const int32_t* first() const { return from_.data(); }
  const int32_t* last() const { return to_.data(); }

 private:
  Lists lists_;
  const int32_t* perm_;
  std::vector<int32_t> cursor_, start_, from_, to_;
  std::vector<Survivor> survivors_;
};

inline void check_code_key(const Tensor& key) {
  STD_TORCH_CHECK(key.is_cpu() && key.scalar_type() == ScalarType::Long && key.dim() == 1 && key.size(0) == 2 &&
                      key.is_contiguous(),
                  "Expected code_key of dtype int64 and shape [2] on the CPU, got shape ", shape_of(key));
}

// Code, or a table, by the name of its mask; the least recently used goes when all of it exceeds 64 MiB.
template <class Code>
class CodeCache {
 public:
  static CodeCache& all() {
    static CodeCache& cache = *new CodeCache;  // never torn down
    return cache;
  }

  // The entry under a checked key that satisfies `same`, else what `make` returns (null: none can be made).
  template <class Same, class Make>
  std::shared_ptr<const Code> find(const Tensor& key, const Same& same, const Make& make) {
    const auto* wanted = static_cast<const uint64_t*>(key.const_data_ptr());
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto e = entries_.begin(); e != entries_.end(); ++e)
      if (e->key[0] == wanted[0] && e->key[1] == wanted[1] && same(*e->code)) {
        entries_.splice(entries_.begin(), entries_, e);
        return e->code;
      }
    if (refused_) return nullptr;
    const std::shared_ptr<const Code> code = make();
    if (code == nullptr) return nullptr;
    if (!code->usable()) {
      refused_ = true;
      return nullptr;
    }
    entries_.push_front({{wanted[0], wanted[1]}, code});
    size_t held = 0;
    for (auto e = entries_.begin(); e != entries_.end();) {
      held += e->code->bytes();
      e = held > kBytes && e != entries_.begin() ? entries_.erase(e) : std::next(e);
    }
    return code;
  }

 private:
  static constexpr size_t kBytes = size_t(64) << 20;
  struct Entry {
    uint64_t key[2];
    std::shared_ptr<const Code> code;
  };

  std::mutex mutex_;
  std::list<Entry> entries_;  // most recently used first
  bool refused_ = false;      // a policy that changed since the probe is asked once
};

}  // namespace sparsekit
