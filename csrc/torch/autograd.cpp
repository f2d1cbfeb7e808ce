// Nodes of torch's autograd graph in C++: Python's cost more than a small layer's product does.
// Not the stable ABI, which has no nodes: the file's name tells the torch it was built with, and the package looks
// there before it loads it. Each function returns NotImplemented where sparsekit/autograd.py must do the work.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/silu.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <dlfcn.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/utils/pybind.h>

#include "sparsekit_schemas.h"

namespace sparsekit {
namespace {

using at::IntArrayRef;
using at::Tensor;
using Count = std::optional<int64_t>;
using Maybe = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Functions of the native library that connect finds; csrc/cpu/csr_chain.h and dense.h say what they take.
struct Native {
  AtenTensorHandle (*chain)(AtenTensorHandle, int64_t, const AtenTensorHandle*, const char* const*);
  void (*clear_pruned)(void*, const uint8_t*, int64_t, int64_t);
} native{};

// What a layer is besides its parameters: csr's index tensors, and the numbers of a convolution (none: linear).
struct Layer {
  enum { kCrow, kCol, kKey, kTCrow, kTRow, kTPerm, kTensors };
  std::vector<Tensor> index;
  std::vector<int64_t> conv;  // kernel size, stride, padding, dilation (two each), groups

  IntArrayRef pair(int which) const { return IntArrayRef(conv).slice(2 * which, 2); }
};

Tensor product(const Tensor& x, const Tensor& values, const Maybe& bias, const Layer& l,
               c10::string_view activation = "none") {
  const auto& i = l.index;
  if (l.conv.empty()) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&,
                                       const Maybe&, c10::string_view)>("sparsekit::csr_linear");
    return op.call(x, values, i[l.kCrow], i[l.kCol], bias, i[l.kKey], activation);
  }
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&,
                                     IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, int64_t, const Maybe&,
                                     c10::string_view, const Maybe&)>("sparsekit::csr_conv2d");
  return op.call(x, values, i[l.kCrow], i[l.kCol], bias, l.pair(0), l.pair(1), l.pair(2), l.pair(3), l.conv[8],
                 i[l.kKey], activation, Maybe());
}

Three gradients(const Tensor& dy, const Tensor& x, const Tensor& values, const Layer& l, std::array<bool, 3> needs) {
  const auto& i = l.index;
  if (l.conv.empty()) {
    static const auto op = find<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      const Tensor&, const Tensor&, const Tensor&, bool, bool, bool,
                                      const Maybe&)>("sparsekit::csr_linear_backward");
    return op.call(dy, x, values, i[l.kCrow], i[l.kCol], i[l.kTCrow], i[l.kTRow], i[l.kTPerm], needs[0], needs[1],
                   needs[2], i[l.kKey]);
  }
  static const auto op = find<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                    const Tensor&, const Tensor&, const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef,
                                    IntArrayRef, int64_t, bool, bool, bool,
                                    const Maybe&)>("sparsekit::csr_conv2d_backward");
  return op.call(dy, x, values, i[l.kCrow], i[l.kCol], i[l.kTCrow], i[l.kTRow], i[l.kTPerm], l.pair(0), l.pair(1),
                 l.pair(2), l.pair(3), l.conv[8], needs[0], needs[1], needs[2], i[l.kKey]);
}

