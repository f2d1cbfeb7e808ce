"""What SparseLinear and SparseConv2d share: the packed parameter, its index, and every way in and out."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from .. import format as formats
from ..autograd import guard
from ..functional import transformed
from ..mask import check_masks

__all__ = ["SparseModule"]


class SparseModule(nn.Module):
    """A layer whose trainable parameter ``values`` holds the survivors of its weight in some format.

    Optimizers keep state for survivors only and can never revive a pruned weight. ``weight`` is a
    differentiable dense view for code that reaches inside; writing into that view changes nothing.
    ``state_dict`` holds ``values``, the format's index tensors and ``bias``; ``load_state_dict`` also
    takes a dense ``weight`` (its survivors are read), ``weight_orig`` with ``weight_mask`` (the mask is
    adopted), and the packed form of any other format. Leave ``use_buffers=False`` in torch's ``AveragedModel``: it
    copies the index then, and would average it in floating point otherwise.
    """

    dense_class: type[nn.Module]
    plan = None
    layer_name = ""
    joint = "."
    """What stands between the layer's path and ``weight`` in the key of a dense state dict."""
    activation = "none"
    """What the layer applies to its output; :func:`sparsekit.fuse` sets it."""

    values: nn.Parameter
    bias: nn.Parameter | None
    _channels_last = False
    """Whether the dense weight lies so: torch runs images in channels_last on such weights without copying them."""
    _guarded: Tensor | None = None
    """The parameter that torch's own operator takes as it is: it keeps its pruned entries at 0 by itself."""

    _mark: Tensor | None = None
    """What stands for the buffer of the mask after :meth:`shed`: the parameter, whose zeros say it, or a mask."""

    def _adopt(self, dense: nn.Module, weight: Tensor, mask: Tensor | None, format: str) -> None:
        """Take over a dense layer's weight, bias and training flag; raises before anything changes."""
        name = f"{self.layer_name}.weight" if self.layer_name else "weight"
        if not weight.is_floating_point():
            raise TypeError(f"{name}: Expected a floating-point weight, got {weight.dtype}")
        if mask is None:
            mask = torch.ones(weight.shape, dtype=torch.bool, device="cpu" if weight.is_meta else weight.device)
        check_masks({name: mask}, {name: weight.shape})
        if mask.is_meta:
            raise ValueError(f"{name}: Expected a mask that holds data, got one on the meta device")
        self.shape = tuple(self._fold(weight).shape)
        self.register_parameter("values", None)
        bias = dense.bias
        if bias is not None:
            bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)
        self.train(dense.training)
        mask = mask if weight.is_meta else mask.to(weight.device)
        self._store(self._fold(weight), self._fold(mask), formats.get(format))
        self.values.requires_grad_(_leaf(dense).requires_grad)

    @staticmethod
    def _fold(dense: Tensor) -> Tensor:
        """A tensor of the dense layer's shape as ``[out, in]`` or ``[out, in/groups, kh, kw]``, which formats hold."""
        return dense

    @staticmethod
    def _unfold(folded: Tensor) -> Tensor:
        """The inverse of :meth:`_fold`."""
        return folded

    @torch.no_grad()
    def _store(self, weight: Tensor, mask: Tensor, fmt: formats.Format) -> None:
        """Hold ``weight`` under ``mask`` in a format; an existing parameter object stays the same object."""
        if not fmt.grouped and getattr(self, "groups", 1) != 1:
            name = self.layer_name or type(self).__name__
            raise ValueError(f"{name}: Expected a format that runs grouped convolutions, got {fmt.name!r}")
        self._guarded = self._mark = None
        self._channels_last = self._channels_last or _is_channels_last(weight)
        layout = torch.channels_last if fmt.masked and self._channels_last else torch.contiguous_format
        mask = mask.contiguous(memory_format=layout)
        index = {name: tensor.to(weight.device) for name, tensor in fmt.index(mask, getattr(self, "groups", 1)).items()}
        index |= fmt.prepare(index, self.shape)
        if old := getattr(self, "format", None):
            for name in old.index_names:
                self._buffers.pop(name, None)
                self._non_persistent_buffers_set.discard(name)
        self.format = fmt
        for name in fmt.index_names:
            self.register_buffer(name, index.get(name), persistent=name not in fmt.derived_names)
        values = fmt.gather(weight.detach(), index).contiguous(memory_format=layout)
        if self.values is not None:
            guard(self.values, None)
        if self.values is None:
            self.values = nn.Parameter(values)
        elif self.values.is_meta and not values.is_meta:
            self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)
        else:
            self.values.data = values
            self.values.grad = None

    @torch.no_grad()
    def shed(self) -> None:
        """Hold no mask where a format's ``values`` say as much by their zeros: what infers is no larger than dense.

        A mask is held again, though not as a buffer, once a gradient is due or ``values`` are packed anew; state dicts
        have it always. A survivor that was set to 0 by hand before that counts as pruned.
        """
        mask = self._buffers.get("mask") if self._mark is None else self._mark
        if not self.format.masked or mask is None or type(self.values) is not nn.Parameter or self.values.is_meta:
            return
        if mask is not self.values and torch.equal(self.values != 0, mask):
            guard(self.values, None)
            self._guarded, self._buffers["mask"] = None, None
            self.__dict__["_mark"] = self.values  # not a second name of the parameter

    def _marked(self) -> Tensor:
        return self._mark if self._mark.dtype == torch.bool else self._mark.detach() != 0

    def _hold(self) -> bool:
        """Hold the mask of a layer that :meth:`shed` it; whether it held none."""
        if self._mark is None or self._mark.dtype == torch.bool:
            return False
        self._mark = self._marked()
        return True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the survivors and the bias as the dense layer does, from the same random numbers."""
        if self.values.is_meta:
            return
        dense = self._empty_dense().to(self.values.dtype).to_empty(device=self.values.device)
        dense.reset_parameters()
        self.values.copy_(self.pack(dense.weight))
        if self.bias is not None:
            self.bias.copy_(dense.bias)

    def __delattr__(self, name: str) -> None:
        if name == "values":  # torch.nn.utils.parametrize is about to put something else in its place
            raise ValueError(
                f"{self.layer_name or type(self).__name__}: Expected values to stay a parameter, got them parametrized "
                "or deleted; parametrize the dense layer, fold it, then convert"
            )
        super().__delattr__(name)

    def _apply(self, fn, recurse=True):
        def keeping_index(tensor):  # module.type() asks for another dtype of every buffer
            moved = fn(tensor)
            return moved if tensor.is_floating_point() or moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._guarded, shed = None, self._hold()  # another dtype may have other zeros
        super()._apply(keeping_index, recurse)
        if self._mark is not None:
            self._mark = keeping_index(self._mark)
        if shed:
            self.shed()
        return self

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_guarded"}

    def _bare(self, values: Tensor, x: Tensor) -> bool:
        """Whether torch's own operator on ``values`` is all there is to do; its gradient is taken care of here."""
        if not self.format.masked or self.activation != "none" or torch.jit.is_tracing():
            return False
        if not torch.is_grad_enabled():
            return True
        if torch.compiler.is_compiling() or type(values) is not nn.Parameter or transformed():
            return False
        if values.requires_grad:
            if len(self.shape) == 2 and self.format.fused(x, self.shape) and not torch.is_autocast_enabled("cpu"):
                return False
            self._hold()
            guard(values, self._buffers[self.format.index_names[0]] if self._mark is None else self._mark)
            self.__dict__["_guarded"] = values  # not a second name of the parameter
        return True

    def _traced(self, x: fx.Proxy, *rest) -> fx.Proxy:
        """Stand in a graph of torch.fx as one call, as torch's own layers do."""
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, *rest), {})

    def derive(self) -> None:
        """Build the index tensors that the input gradient needs; done by itself when one is first asked for."""
        index = {name: self._buffers[name] for name in formats.saved_names(self.format)}
        self._buffers.update(self.format.derive(index, self.shape))

    def _explain(self, error: Exception, x: Tensor) -> Exception:
        """The error of a failed call, in words that name the layer where the input is to blame."""
        name = self.layer_name or type(self).__name__
        if x.is_nested and x.layout == torch.strided:
            return TypeError(f"{name}: Expected a tensor or a jagged nested one, got a strided nested tensor")
        try:
            self._check(x)
        except ValueError as wrong:
            error = wrong
        if isinstance(error, ValueError):
            return ValueError(f"{name}: {error}")
        if x.dtype != self.values.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            return TypeError(f"{name}: Expected an input of {self.values.dtype} like the weight, got {x.dtype}")
        return error

    def _index(self, x: Tensor) -> formats.Index:
        buffers, names = self._buffers, self.format.index_names
        if self._mark is not None:
            if torch.is_grad_enabled() and not (transformed() or torch.compiler.is_exporting()):  # which keep nothing
                self._hold()
            return (self._marked(),)
        missing = x.requires_grad and buffers[names[-1]] is None and self.format.derived_names
        if missing and torch.is_grad_enabled() and not (torch.compiler.is_compiling() or transformed()):
            self.derive()
        return tuple([buffers[name] for name in names])

    def _saved_index(self) -> dict[str, Tensor]:
        if self._mark is not None:
            return {"mask": self._marked()}
        buffers = self._buffers
        return {n: buffers[n] for n in formats.saved_names(self.format) if buffers[n] is not None}

    @property
    def weight(self) -> Tensor:
        """The dense weight, 0 where pruned; gradients through it reach the survivors only."""
        return self._unfold(self._folded_weight())

    def _folded_weight(self) -> Tensor:
        return self.format.scatter(self.values, self._saved_index(), torch.Size(self.shape))

    def survivors(self) -> Tensor:
        """The mask: bool of the weight's shape, True where a weight survives."""
        return self._unfold(self._folded_survivors())

    def _folded_survivors(self) -> Tensor:
        return self.format.survivors(self._saved_index(), torch.Size(self.shape))

    def pack(self, dense: Tensor) -> Tensor:
        """A dense tensor of the weight's shape in the layout of ``values``: what survives of it."""
        self._hold()  # what is packed may be put into values, zeros and all
        return self.format.gather(self._fold(dense), self._saved_index()).clone()

    @property
    def dense_shape(self) -> torch.Size:
        """The shape of the dense layer's weight; ``shape`` is that of the weight as formats hold it."""
        return self._unfold(torch.empty(self.shape, device="meta")).shape

    @property
    def density(self) -> float:
        """Share of the weights that survive."""
        count = torch.Size(self.shape).numel()
        return int(self.survivors().count_nonzero()) / count if count else 1.0

    def set_format(self, name: str) -> None:
        """Move the survivors into another format; the parameter object stays, its shape changes."""
        fmt = formats.get(name)
        if fmt is not self.format:
            self._store(self._folded_weight().detach(), self._folded_survivors(), fmt)

    def to_dense(self) -> nn.Module:
        """The layer as the class it was converted from, survivors bit for bit, pruned weights 0."""
        dense = self._empty_dense()
        weight = self.weight.detach()
        last = self._channels_last and weight.dim() == 4  # not of Conv1d
        weight = weight.clone(memory_format=torch.channels_last if last else torch.preserve_format)
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def bytes(self) -> int:
        """Bytes of parameters and index tensors, those of the backward pass included once built."""
        tensors = [self.values, self.bias, *(self._buffers[name] for name in self.format.index_names)]
        tensors += [self._mark] if self._mark is not self.values else []
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def _repr_tail(self) -> str:
        tail = f"bias={self.bias is not None}, format={self.format.name}, density={self.density:.4g}"
        return tail if self.activation == "none" else f"{tail}, activation={self.activation}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._mark is not None:
            destination[prefix + "mask"] = self._marked()

    def _load_from_state_dict(self, *args):
        if self._mark is None:
            return self._load(*args)
        shed = self._hold()
        self._buffers["mask"], self._mark = self._mark, None
        self._load(*args)
        self._mark, self._buffers["mask"] = self._buffers["mask"], None
        if shed:
            self.shed()
        return None

    def _load(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        self._guarded = None  # with assign=True parameter and mask become others
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        problems: list[str] = []
        if hasattr(self.values, "full_tensor"):
            if not (problem := self._is_shard(own, prefix)):
                return super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
            errors.append(f"{prefix}values: Expected {problem}")
            return None
        found = _incoming(own, prefix, self, problems)
        if found is not None:
            assign = metadata.get("assign_to_params_buffers", False)
            if self.values.is_meta and (found[1] is None or not assign):
                problems.append(f"{prefix}values: Expected packed survivors and assign=True to fill a meta layer")
            else:
                try:
                    self._take(*found, assign)
                except ValueError as error:  # a mask that the format cannot hold
                    problems.append(f"{prefix}weight: {error}")
        errors += problems
        for key in [key for key in own if key[len(prefix) :] in _KEYS]:
            del own[key]
        if found is not None or problems:
            for name, tensor in {"values": self.values.data, **self._saved_index()}.items():
                own[prefix + name] = tensor
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, unexpected, errors)

    def _is_shard(self, own: dict, prefix: str) -> str | None:
        """Why a state dict cannot be copied into sharded values (a DTensor) as it is, or None when it can."""
        given, index = {key[len(prefix) :]: value for key, value in own.items()}, self._saved_index()
        if not given.keys() & _KEYS:
            return None
        values = given.get("values")
        known = values is not None and values.shape == self.values.shape and index.keys() <= given.keys()
        if not known or not all(torch.equal(given[name], tensor) for name, tensor in index.items()):
            return "the packed survivors of this layer's own format and mask, because it is sharded; got others"
        whole = values.full_tensor() if hasattr(values, "full_tensor") else values
        return self.format.check(whole, index, torch.Size(self.shape))

    @torch.no_grad()
    def _take(self, weight: Tensor, mask: Tensor | None, assign: bool) -> None:
        """Load a dense weight under a mask (None: the present one); ``assign`` as in load_state_dict."""
        to = weight if assign else self.values
        weight, mask = weight.to(to.device, to.dtype), None if mask is None else mask.to(to.device)
        own = self._saved_index()
        index = own if mask is None else self.format.index(mask, getattr(self, "groups", 1))
        # The index itself is compared: after to_empty() it holds anything, and no mask can be made of it.
        fits = self.values.device == to.device and self.values.dtype == to.dtype and index.keys() == own.keys()
        if fits and all(torch.equal(index[name], own[name]) for name in index):
            self.values.copy_(self.format.gather(weight, own))
        else:
            self._store(weight, self._folded_survivors().to(to.device) if mask is None else mask, self.format)


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _leaf(dense: nn.Module) -> Tensor:
    orig = getattr(dense, "weight_orig", None)
    return dense.weight if orig is None else orig


