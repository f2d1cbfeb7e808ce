// Chooses the instruction set once per process.
#pragma once
#include <string>

#include "kernels.h"

namespace sparsekit {

// The fastest variant this CPU runs, or the one named by SPARSEKIT_ISA. Throws on an impossible request.
const Isa& active_isa();
// Names of the variants compiled into this library, as a JSON list.
std::string compiled_isas();

template <class T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() { return active_isa().f32; }
template <>
inline const Kernels<double>& kernels<double>() { return active_isa().f64; }

}  // namespace sparsekit
