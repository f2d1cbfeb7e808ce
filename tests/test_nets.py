"""Residual nets, VGGs and transformers: their sizes, keys, seeds and errors."""

import pytest
import torch
from torch import nn

from sparsekit import convert, models, nets, prune

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
PARAMETERS = {  # as torchvision, timm and He et al. count them
    ("resnet20", CIFAR, 10): 272_474,
    ("resnet18", IMAGENET, 1000): 11_689_512,
    ("resnet50", IMAGENET, 1000): 25_557_032,
    ("vit-b16", IMAGENET, 1000): 86_567_656,
}


@pytest.mark.parametrize(("name", "shape", "classes"), PARAMETERS)
def test_parameters(name, shape, classes):
    with torch.device("meta"):
        model = nets._make(name, classes, shape)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, shape, classes]


def test_vgg_widths():
    model = models.build("vgg16", input_shape=CIFAR, seed=0)
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert model(torch.zeros(2, *CIFAR)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vit-tiny16"])
@pytest.mark.parametrize("shape", [CIFAR, (1, 64, 96)])
def test_outputs(name, shape):
    model = models.build(name, classes=7, input_shape=shape, seed=0).eval()
    y = model(torch.randn(2, *shape))
    assert y.shape == (2, 7) and y.isfinite().all()


def test_keys_are_torchvisions():
    keys = models.build("resnet18", input_shape=CIFAR, seed=0).state_dict().keys()
    assert {"conv1.weight", "bn1.running_mean", "layer2.0.downsample.0.weight", "fc.bias"} <= keys


def test_seeds_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (models.build("resnet20", input_shape=CIFAR, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for (_, a), (_, b) in zip(one.state_dict().items(), same.state_dict().items(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_every_weight_layer_is_prunable_and_converts():
    model = models.build("resnet20", input_shape=CIFAR, seed=0).eval()
    masks = prune(model, 0.9)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(masks) == len(layers) == 22
    x = torch.randn(2, *CIFAR)
    dense = models.build("resnet20", input_shape=CIFAR, seed=0).eval()
    with torch.no_grad():
        for name, mask in masks.items():
            dense.get_parameter(name).mul_(mask)
    torch.testing.assert_close(convert(model, masks, impl="csr")(x), dense(x), rtol=1e-4, atol=1e-4)


def test_recipes_are_the_papers():
    resnet, vgg = models.recipe("resnet20"), models.recipe("vgg19")
    assert (resnet.optimizer, resnet.lr, resnet.momentum, resnet.scope) == ("sgd", 0.03, 0.9, "global")
    assert (resnet.warmup, resnet.milestones, resnet.iterations) == (20_000, (20_000, 25_000), 30_000)
    assert (vgg.lr, vgg.warmup, vgg.batch_size) == (0.1, 10_000, 64)
    assert models.rates("resnet50") == {"*": 0.2, "fc.weight": 0.0}
    assert models.rates("vit-b16", 0.5) == {"*": 0.5, "head.weight": 0.0}


@pytest.mark.parametrize(
    ("name", "shape", "least"), [("vgg16", (3, 16, 16), 32), ("resnet20", (64,), 8), ("vit-b16", (3, 8, 8), 16)]
)
def test_bad_shapes(name, shape, least):
    with pytest.raises(ValueError, match=f"of at least {least}x{least}"):
        models.build(name, input_shape=shape)
