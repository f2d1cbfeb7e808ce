"""A network pruned by torch.nn.utils.prune, made faster: what its layers run as, what they hold, fine-tuning.

    python examples/convert_pruned_model.py        # on handwritten digits, seconds
"""

import time

import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune

import sparsekit as sk
from sparsekit import data, models


def train(model, dataset, steps, lr=1e-3):
    """AdamW with weight decay, which would pull pruned weights of a masked dense layer about."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1)
    for _ in range(steps):
        batch = torch.randint(len(dataset.train_x), (64,))
        loss = F.cross_entropy(model(dataset.train_x[batch]), dataset.train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


def accuracy(model, dataset):
    """Share of test digits that are recognised."""
    with torch.no_grad():
        return (model.eval()(dataset.test_x).argmax(1) == dataset.test_y).float().mean().item()


def microseconds(model, x, calls=200):
    """Time of one call."""
    with torch.no_grad():
        model(x)
        start = time.perf_counter()
        for _ in range(calls):
            model(x)
        return (time.perf_counter() - start) / calls * 1e6


def main():
    torch.manual_seed(0)
    dataset = data.load("digits")
    model = models.build("mlp:64-512-512-10", input_shape=tuple(dataset.train_x.shape[1:]), seed=0)
    train(model, dataset, 100)
    print(f"dense: accuracy {accuracy(model, dataset):.3f}")

    # Someone else's pruning: masks and weight_orig, and every product as dense as before.
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features > 10:
            torch_prune.l1_unstructured(module, "weight", amount=0.95)
    x = dataset.test_x[:64]
    print(f"masked: accuracy {accuracy(model, dataset):.3f}, {microseconds(model, x):.0f} us a batch")

    # masks=None reads them; example_inputs is what the formats are measured on.
    sparse = sk.convert(model.train(), example_inputs=x, training=True)
    print(sk.explain(sparse))
    optimizer = train(sparse, dataset, 60)
    print(f"sparse, fine-tuned: accuracy {accuracy(sparse, dataset):.3f}, {microseconds(sparse, x):.0f} us a batch")

    pruned = [~mask for mask in sk.masks_of(sparse).values()]
    weights = [dict(sk.to_dense(sparse).named_parameters())[name] for name in sk.masks_of(sparse)]
    revived = sum(int((w[p] != 0).sum()) for w, p in zip(weights, pruned, strict=True))
    state = sum(t.numel() for s in optimizer.state.values() for t in s.values())
    print(f"pruned weights that came back: {revived}")
    print(f"numbers in AdamW's state: {state}, in the dense model's: {2 * sum(w.numel() for w in weights)}")


if __name__ == "__main__":
    main()
