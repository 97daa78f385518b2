"""How public data sets are laid out on disk: which file is a session's scan, whose it is, and its masks.

A layout is a table of patterns over paths. Nothing here opens a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from preprocessing.subjects import Identity, identify, strip_ending
from preprocessing.vocabulary import ENDINGS as ENDINGS

CONTRAST = re.compile(r"[_-](T1w|T2w|FLAIR|PDw|T1|T2|PD|T1ce|T1c|T1Gd|T1n|T2f)$", re.IGNORECASE)
_CONTRASTS = {
    "flair": r"flair|t2f|t2[-_]?flair",
    "t1ce": r"t1[-_]?(?:ce|c|gd|post|contrast)|ce-[^\W_]+_t1w|t1w?[-_](?:gd|gad|ce)",
    "t2": r"t2(?:w|[-_]?weighted)?",
    "t1": r"t1(?:w|n|[-_]?weighted)?|mp[-_]?rage|me?mprage|f?spgr|bravo",
    "another contrast": r"pdw?|dwi|adc|swi|asl|bold|dti|t2[-_]?star[a-z]?|t[12]map|fieldmap|phase",
}
# The worst last: of the volumes that a session gives, the first is taken.
_POOR = re.compile(
    r"locali[sz]er|scout|survey|part-(?:phase|real|imag)|(?<![^_-])(?:loc|flash)(?![^_-])", re.IGNORECASE
)
# Volumes that are drawn over a scan: masks, segmentations, tissue maps.
LABEL = re.compile(
    r"(?:^|[/_.+-])(?:[adf]?seg|probseg|pveseg|pve|labels?|lesions?|rois?|[^\W_]*mask|aparc|wmparc"
    r"|ribbon)(?:_?\d+)?$",
    re.IGNORECASE,
)


class Kind(NamedTuple):
    """One kind of volume in a layout.

    pattern     of the path without its ending, from any folder (or with ^ from the top) to the end. Its groups say
                whose the volume is: `subject` and `session`; `name` where the file's own name is the same for every
                session; `key` where masks are named otherwise. MODALITY stands for the contrast asked for.
    axes        where the stored axes point to, for files whose header does not say
    distrusted  axes that headers of this kind claim wrongly
    """

    pattern: str
    axes: str | None = None
    distrusted: str | None = None


@dataclass(frozen=True)
class Layout:
    """How one data set is laid out on disk."""

    name: str
    about: str
    scans: tuple[Kind, ...]  # best first: a session gives the first kind it has
    brain_mask: str | None = None  # patterns whose `key` or `name` is the scan's
    lesion_mask: str | None = None
    modalities: dict[str, str] = field(default_factory=lambda: {"t1": ""})


class Found(NamedTuple):
    """A volume that is a scan, paths relative to the folder searched."""

    path: str
    name: str
    identity: Identity | None  # None where --subject-pattern finds nobody
    axes: str | None
    distrusted: str | None
    brain_mask: str | None
    lesion_mask: str | None


_OASIS1 = r"(?P<subject>OAS1_\d{4})_(?P<session>MR\d+)[^/]*"
# Only a derivative has a desc or a space; another contrast agent is another modality.
_BIDS_KEY = (
    r"(?P<key>(?P<subject>sub-[A-Za-z0-9]+)(?:_(?P<session>ses-[A-Za-z0-9]+))?"
    r"(?:_(?!desc-|space-|ce-|label-)[a-z]+-[A-Za-z0-9]+)*)"
)
_BIDS_RAW = r"^(?!(?:.*/)?(?:derivatives|sourcedata)/)(?:.*/)?"
# Drawn on the scan's own grid, as people and tools name it; a bare dseg of a pipeline is of tissues.
_OWN_SPACE = "(?:_space-(?:T1w|orig|individual|native|scanner|anat))?"
_BIDS_LESION = (
    rf"^(?!.*(?:[fs]mriprep|freesurfer|fastsurfer|synthseg))(?:.*/)?{_BIDS_KEY}(?:_MODALITY)?{_OWN_SPACE}"
    rf"(?:(?:_(?:desc|label)-(?:[^\W_]*lesions?[^\W_]*|L)){_OWN_SPACE}(?:_desc-[^\W_]+)?_(?:mask|roi|d?seg)"
    r"|_lesions?(?:[_-](?:mask|roi|d?seg|manual|label))?|_dseg)"
)
_ENTITY = re.compile(r"_(?:acq|rec|run|mod)-[^\W_]+")  # may be in a scan's name and not in its mask's, or the reverse
_BRATS_IDS = (
    r"(?P<key>(?P<subject>BraTS-[A-Z]+-\d+)-(?P<session>\d+))/(?P=key)",
    r"(?P<key>[^/]+)/(?P=key)",
)
_NEURITE = r"(?P<name>OASIS_(?P<subject>OAS1_\d{4})_(?P<session>MR\d+))/"

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "oasis1",
            "OASIS-1 discs",
            (
                # Analyze files do not give their orientation: atlas images are stored transverse, the others sagittal.
                Kind(_OASIS1 + "_t88_masked_gfc", "LAS"),
                Kind(_OASIS1 + "_t88_gfc", "LAS"),
                Kind(_OASIS1 + "_sbj_111", "ASL"),
                Kind(_OASIS1 + r"_mpr-\d+_anon", "ASL"),
            ),
        ),
        Layout(
            "oasis2",
            "OASIS-2 raw parts",
            # The scanner and the protocol of OASIS-1, so the same storage where the header is silent.
            (Kind(r"(?P<name>(?P<subject>OAS2_\d{4})_(?P<session>MR\d+))/(?:RAW/)?mpr-\d+(?:\.nifti)?", "ASL"),),
        ),
        Layout(
            "oasis3",
            "OASIS-3",
            (Kind(r"(?P<subject>OAS3\d{4})_MR_(?P<session>d\d{4})/(?:[^/]+/)*(?P<key>sub-OAS3[^/]*)_MODALITY"),),
            modalities={"t1": "T1w", "t2": "T2w", "flair": "FLAIR"},
        ),
        Layout(
            "neurite-oasis",
            "neurite-oasis (FreeSurfer's axes)",
            tuple(
                Kind(_NEURITE + volume, axes="LIA", distrusted="RAS")
                for volume in ("aligned_norm", "norm", "aligned_orig", "orig")
            ),
        ),
        Layout(
            "atlas2",
            "ATLAS v2",
            (Kind(r"(?P<key>(?P<subject>sub-r\d+s\d+)_(?P<session>ses-\w+?)[^/]*)_T1w"),),
            lesion_mask=r"(?P<key>sub-r\d+s\d+_[^/]*?)(?:_label-[^/_]+)?(?:_desc-[^/_]*lesion|_lesion)_mask",
        ),
        Layout(
            "brats",
            "BraTS",
            (Kind(_BRATS_IDS[0] + "-MODALITY"), Kind(_BRATS_IDS[1] + "_MODALITY")),
            lesion_mask=r"(?P<key>[^/]+)/(?P=key)[_-]seg",
            modalities={"t1": "(?:t1|t1n)", "t1ce": "(?:t1ce|t1c|t1gd)", "t2": "(?:t2|t2w)", "flair": "(?:flair|t2f)"},
        ),
        Layout(
            "ixi",
            "IXI",
            (Kind(r"(?P<subject>IXI\d{3})-[^/-]+-\d+-MODALITY"),),
            modalities={"t1": "T1", "t2": "T2"},
        ),
        Layout(
            "bids",
            "BIDS",
            (Kind(_BIDS_RAW + r"sub-[^/]+/(?:ses-[^/]+/)?anat/" + _BIDS_KEY + "_MODALITY"),),
            brain_mask=_BIDS_KEY + "(?:_space-T1w)?_desc-brain_mask",
            lesion_mask=_BIDS_LESION,
            modalities={"t1": "T1w", "t1ce": "ce-[A-Za-z0-9]+_T1w", "t2": "T2w", "flair": "FLAIR"},
        ),
        Layout(
            "folder",
            "a folder of volumes",
            (),  # `folders.arrange_folder` reads what names say
            modalities={"t1": "", "t1ce": "", "t2": "", "flair": ""},
        ),
    )
}


def name_subject(name: str) -> tuple[str, str]:
    """(subject, session) from a scan's name."""
    identity = identify(name)
    return identity.subject, identity.session