// A gradient of a gradient is rare: through the dense weight, by operations that torch can differentiate again.
Three differentiable(const Tensor& dy, const Tensor& x, const Tensor& values, const Layer& l,
                     std::array<bool, 3> needs) {
  const int64_t out = dy.size(1);
  std::vector<int64_t> shape{out, x.size(1)};
  if (!l.conv.empty()) shape = {out, x.size(1) / l.conv[8], l.conv[0], l.conv[1]};
  const int64_t columns = c10::multiply_integers(shape) / std::max<int64_t>(out, 1);
  const Tensor& col = l.index[l.kCol];
  const Tensor row = at::repeat_interleave(l.index[l.kCrow].diff().to(at::kLong), Count(col.numel()));
  const Tensor place = row.mul(columns).add(col.to(at::kLong));
  Three found;
  auto& [dx, dvalues, dbias] = found;
  auto torchs = [&](const Tensor& input, const Tensor& weight, std::array<bool, 3> mask) {
    return at::convolution_backward(dy, input, weight, {}, l.pair(1), l.pair(2), l.pair(3), false, {0}, l.conv[8],
                                    mask);
  };
  if (needs[0]) {
    const Tensor weight = values.new_zeros({out * columns}).scatter(0, place, values).view(shape);
    dx = l.conv.empty() ? dy.matmul(weight)
                        : std::get<0>(torchs(dy.new_empty({1}).expand(x.sizes()), weight, {true, false, false}));
  }
  if (needs[1]) {
    const Tensor dense = l.conv.empty()
                             ? dy.t().matmul(x)
                             : std::get<1>(torchs(x, dy.new_empty({1}).expand(shape), {false, true, false}));
    dvalues = dense.reshape({-1}).index_select(0, place);
  }
  if (needs[2]) dbias = l.conv.empty() ? dy.sum(0) : dy.sum({0, 2, 3});
  return found;
}

struct CsrFunction : torch::autograd::Function<CsrFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& values, const Maybe& bias,
                        const Layer& layer) {
    ctx->save_for_backward({x, values});
    ctx->saved_data["index"] = layer.index;
    ctx->saved_data["conv"] = layer.conv;
    ctx->saved_data["bias"] = bias.has_value();
    return product(x, values, bias, layer);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const variable_list saved = ctx->get_saved_variables();
    const Layer layer{ctx->saved_data["index"].toTensorVector(), ctx->saved_data["conv"].toIntVector()};
    const bool bias = ctx->saved_data["bias"].toBool();
    // An argument that is None has no edge.
    const std::array<bool, 3> needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                    bias && ctx->needs_input_grad(2)};
    auto [dx, dvalues, dbias] = (at::GradMode::is_enabled() ? differentiable : gradients)(dy[0], saved[0], saved[1],
                                                                                         layer, needs);
    return {needs[0] ? dx : Tensor(), needs[1] ? dvalues : Tensor(), needs[2] ? dbias : Tensor(), Tensor()};
  }
};

// Whether a tensor is on the CPU and one that nothing but torch's own kernels and autograd look at.
bool is_plain(const Tensor& tensor) {
  using Key = c10::DispatchKey;
  static const c10::DispatchKeySet usual{Key::CPU, Key::ADInplaceOrView, Key::AutogradCPU, Key::AutocastCPU};
  return (tensor.key_set() | usual) == usual;
}
bool is_plain(PyObject* object) { return THPVariable_CheckExact(object) && is_plain(THPVariable_Unpack(object)); }

// Whether something sees, changes or replaces what operators do.
bool is_watched() {
  const auto& on = c10::impl::tls_local_dispatch_key_set().included_;
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled() ||
         at::autocast::is_autocast_enabled(at::kCPU) || on.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         on.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

void expect(Py_ssize_t arguments, Py_ssize_t count) {
  TORCH_CHECK_TYPE(count == arguments, "Expected ", arguments, " arguments, got ", count);
}

PyObject* not_implemented() { return Py_NewRef(Py_NotImplemented); }

bool is_tuple(PyObject* object, Py_ssize_t size) {
  return PyTuple_Check(object) && PyTuple_GET_SIZE(object) == size;
}

std::vector<int64_t> numbers(PyObject* tuple) {
  std::vector<int64_t> found;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    PyObject* item = PyTuple_GET_ITEM(tuple, i);
    if (PyTuple_Check(item)) {
      for (int64_t number : numbers(item)) found.push_back(number);
    } else {
      found.push_back(PyLong_AsLongLong(item));
      if (PyErr_Occurred()) throw python_error();
    }
  }
  return found;
}

// As check_linear and check_conv2d of sparsekit/functional.py, which name what is wrong.
bool fits(const Tensor& x, const std::vector<int64_t>& shape, const Layer& l) {
  if (l.conv.empty()) return x.dim() == 2 && x.size(1) == shape[1];
  if (x.dim() != 4 || x.size(1) != shape[1] * l.conv[8]) return false;
  for (int i = 0; i < 2; ++i) {
    if (x.size(2 + i) + 2 * l.pair(2)[i] < l.pair(3)[i] * (l.pair(0)[i] - 1) + 1) return false;
  }
  return true;
}

