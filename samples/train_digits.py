"""Trains a small vision transformer on scikit-learn's handwritten digits: about a minute on two cores.

The 8 x 8 images are enlarged to 32 x 32 and cut into patches of 4 x 4: 64 patches and a class token. Writes

    digits.pt           the whole module, as torch.save(model) leaves it
    digits.safetensors  its weights alone
    digits-calib.npz    the training images, as input x, and their labels
    digits-test.npz     the held-out images, and their labels
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def digits_vit() -> VisionTransformer:
    """The untrained model: 65 tokens of width 128 through 6 blocks."""
    model = VisionTransformer(
        img_size=32, patch_size=4, in_chans=1, num_classes=10, embed_dim=128, depth=6, num_heads=4
    )
    # Distinct positions from the start: with timm's std of 0.02 so small a set takes three times as long to learn.
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    return model


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, held-out images, training labels, held-out labels; a quarter is held out."""
    pixels, labels = load_digits(return_X_y=True)
    images = F.interpolate(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8), size=32, mode="bicubic")
    images = (images - images.mean()) / images.std()
    return train_test_split(images, torch.tensor(labels), test_size=0.25, stratify=labels, random_state=0)


def train(model: VisionTransformer, images: Tensor, labels: Tensor, epochs: int, batch: int = 32) -> None:
    """AdamW with a one-cycle learning rate; the model ends in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * -(-len(images) // batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.2, cycle_momentum=False)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}", flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("samples/out"), help="where to write")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    images, test_images, labels, test_labels = digits()
    model = digits_vit()
    train(model, images, labels, options.epochs)
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    print(f"held-out accuracy: {accuracy:.1%} of {len(test_images)} images")

    options.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), options.out / "digits.safetensors")
    np.savez(options.out / "digits-calib.npz", x=images.numpy(), labels=labels.numpy())
    np.savez(options.out / "digits-test.npz", x=test_images.numpy(), labels=test_labels.numpy())
    torch.save(model, options.out / "digits.pt")  # last: the Makefile takes it as the sign that all are there


if __name__ == "__main__":
    main()