def name_contrast(path: str) -> str:
    """t1, t1ce, t2, flair or "another contrast", from the file's or the nearest folder's name; else ""."""
    for part in reversed(strip_ending(path).split("/")):
        last = (-1, "")
        for contrast, pattern in _CONTRASTS.items():
            for match in re.finditer(rf"(?<![^\W_])(?:{pattern})(?![^\W_])", part, re.IGNORECASE):
                if match.end() > last[0]:
                    last = (match.end(), contrast)
        if last[1]:
            return last[1]
    return ""


def prefer(path: str) -> tuple:
    """The sort key of a session's volumes, best first: no localizer, MPRAGE, few words, run-2 before run-10."""
    name = re.sub(r"^sub-[^_]+", "", strip_ending(path).rpartition("/")[2])
    natural = [(int(run), "") if run.isdigit() else (-1, run.lower()) for run in re.findall(r"\d+|\D+", path)]
    return bool(_POOR.search(name)), "mprage" not in name.lower(), len(re.findall(r"[^\W_]+", name)), natural


def recognise(paths: list[str], modality: str) -> Layout:
    """The layout that explains most of these paths (relative, with `/`); where none does, a folder of volumes."""
    known = [layout for layout in LAYOUTS.values() if layout.name != "folder"]
    counts = [sum(_match_kind(layout, path, modality) is not None for path in paths) for layout in known]
    return known[counts.index(max(counts))] if max(counts) else LAYOUTS["folder"]


