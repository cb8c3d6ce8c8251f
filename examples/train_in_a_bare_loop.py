"""A Program is a plain nn.Module: it trains in a bare torch loop.

python examples/train_in_a_bare_loop.py
"""

import torch
from small_model import accuracy, batches, data, program
from torch.nn import functional


def main(epochs: int = 3) -> float:
    """Train; returns the accuracy on the test digits."""
    train, test = data()
    model = program()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        model.train()  # batch norm and dropout follow, although the graph is fixed
        for images, labels in batches(train, shuffle=True):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy(model, test):.1f} %")
    return accuracy(model, test)


if __name__ == "__main__":
    main()
