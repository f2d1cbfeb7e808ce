"""Residual nets, VGGs and vision transformers, with the layer names and keys that torchvision and timm give them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NAMES", "build"]

# Blocks per stage and, for ImageNet's nets, whether they are bottlenecks.
_RESNETS = {"resnet18": ((2, 2, 2, 2), False), "resnet34": ((3, 4, 6, 3), False), "resnet50": ((3, 4, 6, 3), True)}
_CIFAR_RESNETS = {"resnet20": 3, "resnet32": 5, "resnet56": 9}
_VGGS = {"vgg11": (1, 1, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_VITS = {"vit-tiny16": (192, 12, 3), "vit-small16": (384, 12, 6), "vit-b16": (768, 12, 12)}
NAMES = (*_CIFAR_RESNETS, *_RESNETS, *_VGGS, *_VITS)


def build(name: str, classes: int, input_shape: tuple[int, ...], generator: torch.Generator | None = None) -> nn.Module:
    """A network of ``NAMES`` for ``x [N, *input_shape]``, its weights drawn from ``generator``.

    ``resnet20/32/56`` are CIFAR's nets of He et al. (arXiv:1512.03385, projection shortcuts),
    ``resnet18/34/50`` ImageNet's, with a 3x3 stem and no pooling in it for images under 64 pixels;
    ``vgg11/16/19`` have batch norms and one fully connected layer after a global average, as the
    lottery-ticket papers use them; ``vit-*16`` see patches of 16 pixels (4 under 64), arXiv:2010.11929.

    Raises: ValueError on an unknown name or an input that is no image of the size it needs.
    """
    least = 32 if name in _VGGS else 16 if name in _VITS else 8
    if name not in NAMES:
        raise ValueError(f"Expected a network of {', '.join(NAMES)}, got {name!r}")
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise ValueError(
            f"{name}: Expected an input_shape (channels, height, width) of at least {least}x{least} pixels,"
            f" got {tuple(input_shape)}"
        )
    with torch.device("meta"):  # nn's own initialisation would draw from the global generator
        model = _make(name, classes, tuple(input_shape))
    model = model.to_empty(device="cpu")
    _initialise(model, generator)
    return model


def _make(name: str, classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    channels, small = input_shape[0], min(input_shape[1:]) < 64
    if name in _RESNETS:
        blocks, wide = _RESNETS[name]
        stem = (64, 3, 1) if small else (64, 7, 2)
        return ResNet(channels, classes, stem, blocks, (64, 128, 256, 512), Bottleneck if wide else Basic, not small)
    if name in _CIFAR_RESNETS:
        depth = _CIFAR_RESNETS[name]
        return ResNet(channels, classes, (16, 3, 1), (depth,) * 3, (16, 32, 64), Basic, False)
    if name in _VGGS:
        return VGG(channels, classes, _VGGS[name])
    return VisionTransformer(input_shape, classes, 4 if small else 16, *_VITS[name])


class Basic(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions around a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual net: stem ``(width, kernel, stride)``, then ``layer1…`` of blocks, global average, ``fc``."""

    def __init__(self, channels, classes, stem, blocks, widths, block, pool: bool) -> None:
        super().__init__()
        inputs, kernel, stride = stem
        self.conv1, self.bn1 = _conv(channels, inputs, kernel, stride), nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        self.stages = len(blocks)
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            stage = []
            for i in range(count):
                stage.append(block(inputs, width, 2 if i == 0 and number > 1 else 1))
                inputs = width * block.expansion
            setattr(self, f"layer{number}", nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(self.avgpool(x).flatten(1))


class VGG(nn.Module):
    """Stages of 3x3 convolutions with batch norms, pooled between, global average, ``classifier``."""

    def __init__(self, channels: int, classes: int, stages: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for count, width in zip(stages, (64, 128, 256, 512, 512), strict=True):
            for _ in range(count):
                layers += [_conv(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class Attention(nn.Module):
    """Self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Encoder(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """An image to one token per patch."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Patches, a class token, ``blocks``, and ``head`` on the class token."""

    def __init__(self, input_shape, classes: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (height // patch) * (breadth // patch) + 1, width))
        self.blocks = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


@torch.no_grad()
def _initialise(model: nn.Module, generator: torch.Generator | None) -> None:
    """He's normal weights for convolutional nets (arXiv:1502.01852), 0.02 for transformers, norms as identities."""
    transformer = isinstance(model, VisionTransformer)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif transformer and parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
        elif parameter.dim() > 1:
            parameter.normal_(0, math.sqrt(2 / parameter[0].numel()), generator=generator)
        else:
            parameter.fill_(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