def arrange(
    layout: Layout, paths: list[str], modality: str, pattern: str | None = None
) -> tuple[list[Found], list[tuple[str, str]]]:
    """Separate a layout's scans from everything else: (scans, [(path, why it is left out)]), in order of path."""
    brains, lesions = (
        _key_masks(masks and masks.replace("MODALITY", layout.modalities.get(modality, "")), paths)
        for masks in (layout.brain_mask, layout.lesion_mask)
    )
    masks = {path for found in (brains, lesions) for path in found.values()}
    sessions, left_out = {}, []
    for path in sorted(paths, key=prefer):
        matched = None if path in masks else _match_kind(layout, path, modality)
        if matched:
            rank, match = matched
            groups = match.groupdict()
            name = (groups.get("name") or strip_ending(path).rpartition("/")[2]).replace("/", "_")
            identity = identify(path, pattern)
            if identity and groups.get("session") and not pattern:
                identity = replace(identity, session=groups["session"])
            key = groups.get("key") or name
            one = (groups["subject"].lower(), groups.get("session")) if "subject" in groups else (key, "")
            root = (
                re.split(r"(?:^|/)sub-", path)[0] if layout.name == "bids" else ""
            )  # the same subject of another data set is another person
            kind = layout.scans[rank]
            found = Found(path, name, identity, kind.axes, kind.distrusted, _pick(brains, key), _pick(lesions, key))
            sessions.setdefault((root, *one), []).append((rank, found))
        elif path not in masks:
            label = LABEL.search(strip_ending(path))
            left_out.append((path, "a label map, not a scan" if label else f"no scan of the layout {layout.name}"))
    scans = []
    for volumes in sessions.values():
        _, best = min(volumes, key=lambda volume: volume[0])  # the first of the best kind
        scans.append(best)
        left_out += [(other.path, f"its session is read from {best.path}") for _, other in volumes if other is not best]
    used = {mask for scan in scans for mask in (scan.brain_mask, scan.lesion_mask)}
    left_out += [(path, "a mask without a scan") for path in masks - used]
    return sorted(scans, key=lambda scan: scan.path), sorted(left_out)


def _match(pattern: str, path: str) -> re.Match | None:
    start = "" if pattern.startswith("^") else "(?:^|/)"
    return re.search(f"{start}{pattern}$", strip_ending(path), re.IGNORECASE)


def _match_kind(layout: Layout, path: str, modality: str) -> tuple[int, re.Match] | None:
    """The first kind that a path is of, as (rank, match)."""
    if modality not in layout.modalities or LABEL.search(strip_ending(path)):
        return None
    for rank, kind in enumerate(layout.scans):
        match = _match(kind.pattern.replace("MODALITY", layout.modalities[modality]), path)
        if match:
            return rank, match
    return None


def _key_masks(pattern: str | None, paths: list[str]) -> dict[str, str]:
    """Masks by the key of their scan, the first of each, and by `key*` for the key without acq-, run- ..."""
    masks = {}
    for path in sorted(paths) if pattern else ():
        match = _match(pattern, path)
        if match:
            masks.setdefault(match["key"], path)
            plain = _ENTITY.sub("", match["key"])
            if plain != match["key"]:
                masks.setdefault(f"{plain}*", path)
    return masks


def _pick(masks: dict[str, str], key: str) -> str | None:
    """The mask of a scan, which may go by the scan's name with or without its contrast, acquisition or run."""
    keys = key, CONTRAST.sub("", key), _ENTITY.sub("", key), f"{key}*"
    return next((masks[name] for name in keys if name in masks), None)
