"""What varies between healthy scans, and what the denoising model learns to undo.

`make_pair` is a training step's input and target. `vary_anatomy` and `scan` turn a healthy slice into one that another
subject, sequence or scanner could have given: of the input and of the target, so that the model learns to leave such
differences alone. `corrupt` changes the input only: blobs of graded strength with sharp or gradual edges, mottled or of
foreign tissue (after Naval Marimont et al., "DISYRE", 2024). They are general on purpose: no lesion is imitated. What
another scanner or another healthy person could show as well is never corruption, or the model would find scanners:
noise over the whole slice and local warps were (docs/experiments.md, E43).

Slices are (B, C, H, W) float32 in [0, 1] with the background at 0. The C channels are neighbouring slices of one scan;
what happens to one happens to all, as it would in a brain. Every function draws from the generator that it is given,
on the generator's device, so a seed gives the same batch again. Lengths are in pixels (1.56 mm).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.autoencoder import take_middle

FLOOR = 1e-3  # brain pixels stay above 0
SMALL_BLOB = 8.0  # radius
LARGE_AREA = 273.0  # pixels: a disc of 15 mm radius
CHANNEL_SPACING = 2.56  # from one channel to the next: 4 mm
GRIDS = (6, 12, 24)  # cells along each side of the grids of noise within blobs
REGION_GRIDS = (6, 8)
FLUID_BELOW = 0.45  # values that are fluid, or partly


def make_pair(slices: Tensor, corrupted: bool, generator: Generator) -> tuple[Tensor, Tensor]:
    """(input (B, C, H, W), target (B, 1, H, W)) of a training step, in [0, 1], from healthy slices (B, C, H, W).

    Anatomy is varied, then corrupted for the input alone, then both are scanned with the same scanner and the same
    noise: noise that is missing where something is painted would tell the model where to look, and a real lesion has
    the scanner's noise.
    """
    anatomy = vary_anatomy(slices, generator)
    source = corrupt(anatomy, generator) if corrupted else anatomy
    both = scan(torch.cat([source, take_middle(anatomy)], 1), generator)
    return both[:, :-1], both[:, -1:]


def vary_anatomy(slices: Tensor, generator: Generator) -> Tensor:
    """Healthy slices as other subjects and sequences would give them. Same shape, in [0, 1], background 0."""
    x = change_some(change_pose(slices, generator), 0.4, warp_locally, generator)
    brain, each = x > 0, (len(x), 1, 1, 1)

    def differ_by_region(up_to: float) -> Tensor:
        return make_smooth_noise(x.shape, REGION_GRIDS, generator) * _uniform(each, 0, up_to, generator)

    # contrast: a power, which keeps 0 and 1, a level of fluid, a gain. Sequences and coils also change them from region
    # to region: how bright the thalami are beside the insula, how grey the cortex of one lobe is beside another's
    x = torch.exp(torch.log(x.clamp(min=FLOOR)) * torch.exp(_normal(each, generator) * 0.35 + differ_by_region(0.3)))
    x = x + (_normal(each, generator) * 0.1 + differ_by_region(0.1)) * (1 - x / FLUID_BELOW).clamp(min=0)
    x = x * torch.exp(differ_by_region(0.2))
    x = change_some(x, 0.5, blur, generator)  # less of the noise that these scans came with
    return torch.where(brain, x.clamp(FLOOR, 1), 0)


def scan(pairs: Tensor, generator: Generator) -> Tensor:
    """Slices (B, C + 1, H, W) through a scanner: the last channel is the middle one again, and treated as that is."""
    x, brain, each = pairs, pairs > 0, (len(pairs), 1, 1, 1)
    # a bias field, and a gain because fields vary from slice to slice
    field = make_smooth_noise(x.shape, (2, 3, 4), generator) * _uniform(each, 0, 0.45, generator)
    x = x * torch.exp(field + _normal(each, generator) * 0.1)
    x = change_some(x, 0.5, blur, generator)
    x = change_some(x, 0.6, add_fine_noise, generator)
    x = torch.where(brain, x.clamp(FLOOR, 1), 0)
    # brain masks differ between tools: some slices lose 1 or 2 pixels of their rim, some keep what lies around it
    x = change_some(x, 0.4, erode, generator)
    x = change_some(x, 0.15, erode, generator)
    return change_some(x, 0.3, loosen, generator)


def change_pose(x: Tensor, generator: Generator) -> Tensor:
    """Mirror half of the slices left to right; rotate, scale, shift and warp all a little, as brains differ in shape.

    The warp moves neighbours alike, by some 2.5 pixels at most.
    """
    b = len(x)
    angle = _normal((b,), generator) * 0.07
    scale = torch.exp(_normal((2, b), generator) * 0.05)
    mirror = torch.sign(_uniform((b,), -1, 1, generator))
    shift = _normal((2, b), generator) * 0.02
    theta = torch.stack(
        [
            torch.stack([mirror * angle.cos() * scale[0], -angle.sin() * scale[1], shift[0]], 1),
            torch.stack([mirror * angle.sin() * scale[0], angle.cos() * scale[1], shift[1]], 1),
        ],
        1,
    )
    warp = [make_smooth_noise(x.shape, (3, 5, 8), generator)[:, 0] for _ in range(2)]
    warp = torch.stack(warp, -1) * _uniform_each(x, 0, 2.5 * 2 / x.shape[-1], generator)
    grid = F.affine_grid(theta, x.shape, align_corners=False) + warp
    moved = F.grid_sample(torch.cat([x, (x > 0).float()], 1), grid, align_corners=False)
    values, brain = moved.chunk(2, 1)
    return (values / brain.clamp(min=0.5)).clamp(min=FLOOR) * (brain > 0.5)  # the rim does not fade


def warp_locally(x: Tensor, generator: Generator) -> Tensor:
    """Push tissue away from a place in the brain or pull it in, by up to about 10 pixels.

    Wide ventricles and sulci are an old brain, not a lesion. And a model that undoes this marks what a tumour pushes
    away rather than the tumour.
    """
    b, _, h, w = x.shape
    rows, columns = measure_from_a_place(x, x.shape, generator)
    radius = 5 * 4 ** _uniform_each(x, 0, 1, generator)
    pull = _uniform_each(x, -0.6, 0.9, generator) * torch.exp(-(rows**2 + columns**2) / (2 * radius**2))
    ys = torch.linspace(-1, 1, h, device=x.device).view(1, h, 1) - (pull * rows).squeeze(1) * (2 / (h - 1))
    xs = torch.linspace(-1, 1, w, device=x.device).view(1, 1, w) - (pull * columns).squeeze(1) * (2 / (w - 1))
    grid = torch.stack([xs.expand(b, h, w), ys.expand(b, h, w)], -1)
    warped = F.grid_sample(x, grid, padding_mode="border", align_corners=True)
    return torch.where(warped > FLOOR, warped, x)


def blur(x: Tensor, generator: Generator) -> Tensor:
    """Blend in the mean of 3x3 pixels, as a scan of lower resolution would show."""
    wide = F.pad(x, (1, 1, 1, 1), mode="replicate")  # sums of shifted slices take a third of the time of pooling
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9
    return torch.lerp(x, blurred, _uniform_each(x, 0, 0.9, generator))


def add_fine_noise(x: Tensor, generator: Generator) -> Tensor:
    """Add a scanner's noise, independent from pixel to pixel; the last channel gets that of the middle one."""
    noise = _normal((len(x), x.shape[1] - 1, *x.shape[2:]), generator)
    return x + torch.cat([noise, take_middle(noise)], 1) * _uniform_each(x, 0, 0.04, generator)


