"""Slices and regions are named by where they are, in mm and in the file's own indices."""

from dataclasses import replace

import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from evaluation.places import describe_regions, find_file_slice, find_mm, format_mm, name_slice
from preprocessing.oblique import StraightGrid
from tests.predictions import make_prediction, restore_map


@pytest.mark.parametrize(("axes", "wanted"), [("RAS", ("k", 52)), ("RSP", ("j", 52)), ("IPR", ("i", 147))])
def test_a_slice_has_an_index_along_the_files_own_axis(axes, wanted):
    stored = [0, 0, 0]
    for place, length in zip(axcodes2ornt(axes)[:, 0].astype(int), (40, 40, 200), strict=True):
        stored[place] = length
    shape = tuple({"L": 40, "R": 40, "A": 40, "P": 40, "S": 200, "I": 200}[axis] for axis in axes)
    ras = np.diag([2.0, 2.0, 2.0, 1.0])
    to_stored = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    affine = ras @ inv_ornt_aff(to_stored, (40, 40, 200))
    geometry = replace(
        make_prediction().scan.geometry, axes=axes, shape=shape, affine=tuple(map(tuple, affine.tolist()))
    )
    assert find_file_slice(geometry, 52) == wanted
    assert find_mm(geometry, 2) == pytest.approx(104), "whatever the storage, the same place in space"
    assert name_slice(geometry, 2) == f"z 104 mm, {wanted[0]} = {wanted[1]}"


def test_a_resampled_scan_has_no_slices_of_the_file():
    geometry = make_prediction().scan.geometry
    straight = StraightGrid((40, 40, 200), geometry.affine)
    assert name_slice(replace(geometry, straight=straight), 0) == "z 100 mm, slice 50 after resampling"


def test_there_is_no_minus_zero():
    assert [format_mm(value) for value in (-0.3, -0.0, 0.4, -0.6)] == ["0", "0", "0", "-1"]


def test_regions_have_their_numbers_on_the_stack_and_know_the_lesion_they_touch():
    made = make_prediction()
    made.anomaly[7, 30:33, 30:33] = 9.0  # a small second region, far from the lesion
    made = restore_map(made)
    numbers = made.region_numbers
    assert set(np.unique(numbers)) == {0, 1, 2}
    assert (numbers[made.scan.lesion] == 1).all()
    assert (numbers[7, 30:33, 30:33] == 2).all()
    assert not numbers[made.anomaly < made.threshold].any()
    first, second = describe_regions(made)
    assert (first["number"], first["on_lesion"], first["slice"] in (54, 55)) == (1, True, True)
    assert (second["number"], second["on_lesion"], second["slice"]) == (2, False, 57)
    unknown = replace(made, scan=replace(made.scan, lesion=None))
    assert {region["on_lesion"] for region in describe_regions(unknown)} == {None}
    listed = replace(made, regions=made.regions[:1]).region_numbers
    assert set(np.unique(listed)) == {0, 1}, "what is too small to be listed has no number"
    assert not replace(made, regions=[]).region_numbers.any()
