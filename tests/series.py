"""DICOM series written as the standard has them, for tests."""

import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.spatial.transform import Rotation

from tests.conftest import make_head

SHAPE, SPACING = (20, 24, 22), (8.0, 7.0, 6.0)


def make_image(axes: str = "LPS", tilt_degrees: float = 0, seed: int = 1) -> nib.Nifti1Image:
    """The lopsided head in whole numbers, stored along `axes`: those of a series' columns, rows and slices."""
    head = make_head(SHAPE, SPACING, seed)
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("xz", [tilt_degrees, tilt_degrees / 2], degrees=True).as_matrix()
    image = nib.Nifti1Image(np.round(head.get_fdata()).astype(np.int16), head.affine)
    image = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(axes)))
    return nib.Nifti1Image(np.asarray(image.dataobj), tilt @ image.affine)


def write_series(folder: Path, image: nib.Nifti1Image | None = None, name: str = "{:03d}.dcm", **tags) -> list[Path]:
    """Write an image as a series, one file a slice along its third axis; returns the files in the slices' order.

    A slice's place is given as the DICOM standard has it, in mm towards left, posterior and superior. Neither the
    files' names nor the instance numbers are in the order of the slices.
    """
    image = image or make_image()
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-1, -1, 1, 1]) @ image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    along = affine[:3, :3] / spacing
    tags = {"SeriesNumber": 4, "SeriesDescription": "T1 MPRAGE", "SeriesInstanceUID": generate_uid(), **tags}
    files = []
    for place, number in enumerate(random.Random(0).sample(range(image.shape[2]), image.shape[2])):
        pixels = np.asarray(image.dataobj)[:, :, place].T  # (rows, columns)
        content = {
            "SOPClassUID": MRImageStorage,
            "SOPInstanceUID": generate_uid(),
            "StudyInstanceUID": "1.2.3",
            "Modality": "MR",
            "ScanningSequence": "GR",
            "InstanceNumber": number + 1,
            "ImageOrientationPatient": [f"{part:.8f}" for part in (*along[:, 0], *along[:, 1])],
            "ImagePositionPatient": [f"{part:.8f}" for part in (affine @ (0, 0, place, 1))[:3]],
            "PixelSpacing": [f"{spacing[1]:g}", f"{spacing[0]:g}"],
            "SliceThickness": f"{spacing[2]:g}",
            "Rows": pixels.shape[0],
            "Columns": pixels.shape[1],
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 1,
            "PixelData": pixels.astype("<i2").tobytes(),
        }
        one = pydicom.Dataset()
        for tag, value in (content | tags).items():
            setattr(one, tag, value)
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        files.append(folder / name.format(number))
        pydicom.dcmwrite(files[-1], one, enforce_file_format=True)
    return files
