"""Shapes that are measured: layers of known networks, and the inputs of whole ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["LAYERS", "MODELS", "Layer"]


@dataclass(frozen=True)
class Layer:
    """A layer and its input: ``batch`` rows, or images of ``size`` a side (convolutions; padding ``kernel // 2``)."""

    out: int
    inputs: int
    batch: int
    size: int = 0
    kernel: int = 1
    stride: int = 1

    def module(self) -> nn.Module:
        """The torch layer, with bias."""
        if not self.size:
            return nn.Linear(self.inputs, self.out)
        return nn.Conv2d(self.inputs, self.out, self.kernel, self.stride, self.kernel // 2)

    @property
    def kind(self) -> str:
        """``linear`` or ``conv2d``."""
        return "conv2d" if self.size else "linear"

    @property
    def input(self) -> tuple[int, ...]:
        """The shape of x."""
        return (self.batch, self.inputs, *([self.size] * 2 if self.size else []))

    @property
    def positions(self) -> int:
        """Outputs per output channel: rows or pixels."""
        side = (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        return self.batch * (side * side if self.size else 1)


LAYERS: dict[str, Layer] = {
    "linear-1024x1024": Layer(1024, 1024, 64),
    "linear-784x300": Layer(300, 784, 60),
    "linear-4096x1024": Layer(1024, 4096, 64),
    "linear-1024x1024-one": Layer(1024, 1024, 1),
    "linear-4096x1024-one": Layer(1024, 4096, 1),
    "linear-1024x1024-eight": Layer(1024, 1024, 8),
    "linear-1024x1024-many": Layer(1024, 1024, 256),
    "conv3x3-128-28": Layer(128, 128, 16, 28, 3),
    "conv3x3-64-32": Layer(64, 64, 64, 32, 3),
    "conv3x3-256-14": Layer(256, 256, 16, 14, 3),
    "conv1x1-256-28": Layer(256, 256, 1, 28),
    "linear-8x8": Layer(8, 8, 4),
    "linear-64x64": Layer(64, 64, 16),
    "conv3x3-8-8": Layer(8, 8, 2, 8, 3),
}

# Layers of one shape are named once, after the first of them; batches are those of the papers, or one picture.
_NETWORKS: dict[str, dict[str, Layer]] = {
    "lenet-300-100": {"fc1": Layer(300, 784, 60), "fc2": Layer(100, 300, 60), "fc3": Layer(10, 100, 60)},
    "conv2": {"conv1": Layer(64, 3, 60, 32, 3), "conv2": Layer(64, 64, 60, 32, 3), "fc1": Layer(256, 16384, 60)},
    "conv4": {"conv3": Layer(128, 64, 60, 16, 3), "conv4": Layer(128, 128, 60, 16, 3), "fc1": Layer(256, 8192, 60)},
    "conv6": {
        "conv5": Layer(256, 128, 60, 8, 3), "conv6": Layer(256, 256, 60, 8, 3), "fc1": Layer(256, 4096, 60),
        "fc2": Layer(256, 256, 60),
    },
    "vgg16": {
        "conv2": Layer(64, 64, 64, 32, 3), "conv4": Layer(128, 128, 64, 16, 3), "conv6": Layer(256, 256, 64, 8, 3),
        "conv8": Layer(512, 256, 64, 4, 3), "conv9": Layer(512, 512, 64, 4, 3), "conv11": Layer(512, 512, 64, 2, 3),
    },
    "resnet18": {
        "stem": Layer(64, 3, 1, 224, 7, 2), "stage1": Layer(64, 64, 1, 56, 3), "stage2": Layer(128, 128, 1, 28, 3),
        "stage2_first": Layer(128, 64, 1, 56, 3, 2), "stage3": Layer(256, 256, 1, 14, 3),
        "stage4": Layer(512, 512, 1, 7, 3), "fc": Layer(1000, 512, 1),
    },
    "resnet18-b16": {
        "stage1": Layer(64, 64, 16, 56, 3), "stage2": Layer(128, 128, 16, 28, 3),
        "stage3": Layer(256, 256, 16, 14, 3), "stage4": Layer(512, 512, 16, 7, 3),
    },
    "resnet50": {
        "stage1_reduce": Layer(64, 256, 1, 56), "stage1_expand": Layer(256, 64, 1, 56),
        "stage2_reduce": Layer(128, 512, 1, 28), "stage2_expand": Layer(512, 128, 1, 28),
        "stage3_reduce": Layer(256, 1024, 1, 14), "stage3_expand": Layer(1024, 256, 1, 14),
        "stage4_reduce": Layer(512, 2048, 1, 7), "stage4_expand": Layer(2048, 512, 1, 7), "fc": Layer(1000, 2048, 1),
    },
    "vit-b16": {
        "qkv": Layer(2304, 768, 197), "out": Layer(768, 768, 197), "fc1": Layer(3072, 768, 197),
        "fc2": Layer(768, 3072, 197),
    },
    "bert-base": {"query": Layer(768, 768, 128), "fc1": Layer(3072, 768, 128), "fc2": Layer(768, 3072, 128)},
    "llama-7b": {
        "up": Layer(11008, 4096, 16), "down": Layer(4096, 11008, 16), "up_one": Layer(11008, 4096, 1),
        "down_one": Layer(4096, 11008, 1),
    },
}  # fmt: skip
LAYERS |= {f"{network}.{name}": layer for network, layers in _NETWORKS.items() for name, layer in layers.items()}

MODELS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "lenet-300-100": ((1, 28, 28), 60, 10),
    "vgg16": ((3, 32, 32), 16, 10),
    "resnet18": ((3, 224, 224), 1, 1000),
    "conv6": ((3, 32, 32), 60, 10),
    "resnet50": ((3, 224, 224), 1, 1000),
    "vit-b16": ((3, 224, 224), 1, 1000),
    "mlp:64-300-100-10": ((64,), 60, 10),
    "digits-conv": ((1, 8, 8), 60, 10),
}
"""Model → (input shape, batch, classes)."""
