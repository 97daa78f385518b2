"""Models, corruption, anomaly maps and checkpoints."""

import pickle

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import binomtest

from models.anomaly import (
    _smooth,
    _weigh,
    calibrate,
    count_needed,
    find_regions,
    give_p_values,
    map_anomalies,
    map_brightness,
    reconstruct,
    score_mse,
    score_scan,
    score_slices,
    smooth_residual,
)
from models.autoencoder import MODELS, take_middle
from models.checkpoint import CheckpointError, build_model, load_model, save_checkpoint
from preprocessing.slices import SliceDataset, list_scans
from training.corruption import _draw_blob, corrupt, vary_appearance, warp_locally


def make_slices(count=6, size=32, seed=0, channels=1):
    """Textured discs: (count, channels, size, size) in [0, 1], 0 outside."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    disc = np.hypot(x, y) < size * 0.4
    values = 0.5 + 0.2 * np.sin(x / 3) * np.cos(y / 4) + 0.02 * rng.normal(size=(count, channels, size, size))
    return torch.from_numpy(np.where(disc, values, 0).astype(np.float32))


CONFIGS = [{"model": "cae", "size": 32, "width": 8, "latent": 6}, {"model": "dae", "size": 32, "width": 8, "depth": 3}]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["model"])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_shapes_and_gradients(config, batch):
    model = build_model(config).train()
    slices = make_slices(batch, channels=len(model.find_neighbours(2.0)))
    output = model(slices)
    assert output.shape == (batch, 1, 32, 32)
    ((output - take_middle(slices)) ** 2).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if batch > 1:
            assert parameter.grad.abs().sum() > 0, name


def test_bottleneck_is_far_smaller_than_the_input():
    model = MODELS["cae"]()
    assert model.to_latent.out_features * 100 < 128 * 128


@pytest.mark.parametrize("spoil", [vary_appearance, corrupt])
def test_corruption_keeps_the_conventions_and_repeats(spoil):
    slices = make_slices(16, 64, channels=3)
    first = spoil(slices, torch.Generator().manual_seed(1))
    again = spoil(slices, torch.Generator().manual_seed(1))
    other = spoil(slices, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == slices.shape
    assert first.min() == 0
    assert first.max() <= 1
    assert torch.isfinite(first).all()
    if spoil is corrupt:
        assert torch.equal(first > 0, slices > 0), "the brain stays the brain"
        assert (first != slices).flatten(1).any(1).float().mean() > 0.5


def test_small_blobs_come_in_company():
    slices = make_slices(256, 128)
    blobs = _draw_blob(slices, torch.Generator().manual_seed(0))[:, 0].numpy() > 0.5
    counts, areas = [], []
    for blob in blobs:
        labels, count = ndimage.label(ndimage.binary_closing(blob, iterations=2))
        counts.append(count)
        areas.append(np.bincount(labels.ravel())[1:].max(initial=0))
    small = np.array(areas) < 64
    assert small.sum() > 40
    assert (np.array(counts)[small] > 1).mean() > 0.3


def test_reconstruct_any_batch_size_gives_the_same():
    model = build_model(CONFIGS[1]).eval()
    stack = make_slices(7)[:, 0].numpy()
    a, b = (reconstruct(model, stack, 2.0, batch_size=size) for size in (2, 7))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert (a[stack == 0] == 0).all()


def test_neighbours_are_those_4_mm_away_in_training_and_in_use(processed):
    """The window that the dataset gives is the one that `reconstruct` shows the model."""
    scan = next(list_scans(processed / "train"))
    spacing = scan.record["spacing_mm"][2]
    seen = []

    class Echo(torch.nn.Module):
        find_neighbours = staticmethod(MODELS["dae"].find_neighbours)

        def forward(self, slices):
            seen.append(slices)
            return take_middle(slices)

    reconstruct(Echo(), scan.read_stack(), spacing, batch_size=4)
    dataset = SliceDataset([scan], find_neighbours=MODELS["dae"].find_neighbours)
    torch.testing.assert_close(dataset[:], torch.cat(seen))
    assert [MODELS["dae"].find_neighbours(mm)[-1] for mm in (1.0, 2.0, 3.0, 4.0, 6.0)] == [4, 2, 1, 1, 1]
    stack, step = torch.from_numpy(scan.read_stack()).float(), MODELS["dae"].find_neighbours(spacing)[-1]
    torch.testing.assert_close(dataset[step], stack[[0, step, 2 * step]])
    torch.testing.assert_close(dataset[0], stack[[0, 0, step]])  # nothing lies below the first


def test_what_happens_to_a_slice_happens_to_its_neighbours():
    same = make_slices(16, 64).expand(-1, 3, -1, -1)
    warped = warp_locally(same, torch.Generator().manual_seed(0))
    assert (warped != same).flatten(1).any(1).all()
    torch.testing.assert_close(warped[:, 0], warped[:, 2])
    spoilt = corrupt(same, torch.Generator().manual_seed(0))
    changed = (spoilt != same).flatten(2).any(2)
    assert changed[:, 1].sum() >= changed[:, 0].sum() > 8, "blobs go on through the slices"
    alike = torch.corrcoef(torch.stack([(spoilt - same)[:, 0].flatten(), (spoilt - same)[:, 1].flatten()]))[0, 1]
    assert 0.5 < alike < 0.999, "but are not the same in all"


def test_mse_by_hand():
    stack = np.zeros((2, 4, 4), np.float32)
    stack[:, 1:3, 1:3] = 0.5
    reconstruction = stack.copy()
    reconstruction[1, 1, 1] = 0.1  # one of four brain pixels is 0.4 off
    reconstruction[1, 0, 0] = 9.0  # outside the brain: does not count
    np.testing.assert_allclose(score_mse(stack, reconstruction), [0, 0.16 / 4], atol=1e-7)


def healthy_and_lesion(size=48, depth=10):
    rng = np.random.default_rng(0)
    stack = np.repeat(make_slices(1, size)[0].numpy(), depth, axis=0)
    reconstruction = np.where(stack > 0, stack + 0.02 * rng.normal(size=stack.shape), 0).astype(np.float32)
    lesion = np.zeros(stack.shape, bool)
    lesion[4:7, 20:26, 22:28] = True
    return stack, reconstruction, lesion


def test_a_planted_lesion_stands_out_of_its_surroundings():
    stack, reconstruction, lesion = healthy_and_lesion()
    calibration = calibrate([(stack, reconstruction, (2.0, 1.5))] * 2)
    healthy = map_anomalies(stack, reconstruction, (2.0, 1.5), calibration)
    sick = map_anomalies(np.where(lesion, stack - 0.25, stack), reconstruction, (2.0, 1.5), calibration)
    assert np.isnan(sick[stack == 0]).all()
    assert np.isfinite(sick[stack > 0]).all()
    assert np.median(sick[lesion]) > 5 * np.nanmedian(sick[~lesion])
    scores = score_slices(sick)
    assert scores[4:7].min() > scores[[0, 1, 2, 8, 9]].max()
    assert score_scan(sick) > 2 * score_scan(healthy)
    assert lesion[np.unravel_index(np.nanargmax(sick), sick.shape)]


def test_shading_is_no_anomaly_but_a_lesion_in_it_is():
    stack, _, lesion = healthy_and_lesion(size=96, depth=24)
    lesion = np.zeros(stack.shape, bool)
    lesion[8:14, 44:52, 44:52] = True
    rng = np.random.default_rng(2)
    healthy = np.where(stack > 0, stack + 0.01 * rng.normal(size=stack.shape), 0)
    shading = 0.1 * np.linspace(-1, 1, stack.shape[2])[None, None]
    shaded = np.where(stack > 0, healthy + shading + 0.1 * lesion, 0)
    inner = ndimage.binary_erosion(stack > 0, iterations=6)
    residual = smooth_residual(shaded, stack, (2.0, 1.5))
    assert (
        np.abs(residual[inner & ~ndimage.binary_dilation(lesion, iterations=6)]).mean() < 0.35 * np.abs(shading).mean()
    )
    assert residual[lesion].mean() > 0.06


def test_calibration_divides_by_what_healthy_scans_show_there():
    stack, _, _ = healthy_and_lesion()
    noisy_half = np.zeros(stack.shape, np.float32)
    noisy_half[:, :, : stack.shape[2] // 2] = 1
    rng = np.random.default_rng(1)
    scans = []
    for _ in range(6):
        error = rng.normal(size=stack.shape) * (0.01 + 0.05 * noisy_half)
        scans.append((stack, np.where(stack > 0, stack + error, 0), (2.0, 1.5)))
    calibration = calibrate(scans)
    offset = np.where(stack > 0, stack - 0.1, 0)
    anomaly = map_anomalies(stack, offset, (2.0, 1.5), calibration)
    middle = slice(stack.shape[2] // 4, stack.shape[2] // 4 + 3), slice(-stack.shape[2] // 4 - 3, -stack.shape[2] // 4)
    quiet, noisy = np.nanmedian(anomaly[:, 20:28, middle[1]]), np.nanmedian(anomaly[:, 20:28, middle[0]])
    assert quiet > 2 * noisy


def test_calibration_divides_by_what_healthy_scans_show_where_they_look_like_that():
    """Dark tissue, elsewhere in each scan, is drawn badly: the same residual counts less there."""
    brain = make_slices(1, 48)[0].numpy().repeat(10, axis=0) > 0
    rng = np.random.default_rng(3)
    scans = []
    for column in (12, 16, 20, 24, 28, 32):
        dark = np.zeros(brain.shape, bool)
        dark[:, :, column : column + 6] = True
        drawn = np.where(brain, np.where(dark, 0.3, 0.7), 0).astype(np.float32)
        error = ndimage.gaussian_filter(rng.normal(size=brain.shape), 1) * np.where(dark, 0.2, 0.02)
        scans.append((np.where(brain, drawn + error, 0).astype(np.float32), drawn, (2.0, 1.5)))
    dark = np.zeros(brain.shape, bool)
    dark[:, :, 18:24] = True
    drawn = np.where(brain, np.where(dark, 0.3, 0.7), 0).astype(np.float32)
    lesion = np.zeros(brain.shape, bool)
    lesion[4:7, 22:26, 19:23] = lesion[4:7, 22:26, 29:33] = True
    anomaly = map_anomalies(drawn + 0.1 * lesion, drawn, (2.0, 1.5), calibrate(scans))
    assert anomaly[lesion & ~dark].mean() > 2 * anomaly[lesion & dark].mean()


def test_smoothing_is_the_gaussian_of_scipy():
    values = np.random.default_rng(0).normal(size=(20, 48, 40)).astype(np.float32)
    smoothed = _smooth(torch.from_numpy(values), 3.0, (2.0, 1.5)).numpy()
    expected = ndimage.gaussian_filter(values, (1.5, 2, 2), truncate=6)
    inner = np.s_[8:-8, 12:-12, 12:-12]
    np.testing.assert_allclose(smoothed[inner], expected[inner], atol=1e-3)
    np.testing.assert_allclose(_smooth(torch.ones(values.shape), 9.0, (2.0, 1.5)), 1, atol=1e-5)


def test_no_weight_of_the_gaussian_is_denormal():
    weights = _weigh(128, 1.3)
    assert not ((weights > 0) & (weights < torch.finfo(torch.float32).tiny)).any()


def test_the_map_is_that_of_plain_scipy():
    from benchmarks.speed import map_plainly

    stack, reconstruction, lesion = healthy_and_lesion(size=96, depth=24)
    calibration = calibrate([(stack, reconstruction, (2.0, 1.5))] * 2)
    sick = np.where(lesion, stack - 0.25, stack)
    maps = [make(sick, reconstruction, (2.0, 1.5), calibration) for make in (map_anomalies, map_plainly)]
    inner = ndimage.binary_erosion(stack > 0, iterations=4, border_value=1)
    assert np.corrcoef(*(values[inner] for values in maps))[0, 1] > 0.995
    assert np.abs(np.log(maps[0][lesion] / maps[1][lesion])).max() < 0.1


def test_one_validation_scan_calibrates():
    stack, reconstruction, _ = healthy_and_lesion()
    calibration = calibrate([(stack, reconstruction, (2.0, 1.5))])
    for name, values in calibration.items():
        assert torch.isfinite(values).all(), name
    assert calibration["scan_scores"] > 0
    assert calibration["threshold"] > 0


def test_conformal_p_values():
    healthy = np.array([1.0, 2.0, 2.0, 5.0])
    # worked by hand: (1 + how many are as high) / 5
    np.testing.assert_allclose(give_p_values(np.array([0.5, 1, 2, 3, 5, 9]), healthy), np.array([5, 5, 4, 2, 2, 1]) / 5)
    assert count_needed(0.05) == 19
    assert count_needed(0.1) == 9


def test_false_alarms_come_at_the_asked_rate():
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.2):
        flagged = [
            (give_p_values(rng.gamma(3, size=1), np.sort(rng.gamma(3, size=39))) <= rate)[0] for _ in range(2000)
        ]
        interval = binomtest(int(np.sum(flagged)), len(flagged)).proportion_ci(0.99)
        assert interval.low <= rate <= interval.high


def test_regions_by_hand():
    anomaly = np.full((20, 20, 20), np.nan, np.float32)
    anomaly[2:18, 2:18, 2:18] = 1
    anomaly[4:8, 4:8, 4:8] = 6  # 64 voxels of 2 x 2 x 3 mm: 0.768 ml
    anomaly[5, 5, 5] = 9
    anomaly[12:14, 12, 12] = 7  # 0.024 ml
    affine = np.array([[0, 2.0, 0, -20], [2.0, 0, 0, 5], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    regions = find_regions(anomaly, affine, threshold=5, smallest_ml=0.1)
    assert len(regions) == 1
    assert regions[0]["volume_ml"] == pytest.approx(0.768)
    assert regions[0]["peak"] == 9
    assert regions[0]["mean"] == pytest.approx((63 * 6 + 9) / 64)
    centre = [regions[0][f"{axis}_mm"] for axis in "xyz"]
    np.testing.assert_allclose(centre, affine[:3] @ [5.5, 5.5, 5.5, 1], atol=0.05)
    assert len(find_regions(anomaly, affine, threshold=5, smallest_ml=0)) == 2
    assert find_regions(anomaly, affine, threshold=50, smallest_ml=0) == []


def test_brightness_ranks_by_hand():
    stack = np.zeros((1, 2, 3), np.float32)
    stack[0, 0] = [0.2, 0.4, 0.4]
    stack[0, 1, 0] = 0.9
    np.testing.assert_allclose(map_brightness(stack)[0], [[0.25, 0.75, 0.75], [1, np.nan, np.nan]])


class Evil:
    def __reduce__(self):
        return (open, ("evil-was-here", "w"))


def test_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build_model(CONFIGS[0])
    content = {"config": CONFIGS[0], "weights": model.state_dict(), "rows": [{"loss": 0.5}]}
    save_checkpoint(tmp_path / "a.pt", content)
    save_checkpoint(tmp_path / "b.pt", content)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    loaded, read = load_model(tmp_path / "a.pt")
    slices = make_slices(2)
    assert torch.equal(loaded(slices), model.eval()(slices))
    assert read["rows"] == [{"loss": 0.5}]
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_model(tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        load_model(tmp_path / "cut.pt")
    save_checkpoint(tmp_path / "other.pt", content | {"config": CONFIGS[0] | {"latent": 7}})
    with pytest.raises(CheckpointError, match=r"other\.pt"):
        load_model(tmp_path / "other.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        load_model(tmp_path / "evil.pt")
    torch.save({"config": Evil()}, tmp_path / "evil2.pt")
    with pytest.raises(CheckpointError, match=r"evil2\.pt"):
        load_model(tmp_path / "evil2.pt")
    assert not (tmp_path / "evil-was-here").exists()


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    import os

    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    before = path.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
