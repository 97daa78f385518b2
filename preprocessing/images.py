"""Reads image files, damaged ones too: allocates no more than a file can hold, and fails in one line."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from isal import isal_zlib  # unpacks twice as fast as zlib
from nibabel.orientations import aff2axcodes, axcodes2ornt, inv_ornt_aff

from common.cli import DataError
from common.files import open_regular

MOST_VOXELS = 512**3  # 0.5 mm over 256 mm; float32 takes 0.5 GB of them
SPACING_MM = (0.05, 20)  # of a voxel: what a brain scan can have
MOST_ALONG_AXIS = 2048
DEFLATE_RATIO = 1032  # gzip makes nothing smaller than this
MOST_MEMBERS = 1 << 16  # of a gzip file; of the size that bgzip makes, they hold 4 GB
CHUNK = 1 << 18  # bytes
WIDE_BYTES = 1 << 29  # what takes more than this, 512^3 float64, is read as float32
# What precedes a file's voxels. The rest of a header is extensions, whose length the file itself claims.
HEADER_BYTES, MOST_OFFSET, MOST_MAT_BYTES = 1024, 1 << 26, 1 << 16
FORMATS = [kind for kind in nib.imageclasses.all_image_classes if issubclass(kind, (nib.AnalyzeImage, nib.MGHImage))]

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what matters about a header is checked below


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
        image = _load_header(path)
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
            values = values.astype(np.float32)
            values *= np.float32(slope)  # in place: three of them would take 1.5 GB
            values += np.float32(intercept)
    return Image(values, affine)


def _load_header(path: Path):
    """nibabel's image of a file's header alone; no extension is read, however long it claims to be."""
    _check_start(path)
    is_pair = path.name.lower().endswith(".img")
    beside = Path(nib.AnalyzeImage.filespec_to_file_map(path)["header"].filename) if is_pair else path
    start = _read_start(beside)
    for kind in FORMATS:
        if kind.path_maybe_image(path, (start, str(beside)))[0]:
            break
    else:
        raise DataError(f"{path}: holds no NIfTI, Analyze or MGH image; convert it again")
    file_map = kind.filespec_to_file_map(path)
    if kind is not nib.MGHImage:
        start = start[: kind.header_class.sizeof_hdr]
    file_map["header" if "header" in file_map else "image"].fileobj = io.BytesIO(start)
    mat = Path(file_map["mat"].filename) if "mat" in file_map else None
    if mat and mat.exists() and not (mat.is_file() and mat.stat().st_size <= MOST_MAT_BYTES):
        raise DataError(f"{mat}: is not an SPM matrix, which takes less than {MOST_MAT_BYTES >> 10} kB; remove it")
    return kind.from_file_map(file_map)


def _check_start(path: Path) -> None:
    with open_regular(path) as file:
        start = file.read(2)
    if not start:
        raise DataError(f"{path}: is empty (0 bytes); copy it again")
    packed = start == b"\x1f\x8b"
    if packed != path.name.lower().endswith((".gz", ".mgz")):
        raise DataError(f"{path}: is {'' if packed else 'not '}gzip, unlike its name; rename it or convert it again")


def _read_start(path: Path) -> bytes:
    """The first HEADER_BYTES of a file's content."""
    if not path.name.lower().endswith((".gz", ".mgz")):
        with open_regular(path) as file:
            return file.read(HEADER_BYTES)
    start = b""
    with contextlib.closing(_unpack(path)) as pieces:
        while len(start) < HEADER_BYTES and (piece := next(pieces, None)) is not None:
            start += piece
    return start[:HEADER_BYTES]


