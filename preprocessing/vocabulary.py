"""The words in names of scans: what public data sets call people, and what tells scans of one person apart.

Regular expressions over one part of a path (a folder, or a file without its ending), whatever its case.
"""

from __future__ import annotations

import re


def _one_of(words: str) -> str:
    """A pattern for any of these words, which are patterns themselves and hold no space."""
    return "|".join(words.split())


ENDINGS = (".nii.gz", ".nii", ".img", ".mgz", ".mgh")  # an .img brings its .hdr along
START, END = r"(?<![^\W_])", r"(?![^\W_])"  # the ends of a word; an underscore parts words
GAP = r"[-_.\s]?"

# Public data sets: the whole match or its group `subject` is the subject. The first that matches counts.
KNOWN = tuple(
    re.compile(START + pattern, re.IGNORECASE)
    for pattern in (
        r"OAS(?:[1-4][-_]?\d{4}|[12][-_]\d{1,4})(?!\d)",
        r"sub-[^\W_]+",  # BIDS
        r"(?:ADNI[-_]?)?(?P<subject>\d{3}[-_]?S[-_]?\d{4,5}|\d{1,3}[-_]S[-_]\d{1,5})(?!\d)",
        r"(?P<subject>miriad[-_]\d{1,3})(?:[-_][A-Z]+[-_][MF][-_](?P<session>\d\d))?",
        r"(?:NACC|AIBL|PPMI)[-_]?\d+",
        r"IXI\d{1,3}",
        r"(?P<subject>BraTS-[A-Z]+-\d+)(?:-(?P<session>\d{3}))?",
        r"(?P<subject>BraTS1\d[-_][^\W_]+[-_][^\W_]+)(?:[-_](?P<session>\d)(?!\d))?",
        r"BraTS\d{2,4}[-_](?:(?:Training|Validation|Testing)[-_])?\d{3,5}",
        r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}",
        r"(?P<subject>(?:UPENN-GBM|UCSF-PDGM)-\d+)(?:[-_](?P<session>\d\d|FU\w+))?",
        r"(?P<subject>[1-9]\d{6})(?=_202\d\d_(?P<session>[2-5])_\d)",  # UK Biobank: person_field_visit_array
        r"HC[AD]\d{7}",
        r"NDAR_?INV[A-Z0-9]{8}",
        r"(?:[A-Z]+_)?(?P<subject>005\d{4})(?!\d)",  # ABIDE
        r"(?:OASIS-TRT-20|MMRR-21|NKI-RS-22|NKI-TRT-20|HLN-12)-\d+",  # Mindboggle
        r"(?P<subject>(?:training|test)\d\d)_(?P<session>\d\d)(?!\d)",  # ISBI 2015
        r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",  # a UUID
    )
)

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
YEAR, MM, DD = r"(?:19|20)\d\d", r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_DATE = _one_of(
    rf"""
    {YEAR}-{MM}-{DD}T\d\d[:_-]?\d\d(?:[:_-]?\d\d)?Z?
    {YEAR}{MM}{DD}(?:T?\d{{4,9}}|[-_]\d{{6}})?
    {YEAR}[-_.\s]\d\d?[-_.\s]\d\d?(?:[-_.\s]\d\d[-_.:]\d\d[-_.:]\d\d(?:\.\d+)?)?
    \d\d?[-_.\s]\d\d?[-_.\s]{YEAR}
    \d\d?{GAP}{_MONTH}{GAP}(?:{YEAR}|\d\d)
    {YEAR}{GAP}{_MONTH}(?:{GAP}\d\d?)?
    {_MONTH}{GAP}(?:\d\d?[-_.\s]+)?{YEAR}
    {YEAR}[-_.]{MM}
    """
)
_COUNT = r"(?:\d{1,4}|[a-e]|i{1,3}|iv|one|two|three|four|five)(?:st|nd|rd|th)?"
_VISIT = r"(?:visit|vis|session|sess|ses|time[-_\s]?point|time|tp|exam|wave|round|follow[-_\s]?up|fu)"
_PERIOD = r"(?:months?|mon|mo|weeks?|wk|years?|yrs?|days?)"
_SESSION = _one_of(
    rf"""
    ses-[^\W_]+
    {_VISIT}{GAP}{_COUNT}
    (?:(?:re)?scan|study|mri?){GAP}\d{{1,4}}
    {_PERIOD}{GAP}\d+(?:-\d)?  \d+{GAP}(?:{_PERIOD}|[mywd])  [mvywd]\d+  t(?:0|[3-9]|1\d)
    \d(?:st|nd|rd|th)(?:{GAP}(?:{_VISIT}|scan))?
    bl baseline base sc screening screen {_VISIT} retest rescan initial first second third last
    (?:pre|post|intra)(?:[-_\s]?(?:op|operative|surgery|treatment|therapy|tx))?
    before after entry admission discharge acute subacute chronic
    """
)
_COUNTED = r"(?:runs?|rep|repeat|repetition|acq|echo|series|ser|mpr|mp[-_]?rage|img|image|im|file|vol|volume)"
_RUN = _one_of(
    rf"""
    {_COUNTED}{GAP}(?!(?:{_DATE}){END})\d+  r\d\d?  i\d{{4,}}
    (?<=sag_|tra_|cor_|mpr_|age_|ace_)p[2-4](?=_iso)
    (?:acq|rec|dir|desc|space|res|part|ce|mod|label|hemi|inv)-[^\W_]+
    """
)
_CONTRAST = _one_of(
    r"""
    (?<=\d{3}[_.])000\d$
    [^\W_]*(?:mprage|flair)[^\W_]*
    t[12](?:[-_\s]?(?:weighted|w|n|c|ce|gd|f|star|starw|map))?
    pdw? dwi adc swi asl bold dti unit1 mp2rage uni [137](?:\.5)?t
    gad gd post[-_]?contrast contrast mag magnitude
    """
)
# What programs append, and what files and folders that hold no name are called.
_PROCESSING = _one_of(
    r"""
    (?:skull|no)?[-_]?(?:stripped|strip|skull) ss brains? whole[-_]?(?:brain|head) head cerebrum
    brain[-_]?extract[^\W_]* (?:hd)?[-_]?bet\d? synthstrip deepbet robex bse mask(?:s|ed)?
    defaced? anon[^\W_]* n[34](?:itk|bias[^\W_]*|corr[^\W_]*)? bias[^\W_]* bfc bc unbiased corr corrected
    denoised? filtered smooth(?:ed)? intensity scaled std z[-_]?scored? norm(?:ali[sz]ed?)? nu
    co?reg\d? reg[^\W_]* aligned rigid affine non?lin[^\W_]* lin warp(?:ed)? deformed acpc dc restored?
    (?:to|in|2)?[-_]?(?:mni|icbm)[^\W_]* tal[^\W_]{0,7} atlas template t88 111 sbj gfc
    space native subject[-_]?space orig[^\W_]* raw final copy new edit(?:ed)? clean good v\d+\.\d+
    res(?:amp|lic)[^\W_]* iso[^\W_]{0,7} \d+(?:[.p]\d+)?x\d[\dx.]* \d+(?:\.\d+)?[-_]?mm\d?(?:iso)?
    pp pre[-_]?proc[^\W_]* proc(?:essed)? crop(?:ped)? pad(?:ded)? reorient[^\W_]* ras las lps lpi rpi
    ana anat[^\W_]{0,6} struct[^\W_]* mri? nii nifti gz img image scan volume
    axial ax sagittal sag coronal cor tra [23]d mp[-_]?rage me?mprage mpr spgr fspgr bravo tfe tse flash gre rms
    seg[^\W_]* dseg labels? lesions? roi pve[^\W_]* prob[^\W_]* aseg aparc wm gm csf
    """
)
SET_ASIDE = re.compile(
    f"{START}(?:(?P<date>{_DATE})|(?P<session>{_SESSION})|{_RUN}|{_CONTRAST}|{_PROCESSING}){END}", re.IGNORECASE
)
# Where a visit, contrast or state is written without a gap: `p7m12`, `S01T1w`, `annaVisit2`.
JOINT = re.compile(
    r"(?<=\d\d_\d{6})(?=[a-z])|(?<=\d)(?=(?:visit|ses|session|scan|tp|timepoint|fu|followup|run|bl|baseline|flair"
    rf"|stripped|brain|bet|norm|reg|mask|mni|pre|post)\w?\d*{END}|(?:[mvyw]|month|year|week)\d+{END}|t[12]w?{END})"
    r"|(?<=[^\W\d_])(?=(?-i:Visit|Session|Scan|Run|Baseline|FollowUp|Month|Brain|Stripped|Mask|T[12]w?|FLAIR))",
    re.IGNORECASE,
)

