"""Evaluations side by side: one table of several models and the baselines."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from common.cli import DataError, log
from common.files import read_json
from evaluation.table import format_latex, format_markdown


def read_metrics(folder: Path) -> dict:
    """metrics.json of a finished evaluation. DataError where there is none, or one that no table can be made of."""
    path = folder / "metrics.json"
    cure = "run evaluation/evaluate.py first"
    try:
        content = read_json(path, cure)
        content["settings"]["data"], Path(content["run"])  # there, or an error
        format_markdown({"": content})
    except FileNotFoundError as error:
        raise DataError(f"{path}: no finished evaluation; {cure}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no finished evaluation of this version; {cure}") from error
    return content


def name_runs(metrics: dict[Path, dict]) -> dict[str, dict]:
    """{name: metrics}, no two alike: the run's name, its path, or where that is shared the evaluation's path."""
    for name in (lambda _, content: Path(content["run"]).name, lambda _, content: content["run"]):
        names = [name(folder, content) for folder, content in metrics.items()]
        if max(Counter(names).values()) == 1:
            return dict(zip(names, metrics.values(), strict=True))
    return {str(folder): content for folder, content in metrics.items()}


def compare(evaluations: list[Path], latex: bool) -> tuple[str, int]:
    """(the table of these evaluation folders, how many were skipped). DataError where none can be compared."""
    folders = {os.path.abspath(folder): folder for folder in evaluations}  # each once
    metrics = {}
    for folder in folders.values():
        try:
            metrics[folder] = read_metrics(folder)
        except DataError as error:
            if len(folders) == 1:
                raise
            log.warning("skipped %s", error)
    if not metrics:
        raise DataError(f"{evaluations[0]}: none of the {len(folders)} evaluations can be read; see above")
    if len({content["settings"]["data"] for content in metrics.values()}) > 1:
        raise DataError(f"{evaluations[0]}: the evaluations are of different data; compare those of one test set")
    return (format_latex if latex else format_markdown)(name_runs(metrics)), len(folders) - len(metrics)
