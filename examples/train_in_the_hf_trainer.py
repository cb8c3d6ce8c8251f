"""A Program in the Hugging Face Trainer: it wants a loss in the output, so a few lines wrap it.

A Program captured from a Hugging Face model has the model's own output class; what it has not is
the branch that computes the loss, because a Program is one fixed graph.

    pip install transformers accelerate
    python examples/train_in_the_hf_trainer.py
"""

import tempfile

import torch
from small_model import accuracy, data, program
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments


class WithLoss(nn.Module):
    """Gives `{"loss", "logits"}`, as the Trainer wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Rows of a TensorDataset as the keyword inputs of `WithLoss`."""
    images, labels = zip(*rows, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def main(epochs: int = 3) -> float:
    """Train; returns the accuracy on the test digits."""
    train, test = data()
    model = program()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=64,
            learning_rate=3e-3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(WithLoss(model), arguments, train_dataset=train, data_collator=collate).train()
    print(f"accuracy {accuracy(model, test):.1f} %")
    return accuracy(model, test)


if __name__ == "__main__":
    main()
