// Launchers of panel_product.cu and panel_gradient.cu; see launch.h for what every launcher keeps to.
#pragma once

#include <cstdint>

// A product with a weight of R x C blocks, R in {8, 16}, C in {1, 4, 8, 16}; kernels/blocks/layout.py makes its index.
// Images are channels last, x [batch, height, width, in] and y [batch, out_height, out_width, out], and a linear layer
// is the 1 x 1 convolution of an image of one line: x [tokens, in] and y [tokens, out] have batch 1, height 1 and width
// `tokens`.
// Whatever sticks out of a ragged weight must be 0 in `values`.
struct PanelShape {
  int64_t batch, in, height, width, out;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
  int64_t rows, cols, blocks;  // R, C and the blocks that are stored
  int64_t dtype;               // enum Dtype of x, values, bias and y: float16, bfloat16, or float32 through tf32

  // How to run, 0: chosen by the launcher. Results depend on these in the last bits only.
  int64_t chunk;   // input rows resident in shared memory, a multiple of 16
  int64_t stages;  // chunks (weight gradient: token tiles) in flight, 2 to 4
  int64_t split;   // shares of a sum that run at once and are added by a second pass
  int64_t warps;   // of a block, a multiple of 4 up to 16
};

inline PanelShape panel_linear(int64_t tokens, int64_t in, int64_t out, int64_t rows, int64_t cols, int64_t blocks,
                               int64_t dtype) {
  return {1, in, 1, tokens, out, 1, 1, 1, 1, 0, 0, 1, 1, 1, rows, cols, blocks, dtype, 0, 0, 0, 0};
}

// Pointers are multiples of 16 bytes, those of indices of 4. Workspaces may be uninitialised and are free again when
// the queued work is done; *_workspace gives their bytes, -1 for a shape that the launcher rejects. Results are
// deterministic on one kind of device: every sum runs in a fixed order.
extern "C" {

// y = activation(x * W + bias); bias [out] or null; activation 0 none, 1 relu, 2 gelu (erf), 3 silu.
int sparsekit_cuda_panel_conv2d(const PanelShape* shape, const void* x, const void* values, const int32_t* crow,
                                const int32_t* col, const void* bias, int activation, void* y, void* workspace,
                                void* stream);
int64_t sparsekit_cuda_panel_conv2d_workspace(const PanelShape* shape);

// dx [batch, height, width, in] from dy [batch, out_height, out_width, out], C at least 8; the transposed list.
int sparsekit_cuda_panel_conv2d_t(const PanelShape* shape, const void* dy, const void* values, const int32_t* t_crow,
                                  const int32_t* t_row, const int32_t* t_perm, void* dx, void* workspace,
                                  void* stream);
int64_t sparsekit_cuda_panel_conv2d_t_workspace(const PanelShape* shape);

// dvalues [blocks, R, C], exactly 0 where blocks stick out.
int sparsekit_cuda_panel_conv2d_sddmm(const PanelShape* shape, const void* dy, const void* x, const int32_t* crow,
                                      const int32_t* col, void* dvalues, void* workspace, void* stream);
int64_t sparsekit_cuda_panel_conv2d_sddmm_workspace(const PanelShape* shape);

}  // extern "C"
