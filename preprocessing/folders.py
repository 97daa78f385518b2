"""Finds the scans in a folder of volumes that follows no data set's layout, and which files are their masks.

Names say what a file is: the contrast it shows, a mask, a label map, or the scan without its skull as HD-BET,
SynthStrip, BET, ANTs and deepbet leave it beside the head. Nothing here opens a file.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from preprocessing.layouts import CONTRAST, LABEL, Found, name_contrast, prefer
from preprocessing.subjects import identify, strip_ending

# How the name of a file ends, and what the file then is; the first that matches counts.
_ENDS = {
    "lesion": r"(?:^|[_.-])(?:(?:label|desc|mask)[_-])?"
    r"(?:(?:lesions?|tumou?r|wmh|stroke)[_-]?(?:mask|d?seg|rois?|label|manual)?|seg)$",
    "brain mask": r"(?:^|[_.-])bet[_-]bet$"
    r"|(?:^|[_.-])(?:[^\W_]*brain[^\W_]*|(?:hd[_-]?)?bet\d?|synthstrip|deepbet|robex)?[_-]?mask$",
    "stripped": r"(?:^|[_.-])(?:(?:hd[_-]?)?bet\d?|(?:skull[_-]?)?stripped|skullstrip|ss|synthstrip|deepbet|robex)$"
    r"|(?:^|[_.-])BrainExtractionBrain$",
    "brain": r"[_.-]brain$",  # the scan without its skull, or SynthStrip's mask beside that
}
_FOLDERS = {
    "lesion": r"labels?(?:tr|ts)?|lesions?|lesion[_-]?masks?|seg(?:mentation)?s?|annotations?|gt|ground[_-]?truth",
    "brain mask": r"(?:brain|bet)[_-]?masks?",
    "mask": r"masks?",
    "stripped": r"(?:skull[_-]?)?stripped|(?:hd[_-]?)?bet|synthstrip|deepbet|brains",
    "": r"images?(?:tr|ts)?|heads?|originals?|unstripped",
}
# Names that only say what the volume is, best first; a session gives the best it has.
_RANKS = {
    **{"norm": 0, "t1": 1, "t1w": 1, "t1_mprage": 1, "mprage": 1, "t2": 1, "t2w": 1, "flair": 1, "t1ce": 1, "t1c": 1},
    **{"anat": 2, "struct": 2, "image": 2, "scan": 2, "brain": 3, "orig": 4, "nu": 4},
}
_FREESURFER = ("norm", "t1", "orig", "nu")
_PASSED_OVER = re.compile(r"mri|anat\d*|nifti|raw|(?:t[12]w?|flair|mprage)", re.IGNORECASE)  # in the name of a scan
_LOCALIZER = re.compile(r"(?:^|[_.-])(?:localizers?|localisers?|scout|survey|3-?plane)(?:[_.-]|$)", re.IGNORECASE)

_SPM = re.compile(r"(?:m?w[mc]?[1-3]?|r?c[1-6]|i?y_|co|[rmsoyu])(?=.)")  # prefixes of SPM and CAT12


@dataclass(frozen=True)
class _Volume:
    """A file by its name.

    folder  its folder, without one that only says what it holds (`stripped/`, `labelsTr/`)
    base    the file's name without the ending that gives its kind
    kind    "lesion", "brain mask", "mask", "stripped", "brain" or empty for a scan as acquired
    """

    path: str
    folder: str
    stem: str
    base: str
    kind: str
    contrast: str

    @property
    def plain(self) -> str:
        return CONTRAST.sub("", self.base).lower()

    @property
    def rank(self) -> int | None:
        if re.match(r"dicom-\d+(?:_|$)", self.base):  # a series of `dicom.list_series`
            return 5 if self.contrast == "" else 1
        return _RANKS.get(self.base.lower())


def arrange_folder(
    paths: list[str], modality: str, pattern: str | None = None, channels: dict[int, str] | None = None
) -> tuple[list[Found], list[tuple[str, str]]]:
    """Separate a folder's scans from everything else: (scans, [(path, why it is left out)]), both in order of path.

    pattern   finds the subject in each path (`subjects.identify`)
    channels  contrasts by nnU-Net's channel number, as its dataset.json says
    """
    volumes = [_read_name(path, channels or {}) for path in sorted(paths, key=prefer)]
    left_out = {
        volume.path: "a label map, not a scan"
        for volume in volumes
        if volume.kind == "" and LABEL.search(volume.stem.lower())
    }
    volumes = [volume for volume in volumes if volume.path not in left_out]
    masks = [volume for volume in volumes if volume.kind in ("lesion", "brain mask", "mask")]
    scans = [volume for volume in volumes if volume.kind in ("", "stripped", "brain")]
    left_out |= _leave_contrasts(scans, modality)
    scans = [volume for volume in scans if volume.path not in left_out]
    more_masks, not_taken = _leave_doubles(scans)
    masks, left_out = masks + more_masks, left_out | not_taken
    apart = {mask.path for mask in more_masks} | set(left_out)
    scans = [volume for volume in scans if volume.path not in apart]
    found, used = [], set()
    names, alone, by_name = _name_scans(scans), Counter(volume.folder for volume in scans), _index_masks(masks)
    for volume in scans:
        pair = [_pick(by_name, kind, volume, alone[volume.folder] == 1) for kind in ("brain mask", "lesion")]
        used.update(pair)
        found.append(Found(volume.path, names[volume.path], identify(volume.path, pattern), None, None, *pair))
    for mask in masks:
        if mask.path not in used:
            left_out[mask.path] = (
                f"a mask of unknown kind; rename it to {mask.base}_brain_mask or {mask.base}_lesion_mask"
                if mask.kind == "mask"
                else "a mask without a scan"
            )
    return sorted(found, key=lambda one: one.path), sorted(left_out.items())


def read_mask_name(name: str) -> tuple[str, str]:
    """("lesion" or "brain mask", whose) of a file in a folder of masks, by its name without its ending; else ("", "").

    Whose it is in small letters and without its contrast.
    """
    mask = _read_name(f"masks/{name}", {})
    kind = "brain mask" if mask.kind == "brain" else mask.kind
    return (kind, mask.plain) if kind in ("lesion", "brain mask") else ("", "")


def _read_name(path: str, channels: dict[int, str]) -> _Volume:
    folder, _, stem = strip_ending(path).rpartition("/")
    above, _, last = folder.rpartition("/")
    kind, base, contrast = "", stem, ""
    for name, pattern in _FOLDERS.items():
        if re.fullmatch(pattern, last, re.IGNORECASE):
            kind, folder = name, above
            break
    channel = re.search(r"_(\d{4})$", base) if re.fullmatch(r"images?t[rs]", last, re.IGNORECASE) else None
    if channel:
        base, contrast = base[: channel.start()], channels.get(int(channel[1]), "" if channel[1] == "0000" else "other")
    base = re.sub(r"(?<=[^\W_])(?=BrainExtraction(?:Brain|Mask)$)", "_", base)  # ANTs
    while True:  # `p7_T1w_brain_mask`, `p7_synthstrip_mask`: the last word decides what it is
        name, match = next(
            ((name, match) for name, end in _ENDS.items() if (match := re.search(end, base, re.IGNORECASE))), ("", None)
        )
        if not match or not match.start():
            if match and base == stem and kind == "" and name in ("lesion", "brain mask"):
                kind, base = name, ""  # `anna/mask.nii.gz`
            break
        kind, base = name if kind in ("", "mask") else kind, base[: match.start()]
    return _Volume(path, folder, stem, base, kind, contrast or name_contrast(path))


def _leave_contrasts(scans: list[_Volume], modality: str) -> dict[str, str]:
    """{path: why} of scans of another contrast. Where no name gives a contrast, all are taken."""
    wanted = {modality} | ({""} if modality == "t1" or not any(volume.contrast for volume in scans) else set())
    left_out = {}
    for volume in scans:
        in_mri = re.search(r"(?:^|/)mri(?:/|$)", volume.folder) and volume.path.lower().endswith((".mgz", ".mgh"))
        if in_mri and (volume.stem.lower() not in _FREESURFER or not volume.folder.endswith("mri")):
            left_out[volume.path] = "a FreeSurfer file, not a scan"
        elif volume.contrast not in wanted:
            left_out[volume.path] = (
                f"shows {volume.contrast or 'a contrast that its name does not give'}, not {modality}"
            )
    return left_out


def _leave_doubles(scans: list[_Volume]) -> tuple[list[_Volume], dict[str, str]]:
    """(masks among the scans, {path: why} of other forms of a scan that is taken)."""
    groups, generic = defaultdict(list), defaultdict(list)
    for volume in scans:
        groups[volume.folder, volume.plain].append(volume)
    masks, left_out = {}, {}
    for group in groups.values():
        brains = [volume for volume in group if volume.kind == "stripped"]
        others = [volume for volume in group if volume.kind == "brain"]
        if brains and others:
            mask = others.pop(0)
            masks[mask.path] = replace(mask, kind="brain mask")
        heads = [volume for volume in group if volume.kind == ""]
        taken = (heads + brains + others)[0]
        left_out |= {v.path: f"its session is read from {taken.path}" for v in brains + others if v is not taken}
    scans = [volume for volume in scans if volume.path not in masks and volume.path not in left_out]
    for volume in scans:
        place = re.sub(r"(?:^|/)(?:mri|anat\d*|nifti|raw|t[12]w?|flair)$", "", volume.folder, flags=re.IGNORECASE)
        generic[place if volume.rank is not None else volume.path].append(volume)
    for group in generic.values():
        best = min(group, key=lambda volume: volume.rank or 0)
        left_out |= {volume.path: f"its session is read from {best.path}" for volume in group if volume is not best}
    stems = {(volume.folder, volume.stem): volume for volume in scans}
    for volume in scans:
        prefix = _SPM.match(volume.stem)
        source = stems.get((volume.folder, volume.stem[prefix.end() :])) if prefix else None
        if source:
            left_out[volume.path] = f"made by SPM from {source.path}"
    folders = {volume.folder for volume in scans if not _LOCALIZER.search(volume.stem)}
    left_out |= {v.path: "a localizer" for v in scans if _LOCALIZER.search(v.stem) and v.folder in folders}
    return list(masks.values()), left_out


def _name_scans(scans: list[_Volume]) -> dict[str, str]:
    """Each scan's name: its file's, or its folders' where files of several people have the same name."""
    names = {}
    for volume in scans:
        parts, place = volume.path.split("/")[:-1], identify(volume.path).place
        own = [] if volume.rank is not None and parts else [volume.stem]
        above = parts[place : place + 1] + [part for part in parts[place + 1 :] if not _PASSED_OVER.fullmatch(part)]
        names[volume.path] = "_".join(above + own) if place < len(parts) else volume.stem
    counts = Counter(names.values())
    for volume in scans:
        parts = volume.path.split("/")[:-1]
        if counts[names[volume.path]] > 1 and names[volume.path] != volume.stem:
            names[volume.path] = "_".join([*parts, volume.stem])
    return names


def _index_masks(masks: list[_Volume]) -> dict[tuple[str, str | None, str], str]:
    """Paths by (kind, folder, base), and by (kind, None, base) in any folder.

    Of several, the first with "brain" in its name, else the first.
    """
    index = {}
    for mask in sorted(masks, key=lambda mask: "brain" not in mask.stem.lower()):
        index.setdefault((mask.kind, mask.folder, mask.base.lower()), mask.path)
        index.setdefault((mask.kind, None, mask.base.lower()), mask.path)
    return index


def _pick(masks: dict[tuple, str], kind: str, scan: _Volume, alone: bool) -> str | None:
    """The mask of a scan: in its folder first, by its name with or without its contrast."""
    own = [(folder, base) for folder in (scan.folder, None) for base in (scan.base.lower(), scan.plain)]
    own = [(folder, base) for folder, base in own if folder is not None or scan.rank is None]
    own += [(scan.folder, "")] if alone else []  # `anna/mask.nii.gz` beside `anna/T1.nii.gz`
    return next((masks[(kind, *key)] for key in own if (kind, *key) in masks), None)
