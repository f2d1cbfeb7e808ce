"""The networks of the papers, their sizes and their recipes."""

from dataclasses import asdict
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from sparsekit import models

CIFAR = (3, 32, 32)
SIZES = {
    "lenet-300-100": ((1, 28, 28), 266_200),
    "mlp:64-1024-1024-10": ((1, 8, 8), 1_124_352),
    "conv2": (CIFAR, 4_300_992),
    "conv4": (CIFAR, 2_425_024),
    "conv6": (CIFAR, 2_261_184),
    "digits-conv": ((1, 8, 8), 151_072),
}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith("weight")}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_outputs(name):
    shape, count = SIZES[name]
    model = models.build(name, input_shape=shape, seed=0)
    assert sum(w.numel() for w in weights(model).values()) == count
    assert model(torch.zeros(3, *shape)).shape == (3, 10)
    assert all(torch.count_nonzero(p) == 0 for n, p in model.named_parameters() if n.endswith("bias"))


def test_lenet_layers_as_in_the_paper():
    model = models.build("lenet-300-100", seed=0)
    assert [w.numel() for w in weights(model).values()] == [235_200, 30_000, 1_000]
    assert list(weights(model)) == ["fc1.weight", "fc2.weight", "fc3.weight"]


def test_initialisation_is_gaussian_glorot():
    weight = models.build("lenet-300-100", seed=0).fc1.weight.detach()
    sigma = (2 / (784 + 300)) ** 0.5
    assert weight.std() == pytest.approx(sigma, rel=0.01)
    assert weight.abs().max() > 3.5 * sigma  # a uniform one would end at 1.73


def test_seeds():
    state = torch.get_rng_state()
    a, b, c = (models.build("digits-conv", input_shape=(1, 8, 8), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.conv2.weight, b.conv2.weight) and not torch.equal(a.conv2.weight, c.conv2.weight)
    torch.manual_seed(3)
    first = models.build("lenet-300-100").fc1.weight
    torch.manual_seed(3)
    assert torch.equal(first, models.build("lenet-300-100").fc1.weight)


def test_other_classes_and_inputs():
    assert models.build("conv4", classes=7, input_shape=(1, 28, 28))(torch.zeros(2, 1, 28, 28)).shape == (
        2,
        7,
    )
    assert models.build("lenet-300-100", classes=3, input_shape=(1, 8, 8)).fc3.out_features == 3


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet-900", (1, 8, 8), "Expected a model of lenet-300-100"),
        ("mlp:", (1, 8, 8), "mlp:64-1024-1024-10, got 'mlp:'"),
        ("mlp:64", (1, 8, 8), "got 'mlp:64'"),
        ("mlp:64-0-10", (1, 8, 8), "got 'mlp:64-0-10'"),
        ("mlp:64-x-10", (1, 8, 8), "got 'mlp:64-x-10'"),
        ("mlp:784-30-10", (1, 8, 8), "widths from 64 (1x8x8 inputs) to 10 (classes), got 784 to 10"),
        ("mlp:64-30-9", (1, 8, 8), "got 64 to 9"),
        ("conv6", (64,), "conv6: Expected an input_shape (channels, height, width) of at least 8x8"),
        ("conv6", (3, 4, 4), "of at least 8x8"),
        ("conv2", (), "Expected sizes of at least 1"),
    ],
)
def test_bad_names_and_shapes(name, shape, message):
    with pytest.raises(ValueError) as caught:
        models.build(name, input_shape=shape)
    assert message in str(caught.value)


def test_output_layer():
    assert models.output_layer(models.build("conv2", input_shape=CIFAR)) == "fc3.weight"
    assert models.output_layer(nn.Linear(2, 2)) == "weight"
    assert (
        models.output_layer(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 1, 1)), nn.ReLU()))
        == "1.0.weight"
    )
    with pytest.raises(ValueError, match="got ReLU"):
        models.output_layer(nn.ReLU())


def rate_of(rates: dict[str, float], name: str) -> float:
    return [rate for pattern, rate in rates.items() if fnmatchcase(name, pattern)][-1]


@pytest.mark.parametrize(("name", "conv"), [("conv2", 0.1), ("conv4", 0.1), ("conv6", 0.15)])
def test_paper_rates_of_the_conv_nets(name, conv):
    found = models.rates(name)
    expected = {
        "conv1.weight": conv,
        "conv2.weight": conv,
        "fc1.weight": 0.2,
        "fc2.weight": 0.2,
        "fc3.weight": 0.1,
    }
    assert {layer: rate_of(found, layer) for layer in expected} == expected
    assert models.rates(name, 0.5) == {"*": 0.5, "fc3.weight": 0.25}


@pytest.mark.parametrize("name", SIZES)
def test_recipes_name_real_layers(name):
    shape, _ = SIZES[name]
    recipe = models.recipe(name)
    names = list(weights(models.build(name, input_shape=shape)))
    for pattern in recipe.rates:
        assert any(fnmatchcase(layer, pattern) for layer in names)
    assert asdict(recipe)["rates"] == models.rates(name)
    model = models.build(name, input_shape=shape)
    assert models.rates(model, 0.4) == models.rates(name, 0.4)
    assert recipe.source and recipe.iterations > 0


def test_rates_are_copies():
    models.rates("conv2")["*"] = 0.9
    assert models.rates("conv2")["*"] == 0.2


def test_lenet_recipe_is_the_papers():
    recipe = models.RECIPES["lenet-300-100"]
    assert (recipe.optimizer, recipe.lr, recipe.batch_size, recipe.iterations) == ("adam", 1.2e-3, 60, 50_000)
    assert "1803.03635" in recipe.source


def test_unknown_recipe():
    with pytest.raises(ValueError, match="Expected a model of"):
        models.recipe("resnet-900")
