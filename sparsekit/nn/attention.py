"""SparseMultiheadAttention, the drop-in of nn.MultiheadAttention, and TransposedLinear, that of GPT-2's Conv1D."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..mask import weight_of
from .base import SparseModule
from .linear import SparseLinear

__all__ = ["SparseMultiheadAttention", "TransposedLinear", "block_fast_paths", "restore_fast_paths"]

_SAME = ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first", "kdim", "vdim", "_qkv_same_embed_dim")


class SparseMultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` whose projections ``in_proj`` (queries, keys, values) and ``out_proj`` are layers.

    Made by :func:`sparsekit.convert`; called as ``nn.MultiheadAttention`` is, with the same results, and
    ``state_dict`` of either is understood. Self-attention is one product of ``in_proj``; attention between two
    sequences takes the rows it needs of ``in_proj.weight`` at a dense layer's speed.
    """

    dense_class = nn.MultiheadAttention
    in_proj_weight = in_proj_bias = None
    """torch's fast paths read weights past the layers that hold them; these names tell them to stay away."""
    bias_k = bias_v = None
    add_zero_attn = False

    @classmethod
    def from_dense(cls, module: nn.MultiheadAttention, in_proj: nn.Module | None, out_proj: nn.Module | None):
        """The attention of ``module`` with other projections; None takes over its own."""
        self = cls()
        for name in _SAME:
            setattr(self, name, getattr(module, name))
        self.in_proj = in_projection(module) if in_proj is None else in_proj
        self.in_proj.joint = "_"
        self.out_proj = _plain(module.out_proj.weight, module.out_proj.bias) if out_proj is None else out_proj
        return self.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results of ``nn.MultiheadAttention.forward``."""
        if isinstance(query, Proxy):  # one call in a graph of torch.fx, as torch's own is
            path, rest = query.tracer.path_of_module(self), (key_padding_mask, need_weights, attn_mask)
            arguments = (query, key, value, *rest, average_attn_weights, is_causal)
            return query.tracer.create_proxy("call_module", path, arguments, {})
        if is_causal and attn_mask is None:
            raise ValueError("Expected attn_mask beside is_causal=True, which is a hint about it, got none")
        batched, inner = query.dim() == 3, (lambda x: x.unsqueeze(0))
        if batched:
            inner = (lambda x: x) if self.batch_first else (lambda x: x.transpose(0, 1))
        if query is key and key is value:
            q, k, v = self.in_proj(inner(query)).chunk(3, -1)
        else:
            # As many products as there are inputs, as torch's own does.
            rows, inputs = ((1, 2), (query, key)) if key is value else ((1, 1, 1), (query, key, value))
            sizes = [count * self.embed_dim for count in rows]
            bias = (None,) * 3 if self.in_proj.bias is None else self.in_proj.bias.split(sizes)
            parts = zip(inputs, self.in_proj.weight.split(sizes), bias, strict=False)
            q, k, v = (y for x, w, b in parts for y in F.linear(inner(x), w, b).split(self.embed_dim, -1))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if is_causal and key_padding_mask is None and not need_weights:
            y, weights = F.scaled_dot_product_attention(q, k, v, None, dropout, True), None
        else:
            mask = self._merged(attn_mask, key_padding_mask, q)
            if need_weights:
                scores = q / math.sqrt(self.head_dim) @ k.transpose(-2, -1)
                weights = torch.softmax(scores if mask is None else scores + mask, -1)
                weights = F.dropout(weights, dropout) if dropout else weights
                y = weights @ v
                weights = weights.mean(1) if average_attn_weights else weights
            else:
                y, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _merged(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one to add to the scores ``[N, heads, L, S]``."""
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:])
        if padding is not None:
            padding = padding.view(-1, 1, 1, padding.shape[-1])
        masks = [_additive(mask, q.dtype) for mask in (attn_mask, padding) if mask is not None]
        return sum(masks[1:], masks[0]) if masks else None

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        # A dense state dict names the projection as a parameter of the attention itself.
        for key in [key for key in state_dict if key.startswith(prefix + "in_proj_")]:
            state_dict[f"{prefix}in_proj.{key.removeprefix(prefix + 'in_proj_')}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def to_dense(self) -> nn.MultiheadAttention:
        """The module as ``nn.MultiheadAttention`` with its keys; survivors bit for bit, pruned weights 0."""
        bias = self.in_proj.bias is not None
        dense = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, bias, batch_first=self.batch_first, device="meta"
        )
        parts = [p.to_dense() if isinstance(p, SparseModule) else p for p in (self.in_proj, self.out_proj)]
        dense.in_proj_weight, dense.out_proj.weight = (part.weight for part in parts)
        dense.in_proj_bias, dense.out_proj.bias = (part.bias for part in parts)
        return dense.train(self.training)


def in_projection(module: nn.MultiheadAttention) -> nn.Linear:
    """The projection of queries, keys and values as a linear layer over the same parameters."""
    weight = module._parameters.get("in_proj_weight")
    if weight is None:  # under torch.nn.utils.prune
        weight = nn.Parameter(weight_of(module).detach(), requires_grad=module.in_proj_weight_orig.requires_grad)
    return _plain(weight, module.in_proj_bias).train(module.training)


def _plain(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


class TransposedLinear(SparseLinear):
    """:class:`SparseLinear` in place of ``transformers.pytorch_utils.Conv1D``: masks and weight are ``[in, out]``."""

    @classmethod
    def from_dense(cls, module: nn.Module, mask: Tensor, format: str = "csr", name: str = "") -> TransposedLinear:
        """A copy of ``module`` under ``mask``."""
        self = cls.__new__(cls)
        SparseModule.__init__(self)
        self.layer_name, self.dense_class = name, type(module)
        self.nx, self.nf = self.in_features, self.out_features = module.weight.shape
        self._adopt(module, weight_of(module), mask, format)
        return self

    @staticmethod
    def _fold(dense: Tensor) -> Tensor:
        return dense.t().contiguous()

    @staticmethod
    def _unfold(folded: Tensor) -> Tensor:
        return folded.t().contiguous()

    def _empty_dense(self) -> nn.Module:
        with torch.device("meta"):
            return self.dense_class(self.nf, self.nx)

    def reset_parameters(self) -> None:
        """Initialise as Conv1D does: normal weights of deviation 0.02, no bias."""
        with torch.no_grad():
            self.values.copy_(self.pack(torch.empty(self.nx, self.nf).normal_(std=0.02)))
            self.bias.zero_()


def block_fast_paths(model: nn.Module) -> None:
    """Keep torch's transformer encoders from reading dense weights past their sparse layers in eval mode."""
    for module in model.modules():
        switches = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
        for kind, switch in switches.items():
            sparse = isinstance(module, kind) and any(isinstance(m, SparseModule) for m in module.modules())
            if sparse and getattr(module, switch, None) and "_fast_path" not in module.__dict__:
                module._fast_path = (switch, getattr(module, switch))
                setattr(module, switch, type(getattr(module, switch))(0))


def restore_fast_paths(model: nn.Module) -> None:
    """Undo :func:`block_fast_paths`."""
    for module in model.modules():
        if found := module.__dict__.pop("_fast_path", None):
            setattr(module, *found)