_KEYS = {"weight", "weight_orig", "weight_mask", "values"} | {
    name for fmt in formats.names() for name in formats.saved_names(formats.get(fmt))
}


def _incoming(own: dict, prefix: str, layer: SparseModule, errors: list) -> tuple[Tensor, Tensor | None] | None:
    """The folded weight and mask that a state dict brings for a layer; problems go to ``errors``."""
    shape = torch.Size(layer.shape)
    keys = {key[len(prefix) :]: value for key, value in own.items() if key[len(prefix) :] in _KEYS}
    if {"weight_orig", "weight_mask"} <= keys.keys():
        weight, mask = keys["weight_orig"], keys["weight_mask"] != 0
    elif "weight" in keys:
        weight, mask = keys["weight"], None
    elif "values" in keys:
        problems: list[str] = []
        for fmt in map(formats.get, formats.names()):
            saved = set(formats.saved_names(fmt))
            if saved - set(fmt.optional_names) <= keys.keys() - {"values"} <= saved:
                index = {name: keys[name] for name in saved & keys.keys()}
                if problem := fmt.check(keys["values"], index, shape):
                    problems.append(problem)  # formats of one storage differ in the blocks they take
                else:
                    return fmt.scatter(keys["values"], index, shape), fmt.survivors(index, shape)
        wanted = problems[0] if problems else f"the index tensors of one format beside it, got {sorted(keys)}"
        errors.append(f"{prefix}values: Expected {wanted}")
        return None
    else:
        return None
    dense = layer.dense_shape
    for name, tensor in {"weight": weight, "weight_mask": mask}.items():
        if tensor is not None and tensor.shape != dense:
            errors.append(f"{prefix}{name}: Expected a {name} of shape {list(dense)}, got {list(tensor.shape)}")
            return None
    return layer._fold(weight), None if mask is None else layer._fold(mask)