def erode(x: Tensor, _: Generator) -> Tensor:
    """Remove the outermost pixels of the brain."""
    return x * ~grow(x <= 0)


def loosen(x: Tensor, generator: Generator) -> Tensor:
    """Leave up to 3 pixels of what lies around the brain, in places: fluid, meninges or fat, of any brightness."""
    level = _uniform_each(x, 0, 1, generator).square()  # dark more often than bright
    around = level + make_smooth_noise(x.shape, GRIDS, generator) * _uniform_each(x, 0, 0.3, generator)
    thickness = make_smooth_noise(x.shape, GRIDS, generator) + 1
    brain = x > 0
    for pixels in range(1, 4):
        brain = torch.where(2 * thickness > pixels, grow(brain), brain)
    return torch.where(brain & (x <= 0), around.clamp(FLOOR, 1), x)


def grow(mask: Tensor) -> Tensor:
    """A mask (B, C, H, W) bool with the eight neighbours of each of its pixels."""
    wide = F.pad(mask, (1, 1, 1, 1))
    rows = wide[..., :-2, :] | wide[..., 1:-1, :] | wide[..., 2:, :]
    return rows[..., :-2] | rows[..., 1:-1] | rows[..., 2:]


def corrupt(slices: Tensor, generator: Generator) -> Tensor:
    """Slices with something wrong in them, for the model to undo. Same shape, in [0, 1], the brain stays the brain."""
    blurred = average_brain(slices)
    chosen = [_choose(len(slices), share, generator) for share in (0.5, 0.5, 0.25, 0.5, 0.5)]
    blobs = draw_blob(slices[torch.cat(chosen)], generator).split([len(numbers) for numbers in chosen])
    x = slices
    for numbers, blob in zip(chosen[:3], blobs[:3], strict=True):
        x = x.index_copy(0, numbers, paint_blob(x[numbers], blob, blurred[numbers], generator))
    for numbers, blob in zip(chosen[3:], blobs[3:], strict=True):
        x = x.index_copy(0, numbers, infiltrate(x[numbers], blob, generator))
    return torch.where(slices > 0, x.clamp(FLOOR, 1), 0)


