"""Train the handwritten-digits CNN of the demo and export it to ONNX.

    python -m fourfold.examples.train_digits [FOLDER]

FOLDER (default: `digits/` beside this file) must hold `digits.npz`: `images` uint8 [1797, 8, 8]
with grey values 0..16, `labels` int64 [1797]. Written beside it:

- `digits.onnx`: float32, input `image` [n, 1, 8, 8] in 0..1, output `logits` [n, 10], `n` dynamic.
  BatchNormalization stays in the graph, unfolded, so that a compiler has something to do.
- `calib.npz`: `image` float32 [300, 1, 8, 8], taken from the training samples.
- `check.npz`: `image` float32 [450, 1, 8, 8] and `labels` int64 [450], held out from training.

Needs the `torch` extra. Takes about twenty seconds on two cores. The split, the initial weights
and the order of the batches come from one seed; another torch version or CPU may still round
differently.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.nn import functional

SEED = 4
EPOCHS = 40
HELD_OUT = 450
CALIBRATION = 300


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Return Conv 3x3 + BatchNorm; the caller adds the Relu."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
    )


class Residual(nn.Module):  # type: ignore[misc]  # torch is read as untyped
    """Two blocks around a shortcut: [n, channels, h, w] to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = block(channels, channels)
        self.second = block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x + second(relu(first(x))))."""
        return functional.relu(x + self.second(functional.relu(self.first(x))))


class DigitNet(nn.Module):  # type: ignore[misc]  # torch is read as untyped
    """A small ResNet: [n, 1, 8, 8] grey images in 0..1 to [n, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(1, 32)
        self.fine = Residual(32)
        self.widen = block(32, 64)
        self.coarse = Residual(64)
        self.classify = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of ten digits."""
        x = self.fine(functional.relu(self.stem(image)))
        x = functional.max_pool2d(functional.relu(self.widen(x)), 2)
        x = functional.avg_pool2d(self.coarse(x), 4)
        return self.classify(x.reshape(-1, 64))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images [n, 1, 8, 8], moved by -1..1 pixels along both axes, zeros moved in."""
    rows = torch.arange(8)
    padded = functional.pad(images, (1, 1, 1, 1))
    move = torch.randint(0, 3, (2, len(images), 1), generator=generator)
    y, x = (rows + move[0])[:, :, None], (rows + move[1])[:, None, :]
    return padded[torch.arange(len(images))[:, None, None], 0, y, x][:, None]


def train(images: Tensor, labels: Tensor) -> DigitNet:
    """Train on `images` [n, 1, 8, 8] and `labels` [n]; return the network in evaluation mode."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net = DigitNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
    batches = -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=generator).split(64):
            logits = net(shifted(images[chosen], generator))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    return net


def export(net: DigitNet, path: Path) -> None:
    """Write the network as ONNX, folded only as far as BatchNormalization stays.

    The exporter's own optimizer would fold it into Conv, so it is off and `tidied` does the rest.
    """
    program = torch.onnx.export(
        net,
        (torch.zeros(2, 1, 8, 8),),
        dynamo=True,
        optimize=False,
        opset_version=20,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("n")}},
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program for the digits network")
    tidied(program.model)
    program.save(path, external_data=False)


def tidied(model: ir.Model) -> None:
    """Fold the shapes and zero biases the graph computes and drop the tracer's notes, in place."""
    fold_constants(model)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True),
        common.ClearMetadataAndDocStringPass(),
    )(model)
    graph = model.graph
    made = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        value.metadata_props.clear()


def main(folder: Path) -> None:
    """Train, export, write the two splits and print the held-out accuracy."""
    data = np.load(folder / "digits.npz")
    images = (data["images"].astype(np.float32) / np.float32(16))[:, None]
    order = np.random.default_rng(SEED).permutation(len(images))
    held, kept = order[:HELD_OUT], order[HELD_OUT:]
    net = train(torch.from_numpy(images[kept]), torch.from_numpy(data["labels"][kept]))
    with torch.no_grad():
        answers = net(torch.from_numpy(images[held])).argmax(1).numpy()
    export(net, folder / "digits.onnx")
    np.savez_compressed(folder / "calib.npz", image=images[kept[:CALIBRATION]])
    np.savez_compressed(folder / "check.npz", image=images[held], labels=data["labels"][held])
    size = sum(p.numel() for p in net.parameters())
    accuracy = float((answers == data["labels"][held]).mean() * 100)
    print(f"{size} parameters, {accuracy:.2f} % of {HELD_OUT} held-out digits right")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "digits")