_PERSON = _one_of("sub subj subject suj pat pt patient participant person proband case volunteer control ctrl ctl")
SPELLED_PERSON = re.compile(rf"({_PERSON})(\d\w*|(?-i:[A-Z]))?", re.IGNORECASE)
LETTERED_PERSON = re.compile(r"(p|s|c|n|h|hc|nc|cn|ad|mci|ms|pd)(\d+[a-d]?)?", re.IGNORECASE)
# Below a site with its number or letter, and in a collection of a year, people are numbered anew.
PLACE = re.compile(
    r"(?:site|cent(?:er|re)|hospital|clinic|institution|cohort|dataset|ds)[-_.\s]?(?:\d+|[a-z])"
    r"|(?:ge|philips|siemens)\w*\dt|[a-z]+(?:19|20)\d\d",
    re.IGNORECASE,
)
GROUPS = re.compile(r"ad|mci|cn|hc|nc|healthy|(?:control|patient)s", re.IGNORECASE)
# Folders that sort scans and are nobody.
SORTING = re.compile(
    GROUPS.pattern
    + "|"
    + _one_of(
        r"""
        data raw\w* source(?:data)? nii\w* nifti\w* images?(?:tr|ts)? labels(?:tr|ts) img scans? others? more
        subj subjects? persons? people cases participants control patient
        mri func fmap dwi deriv\w* bids outputs? results?
        (?:train|training|val|validation|test|testing)(?:[-_]?(?:set|data|images))? normals? abnormals?
        fs freesurfer fsl(?:_?seg)? fmriprep spm\d* ants cat12 stats unprocessed mninonlinear
        adni\d? aibl ppmi hcp oasis\d? ixi miriad nacc brats\d* oas\d_raw_part\d
        (?:part|disc|disk|batch|fold|set|group|study|release)(?:\d*|[-_\s]\w*)
        """
    ),
    re.IGNORECASE,
)
