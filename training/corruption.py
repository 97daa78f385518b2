"""What the denoising model is asked to undo, and the many looks that a healthy slice can have.

`vary_appearance` makes of a healthy slice another healthy slice, as a different scanner or subject would give it; the
model is shown it both as input and as target, so that it learns to leave such differences alone. `corrupt` then spoils
the input only: coarse noise (Kascenas et al., MIDL 2022), painted blobs of graded strength, foreign tissue and local
warps (after Naval Marimont et al., "DISYRE", 2024). All of it is general on purpose: no lesion is imitated.

Slices are (B, C, H, W) float32 in [0, 1] with the background at 0; the C channels are neighbouring slices of one scan,
and what happens to one happens to all, as it would in a brain. Every function draws from the generator it is given, on
the generator's device, so a seed gives the same batch again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

FLOOR = 1e-3  # brain pixels stay above 0
SMALL_BLOB = 8.0  # pixels of radius
BETWEEN_PIXELS = 2.56  # between neighbouring channels: 4 mm at 1.56 mm a pixel


def vary_appearance(slices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Healthy slices as other scanners and subjects would give them, in [0, 1], background 0."""
    b = len(slices)
    x = _move(slices, generator)
    brain = x > 0
    # contrast: a monotone curve through 0 and 1; bias field; gain, for a field that varies from slice to slice
    x = torch.exp(torch.log(x.clamp(min=FLOOR)) * torch.exp(_normal((b, 1, 1, 1), generator) * 0.25))
    field = _smooth_noise(x.shape, (2, 3, 4), generator) * _uniform((b, 1, 1, 1), 0, 0.35, generator)
    x = x * torch.exp(field + _normal((b, 1, 1, 1), generator) * 0.08)
    # resolution: half of the slices are blurred; noise: on half of the slices; rim: on some
    x = _do_to_some(x, 0.5, _blur, generator)
    x = _do_to_some(x, 0.5, _add_noise, generator)
    x = torch.where(brain, x.clamp(FLOOR, 1), 0)
    # brain masks differ between tools: some slices lose 1 or 2 pixels of their rim
    x = _do_to_some(x, 0.4, _erode, generator)
    return _do_to_some(x, 0.15, _erode, generator)


