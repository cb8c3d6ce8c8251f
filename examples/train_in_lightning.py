"""A Program inside a LightningModule.

pip install lightning
python examples/train_in_lightning.py
"""

import lightning
import torch
from small_model import accuracy, batches, data, program
from torch import Tensor, nn
from torch.nn import functional


class Classifier(lightning.LightningModule):
    """Cross-entropy and AdamW around any module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int = 3) -> float:
    """Train; returns the accuracy on the test digits."""
    train, test = data()
    model = program().train()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(model), batches(train, shuffle=True))
    print(f"accuracy {accuracy(model, test):.1f} %")
    return accuracy(model, test)


if __name__ == "__main__":
    main()
