#include "code_pages.h"

#include <cmath>
#include <cstring>

#if defined(SPARSEKIT_X86) && defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsekit {
namespace {

#if defined(SPARSEKIT_X86) && defined(__linux__)
constexpr const char* kPlatform = nullptr;
// Code larger than the caches is fetched up to a tenth faster from pages of 2 MB, where the system has them: it gets as
// many as it fills, and one for what is left if that wastes little.
constexpr size_t kPage = 4096, kHugePage = size_t(2) << 20;
size_t mapped(size_t size) {
  const size_t whole = (size + kHugePage - 1) / kHugePage * kHugePage;
  return whole - size <= whole / 4 ? whole : (size + kPage - 1) / kPage * kPage;
}

void* executable(const void* code, size_t size) {
  const size_t wanted = mapped(size), huge = wanted / kHugePage * kHugePage, slack = huge > 0 ? kHugePage : 0;
  void* all = mmap(nullptr, wanted + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* pages = static_cast<char*>(all);
  if (huge > 0) {  // begins at one
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(all) % kHugePage) % kHugePage;
    pages += before;
    if (before > 0) munmap(all, before);
    munmap(pages + wanted, slack - before);
    madvise(pages, huge, MADV_HUGEPAGE);
  }
  std::memcpy(pages, code, size);
  if (mprotect(pages, wanted, PROT_READ | PROT_EXEC) == 0) return pages;
  munmap(pages, wanted);
  return nullptr;
}
void release(void* pages, size_t size) { munmap(pages, mapped(size)); }
#else
constexpr const char* kPlatform = "needs Linux on x86-64";
size_t mapped(size_t size) { return size; }
void* executable(const void*, size_t) { return nullptr; }
void release(void*, size_t) {}
#endif

std::string probe() {
  const char* wanted = std::getenv("SPARSEKIT_JIT");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return "switched off by SPARSEKIT_JIT=0";
  if (kPlatform != nullptr) return kPlatform;
  if (std::strncmp(active_isa().name, "avx512", 6) != 0) return "needs AVX-512";
  return CodePages({0xc3}) ? "yes" : "the system forbids executable memory";
}

// f(number) for the numbers of an outline.
template <class F>
void outline(const Lists& lists, const F& f) {
  for (int64_t r = 0; r < lists.rows; ++r) {
    const int32_t begin = lists.crow[r], end = lists.crow[r + 1];
    f(end);
    f(begin < end ? lists.index[begin] : -1);
    f(begin < end ? lists.index[end - 1] : -1);
  }
}

}  // namespace

const std::string& code_available() {
  static const std::string reason = probe();
  return reason;
}

CodePages::CodePages(const std::vector<uint8_t>& code)
    : data_(executable(code.data(), code.size())), size_(code.size()) {}

size_t CodePages::held() const { return mapped(size_); }

CodePages::~CodePages() {
  if (data_ != nullptr) release(data_, size_);
}

Outline::Outline(const Lists& lists) {
  all_.reserve(size_t(3 * lists.rows));
  outline(lists, [&](int32_t n) { all_.push_back(n); });
}

bool Outline::describes(const Lists& lists) const {
  if (int64_t(all_.size()) != 3 * lists.rows) return false;
  bool same = true;
  size_t i = 0;
  outline(lists, [&](int32_t n) { same = same && all_[i++] == n; });
  return same;
}

bool ascend(const Lists& lists) {
  for (int64_t r = 0; r < lists.rows; ++r) {
    if (lists.crow[r] > lists.crow[r + 1]) return false;
    int32_t last = -1;
    for (int32_t p = lists.crow[r]; p < lists.crow[r + 1]; last = lists.index[p++])
      if (lists.index[p] <= last) return false;
  }
  return true;
}

double meetings(double nnz, double places) { return places * (1 - std::exp(-nnz / places)); }

const std::vector<PieceSorter::Survivor>& PieceSorter::take(Span rows, Span indices) {
  const int64_t count = rows.end - rows.begin;
  from_.assign(cursor_.begin() + rows.begin, cursor_.begin() + rows.end);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    int32_t& p = cursor_[size_t(r)];
    while (p < lists_.crow[r + 1] && lists_.index[p] < indices.end) ++p;
  }
  to_.assign(cursor_.begin() + rows.begin, cursor_.begin() + rows.end);
  // By counting: how many of each index, where they begin, each to its place.
  start_.assign(size_t(indices.end - indices.begin + 1), 0);
  const auto each = [&](const auto& f) {
    for (int64_t r = 0; r < count; ++r)
      for (int32_t p = from_[size_t(r)]; p < to_[size_t(r)]; ++p)
        f(int32_t(r), p, int32_t(lists_.index[p] - indices.begin));
  };
  each([&](int32_t, int32_t, int32_t k) { ++start_[size_t(k + 1)]; });
  for (size_t k = 1; k < start_.size(); ++k) start_[k] += start_[k - 1];
  survivors_.resize(size_t(start_.back()));
  each([&](int32_t r, int32_t p, int32_t k) {
    survivors_[size_t(start_[size_t(k)]++)] = {r, k, perm_ ? perm_[p] : p};
  });
  return survivors_;
}

}  // namespace sparsekit