def _pick_volume(path: Path, image, index: int | None) -> tuple[tuple[int, int, int], int, int]:
    """(shape of one volume, how many volumes, voxels before the one picked)."""
    shape = tuple(int(n) for n in image.shape)
    if len(shape) < 3 or min(shape[:3]) < 2 or min(shape) < 1:
        raise DataError(f"{path}: shape {shape} is not a volume; give a 3-D scan")
    count = int(np.prod(shape[:3], dtype=object))
    if count > MOST_VOXELS or max(shape[:3]) > MOST_ALONG_AXIS:
        raise DataError(
            f"{path}: its header claims {shape[:3]} voxels, too many for a brain; resample it or copy it again"
        )
    volumes = int(np.prod(shape[3:], dtype=object))
    if volumes == 1:
        return shape[:3], 1, 0
    if index is None:
        raise DataError(f"{path}: holds {volumes} volumes {shape}, not one; choose one with --volume")
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
        raise DataError(f"{path}: its header does not give its orientation; give --axes, where its axes point")
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

    No more is allocated than the file can hold, whatever its header says; the file is not read beyond that either.
    """
    first, wanted, stored = start + skip * dtype.itemsize, count * dtype.itemsize, path.stat().st_size
    promised = start + volumes * wanted
    packed = path.name.lower().endswith((".gz", ".mgz"))
    if not 0 <= start <= MOST_OFFSET:
        raise DataError(f"{path}: its header says that the voxels begin at byte {start}; convert it again")
    if first + wanted > stored * (DEFLATE_RATIO if packed else 1):
        raise DataError(f"{path}: is truncated: {stored} bytes cannot hold what its header says; copy it again")
    is_wide = wanted > WIDE_BYTES and dtype.itemsize > 4  # wanted is bounded by now
    values = np.empty(count, np.float32 if is_wide else dtype)
    most = promised + max(promised // 100, 1 << 16)
    stop = first + wanted if volumes > 1 else most + 1  # a single volume is read to its end, where the checksum is
    size = filled = 0
    kept = b""  # bytes of a value that continues in the next piece
    for piece in _unpack(path) if packed else _read_pieces(path, first, wanted):
        begin = size if packed else first + size
        part = kept + memoryview(piece)[max(0, first - begin) : max(0, first + wanted - begin)]
        number = len(part) // dtype.itemsize
        with np.errstate(over="ignore"):
            values[filled : filled + number] = np.frombuffer(part, dtype, number)
        kept, filled, size = part[number * dtype.itemsize :], filled + number, size + len(piece)
        if packed and size >= stop:
            break
    if filled < count:
        raise DataError(f"{path}: is truncated: {filled * dtype.itemsize} of {wanted} bytes; copy it again")
    size = size if packed else stored
    if size > most:
        raise DataError(f"{path}: holds {size} bytes or more where its header says {promised}; convert it again")
    return values


def _read_pieces(path: Path, first: int, count: int) -> Iterator[bytes]:
    """`count` bytes of a file from byte `first` on."""
    with open(path, "rb") as file:
        file.seek(first)
        while count > 0 and (piece := file.read(min(count, CHUNK))):
            count -= len(piece)
            yield piece


def _unpack(path: Path) -> Iterator[bytes]:
    """The content of a gzip file in pieces, checksums verified."""
    with open(path, "rb") as file:
        unpacker, members = isal_zlib.decompressobj(31), 1
        packed = file.read(CHUNK)
        while not unpacker.eof:
            piece = unpacker.decompress(packed, CHUNK)
            packed = unpacker.unconsumed_tail or (b"" if unpacker.eof else file.read(CHUNK))
            if unpacker.eof:  # another member may follow, or zeros that fill up a tape's block
                packed = unpacker.unused_data.lstrip(b"\0")
                while not packed and (more := file.read(CHUNK)):
                    packed = more.lstrip(b"\0")
                if packed:
                    unpacker, members = isal_zlib.decompressobj(31), members + 1
            elif not (piece or packed):
                raise DataError(f"{path}: ends in the middle; copy it again")
            if members > MOST_MEMBERS:
                raise DataError(f"{path}: is packed in more than {MOST_MEMBERS} pieces; pack it again")
            yield piece
