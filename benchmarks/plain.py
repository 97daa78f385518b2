"""The plain loop that such projects typically have, to measure training and evaluation against.

fp32, contiguous layout, one `np.load` a slice in a DataLoader without workers, the loss read after every step;
evaluation one slice at a time, its map made with SciPy's filters. Networks, corruption and slices are the project's;
`unet` and `hobby` are the networks that such projects typically train.
"""

from __future__ import annotations

from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from models.autoencoder import MODELS, convolution_block, take_middle
from models.calibration import Calibration
from models.checkpoint import build_model
from preprocessing.store import StoredScan, name_slice
from tests.reference import map_plainly
from training.batches import seed_generator
from training.corruption import make_pair
from training.dataset import see_no_neighbours


class HobbyAutoencoder(nn.Module):
    """The full-resolution convolutional autoencoder of many notebooks, trained with input = target."""

    corrupted = False
    neighbour_offsets = staticmethod(see_no_neighbours)

    def __init__(self, size: int = 128):
        super().__init__()
        encoder, decoder = [], []
        for i, o in ((1, 32), (32, 64), (64, 128)):
            encoder += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        for i, o in ((128, 64), (64, 32)):
            decoder += [nn.ConvTranspose2d(i, o, 2, stride=2), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*encoder, *decoder, nn.ConvTranspose2d(32, 1, 2, stride=2), nn.Sigmoid())

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        return self.layers(slices)


class SmallUNet(nn.Module):
    """A small denoising U-Net: cells of 2x2 pixels, skips joined, one slice at a time."""

    corrupted = True
    neighbour_offsets = staticmethod(see_no_neighbours)

    def __init__(self, size: int = 128):
        super().__init__()
        self.stem, widths = nn.PixelUnshuffle(2), (32, 64, 128, 256)
        self.down = nn.ModuleList(double_convolution(i, o) for i, o in zip((4, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(
            double_convolution(i + o, o) for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.to_slice = nn.Sequential(nn.Conv2d(widths[0], 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        x, kept = self.stem(slices), []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        kept.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), kept.pop()], 1))
        return self.to_slice(x)


def double_convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(convolution_block(channels_in, channels_out), convolution_block(channels_out, channels_out))


MODELS |= {"hobby": HobbyAutoencoder, "unet": SmallUNet}


class PlainDataset(Dataset):
    """A file a slice, read when it is asked for, each time with the neighbours that the model sees."""

    def __init__(self, name: str, scans: list[StoredScan]):
        self.windows = []
        for scan in scans:
            paths = [scan.folder / name_slice(index) for index in scan.indices]
            offsets = MODELS[name].neighbour_offsets(scan.geometry.slice_spacing_mm)
            for place in range(len(paths)):
                self.windows.append([paths[min(max(place + n, 0), len(paths) - 1)] for n in offsets])

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.load(path).astype(np.float32) for path in self.windows[index]]))


class PlainTraining:
    """Training as it is typically written: the model of that name, all scans, one process."""

    def __init__(self, name: str, scans: list[StoredScan], batch_size: int):
        self.name, self.device = name, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.model = build_model({"model": name, "size": scans[0].size}).to(self.device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        loader = DataLoader(PlainDataset(name, scans), batch_size, shuffle=True, drop_last=True)
        self.batches = (batch for epoch in cycle([loader]) for batch in epoch)
        self.step = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            clean = next(self.batches).to(self.device)
            source, target = choose_pair(self.name, clean, seed_generator(self.device, 0, self.step))
            self.optimiser.zero_grad()
            brain = (target > 0).float()
            loss = ((self.model(source) - target) ** 2 * brain).sum() / brain.sum()
            loss.backward()
            self.optimiser.step()
            loss.item()
            self.step += 1


def choose_pair(name: str, clean: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(input, target), as the model of that name is trained; the hobby model sees its slices as they are."""
    return (clean, clean) if name == "hobby" else make_pair(clean, MODELS[name].corrupted, generator)


def map_one_by_one(model: nn.Module, name: str, scan: StoredScan, calibration: Calibration) -> np.ndarray:
    """The anomaly map of a scan: the network one slice at a time, then SciPy."""
    device = next(model.parameters()).device
    stack, parts = [], []
    with torch.no_grad():
        for slices in DataLoader(PlainDataset(name, [scan])):
            output = model(slices.to(device)).cpu()
            middle = take_middle(slices)
            stack.append(middle[0, 0].numpy())
            parts.append(torch.where(middle > 0, output, 0)[0, 0].numpy())
    return map_plainly(np.stack(stack), np.stack(parts), scan.geometry.sampling_mm, calibration)
