"""Which words of a clinical table mean a healthy person and which a patient; the user must map any others."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common.cli import DataError

BLANK = {"", ".", "?", "-", "--", "–", "—", "na", "nan", "null", "#na", "-4"} | {
    *("unknown", "missing", "unspecified", "undetermined", "notavailable", "notapplicable", "notassessed", "notdone")
}
CDR = {"0": "normal", "0.5": "abnormal", "1": "abnormal", "2": "abnormal", "3": "abnormal"}  # Morris, Neurology 1993
# Codes that a data set documents under a name that only it uses: NACC, ADNI and AIBL, OASIS-3 (UDS form D1).
CODES = {
    "naccudsd": {"1": "normal", "2": "abnormal", "3": "abnormal", "4": "abnormal"},
    "dxcurren": {"1": "normal", "2": "abnormal", "3": "abnormal"},
    "normcog": {"1": "normal", "0": "abnormal"},
}

NORMAL = """
    control, ctrl, ctl, ctr, cntrl, con, hc, hcs, cn, nc, ncs, nl, cu, hv, hvs, nci, td, tdc, tds, norm,
    healthy, healthy control, healthy volunteer, healthy subject, healthy participant, healthy person, healthy people,
    healthy individual, healthy adult, healthy elderly, healthy aging, healthy ageing, healthy comparison,
    healthy brain, healthy norm, healthy control subject, healthy normal control, healthy comparison subject,
    healthy control group, control group, control subject, control participant,
    control healthy, normal, normal control, normal subject, normal volunteer, normal aging, normal ageing,
    normal cognition, normal brain, normal elderly, elderly control, young control, old control, young healthy,
    elderly healthy, cognitively normal, cognitive normal, cognitively healthy, cognitively intact,
    cognitively unimpaired, cognitive unimpaired, cognitively normal control, cognitively unimpaired control,
    clinically normal, neurologically normal, neurologically healthy, neurotypical, neurotypical control,
    typical, typically developing, typical developing, typical development, typically developing control,
    typically developing child, typically developing children, typical control,
    unimpaired, unaffected, nonimpaired, not impaired, non patient, not demented, non demented, undemented, no dementia,
    without dementia, non dementia, no ad, non ad, no mci, no impairment, no cognitive impairment, no disease,
    no disorder, no diagnosis, no pathology, no finding, no lesion, no tumor, no tumour, no abnormality, no stroke,
    no epilepsy, no psychiatric disorder, volunteer, none, gesund, kontrolle, kontrollgruppe, temoin, sain, sano
"""
ABNORMAL = """
    patient, pat, pts, case, patient group, affected, impaired, diseased, disease, ill, sick, abnormal,
    pathological, pathology, pathologic, lesion, lesioned, krank, malade,
    ad, alzheimer, alzheimers, alzheimer disease, alzheimers disease, alzheimer dementia, alzheimers dementia,
    ad dementia, dementia ad, dat, probable ad, possible ad, probable alzheimers disease, dementia, demented,
    very mild dementia, mild dementia, moderate dementia, severe dementia, very mild demented, mild demented,
    moderate demented, very mild ad, mild ad, moderate ad, severe ad, converted, converter,
    mci, emci, lmci, amci, namci, amnestic mci, early mci, late mci, smci, pmci, mcic, mcinc, stable mci,
    progressive mci, mild cognitive impairment, cognitive impairment, cognitively impaired, impaired not mci,
    vad, vascular dementia, vci, ftd, bvftd, ftld, frontotemporal dementia, svppa, nfvppa, lvppa, ppa, pnfa,
    semantic dementia, dlb, lbd, lewy body dementia, dementia with lewy bodies, pca, cjd, psp, cbd, cbs, msa,
    pd, pdd, parkinson, parkinsons, parkinson disease, parkinsons disease, hd, huntington, huntington disease,
    huntingtons disease, als, amyotrophic lateral sclerosis, ataxia, dystonia, essential tremor,
    ms, rrms, spms, ppms, multiple sclerosis, nmo, nmosd, leukodystrophy, wml,
    stroke, ischemic stroke, ischaemic stroke, hemorrhagic stroke, infarct, infarction, hemorrhage, haemorrhage, ich,
    sah, tia, aneurysm, avm, tumor, tumour, brain tumor, brain tumour, cancer, glioma, glioblastoma, gbm, hgg, lgg,
    high grade glioma, low grade glioma, astrocytoma, oligodendroglioma, meningioma, metastasis, metastases,
    pituitary, pituitary adenoma, epilepsy, epileptic, tle, ltle, rtle, fcd, focal cortical dysplasia, hydrocephalus,
    nph, tbi, mtbi, traumatic brain injury, concussion, encephalitis, abscess, edema, oedema,
    schizophrenia, schizophrenic, schizo, schz, scz, sz, schizoaffective, schizoaffective disorder, psychosis, fep,
    psychotic, bipolar, bipolar disorder, bd, bpd, depression, depressed, mdd, major depression,
    major depressive disorder, anxiety, ptsd, ocd, adhd, add, asd, autism, autistic, autism spectrum disorder,
    asperger, aspergers, dyslexia, anorexia, addiction