def infiltrate(x: Tensor, blob: Tensor, generator: Generator) -> Tensor:
    """Pull tissue down to a level within a blob that fades out over centimetres, or up to one; what is beyond stays."""
    blob = F.interpolate(F.avg_pool2d(blob, 4), scale_factor=4.0, mode="bilinear")
    level, darker = _uniform_each(x, 0.1, 1, generator), _uniform_each(x, 0, 1, generator) < 0.8
    missing = level - x
    missing = torch.where(darker, missing.clamp(max=0), missing.clamp(min=0))
    return x + blob * _uniform_each(x, 0.2, 1, generator) * missing


def paint_blob(x: Tensor, blob: Tensor, blurred: Tensor, generator: Generator) -> Tensor:
    """Blend something else into a blob: a mottled grey, a change of brightness, foreign tissue, or what is `blurred`.

    The grey keeps more or less of the texture x - blurred; foreign tissue is that of another slice, upside down. Large
    blobs hardly change in brightness: a coil or a sequence does the same to healthy tissue.
    """
    level = _uniform_each(x, 0, 1.1, generator)
    mottle = make_smooth_noise(x.shape, GRIDS, generator) * _uniform_each(x, 0, 0.15, generator)
    kind = _uniform_each(x, 0, 1, generator)
    texture = (x - blurred) * _uniform_each(x, 0, 1, generator)
    area = blob.square().sum((1, 2, 3), keepdim=True) / x.shape[1]
    brighter = x + _normal((len(x), 1, 1, 1), generator) * 0.25 * torch.exp(-area / LARGE_AREA) + mottle
    foreign = x.roll(1, 0).flip(-2)
    foreign = torch.where(foreign > 0, foreign, level)
    grey = level + mottle + texture
    other = torch.where(kind < 0.45, grey, torch.where(kind < 0.6, brighter, torch.where(kind < 0.9, foreign, blurred)))
    return torch.lerp(x, other, blob * _uniform_each(x, 0.2, 1, generator))


