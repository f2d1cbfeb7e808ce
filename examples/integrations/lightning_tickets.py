"""Tickets of a LightningModule on handwritten digits, on a CPU in less than a minute."""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from sparsekit.integrations.lightning import find


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, _):
        x, y = batch
        self.log("test_accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 2e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)]


def main():
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    train, test = random_split(data, [1500, len(data) - 1500])
    loaders = {"train_dataloaders": DataLoader(train, 60, shuffle=True), "val_dataloaders": DataLoader(test, 297)}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    _, ledger = find(
        Digits(),
        lambda: lightning.Trainer(max_epochs=4, accelerator="cpu", **quiet),
        loaders,
        rounds=4,
        rate=0.5,
        rewind="1ep",
    )
    for line in ledger["rounds"]:
        print(f"round {line['round']}: {line['density']:6.1%} of the weights, accuracy {line['test_accuracy']:.3f}")


if __name__ == "__main__":
    main()