"""


class Choice(NamedTuple):
    """The user's words after --normal-values and --abnormal-values."""

    normal: tuple[str, ...] = ()
    abnormal: tuple[str, ...] = ()


def spell(cell: str) -> str:
    """A value whatever its case, accents and separators: `Healthy_Controls` as `healthycontrols`, `0,50` as `0.5`.

    Signs at the end stay: HIV- and HIV+ differ.
    """
    number = read_number(cell)
    if number is not None:
        return f"{number + 0:g}"
    letters = unicodedata.normalize("NFKD", cell).casefold()
    kept = re.sub(r"[^\w+#.?-]|_", "", letters)
    return re.sub(r"(?<=\w)[-.]+(?=\w)|(?<=\w)\.$", "", kept) or letters.strip()


def read_number(cell: str) -> float | None:
    """`0.5` or `0,5` as a number, None where the cell is none; "inf" and "nan" are words."""
    plain = re.fullmatch(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d{1,2})?", cell.strip(), re.IGNORECASE)
    return float(cell.replace(",", ".")) if plain else None


def read_legend(header: str) -> dict[str, str]:
    """The codes that a header explains: `SEX_ID (1=m, 2=f)` as {"1": "m", "2": "f"}."""
    pairs = re.findall(r"(\d+)\s*[=:]\s*([^,;/|()\[\]=:]+)", header)
    return {code: word.strip() for code, word in pairs}


def _list_words(text: str) -> frozenset[str]:
    words = {spell(word) for word in text.split(",")}
    return frozenset(words | {f"{word}s" for word in words if len(word) > 3})


WORDS = dict.fromkeys(_list_words(ABNORMAL), "abnormal") | dict.fromkeys(_list_words(NORMAL), "normal")


def _look_up(value: str) -> str | None:
    """The meaning of the words; `Healthy control (HC)` has one where both parts agree."""
    parts = re.fullmatch(r"(.+?)\s*[(\[](.+)[)\]]", value.strip())
    meanings = {WORDS.get(spell(part)) for part in (parts.groups() if parts else (value,))}
    return meanings.pop() if len(meanings) == 1 else None


def judge(values: Counter[str], scale: dict[str, str], choice: Choice) -> tuple[dict[str, str], list[str]]:
    """What each value of a column means: ({value: normal or abnormal or "" for an empty cell}, [unknown values]).

    `scale` maps codes that mean something in this column (a CDR); elsewhere numbers mean nothing, except a 0
    among values that all mean patients.
    """
    said = {spell(word): "normal" for word in choice.normal} | {spell(word): "abnormal" for word in choice.abnormal}
    meanings = {}
    for value in values:
        word = spell(value)
        meaning = said.get(word) or scale.get(word) or _look_up(value)
        meanings[value] = "" if meaning is None and word in BLANK else meaning
    others = {meaning for value, meaning in meanings.items() if spell(value) != "0" and meaning != ""}
    for value, meaning in meanings.items():
        if meaning is None and spell(value) == "0" and others == {"abnormal"}:
            meanings[value] = "normal"
    unknown = [value for value, meaning in meanings.items() if meaning is None]
    return meanings, unknown


def refuse_unknown(path: Path, column: str, values: Counter[str], unknown: list[str], is_cdr: bool) -> None:
    """Raise DataError with each unknown value, how often it occurs, and how to map it."""
    if unknown:
        hint = " (a CDR is 0, 0.5, 1, 2 or 3)" if is_cdr else ""
        raise DataError(
            f"{path}: its column {column} has values of unknown meaning{hint}: "
            f"{list_values(values, unknown)}; map them with --normal-values VALUE ... and --abnormal-values VALUE ..., "
            "or empty the cells to leave them out"
        )


def refuse_wrong_choice(path: Path, column: str, values: Counter[str], choice: Choice) -> None:
    """Raise DataError where the user maps a value to both labels, or one that does not occur: a typing error."""
    both = {spell(word) for word in choice.normal} & {spell(word) for word in choice.abnormal}
    absent = [word for word in (*choice.normal, *choice.abnormal) if spell(word) not in set(map(spell, values))]
    if both:
        raise DataError(f"--normal-values and --abnormal-values both have {', '.join(sorted(both))}; leave one out")
    if absent:
        raise DataError(
            f"{path}: its column {column} has no value {', '.join(absent)}; it has {list_values(values, values)}"
        )


def list_values(values: Counter[str], chosen: Iterable[str], most: int = 30) -> str:
    """`MCI+ (12 lines), 1 (3 lines)`, the most frequent first, on one line whatever the cells hold."""
    order = sorted(chosen, key=lambda value: (-values[value], value))
    words = [f"{show(value)} ({values[value]} line{'s' * (values[value] != 1)})" for value in order[:most]]
    return ", ".join(words) + (f" and {len(order) - most} more" if len(order) > most else "")


def show(cell: str) -> str:
    """A cell as one line of at most 40 characters."""
    plain = "".join(letter if letter.isprintable() else " " for letter in cell)
    return f"{plain[:39]}…" if len(plain) > 40 else plain
