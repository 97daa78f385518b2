"""Reads image files, damaged ones too: never more than a file really holds, and one line where that fails."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from isal import isal_zlib  # unpacks twice as fast as zlib
from nibabel.orientations import aff2axcodes, axcodes2ornt, inv_ornt_aff

from common.cli import DataError

MOST_VOXELS = 512**3  # 0.5 mm over 256 mm; float32 takes 0.5 GB of them
SPACING_MM = (0.05, 20)  # of a voxel: what a brain scan can have
DEFLATE_RATIO = 1032  # gzip makes nothing smaller than this
CHUNK = 1 << 18  # bytes

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what matters about a header is checked below


def parse_axes(text: str) -> str:
    """Three letters, one of L and R, one of P and A, one of I and S: the type of --axes."""
    axes = text.upper()
    if len(axes) != 3 or not all(len(set(axes) & set(pair)) == 1 for pair in ("LR", "PA", "IS")):
        raise argparse.ArgumentTypeError(f"{text}: say where the three axes point to, such as ASL or RAS")
    return axes


class Image(NamedTuple):
    """values (I, J, K) as stored, any real type; affine (4, 4), voxel to scanner mm."""

    values: np.ndarray
    affine: np.ndarray


def read_image(path: Path, axes: str | None = None, distrusted: str | None = None, index: int | None = None) -> Image:
    """Read one 3-D volume of a NIfTI, Analyze or MGH file. Raises DataError with the cure.

    axes        where the stored axes point to (three letters, "ASL"), for a file whose header does not say
    distrusted  axes that are not believed where a header says them
    index       which volume of a file with several, from 0
    """
    try:
        _check_file(path)
        image = nib.load(path)
        shape, volumes, offset = _pick_volume(path, image, index)
        dtype = image.header.get_data_dtype()
        if dtype.fields:
            raise DataError(f"{path}: holds colours, not intensities; export it as grey values")
        if dtype.kind == "c":
            raise DataError(f"{path}: holds complex values; save their magnitude")
        affine = _find_affine(path, image, shape, axes, distrusted)
        data_file = image.file_map["image"].filename
        values = _read_values(Path(data_file), image.dataobj.offset, offset, int(np.prod(shape)), volumes, dtype)
        slope, intercept = image.dataobj.slope, image.dataobj.inter
    except DataError:
        raise
    except Exception as error:  # nibabel raises anything on a broken header, and it always means the same
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}); copy it again") from error
    values = values.reshape(shape, order="F")
    if (slope, intercept) != (1, 0):
        with np.errstate(over="ignore", invalid="ignore"):
            values = values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    return Image(values, affine)


def _check_file(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(2)
    if not start:
        raise DataError(f"{path}: is empty (0 bytes); copy it again")
    packed = start == b"\x1f\x8b"
    if packed != path.name.lower().endswith((".gz", ".mgz")):
        raise DataError(f"{path}: is {'' if packed else 'not '}gzip, against its name; rename it or convert it again")


def _pick_volume(path: Path, image, index: int | None) -> tuple[tuple[int, int, int], int, int]:
    """(shape of one volume, how many volumes, voxels before the one picked)."""
    shape = tuple(int(n) for n in image.shape)
    if len(shape) < 3 or min(shape[:3]) < 2 or min(shape) < 1:
        raise DataError(f"{path}: shape {shape} is not a volume; give a 3-D scan")
    count = int(np.prod(shape[:3], dtype=object))
    if count > MOST_VOXELS:
        raise DataError(
            f"{path}: its header claims {shape[:3]} voxels, too many for a brain; resample it or copy it again"
        )
    volumes = int(np.prod(shape[3:], dtype=object))
    if volumes == 1:
        return shape[:3], 1, 0
    if index is None:
        raise DataError(f"{path}: holds {volumes} volumes {shape}, not one; say which with --volume")
    if index >= volumes:
        raise DataError(f"{path}: holds {volumes} volumes, so --volume is at most {volumes - 1}")
    return shape[:3], volumes, count * index


def _find_affine(path: Path, image, shape: tuple, axes: str | None, distrusted: str | None) -> np.ndarray:
    oriented = _has_orientation(image)
    affine = np.asarray(image.affine, dtype=float)
    if oriented and not (np.isfinite(affine).all() and np.linalg.matrix_rank(affine[:3, :3]) == 3):
        raise DataError(f"{path}: its header's orientation matrix is singular; convert it again from its source")
    is_quaternion = isinstance(image, nib.Nifti1Pair) and image.header["sform_code"] == 0
    zooms = nib.affines.voxel_sizes(affine) if oriented and not is_quaternion else _read_zooms(image)
    if not np.isfinite(zooms).all() or zooms.min() < SPACING_MM[0] or zooms.max() > SPACING_MM[1]:
        sizes = ", ".join(f"{zoom:g}" for zoom in zooms)
        raise DataError(f"{path}: its header claims voxels of {sizes} mm; correct the header")
    if oriented and "".join(aff2axcodes(affine)) != distrusted:
        return affine
    if axes is None:
        raise DataError(f"{path}: its header does not give its orientation; give --axes, where its axes point to")
    return _make_affine(axes, shape, zooms)


def _read_zooms(image: nib.AnalyzeImage) -> np.ndarray:
    """Voxel sizes in mm as an Analyze or NIfTI header gives them, before nibabel replaces 0 by 1."""
    holder = image.file_map["header" if "header" in image.file_map else "image"]
    with holder.get_prepare_fileobj("rb") as file:
        return np.abs(type(image.header).from_fileobj(file, check=False)["pixdim"][1:4].astype(float))


def _has_orientation(image) -> bool:
    header = image.header
    if isinstance(image, nib.Nifti1Pair):
        return bool(header["sform_code"] > 0 or header["qform_code"] > 0)
    if isinstance(image, nib.AnalyzeImage):  # only SPM stores it, in a .mat beside
        mat = image.file_map.get("mat")
        return mat is not None and Path(mat.filename).exists()
    return True


def _make_affine(axes: str, shape: tuple, zooms: np.ndarray) -> np.ndarray:
    """The affine of a volume stored along these axes, scanner centre in its middle."""
    ornt = axcodes2ornt(axes)
    order = ornt[:, 0].astype(int)
    canonical = np.empty(3)
    canonical[order] = zooms
    size = np.empty(3)
    size[order] = shape
    affine = np.diag([*canonical, 1.0])
    affine[:3, 3] = -canonical * (size - 1) / 2
    return affine @ np.linalg.inv(inv_ornt_aff(ornt, shape))


def _read_values(path: Path, start: int, skip: int, count: int, volumes: int, dtype: np.dtype) -> np.ndarray:
    """(count,) values after `skip` others from byte `start` of the file's content on.

    No more is allocated than the file can hold, whatever its header says.
    """
    first, wanted, stored = start + skip * dtype.itemsize, count * dtype.itemsize, path.stat().st_size
    promised = start + volumes * wanted
    packed = path.name.lower().endswith((".gz", ".mgz"))
    if first + wanted > stored * (DEFLATE_RATIO if packed else 1):
        raise DataError(f"{path}: is truncated: {stored} bytes cannot hold what its header says; copy it again")
    content, size, filled = np.empty(wanted if packed else 0, np.uint8), stored, 0  # wanted is bounded by now
    if packed:
        size = 0
        for piece in _unpack(path):
            part = memoryview(piece)[max(0, first - size) : max(0, first + wanted - size)]
            content[filled : filled + len(part)] = part
            filled += len(part)
            size += len(piece)
            if volumes > 1 and size >= first + wanted:
                break  # a single volume is read to its end, where the checksum is
    if packed and filled < wanted:
        raise DataError(f"{path}: is truncated: {filled} of {wanted} bytes; copy it again")
    if size - promised > max(promised // 100, 1 << 16):
        raise DataError(f"{path}: holds {size} bytes where its header says {promised}; convert it again")
    return content.view(dtype) if packed else np.fromfile(path, dtype, count, offset=first)


def _unpack(path: Path):
    """The content of a gzip file in pieces, checksums verified."""
    with open(path, "rb") as file:
        unpacker = isal_zlib.decompressobj(31)
        packed = file.read(CHUNK)
        while not unpacker.eof:
            piece = unpacker.decompress(packed, CHUNK)
            packed = unpacker.unconsumed_tail or (b"" if unpacker.eof else file.read(CHUNK))
            if unpacker.eof:  # another member may follow, or zeros that fill up a tape's block
                packed = (unpacker.unused_data + file.read(CHUNK)).lstrip(b"\0")
                if packed:
                    unpacker = isal_zlib.decompressobj(31)
            elif not (piece or packed):
                raise DataError(f"{path}: ends in the middle; copy it again")
            yield piece