Tensor activate(const Tensor& y, c10::string_view activation) {
  if (activation == "relu") return at::relu(y);
  if (activation == "gelu") return at::gelu(y);
  if (activation == "silu") return at::silu(y);
  TORCH_CHECK(activation == "none", "Expected an activation of none, relu, gelu, silu, got ", activation);
  return y;
}

// (x, values, bias, index, shape, conv or None, activation): sparse_linear or sparse_conv2d of a csr layer.
PyObject* csr(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(7, count);
  const bool plain = is_plain(args[0]) && is_plain(args[1]) && (Py_IsNone(args[2]) || is_plain(args[2]));
  const bool linear = Py_IsNone(args[5]);
  const bool known = is_tuple(args[3], Layer::kTensors) && is_tuple(args[4], linear ? 2 : 4);
  if (!plain || !known || is_watched()) return not_implemented();
  const Tensor& x = THPVariable_Unpack(args[0]);
  const Tensor& values = THPVariable_Unpack(args[1]);
  const Maybe bias = Py_IsNone(args[2]) ? Maybe() : Maybe(THPVariable_Unpack(args[2]));
  const bool train = at::GradMode::is_enabled() &&
                     (values.requires_grad() || x.requires_grad() || (bias && bias->requires_grad()));
  Layer layer;
  layer.index.reserve(Layer::kTensors);
  // The operators read the transposed index for the input gradient alone; a first layer never builds it.
  const bool whole = train && x.requires_grad();
  for (int i = 0; i < Layer::kTensors; ++i) {
    const int read = i < Layer::kTCrow || whole ? i : i == Layer::kTCrow ? Layer::kCrow : Layer::kCol;
    PyObject* item = PyTuple_GET_ITEM(args[3], read);
    if (!is_plain(item)) return not_implemented();
    layer.index.push_back(THPVariable_Unpack(item));
  }
  const std::vector<int64_t> shape = numbers(args[4]);
  if (!linear) {
    if (!PyTuple_Check(args[5])) return not_implemented();
    layer.conv = numbers(args[5]);
    if (layer.conv.size() != 7) return not_implemented();  // stride, padding, dilation, groups
    layer.conv.insert(layer.conv.begin(), shape.begin() + 2, shape.end());
  }
  if (!fits(x, shape, layer)) return not_implemented();
  Py_ssize_t length = 0;
  const char* name = PyUnicode_AsUTF8AndSize(args[6], &length);
  if (!name) return nullptr;
  const c10::string_view activation(name, length);
  Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    y = train ? activate(CsrFunction::apply(x, values, bias, layer), activation)
              : product(x, values, bias, layer, activation);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// (x, its features, [(parameters, buffers, activation), …]): csr_chain of layers' tensors, where no gradient is due.
PyObject* chain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(3, count);
  if (!native.chain || !is_plain(args[0]) || at::GradMode::is_enabled() || is_watched()) return not_implemented();
  const Tensor& x = THPVariable_Unpack(args[0]);
  if (x.dim() != 2 || x.size(1) != PyLong_AsLongLong(args[1]) || !PyList_Check(args[2])) return not_implemented();
  const auto handle = [](const Tensor* t) { return reinterpret_cast<AtenTensorHandle>(const_cast<Tensor*>(t)); };
  const Py_ssize_t layers = PyList_GET_SIZE(args[2]);
  std::vector<Tensor> held;  // another thread may give a layer other tensors while this one computes
  std::vector<AtenTensorHandle> tensors;
  std::vector<const char*> activations;
  held.reserve(5 * layers);
  tensors.reserve(5 * layers);
  activations.reserve(layers);
  static PyObject* const names[] = {
      PyUnicode_InternFromString("values"), PyUnicode_InternFromString("crow_indices"),
      PyUnicode_InternFromString("col_indices"), PyUnicode_InternFromString("bias"),
      PyUnicode_InternFromString("code_key")};
  constexpr int kBias = 3;  // this one may be None
  for (Py_ssize_t i = 0; i < layers; ++i) {
    PyObject* layer = PyList_GET_ITEM(args[2], i);
    if (!is_tuple(layer, 3)) return not_implemented();
    for (int k = 0; k < 5; ++k) {
      PyObject* dict = PyTuple_GET_ITEM(layer, k % kBias != 0);  // parameters, or buffers
      PyObject* item = PyDict_Check(dict) ? PyDict_GetItem(dict, names[k]) : nullptr;
      const bool none = k == kBias && item && Py_IsNone(item);
      if (!none && !(item && is_plain(item))) return not_implemented();
      if (!none) held.push_back(THPVariable_Unpack(item));
      tensors.push_back(none ? nullptr : handle(&held.back()));
    }
    activations.push_back(PyUnicode_AsUTF8(PyTuple_GET_ITEM(layer, 2)));
    if (!activations.back()) return nullptr;
  }
  AtenTensorHandle found;
  {
    pybind11::gil_scoped_release no_gil;
    at::AutoDispatchBelowAutograd below;
    RECORD_FUNCTION("sparsekit::csr_chain", c10::ArrayRef<const c10::IValue>());
    found = native.chain(handle(&x), layers, tensors.data(), activations.data());
  }
  if (!found) return not_implemented();
  const std::unique_ptr<Tensor> y(reinterpret_cast<Tensor*>(found));
  return THPVariable_Wrap(*y);
  END_HANDLE_TH_ERRORS
}

