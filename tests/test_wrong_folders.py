"""A folder or file given in the place of another gets one line that names the right one."""

import pytest

from common.cli import DataError
from evaluation.evaluate import main as evaluate
from training.calibrate import main as calibrate
from training.train import main as train


@pytest.mark.parametrize(
    ("script", "data", "cure"),
    [
        (evaluate, "", "{processed}: no slices in normal/ or abnormal/ or unlabelled/; give --data {processed}/test, "),
        (evaluate, "test/abnormal", "give --data {processed}/test, which has some"),
        (evaluate, "../nowhere", "nowhere: no such folder; run preprocessing/preprocess_oasis.py first"),
        (train, "train", "{processed}/train: no slices in train/normal/; give --data {processed}, which has some"),
        (train, "train/normal", "give --data {processed}, which has some"),
        (train, "../untrained", "holds a model, not slices; give it as --run, and the slices as --data"),
        (calibrate, "../raw", "raw: no slices in normal/; run preprocessing/preprocess_oasis.py first"),
    ],
)
def test_a_wrong_folder_of_slices(script, data, cure, untrained, processed, tmp_path):
    flags = ["--run", str(tmp_path / "run")] if script is train else ["--run", str(untrained), "--out", str(tmp_path)]
    with pytest.raises(DataError) as error:
        script(["--data", str(processed / data), *flags])
    assert cure.format(processed=processed) in str(error.value)


@pytest.mark.parametrize("script", [evaluate, calibrate])
def test_run_and_data_swapped_and_a_file_for_a_folder(script, untrained, processed, tmp_path, capsys):
    model = untrained / "model.pt"
    for run, data, cure in (
        (processed, untrained, f"--run {processed} holds no model and --data {untrained} does; swap them"),
        (model, processed, f"--run {model}: is a file; give the folder that it is in"),
    ):
        with pytest.raises(SystemExit, match="2"):
            script(["--run", str(run), "--data", str(data), "--out", str(tmp_path)])
        (line,) = capsys.readouterr().err.splitlines()
        assert cure in line


def test_scan_and_mask_swapped(untrained, raw, tmp_path):
    scan = next((raw / "test" / "normal").iterdir())
    mask = next(path for path in (raw / "test" / "masks").iterdir() if scan.name[:7] in path.name)
    with pytest.raises(DataError, match=f"{mask}: holds two values only, as a mask does; give the scan here"):
        evaluate(["--run", str(untrained), "--scan", str(mask), "--brain-mask", str(scan), "--out", str(tmp_path)])
