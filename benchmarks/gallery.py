"""A page with the pictures of what goes wrong: healthy scans that look most unusual, and lesions that are missed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jinja2 import Environment
from scipy import ndimage

from common.files import write_atomically, write_figure
from evaluation.panels import draw_panels
from evaluation.predictor import Prediction

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>What goes wrong</title>
<style>body { font: 16px sans-serif; max-width: 72em; margin: 2em auto } img { width: 100% } figure { margin: 2em 0 }
</style>
<h1>What goes wrong</h1>
{% for title, pictures in sections %}<h2>{{ title }}</h2>
{% for picture in pictures %}<figure><img src="{{ picture.file }}" alt=""><figcaption>{{ picture.words }}</figcaption>
</figure>
{% endfor %}{% endfor %}"""
TISSUES = {"fluid": 5, "grey matter": 45, "white matter": 85}  # percentiles of a brain's values


class Gallery:
    """The worst of many predictions, so many of each sort; the others are not kept.

    found  {sort: [(how bad, where it is shown, what it is, the prediction)]}, the worst first
    """

    def __init__(self, count: int = 10):
        self.count = count
        self.found = {"Healthy scans that look most unusual": [], "Lesions of which least is found": []}

    def add(self, where: str, prediction: Prediction) -> None:
        """Keep a prediction if it is among the worst; `where` says of which set and calibration it is."""
        false_positives, misses = self.found.values()
        anomaly, lesion = prediction.anomaly, prediction.scan.lesion
        name, p_value = prediction.scan.name, prediction.scan_row["p_value"]
        if prediction.scan.label == "normal":
            place = np.unravel_index(np.nanargmax(anomaly), anomaly.shape)
            words = f"{where}: {name}, p = {p_value:.3f}; {describe(prediction, place)}"
            self._keep(
                false_positives, prediction.scan_row["score"] / prediction.threshold, place[0], words, prediction
            )
        elif lesion is not None and lesion.any():
            found = prediction.marked[lesion].mean()
            place = np.unravel_index(np.argmax(ndimage.distance_transform_edt(lesion)), lesion.shape)
            millilitres = lesion.sum() * np.prod(
                [*prediction.scan.geometry.sampling_mm, prediction.scan.geometry.pixel_mm]
            )
            words = f"{where}: {name}, {millilitres / 1000:.1f} ml, {found:.0%} found; {describe(prediction, place)}"
            self._keep(misses, -found, place[0], words, prediction)

    def _keep(self, kept: list, badness: float, shown: int, words: str, prediction: Prediction) -> None:
        kept.append((badness, int(shown), words, prediction))
        kept.sort(key=lambda one: -one[0])
        del kept[self.count :]

    def write(self, folder: Path) -> None:
        """Leave index.html and its pictures in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        sections = []
        for number, (title, kept) in enumerate(self.found.items()):
            pictures = []
            for place, (_, shown, words, prediction) in enumerate(kept):
                file = f"{'miss' if number else 'false_positive'}_{place + 1}.png"
                write_figure(folder / file, draw_panels(prediction, [shown], words.split(";")[0]))
                pictures.append({"file": file, "words": words})
            sections.append((title, pictures))
        page = Environment(autoescape=True).from_string(PAGE).render(sections=sections)
        write_atomically(folder / "index.html", page.encode())


def describe(prediction: Prediction, place: tuple[int, ...]) -> str:
    """What is seen at a place of the stack: how it differs from its reconstruction, in which tissue, how deep."""
    stack = prediction.scan.stack.astype(np.float32)
    value, drawn = stack[place], prediction.reconstruction[place]
    levels = np.percentile(stack[stack > 0], list(TISSUES.values()))
    tissue = list(TISSUES)[int(np.abs(levels - value).argmin())]
    between, pixel = prediction.scan.geometry.sampling_mm
    depth = ndimage.distance_transform_edt(stack > 0, sampling=(between, pixel, pixel))[place]
    words = "darker" if value < drawn else "brighter"
    return (
        f"{abs(value - drawn):.2f} {words} than its reconstruction, as bright as {tissue}, {depth:.0f} mm from the rim"
    )
