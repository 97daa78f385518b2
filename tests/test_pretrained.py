"""The model that ships: its bytes are those of its card, and it finds the painted lesion of the example."""

import hashlib
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from evaluation.evaluate import main
from evaluation.predictor import Predictor
from models.checkpoint import PRETRAINED
from preprocessing.simulator import load_template, simulate_scan
from preprocessing.worker import CutSettings, cut_scan
from tests.test_scripts import PROJECT

KNOWN_SCORE = 27.04
EXAMPLE = PROJECT / "Dataset/example"


@pytest.fixture(scope="module")
def predictor():
    return Predictor.load(PRETRAINED / "model.pt", torch.device("cpu"))


def test_the_card_has_the_hash_of_the_model():
    found = hashlib.sha256((PRETRAINED / "model.pt").read_bytes()).hexdigest()
    assert found in (PRETRAINED / "README.md").read_text(encoding="utf-8")
    assert (PRETRAINED / "model.pt").stat().st_size < 10e6


def test_a_false_positive_rate_of_1_in_20_can_be_asked(predictor):
    assert predictor.calibration.normal_scans == 35
    assert predictor.calibration.flag_score("scan", 0.05) is not None


def test_a_simulated_scan_has_the_score_that_it_had(predictor, tmp_path):
    scan, _, _, affine = simulate_scan(load_template(2.0), 2.0, None, np.random.default_rng(0))
    nib.save(nib.Nifti1Image(scan, affine), tmp_path / "simulated_T1w.nii.gz")
    cut = cut_scan(tmp_path / "simulated_T1w.nii.gz", None, CutSettings(0.7, 128, 200.0))
    assert predictor.predict(cut).scan_row["score"] == pytest.approx(KNOWN_SCORE, rel=0.03)  # bf16 and fp32 differ


def test_without_run_it_finds_the_lesion_of_the_example_and_says_which_model_did(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--scan", str(EXAMPLE / "painted_T1w.nii.gz")]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("with the model that ships (")
    assert main(["--scan", str(EXAMPLE / "painted_T1w.nii.gz"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["scans"]
    assert (found["verdict"], found["unlike_training"]) == ("unusual", [])
    assert found["regions"][0]["p_value"] == pytest.approx(1 / 36)
    mask = nib.load(tmp_path / "runs/pretrained/scans/painted_T1w_mask.nii.gz").get_fdata() > 0
    lesion = nib.load(EXAMPLE / "painted_lesion.nii.gz").get_fdata() > 0
    assert np.count_nonzero(mask & lesion) > 0.5 * np.count_nonzero(lesion)
