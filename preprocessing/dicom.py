"""DICOM series: finds them below a folder, and converts each with dcm2niix into the NIfTI file that all else reads."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import dcm2niix
import pydicom

from common.cli import DataError, explain
from common.files import open_regular, read_json, write_atomically
from preprocessing.scans import walk
from preprocessing.subjects import strip_ending

CONVERTED = "dicom"  # the folder of a slice store that holds the NIfTI files
ENDINGS = (".dcm", ".ima")  # others are tried where their name has no ending, or a number as a UID's name has
MAGIC, MAGIC_AT = b"DICM", 128
TAGS = (
    "ImageType Modality ScanningSequence SeriesDescription ProtocolName SeriesInstanceUID SeriesNumber InstanceNumber"
)
LONGEST_DESCRIPTION = 60
MOST_SECONDS = 1800  # that dcm2niix may take for one series; 384 slices take 0.3
_LOCALIZER = re.compile(r"(?<![^\W_])loc(?![^\W_])|locali[sz]er|scout|survey|(?:3|three)[-_ ]?plane", re.IGNORECASE)

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # what matters of a header is checked here


@dataclass(frozen=True)
class Series:
    """The files of one DICOM series, and the NIfTI file that they are converted to.

    folder       holds the files, itself or in folders below
    number       of the series; 0 where its header gives none
    description  as its header gives it
    unfit        why it is no anatomical MRI, in words; empty where it may be one
    target       the NIfTI file
    """

    folder: Path
    number: int
    description: str
    files: tuple[Path, ...]
    unfit: str
    target: Path

    def __str__(self) -> str:
        return f"{self.folder}, series {self.describe()}"

    def describe(self) -> str:
        return f"{self.number} ({self.description or 'no description'}, {len(self.files)} files)"

    def convert(self) -> None:
        """Write `target`, unless it is there and was made from these very files. DataError with the cure.

        The record beside it is written last: where it has the files' fingerprint, the NIfTI file is whole.
        """
        record_path = Path(f"{strip_ending(str(self.target))}.json")
        fingerprint = self._take_fingerprint()
        with contextlib.suppress(FileNotFoundError, DataError):
            if read_json(record_path, "delete it").get("fingerprint") == fingerprint and self.target.exists():
                return
        record = {"folder": str(self.folder), "number": self.number, "description": self.description}
        record |= {"files": len(self.files), "fingerprint": fingerprint, "dcm2niix": dcm2niix.__version__}
        scratch = self.target.with_name(f".partial-{self.target.name}")
        try:
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            scratch.mkdir(parents=True)
            os.replace(self._run_dcm2niix(scratch), self.target)
            write_atomically(record_path, json.dumps(record, indent=1).encode())
        except OSError as error:
            raise DataError(f"{self.target}: cannot be written ({explain(error)})") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _take_fingerprint(self) -> str:
        """Of the files' names, sizes and times: 64 hexadecimal digits."""
        states = [(path.relative_to(self.folder), path.stat()) for path in self.files]
        known = [(os.fsencode(path), state.st_size, state.st_mtime_ns) for path, state in states]
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def _run_dcm2niix(self, scratch: Path) -> Path:
        """The NIfTI file that dcm2niix makes of the files; DataError where it is not one, or not of all files."""
        links = scratch / "files"
        links.mkdir()
        for number, path in enumerate(self.files):  # so that it sees these files alone, whatever lies beside them
            try:
                (links / f"{number:06d}").symlink_to(path.absolute())
            except OSError:  # a disk that has no links, such as exFAT
                shutil.copyfile(path, links / f"{number:06d}")
        options = ["-g", "i", "-b", "n", "-z", "i", "-1", "-d", "0", "-f", "volume"]  # -g i: no user's own defaults
        try:
            done = dcm2niix.main(
                [*options, "-o", str(scratch), str(links)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=MOST_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"{self}: dcm2niix does not end; convert it yourself, or remove it") from error
        said = (done.stdout + done.stderr).decode(errors="replace")
        volumes = sorted(scratch.glob("volume*.nii.gz"))
        if done.returncode or not volumes:
            where, why = self, f"exit code {done.returncode}"
            if damaged := re.search(rf"(?:Warning: )?(.*): {re.escape(str(links))}/(\d{{6}})", said):
                where, why = self.files[int(damaged[2])], damaged[1]
            raise DataError(f"{where}: dcm2niix cannot convert it ({why}); copy the series again, or free some space")
        if any("_Eq" in volume.name for volume in volumes):
            raise DataError(f"{self}: the distance between its slices varies, so some are missing; copy it again")
        if len(volumes) != 1:
            raise DataError(
                f"{self}: holds {len(volumes)} images, such as echoes; convert it with dcm2niix and give one of them"
            )
        used = sum(map(int, re.findall(r"^Convert (\d+) DICOM", said, re.MULTILINE)))
        if used != len(self.files):
            raise DataError(f"{self}: only {used} files can be used; copy it again, and each slice once")
        return volumes[0]


class Listing(NamedTuple):
    """The series below a folder."""

    series: list[Series]
    refused: list[tuple[str, str]]  # (path, why and the cure)


def list_series(folder: Path, target: Path, besides: Path | None = None) -> Listing:
    """The DICOM series at any depth below a folder, leaving out `besides`; `target` is where their NIfTI files will be.

    No series of a folder with a damaged file is listed: the file may be a slice of any of them.
    """
    groups, damaged = defaultdict(lambda: defaultdict(dict)), {}
    for path in walk(folder, besides, _may_be_dicom)[0]:
        try:
            header = _read_header(path)
        except (DataError, OSError) as error:
            why = explain(error) if isinstance(error, OSError) else error
            damaged.setdefault(path.parent, (path, f"{path}: {why}; no series of its folder is used"))
            continue
        if header is not None:
            number = _read_number(header, "SeriesNumber") or 0
            groups[header.get("SeriesInstanceUID") or path.parent, number][path.parent][path] = header
    series, taken = [], set()
    for (_, number), places in sorted(groups.items(), key=lambda group: str(group[0])):
        for place, headers in _join(places):
            if damaged.keys() & {path.parent for path in headers}:
                continue
            first = next(iter(headers.values()))
            description = " ".join(str(first.get("SeriesDescription") or first.get("ProtocolName") or "").split())
            name = f"dicom-{number}_{_spell(description)}".rstrip("_")
            names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
            goals = (target / place.relative_to(folder) / f"{own}.nii.gz" for own in names)
            goal = next(goal for goal in goals if goal not in taken)
            taken.add(goal)
            series.append(Series(place, number, description, tuple(headers), _find_unfit(first, description), goal))
    return Listing(
        sorted(series, key=lambda one: (one.folder, one.number)), [(str(path), why) for path, why in damaged.values()]
    )


@contextlib.contextmanager
def open_scan(path: Path, number: int | None = None) -> Iterator[Path]:
    """Yields a scan's file: `path`, or where that is a folder of DICOM files, a temporary NIfTI file of its series.

    number  of the series, for a folder with several. DataError lists them where it is needed, or there is no such one
    """
    if not path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        series = _choose(path, number, list_series(path, Path(scratch)))
        words = (path.resolve().name, str(series.number), _spell(series.description))
        file = Path(scratch, "_".join(filter(None, words)) + ".nii.gz")
        try:
            if series.unfit:
                raise DataError(f"{series}: {series.unfit}")
            series.convert()
            series.target.rename(file)
            yield file
        except DataError as error:
            raise DataError(str(error).replace(str(file), str(series))) from error


def _choose(folder: Path, number: int | None, listing: Listing) -> Series:
    chosen = [one for one in listing.series if number in (None, one.number)]
    if len(chosen) == 1:
        return chosen[0]
    if not chosen and listing.refused:
        raise DataError(listing.refused[0][1])
    if not listing.series:
        raise DataError(f"{folder}: holds no DICOM images; give the folder of a DICOM series, or a scan's file")
    which = f"{len(chosen) or 'no'} series{'' if number is None else f' of number {number}'}"
    known = ", ".join(one.describe() for one in chosen or listing.series)
    raise DataError(
        f"{folder}: holds {which}{': ' if chosen else '; it has '}{known}; "
        f"{'' if chosen and number is not None else 'choose one with --series NUMBER, or '}give the folder of one"
    )


def _may_be_dicom(name: str) -> bool:
    ending = os.path.splitext(name)[1].lower()
    return ending in ENDINGS or not ending or ending[1:].isdigit()


def _read_header(path: Path) -> pydicom.Dataset | None:
    """What TAGS name, of a file that is a DICOM image; None for any other file. DataError for a damaged one."""
    with open_regular(path) as file:
        start = file.read(MAGIC_AT + len(MAGIC))
    if start[MAGIC_AT:] != MAGIC:
        if path.suffix.lower() in ENDINGS:
            what = "is no DICOM file" if start else "is empty (0 bytes)"
            raise DataError(f"{what}; copy it again or remove it")
        return None
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Rows", *TAGS.split()])
        kind = header.file_meta.MediaStorageSOPClassUID.name  # reports and directories are no images
        if "Rows" not in header and "Image" in kind:
            raise ValueError("it ends in its header")
        return header if "Rows" in header else None
    except Exception as error:  # pydicom raises anything on a broken header, and it always means the same
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot be read as DICOM ({reason}); copy it again or remove it") from error


def _read_number(header: pydicom.Dataset, tag: str) -> int | None:
    try:
        return int(header.get(tag))
    except (TypeError, ValueError):
        return None


def _join(places: dict[Path, dict[Path, pydicom.Dataset]]) -> list[tuple[Path, dict[Path, pydicom.Dataset]]]:
    """[(folder, headers by path)]: folders with different slices of one series are one, copies of it are not."""
    slices = [{_read_number(header, "InstanceNumber") for header in headers.values()} for headers in places.values()]
    every = set().union(*slices)
    if len(places) > 1 and None not in every and sum(map(len, slices)) == len(every):
        headers = {path: header for part in places.values() for path, header in part.items()}
        return [(Path(os.path.commonpath(places)), headers)]
    return list(places.items())


def _find_unfit(header: pydicom.Dataset, description: str) -> str:
    modality, sequence = header.get("Modality") or "unknown", str(header.get("ScanningSequence") or "")
    if modality != "MR":
        return f"its modality is {modality}, not MR"
    if "EP" in sequence:
        return "echo-planar, as functional and diffusion series are; not anatomical"
    return "a localizer" if _LOCALIZER.search(description) or "LOCALIZER" in str(header.get("ImageType")) else ""


def _spell(description: str) -> str:
    """As part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", description)[:LONGEST_DESCRIPTION].strip("._")
