// What ThreadSanitizer must accept and what it must find: threads that sum shares of numbers the caller wrote,
// each into a place of its own, or all into the first place. Built and run by tests/race.py.
#include "../csrc/cpu/parallel.h"

extern "C" int64_t sparsekit_sum(int64_t parts, int64_t place) {
  int64_t* numbers = sparsekit::Workspace::mine().get<int64_t>(sparsekit::Workspace::kX, 1000);
  int64_t* sums = sparsekit::Workspace::mine().get<int64_t>(sparsekit::Workspace::kDy, 8 * parts);
  int64_t total = 0;
  for (int round = 0; round < 20; ++round) {  // memory goes from the caller to the threads and back
    for (int64_t i = 0; i < 1000; ++i) numbers[i] = i + round;
    for (int64_t i = 0; i < 8 * parts; ++i) sums[i] = 0;
    sparsekit::for_parts(parts, [&](int64_t part) {
      const auto share = sparsekit::cut(1000, parts, part);
      for (int64_t i = share.begin; i < share.end; ++i) sums[8 * part * place] += numbers[i];
    });
    for (int64_t i = 0; i < 8 * parts; ++i) total += sums[i];
  }
  return total;
}
