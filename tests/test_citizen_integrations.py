"""Lightning, transformers and the Hub: rounds that reset what a round resets, and masks that stay."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparsekit as sk

pytestmark = pytest.mark.filterwarnings("ignore")  # other packages' own


def package(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def batches(n=4, size=6):
    x = torch.randn(n * size, 12, generator=torch.Generator().manual_seed(3))
    return [(x[i : i + size], x[i : i + size].sum(1).long() % 3) for i in range(0, n * size, size)]


def module(lightning, record):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))

        def training_step(self, batch, _):
            record["rates"].append(self.optimizers().param_groups[0]["lr"])
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), 0.01)
            record["optimizers"].append(optimizer)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]

    return Module()


@pytest.mark.parametrize("rewind", ["init", "3it", "1ep", "lr"])
def test_lightning(rewind, tmp_path):
    lightning = package("lightning")
    from sparsekit.integrations.lightning import find

    record = {"rates": [], "optimizers": []}
    torch.manual_seed(0)
    model = module(lightning, record)
    rows = [torch.cat(part) for part in zip(*batches(), strict=True)]
    loader = DataLoader(TensorDataset(*rows), 6)

    def trainer():
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        return lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)

    torch.manual_seed(0)
    last, ledger = find(model, trainer, {"train_dataloaders": loader}, rounds=2, rate=0.5, rewind=rewind, impl="csr")
    assert [round(line["density"], 2) for line in ledger["rounds"]] == [1, 0.5, 0.25]
    assert all(line["loss"] > 0 for line in ledger["rounds"])
    start = {"3it": 3, "1ep": 4}.get(rewind, 0)
    assert [line["steps"] for line in ledger["rounds"]] == [8, 8 - start, 8 - start]
    rates = [0.01 * 0.1 ** (step // 2) for step in range(8)]  # replayed from the rewind point in every round
    assert record["rates"] == pytest.approx(rates + 2 * rates[start:])
    assert len({id(optimizer) for optimizer in record["optimizers"]}) == 3
    for layer in (last.net[0], last.net[2]):
        holes = ~layer.survivors()
        assert torch.equal(layer.weight[holes], torch.zeros(int(holes.sum())))
    if rewind == "lr":
        return

    # The same search by hand gives the same weights.
    plain = copy.deepcopy(model)
    torch.manual_seed(0)
    for round_ in sk.tickets(plain, rounds=2, rate=0.5, rewind=rewind, impl="csr"):
        optimizer = torch.optim.Adam(round_.model.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for step in range(round_.begin(optimizer, scheduler, 4), 8):
            offset = step - (start if round_.number else 0)  # a fit begins its data anew
            x, y = batches()[offset % 4]
            optimizer.zero_grad()
            F.cross_entropy(round_.model.net(x), y).backward()
            optimizer.step()
            scheduler.step()
            round_.step()
    for name, tensor in round_.model.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], tensor)


def test_lightning_notices_folded_masks(tmp_path):
    lightning = package("lightning")
    from sparsekit.integrations.lightning import TicketCallback

    record = {"rates": [], "optimizers": []}
    model = module(lightning, record)
    rounds = iter(sk.tickets(model, rounds=1, rate=0.5, impl="csr"))
    next(rounds)
    round_ = next(rounds)
    callback = TicketCallback(round_)
    layer = round_.model.net[0]
    layer.load_state_dict({"weight_orig": layer.weight, "weight_mask": torch.ones(32, 12), "bias": layer.bias})
    with pytest.raises(RuntimeError, match="Expected the masks that the round began with, got others after the fit"):
        callback.on_train_end(None, round_.model)


@pytest.mark.parametrize("rewind", ["init", "2it"])
def test_transformers_trainer(rewind, tmp_path):
    transformers = package("transformers")
    package("accelerate")
    from sparsekit.integrations.huggingface import find

    rows = [{"input_ids": torch.arange(i, i + 5) % 9, "labels": i % 2} for i in range(24)]
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=9, **small))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, use_cpu=True, save_strategy="steps", save_steps=6,
        report_to=[], disable_tqdm=True, logging_strategy="no", learning_rate=1e-3, weight_decay=0.1,
    )  # fmt: skip
    trainers = []

    def make_trainer(model):
        trainers.append(transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8]))
        return trainers[-1]

    last, ledger = find(model, make_trainer, rounds=2, rate=0.5, rewind=rewind, impl="csr")
    assert [round(line["density"], 2) for line in ledger["rounds"]] == [1, 0.5, 0.25]
    assert [line["steps"] for line in ledger["rounds"]] == ([6, 6, 6] if rewind == "init" else [6, 4, 4])
    assert all(line["eval_loss"] > 0 and line["train_loss"] > 0 for line in ledger["rounds"])
    assert set(trainers[-1].lr_scheduler.get_last_lr()) == {0.0}  # the schedule came to its end
    masks = sk.masks_of(last)
    assert len(masks) == 8 and trainers[-1].model is last
    dense = sk.to_dense(last).state_dict()
    for name, mask in masks.items():
        assert torch.equal(dense[name][~mask], torch.zeros(int((~mask).sum())))


@pytest.mark.parametrize(
    ("script", "packages"),
    [("lightning_tickets", ["lightning"]), ("huggingface_tickets", ["transformers", "accelerate"])],
)
def test_examples_run(script, packages, tmp_path):
    for name in (*packages, "sklearn"):
        package(name)
    path = Path(__file__).resolve().parents[1] / f"examples/integrations/{script}.py"
    run = subprocess.run([sys.executable, "-W", "ignore", path], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("round ")]
    assert lines[0].startswith("round 0: 100.0%") and len(lines) >= 3
    assert all(float(line.rpartition(" ")[2]) > 0.5 for line in lines), run.stdout


def test_hub_round_trip(tmp_path):
    package("huggingface_hub")
    from sparsekit.integrations.huggingface import FILE, TicketHubMixin

    class Net(nn.Module, TicketHubMixin):
        def __init__(self, width: int = 4):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, width), nn.BatchNorm1d(width), nn.Linear(width, 3))

        def forward(self, x):
            return self.net(x)

    model = Net(width=32).eval()
    fast = sk.convert(model, sk.prune(model, 0.8), impl="csr")
    fast.save_pretrained(tmp_path / "repo")
    assert {path.name for path in (tmp_path / "repo").iterdir()} >= {FILE, "config.json"}
    back = Net.from_pretrained(tmp_path / "repo").eval()
    x = torch.randn(2, 12)
    assert type(back) is Net and isinstance(back.net[0], sk.SparseLinear)
    torch.testing.assert_close(back(x), fast(x))
    assert {name: int(mask.sum()) for name, mask in sk.masks_of(back).items()} == {
        name: int(mask.sum()) for name, mask in sk.masks_of(fast).items()
    }
    (tmp_path / "repo" / FILE).write_bytes(b"torn")
    with pytest.raises(ValueError, match="Expected a whole safetensors file"):
        Net.from_pretrained(tmp_path / "repo")