// (x, values, bias, index, shape, activation, scale or None): a product in lanes where no gradient is due.
PyObject* lanes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(7, count);
  const auto maybe = [&](int i) { return Py_IsNone(args[i]) ? Maybe() : Maybe(THPVariable_Unpack(args[i])); };
  bool plain = is_plain(args[0]) && is_plain(args[1]);
  for (int i : {2, 6}) plain = plain && (Py_IsNone(args[i]) || is_plain(args[i]));
  if (!plain || !is_tuple(args[3], 4) || !is_tuple(args[4], 2) || is_watched()) return not_implemented();
  const Tensor& x = THPVariable_Unpack(args[0]);
  const Tensor& values = THPVariable_Unpack(args[1]);
  const Maybe bias = maybe(2), scale = maybe(6);
  const bool train = at::GradMode::is_enabled() &&
                     (values.requires_grad() || x.requires_grad() || (bias && bias->requires_grad()));
  Layer layer;
  layer.index.reserve(4);
  for (int i = 0; i < 4; ++i) {
    PyObject* item = PyTuple_GET_ITEM(args[3], i);
    if (!is_plain(item)) return not_implemented();
    layer.index.push_back(THPVariable_Unpack(item));
  }
  const std::vector<int64_t> shape = numbers(args[4]);
  if (train || x.scalar_type() == at::kDouble || !fits(x, shape, layer)) return not_implemented();
  Py_ssize_t length = 0;
  const char* name = PyUnicode_AsUTF8AndSize(args[5], &length);
  if (!name) return nullptr;
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                     const Tensor&, const Maybe&, const Maybe&, int64_t, c10::string_view)>(
      "sparsekit::lanes_linear");
  Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    const auto& i = layer.index;
    y = op.call(x, values, i[0], i[1], i[2], i[3], scale, bias, shape[0], c10::string_view(name, length));
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// Guard of sparsekit/autograd.py without Python. It stands in the place of all other hooks of its leaf and runs them
// first: Python's are in one dict, mostly empty, that is there before it, because setting one clears what torch holds.
class Guard : public torch::autograd::FunctionPreHook {
 public:
  using Hooks = std::vector<std::unique_ptr<FunctionPreHook>>;

  Guard(Tensor mask, Hooks others, PyObject* dict)
      : others(std::move(others)), mask_(std::move(mask)), dict_(this->others.size() == 1 ? dict : nullptr) {}

  bool is_for(const Tensor& mask) const { return mask_.is_same(mask); }

  variable_list operator()(const variable_list& grads) override {
    if (quiet()) return {masked(grads[0])};
    variable_list found = grads;
    for (const auto& hook : others) found = (*hook)(found);
    return {masked(std::exchange(found[0], Tensor()))};
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    if (!quiet()) {
      for (const auto& hook : others) hook->compiled_args(args);
    }
    args.add_cpp_single_tensor_pre_hook(
        [mask = mask_](const at::TensorBase& grad) -> at::TensorBase { return chosen(Tensor(grad), mask); }, 0);
  }

