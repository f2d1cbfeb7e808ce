#include "dispatch.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>

namespace sparsekit {

extern const Isa isa_portable;
#if defined(SPARSEKIT_X86)
extern const Isa isa_avx2;
extern const Isa isa_avx512;
extern const Isa isa_avx512_bf16;
#endif

namespace {

struct Variant {
  const Isa* isa;
  bool (*runs_here)();
};

#if defined(SPARSEKIT_X86)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("avx2");
}
#endif

// Fastest first.
const Variant kVariants[] = {
#if defined(SPARSEKIT_X86)
    {&isa_avx512_bf16, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
    {&isa_avx512, has_avx512},
    // Every AVX2 processor with FMA also has F16C; gcc has no name to ask for it.
    {&isa_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&isa_portable, [] { return true; }},
};

const Isa& choose() {
  const char* wanted = std::getenv("SPARSEKIT_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    for (const Variant& v : kVariants)
      if (v.runs_here()) return *v.isa;
  }
  for (const Variant& v : kVariants) {
    if (std::string(wanted) != v.isa->name) continue;
    STD_TORCH_CHECK(v.runs_here(), "SPARSEKIT_ISA=", wanted, ": this CPU does not support it; unset the variable");
    return *v.isa;
  }
  STD_TORCH_CHECK(false, "SPARSEKIT_ISA=", wanted, " is not one of ", compiled_isas(), "; unset the variable");
}

}  // namespace

const Isa& active_isa() {
  static const Isa& isa = choose();
  return isa;
}

std::string compiled_isas() {
  std::string list = "[";
  for (const Variant& v : kVariants) list += std::string(list.size() > 1 ? ", " : "") + '"' + v.isa->name + '"';
  return list + "]";
}

}  // namespace sparsekit
