"""Tickets of a small vision transformer with transformers.Trainer, on a CPU in less than a minute."""

import tempfile

import numpy
import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from sparsekit.integrations.huggingface import find


def main():
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2,
        num_channels=1, num_labels=10,
    )  # fmt: skip

    def accuracy(prediction):
        return {"accuracy": float(numpy.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=150, per_device_train_batch_size=60, per_device_eval_batch_size=297, learning_rate=2e-3,
            use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        _, ledger = find(
            ViTForImageClassification(config),
            lambda model: Trainer(
                model, arguments, train_dataset=rows[:1500], eval_dataset=rows[1500:], compute_metrics=accuracy
            ),
            rounds=2,
            rate=0.5,
            rewind="30it",
        )
    for line in ledger["rounds"]:
        print(f"round {line['round']}: {line['density']:6.1%} of the weights, accuracy {line['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
