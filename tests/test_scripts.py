"""The scripts run from anywhere, and user errors end in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    "preprocessing/preprocess_oasis.py", "preprocessing/demo_cohort.py", "training/train.py", "training/calibrate.py",
    "evaluation/evaluate.py", "evaluation/compare.py", "benchmarks/preprocessing.py", "benchmarks/speed.py",
    "benchmarks/growth.py", "benchmarks/detection.py",
]  # fmt: skip


def run_script(*arguments, cwd):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_by_path_and_as_module(script, tmp_path):
    by_path = run_script(PROJECT / script, "--help", cwd=tmp_path)
    as_module = run_script("-m", script.removesuffix(".py").replace("/", "."), "--help", cwd=PROJECT)
    for result in (by_path, as_module):
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("usage:")


@pytest.mark.parametrize("script", [script for script in SCRIPTS if not script.startswith("benchmarks")])
def test_help_waits_for_no_library(script, tmp_path):
    """They take seconds to load."""
    code = (
        f"import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_path({str(PROJECT / script)!r}, run_name='__main__')"
    )
    loaded = run_script("-X", "importtime", "-c", code, cwd=tmp_path).stderr
    libraries = {line.split("|")[-1].strip() for line in loaded.splitlines()}
    assert "yaml" in libraries
    assert not libraries & {"torch", "numpy", "nibabel", "scipy", "sklearn", "skimage", "matplotlib", "joblib"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["preprocessing/preprocess_oasis.py", "--raw", "nowhere"], 1, "nowhere: no such folder"),
        (["preprocessing/preprocess_oasis.py", "--keep", "7"], 2, "--keep"),
        (["training/train.py", "--data", "nowhere"], 1, "preprocess_oasis.py first"),
        (["training/train.py", "--steps", "0"], 2, "--steps"),
        (
            ["evaluation/evaluate.py", "--run", "nowhere", "--data", "nowhere"],
            1,
            "nowhere/model.pt: no such checkpoint",
        ),
        (["evaluation/compare.py", "nowhere"], 1, "metrics.json"),
    ],
)
def test_user_errors_end_in_one_line(arguments, code, words, tmp_path):
    result = run_script(PROJECT / arguments[0], *arguments[1:], cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    if code == 1:
        assert len(result.stderr.splitlines()) == 1


def test_every_network_of_the_benchmark_takes_a_step(tmp_path):
    code = "import sys; from pathlib import Path; from benchmarks.speed import TITLES, OurTraining, make_store\n"
    code += "scans = make_store(Path(sys.argv[1]), 1, 8, 32)\n"
    code += "for name in TITLES: OurTraining(name, 'fp32', scans, 4).take_steps(1); print(name)"
    result = run_script("-c", code, tmp_path, cwd=PROJECT)
    assert result.stdout.split() == ["hobby", "dae", "cae"], result.stderr


@pytest.mark.slow
def test_the_benchmark_ends_with_a_line_of_figures(tmp_path):
    small = ["--rounds", "1", "--steps", "1", "--size", "32", "--scans", "2", "--slices", "8", "--batch-size", "4"]
    for script, arguments, figure in (("speed", small, "train_dae_fp32"), ("growth", ["--scans", "50"], "listing")):
        result = run_script(PROJECT / f"benchmarks/{script}.py", *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])[figure]