  Hooks others;

 private:
  bool quiet() const { return others.empty() || (dict_ && PyDict_GET_SIZE(dict_) == 0); }

  static Tensor chosen(const Tensor& grad, const Tensor& mask) {
    return at::where(mask, grad, at::zeros({}, grad.options()));
  }

  // Whether nobody else holds a gradient or memory of it; transposed ones hold what they are a view of.
  static bool is_own(const Tensor& grad) {
    const bool view = grad.is_view();
    return torch::autograd::impl::is_tensor_stealable(grad) && grad.storage().use_count() == 1 + size_t(view) &&
           (!view || grad._base().use_count() == 1);
  }

  Tensor masked(const Tensor& grad) const {
    if (!grad.defined()) return grad;
    if (at::GradMode::is_enabled() || is_watched() || !is_plain(grad)) return chosen(grad, mask_);
    Tensor found = is_own(grad) ? grad : grad.clone();
    if (native.clear_pruned && found.element_size() > 1 && found.sizes().equals(mask_.sizes()) &&
        found.strides().equals(mask_.strides()) && found.is_non_overlapping_and_dense()) {
      native.clear_pruned(found.mutable_data_ptr(), static_cast<const uint8_t*>(mask_.const_data_ptr()), found.numel(),
                          int64_t(found.element_size()));
    } else {
      static const auto zero_pruned_ = find<void(Tensor&, const Tensor&)>("sparsekit::zero_pruned_");
      zero_pruned_.call(found, mask_);
    }
    return found;
  }

  const Tensor mask_;
  PyObject* const dict_;  // the leaf's own, held by the one other hook; its size is read as it is, without the GIL
};

// (values, mask): the one Guard of a leaf is for this mask from now on; None takes it away.
PyObject* guard(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(2, count);
  TORCH_CHECK_TYPE(THPVariable_Check(args[0]) && (Py_IsNone(args[1]) || THPVariable_Check(args[1])),
                   "Expected a leaf and a mask or None");
  const Tensor& values = THPVariable_Unpack(args[0]);
  const Tensor mask = Py_IsNone(args[1]) ? Tensor() : THPVariable_Unpack(args[1]);
  if (!torch::autograd::impl::get_autograd_meta(values)) Py_RETURN_NONE;
  auto& hooks = torch::autograd::impl::hooks(values);
  Guard* present = hooks.size() == 1 ? dynamic_cast<Guard*>(hooks[0].get()) : nullptr;
  if (present && mask.defined() && present->is_for(mask)) Py_RETURN_NONE;
  if (present) hooks = std::exchange(present->others, {});
  if (mask.defined()) {
    PyObject* dict = reinterpret_cast<THPVariable*>(args[0])->backward_hooks;
    auto made = std::make_unique<Guard>(mask, std::exchange(hooks, {}), dict);
    hooks.push_back(std::move(made));
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// (path): take the functions of the native library, which is loaded.
PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(1, count);
  const char* path = PyUnicode_AsUTF8(args[0]);
  if (!path) return nullptr;
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  TORCH_CHECK(library, "Expected a library that is loaded, got ", path);
  const auto take = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    TORCH_CHECK(function, "Expected ", name, " in ", path);
  };
  take(native.chain, "sparsekit_csr_chain");
  take(native.clear_pruned, "sparsekit_clear_pruned");
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<csr>("csr"),     method<chain>("chain"), method<connect>("connect"),
                         method<lanes>("lanes"), method<guard>("guard"), {}};
PyModuleDef module{PyModuleDef_HEAD_INIT, "sparsekit._autograd", nullptr, -1, methods, {}, {}, {}, {}};

}  // namespace
}  // namespace sparsekit

PyMODINIT_FUNC PyInit__autograd() {
  PyObject* made = PyModule_Create(&sparsekit::module);
  if (made && PyModule_AddStringConstant(made, "schemas", SPARSEKIT_SCHEMA_HASH) < 0) Py_CLEAR(made);
  return made;
}
