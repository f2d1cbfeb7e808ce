// Schemas and registration. The strings come from sparsekit/schemas.py, through the build.
#include <torch/csrc/stable/library.h>

#include "cpu/bsr_conv2d.h"
#include "cpu/bsr_linear.h"
#include "cpu/code_pages.h"
#include "cpu/csr_chain.h"
#include "cpu/csr_conv2d.h"
#include "cpu/csr_linear.h"
#include "cpu/dense.h"
#include "cpu/lanes_linear.h"
#include "cpu/max_pool2d.h"
#include "sparsekit_schemas.h"

namespace sparsekit {
namespace {

std::string build_info() {
  const std::string quote = "\"";
  return "{\"version\": " + quote + SPARSEKIT_VERSION + "\", \"schemas\": " + quote + SPARSEKIT_SCHEMA_HASH +
         "\", \"compiler\": " + quote + SPARSEKIT_COMPILER + "\", \"isa\": " + compiled_isas() +
         ", \"active_isa\": " + quote + active_isa().name + "\", \"machine_code\": " + quote +
         code_available() + "\", \"cuda\": " +
#if defined(SPARSEKIT_CUDA)
         "true}";
#else
         "false}";
#endif
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY(sparsekit, m) {
  for (const char* schema : sparsekit::kSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&sparsekit::build_info));
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("csr_chain", TORCH_BOX(&sparsekit::csr_chain));
  m.impl("csr_linear", TORCH_BOX(&sparsekit::csr_linear));
  m.impl("csr_linear_t", TORCH_BOX(&sparsekit::csr_linear_t));
  m.impl("csr_sddmm", TORCH_BOX(&sparsekit::csr_sddmm));
  m.impl("csr_linear_backward", TORCH_BOX(&sparsekit::csr_linear_backward));
  m.impl("csr_conv2d", TORCH_BOX(&sparsekit::csr_conv2d));
  m.impl("csr_conv2d_planes", TORCH_BOX(&sparsekit::csr_conv2d_planes));
  m.impl("csr_conv2d_t", TORCH_BOX(&sparsekit::csr_conv2d_t));
  m.impl("csr_conv2d_sddmm", TORCH_BOX(&sparsekit::csr_conv2d_sddmm));
  m.impl("csr_conv2d_backward", TORCH_BOX(&sparsekit::csr_conv2d_backward));
  m.impl("bsr_linear", TORCH_BOX(&sparsekit::bsr_linear));
  m.impl("bsr_linear_t", TORCH_BOX(&sparsekit::bsr_linear_t));
  m.impl("bsr_sddmm", TORCH_BOX(&sparsekit::bsr_sddmm));
  m.impl("bsr_linear_backward", TORCH_BOX(&sparsekit::bsr_linear_backward));
  m.impl("bsr_conv2d", TORCH_BOX(&sparsekit::bsr_conv2d));
  m.impl("bsr_conv2d_t", TORCH_BOX(&sparsekit::bsr_conv2d_t));
  m.impl("bsr_conv2d_sddmm", TORCH_BOX(&sparsekit::bsr_conv2d_sddmm));
  m.impl("bsr_conv2d_backward", TORCH_BOX(&sparsekit::bsr_conv2d_backward));
  m.impl("lanes_linear", TORCH_BOX(&sparsekit::lanes_linear));
  m.impl("max_pool2d", TORCH_BOX(&sparsekit::max_pool2d));
  m.impl("max_pool2d_planes", TORCH_BOX(&sparsekit::max_pool2d_planes));
  m.impl("dense_sddmm", TORCH_BOX(&sparsekit::dense_sddmm));
  m.impl("zero_pruned_", TORCH_BOX(&sparsekit::zero_pruned_));
}
