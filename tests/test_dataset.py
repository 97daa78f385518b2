"""Slices as a torch dataset: each with its neighbours, from memory or from disk, one batch after the other."""

import numpy as np
import psutil
import pytest
import torch

from preprocessing.geometry import Geometry
from preprocessing.store import list_scans, write_scan
from tests.test_store import RECORD
from training.dataset import SliceDataset


def write_flat(folder, name, values, spacing_mm):
    """A scan whose slices are flat, (n, 4, 4) with these values."""
    stack = np.float16(values)[:, None, None].repeat(4, 1).repeat(4, 2)
    slices, affine = tuple(range(10, 10 + len(values))), tuple(map(tuple, np.eye(4)))
    record = {key: value for key, value in RECORD.items() if key != "lesion_voxels"}
    geometry = Geometry((9, 9, 30), affine, "RAS", (1.0, 1.0, spacing_mm), (4.0, 4.0), 1.5, 4, slices)
    write_scan(folder / "train/normal" / name, stack, None, record | {"subject": name} | geometry.to_record())


@pytest.fixture
def scans(tmp_path):
    """Three slices of 0.25, 0.5, 0.75 at 4 mm, and two of 0.125 and 1 at 2 mm."""
    write_flat(tmp_path, "a_T1w", [0.25, 0.5, 0.75], 4.0)
    write_flat(tmp_path, "b_T1w", [0.125, 1.0], 2.0)
    return list(list_scans(tmp_path))


def within_4_mm(spacing_mm):
    step = round(4 / spacing_mm)
    return (-step, 0, step)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_slice_comes_with_its_neighbours_of_the_same_scan(scans, in_memory):
    dataset = SliceDataset(scans, in_memory, neighbour_offsets=within_4_mm)
    assert len(dataset) == 5
    expected = [[0.25, 0.25, 0.5], [0.25, 0.5, 0.75], [0.5, 0.75, 0.75], [0.125, 0.125, 1], [0.125, 1, 1]]
    for index, values in enumerate(expected):
        item = dataset[index]
        assert item.shape == (3, 4, 4)
        assert item.dtype == torch.float32
        assert item[:, 1, 2].tolist() == values
    assert dataset[[4, 0]][:, :, 0, 0].tolist() == [expected[4], expected[0]]
    assert dataset[1:4][:, :, 0, 0].tolist() == expected[1:4]
    batches = list(dataset.read_batches([[0, 1], [4], [2, 3]], readers=1))
    assert [batch[:, 1, 0, 0].tolist() for batch in batches] == [[0.25, 0.5], [1.0], [0.75, 0.125]]
    assert batches[0].dtype == torch.float32


def test_alone_a_slice_is_one_channel(scans):
    assert SliceDataset(scans)[3].shape == (1, 4, 4)


def test_what_is_read_ahead_is_bounded(processed):
    dataset = SliceDataset(list(list_scans(processed / "train")), in_memory=False)
    asked = []
    batches = dataset.read_batches(([asked.append(i) or i] for i in range(40)), readers=3)
    for i in range(20):
        assert torch.equal(next(batches)[0], dataset[i])
        assert len(asked) - i <= 4
    batches.close()


def test_reading_ahead_starts_no_threads_of_arithmetic(processed):
    dataset = SliceDataset(list(list_scans(processed / "train")), in_memory=False)
    torch.ones(10**6).add(1)  # now the threads of this one are there
    before = psutil.Process().num_threads()
    places = np.arange(64) % len(dataset)
    for _ in dataset.read_batches([places] * 8, readers=2):
        assert psutil.Process().num_threads() <= before + 2