def draw_blob(x: Tensor, generator: Generator) -> Tensor:
    """Soft irregular blobs, each at a random place in the brain: (B, C, H, W) in [0, 1], drawn at half the resolution.

    In the neighbouring channels it is the section of an ellipsoid whose middle lies a little above or below.
    """
    b, c, h, w = x.shape
    half = (b, 1, h // 2, w // 2)
    rows, columns = measure_from_a_place(x, half, generator)
    radius = 1.5 * 16 ** _uniform_each(x, 0, 1, generator)  # 1.5 to 24
    stretch, stretch_across = torch.exp(_normal((2, b, 1, 1, 1), generator) * 0.3)
    middle = _uniform_each(x, -0.7, 0.7, generator) * radius
    across = (torch.arange(c, device=x.device) - c // 2).view(1, c, 1, 1) * CHANNEL_SPACING
    further = ((across - middle) * stretch_across) ** 2 - (middle * stretch_across) ** 2  # than the middle channel
    distance = torch.sqrt(((rows * stretch) ** 2 + (columns / stretch) ** 2 + further).clamp(min=0)) / radius
    ragged = make_smooth_noise(half, GRIDS, generator) * _uniform_each(x, 0, 0.6, generator)
    edge = _uniform_each(x, 0.5, 1.5, generator) / radius
    blob = torch.sigmoid((1 - distance + ragged) / edge) * (distance < 3)
    # small blobs come with those of other slices: alone, they would be too few pixels to learn from
    number = torch.arange(1, 6, device=x.device).view(1, 5, 1, 1, 1)
    others = (torch.arange(b, device=x.device).view(b, 1) - number.view(1, 5)) % b
    together = _uniform_each(x, 0, 7, generator)[:, None] > number + 1
    small = blob * (radius < SMALL_BLOB)
    blob = torch.maximum(blob, (small[others] * together).amax(1))
    return F.interpolate(blob, size=(h, w), mode="bilinear", align_corners=True)


def average_brain(x: Tensor) -> Tensor:
    """The mean over the brain within about 5 pixels, at a quarter of the resolution, where it costs little."""
    both = F.avg_pool2d(torch.cat([x, (x > 0).float()], 1), 4)
    values, brain = F.avg_pool2d(both, 3, 1, 1).chunk(2, 1)
    return F.interpolate(values / brain.clamp(min=0.1), scale_factor=4.0, mode="bilinear", align_corners=False)


def measure_from_a_place(x: Tensor, shape: Sequence[int], generator: Generator) -> tuple[Tensor, Tensor]:
    """(rows, columns) from a random brain pixel of each middle channel, in pixels of x, on a grid of this shape."""
    b, (height, width), (h, w) = len(x), x.shape[-2:], shape[-2:]
    coarse = x[:, x.shape[1] // 2, ::4, ::4]  # one pixel in 16 is choice enough, and drawing among all is slow
    drawn = _uniform(coarse.shape, 0, 1, generator) * (coarse > 0)
    place = drawn.flatten(1).argmax(1).view(b, 1, 1, 1)
    rows = torch.linspace(0, height - 1, h, device=x.device).view(1, 1, h, 1) - 4 * (place // coarse.shape[-1])
    columns = torch.linspace(0, width - 1, w, device=x.device).view(1, 1, 1, w) - 4 * (place % coarse.shape[-1])
    return rows, columns


def make_smooth_noise(shape: Sequence[int], grids: tuple[int, ...], generator: Generator) -> Tensor:
    """(B, 1, H, W) noise of about unit variance: a random mix of grids of so many cells, stretched to the slice.

    All grids are stretched by one product: they lie along the diagonal of a matrix, each with its share.
    """
    (b, _, h, w), cells = shape, sum(grids)
    down, along = (_stretch_grids(grids, size, generator.device) for size in (h, w))
    places, numbers = _place_grids(grids, generator.device)
    share = _uniform((b, len(grids)), 0.05, 1, generator)
    share = share / share.norm(dim=1, keepdim=True)
    noise = _normal((b, len(places)), generator) * share[:, numbers]
    mixed = noise.new_zeros(b, cells * cells).index_copy(1, places, noise).view(b, cells, cells)
    return (down @ mixed @ along.T)[:, None]


@lru_cache(maxsize=64)
def _stretch_grids(grids: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """(size, sum of grids): bilinear interpolation along an axis, of each grid to the finest and of that to pixels."""
    finest = [F.interpolate(torch.eye(cells)[None], grids[-1], mode="linear", align_corners=True) for cells in grids]
    stretched = F.interpolate(torch.cat(finest, 1), size, mode="linear", align_corners=True)
    return stretched[0].T.contiguous().to(device)


@lru_cache(maxsize=64)
def _place_grids(grids: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the cells of all grids lie in a matrix that has them as blocks along its diagonal; the grid of each."""
    blocks = torch.block_diag(*(torch.full((cells, cells), number + 1) for number, cells in enumerate(grids))).flatten()
    places = blocks.nonzero()[:, 0]
    return places.to(device), (blocks[places] - 1).to(device)


def change_some(x: Tensor, share: float, change: Callable[[Tensor, Generator], Tensor], generator: Generator) -> Tensor:
    """x with this share of its slices changed."""
    chosen = _choose(len(x), share, generator)
    return x.index_copy(0, chosen, change(x[chosen], generator)) if len(chosen) else x


def _choose(count: int, share: float, generator: Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device)[: round(share * count)]


def _uniform(shape: Sequence[int], low: float, high: float, generator: Generator) -> Tensor:
    return torch.empty(shape, device=generator.device).uniform_(low, high, generator=generator)


def _uniform_each(x: Tensor, low: float, high: float, generator: Generator) -> Tensor:
    """A number for each slice, (B, 1, 1, 1)."""
    return _uniform((len(x), 1, 1, 1), low, high, generator)


def _normal(shape: Sequence[int], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
