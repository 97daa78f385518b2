"""The convolutional autoencoders. `MODELS` names them; both map slices (B, C, H, W) in [0, 1] to (B, 1, H, W).

cae  the plain autoencoder: everything must pass through a small dense latent, so it cannot draw what it never saw
dae  a denoising U-Net: trained to undo corruptions of healthy slices (Kascenas et al., MIDL 2022; Naval Marimont et
     al., "DISYRE", 2024), it takes an anomaly for one more corruption and draws healthy tissue instead

The C channels are the slice to reconstruct, in the middle, and the neighbours that `neighbour_offsets` asks for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

NEIGHBOUR_MM = 4.0  # distance, about, between a slice and the neighbours that the model sees


def take_middle(slices: torch.Tensor) -> torch.Tensor:
    """The slices without their neighbours: (B, 1, H, W) of (B, C, H, W)."""
    middle = slices.shape[1] // 2
    return slices[:, middle : middle + 1]


def convolution_block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, SiLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(),
    )


class ConvolutionalAutoencoder(nn.Module):
    """Encoder that halves the resolution four times, a dense latent, and the mirrored decoder.

    size    pixels along each side of a slice, a multiple of 16
    width   channels of the first level; they double at each of the next three
    latent  numbers that encode a slice; far fewer than its pixels, or the identity is learned
    """

    corrupted = False  # trained with input = target

    @staticmethod
    def neighbour_offsets(slice_spacing_mm: float) -> tuple[int, ...]:
        """The slices that the model sees, relative to the one it reconstructs: that one alone."""
        return (0,)

    def __init__(self, size: int = 128, width: int = 32, latent: int = 64):
        super().__init__()
        widths = [width, width * 2, width * 4, width * 8]
        self.deepest = (widths[-1], size // 16, size // 16)
        cells = self.deepest[0] * self.deepest[1] * self.deepest[2]
        pairs = list(zip([1, *widths[:-1]], widths, strict=True))
        self.encoder = nn.Sequential(*(convolution_block(i, o, stride=2) for i, o in pairs))
        self.to_latent = nn.Linear(cells, latent)
        self.from_latent = nn.Linear(latent, cells)
        decoder = []
        for deeper, shallower in zip(widths[::-1], [*widths[-2::-1], width], strict=True):
            decoder += [nn.Upsample(scale_factor=2, mode="nearest"), convolution_block(deeper, shallower)]
        self.decoder = nn.Sequential(*decoder)
        self.to_slice = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        latent = self.to_latent(self.encoder(slices).flatten(1))
        return self.to_slice(self.decoder(self.from_latent(latent).unflatten(1, self.deepest)))


class DenoisingUNet(nn.Module):
    """U-Net on cells of 4x4 pixels, which makes it several times faster; its output is a correction of the slice.

    It also sees the slices about 4 mm below and above, where a fold of the cortex goes on and a lesion differs. Skip
    connections are added, not concatenated, and convolved once: half the arithmetic.

    size   unused, as the network is convolutional; both models take it
    width  channels of the first level; they double at each of the `depth - 1` next
    """

    corrupted = True  # trained to undo corruption
    cell = 4  # pixels along each side

    def __init__(self, size: int = 128, width: int = 64, depth: int = 3):
        super().__init__()
        widths = [width * 2**level for level in range(depth)]
        self.stem = nn.PixelUnshuffle(self.cell)
        self.down = nn.ModuleList()
        for i, o in zip([3 * self.cell**2, *widths[:-1]], widths, strict=True):
            self.down.append(nn.Sequential(convolution_block(i, o), convolution_block(o, o)))
        self.narrow, self.up = nn.ModuleList(), nn.ModuleList()
        for deeper, shallower in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.narrow.append(nn.Conv2d(deeper, shallower, 1))
            self.up.append(convolution_block(shallower, shallower))
        self.to_slice = nn.Sequential(nn.Conv2d(width, self.cell**2, 3, padding=1), nn.PixelShuffle(self.cell))

    @staticmethod
    def neighbour_offsets(slice_spacing_mm: float) -> tuple[int, ...]:
        """The slices that the model sees, relative to the one it reconstructs: those about 4 mm below and above too."""
        step = max(1, round(NEIGHBOUR_MM / slice_spacing_mm))
        return (-step, 0, step)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        x, kept = self.stem(slices), []
        for level, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if level else x)
            kept.append(x)
        kept.pop()
        for narrow, block in zip(self.narrow, self.up, strict=True):
            x = block(F.interpolate(narrow(x), scale_factor=2, mode="nearest") + kept.pop())
        return take_middle(slices) + self.to_slice(x)


MODELS = {"cae": ConvolutionalAutoencoder, "dae": DenoisingUNet}