def corrupt(slices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The slices with something wrong in them: what the model must undo. Same shape, in [0, 1], background 0."""
    blurred = _blur_widely(slices)
    x = _do_to_some(slices, 0.4, warp_locally, generator)
    for share in (0.75, 0.75, 0.5):
        chosen = _choose(len(x), share, generator)
        x = x.index_copy(0, chosen, paint_blob(x[chosen], blurred[chosen], generator))
    x = _do_to_some(x, 0.5, add_coarse_noise, generator)
    return torch.where(slices > 0, x.clamp(FLOOR, 1), 0)


def add_coarse_noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise on a coarse grid, drawn out to the slice; here of mixed grain and strength."""
    return x + _smooth_noise(x.shape, (6, 12, 24), generator) * _uniform_each(x, 0.02, 0.2, generator)


def paint_blob(x: torch.Tensor, blurred: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blend something else into a blob: a flat or mottled grey, a change of brightness, a blur, or foreign tissue."""
    blob = _draw_blob(x, generator)
    level = _uniform_each(x, 0, 1.1, generator)
    mottle = _smooth_noise(x.shape, (6, 12, 24), generator) * _uniform_each(x, 0, 0.15, generator)
    kind = _uniform_each(x, 0, 1, generator)
    texture = (x - blurred) * _uniform_each(x, 0, 1, generator)
    brighter = x + _normal((len(x), 1, 1, 1), generator) * 0.25 + mottle
    foreign = x.roll(1, 0).flip(-2)
    foreign = torch.where(foreign > 0, foreign, level)
    grey = level + mottle + texture
    other = torch.where(kind < 0.5, grey, torch.where(kind < 0.75, brighter, torch.where(kind < 0.9, foreign, blurred)))
    return torch.lerp(x, other, blob * _uniform_each(x, 0.2, 1, generator))


def warp_locally(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Push tissue away from a place or pull it in, by up to about 10 pixels."""
    b, _, h, w = x.shape
    rows, columns = _offsets_from_a_place(x, x.shape, generator)
    radius = 5 * 4 ** _uniform_each(x, 0, 1, generator)
    pull = _uniform_each(x, -0.6, 0.9, generator) * torch.exp(-(rows**2 + columns**2) / (2 * radius**2))
    ys = torch.linspace(-1, 1, h, device=x.device).view(1, h, 1) - (pull * rows).squeeze(1) * (2 / (h - 1))
    xs = torch.linspace(-1, 1, w, device=x.device).view(1, 1, w) - (pull * columns).squeeze(1) * (2 / (w - 1))
    grid = torch.stack([xs.expand(b, h, w), ys.expand(b, h, w)], -1)
    warped = F.grid_sample(x, grid, padding_mode="border", align_corners=True)
    return torch.where(warped > FLOOR, warped, x)


def _uniform(shape, low, high, generator):
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _uniform_each(x, low, high, generator):
    """A number for each slice, (B, 1, 1, 1)."""
    return _uniform((len(x), 1, 1, 1), low, high, generator)


def _normal(shape, generator):
    return torch.randn(shape, generator=generator, device=generator.device)


def _add_noise(x, generator):
    return x + _normal(x.shape, generator) * _uniform_each(x, 0, 0.03, generator)


def _choose(count, share, generator):
    return torch.randperm(count, generator=generator, device=generator.device)[: round(share * count)]


def _do_to_some(x, share, change, generator):
    """x with that share of its slices changed."""
    chosen = _choose(len(x), share, generator)
    return x.index_copy(0, chosen, change(x[chosen], generator)) if len(chosen) else x


def _blur(x, generator):
    wide = F.pad(x, (1, 1, 1, 1), mode="replicate")  # sums of shifted slices take a third of the time of pooling
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9
    return torch.lerp(x, blurred, _uniform_each(x, 0, 0.9, generator))


def _blur_widely(x):
    """The mean over the brain within about 5 pixels; taken at a quarter of the resolution, where it costs little."""
    both = F.avg_pool2d(torch.cat([x, (x > 0).float()], 1), 4)
    values, brain = F.avg_pool2d(both, 3, 1, 1).chunk(2, 1)
    return F.interpolate(values / brain.clamp(min=0.1), scale_factor=4.0, mode="bilinear", align_corners=False)


def _smooth_noise(shape, grains, generator):
    """(B, 1, H, W) noise of about unit variance, a random mix of grids of so many cells drawn out to the slice."""
    b, finest = shape[0], (grains[-1], grains[-1])
    share = _uniform((len(grains), b, 1, 1, 1), 0.05, 1, generator)
    share = share / share.square().sum(0, keepdim=True).sqrt()
    grids = [_normal((b, 1, cells, cells), generator) for cells in grains]
    grids = [F.interpolate(grid, size=finest, mode="bilinear", align_corners=True) for grid in grids]
    mixed = sum(s * grid for s, grid in zip(share, grids, strict=True))
    return F.interpolate(mixed, size=tuple(shape[-2:]), mode="bilinear", align_corners=True)


def _move(x, generator):
    """Mirror left and right, turn, scale, shift: half of the slices are mirrored, all are moved a little."""
    b, c = x.shape[:2]
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
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    moved = F.grid_sample(torch.cat([x, (x > 0).float()], 1), grid, align_corners=False)
    values, brain = moved[:, :c], moved[:, c:]
    return (values / brain.clamp(min=0.5)).clamp(min=FLOOR) * (brain > 0.5)  # the rim does not fade


def _erode(x, _):
    """The slices without the outermost pixels of their brain."""
    brain = F.pad(x > 0, (1, 1, 1, 1), value=True)
    rows = brain[..., :-2, :] & brain[..., 1:-1, :] & brain[..., 2:, :]
    return x * (rows[..., :-2] & rows[..., 1:-1] & rows[..., 2:])


def _offsets_from_a_place(x, shape, generator):
    """Rows and columns, in pixels of x, from a random brain pixel of each middle slice, on a grid of this shape."""
    b, (height, width), (h, w) = len(x), x.shape[-2:], shape[-2:]
    coarse = x[:, x.shape[1] // 2, ::4, ::4]  # one pixel in 16 is choice enough, and drawing among all is slow
    place = torch.multinomial((coarse.flatten(1) > 0) + 1e-6, 1, generator=generator).view(b, 1, 1, 1)
    rows = torch.linspace(0, height - 1, h, device=x.device).view(1, 1, h, 1) - 4 * (place // coarse.shape[-1])
    columns = torch.linspace(0, width - 1, w, device=x.device).view(1, 1, 1, w) - 4 * (place % coarse.shape[-1])
    return rows, columns


def _draw_blob(x, generator):
    """Soft irregular blobs, each at a random place of the brain: (B, C, H, W) in [0, 1]; made at half resolution.

    A blob goes on through the neighbouring slices as an ellipsoid does whose middle lies a little above or below.
    """
    b, c, h, w = x.shape
    half = (b, 1, h // 2, w // 2)
    rows, columns = _offsets_from_a_place(x, half, generator)
    radius = 1.5 * 16 ** _uniform_each(x, 0, 1, generator)  # 1.5 to 24 pixels
    stretch, stretch_across = torch.exp(_normal((2, b, 1, 1, 1), generator) * 0.3)
    middle = _uniform_each(x, -0.7, 0.7, generator) * radius
    across = (torch.arange(c, device=x.device) - c // 2).view(1, c, 1, 1) * BETWEEN_PIXELS
    further = ((across - middle) * stretch_across) ** 2 - (middle * stretch_across) ** 2  # than the middle slice
    distance = torch.sqrt(((rows * stretch) ** 2 + (columns / stretch) ** 2 + further).clamp(min=0)) / radius
    ragged = _smooth_noise(half, (6, 12, 24), generator) * _uniform_each(x, 0, 0.6, generator)
    edge = _uniform_each(x, 0.5, 1.5, generator) / radius
    blob = torch.sigmoid((1 - distance + ragged) / edge) * (distance < 3)
    # with other slices' small ones for company, or too few pixels would teach what a small lesion is
    small, count = blob * (radius < SMALL_BLOB), _uniform_each(x, 0, 7, generator)
    for number in range(1, 6):
        blob = torch.maximum(blob, small.roll(number, 0) * (count > number + 1))
    return F.interpolate(blob, size=(h, w), mode="bilinear", align_corners=True)
