"""What a run shows: a row an epoch in log.csv and TensorBoard, pictures with the nose up, curves of both losses."""

import csv
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.run_log import LOG_COLUMNS, RunLog, draw_curves, draw_reconstructions

ROWS = [dict(zip(LOG_COLUMNS, (i, 10 * i, 0.5 / i, 0.25 / i, 1e-3, 40.0), strict=True)) for i in (1, 2, 3)]


def make_pictures() -> dict[str, np.ndarray]:
    """Two slices each of 4x4: the healthy ones are bright at the nose (last row), the others all grey."""
    healthy = np.zeros((2, 4, 4))
    healthy[:, -1] = 1
    return {"healthy slice": healthy, "reconstruction": np.full((2, 4, 4), 0.5)}


def read_board(run) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_each_epoch_is_shown_once_though_the_run_was_interrupted(tmp_path):
    rows = ROWS[:1]
    with RunLog(tmp_path, rows) as log:
        rows.append(ROWS[1])
        log.add_epoch(make_pictures())
    rows = ROWS[:2]
    with RunLog(tmp_path, rows) as log:
        rows.append(ROWS[2])
        log.add_epoch(make_pictures())
    read = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [[float(row[name]) for name in LOG_COLUMNS] for row in read] == [
        pytest.approx(list(row.values()), rel=1e-5) for row in ROWS
    ]
    board = read_board(tmp_path)
    assert set(board.Tags()["scalars"]) == {"train_loss", "val_loss", "learning_rate", "slices_per_s"}
    assert [(event.step, event.value) for event in board.Scalars("val_loss")] == [
        (row["step"], pytest.approx(row["val_loss"])) for row in ROWS
    ]


def test_pictures_stand_in_rows_with_the_nose_up(tmp_path):
    rows = ROWS[:1]
    with RunLog(tmp_path, rows) as log:
        log.add_epoch(make_pictures())
    image = read_board(tmp_path).Images("reconstructions")[-1]
    values = plt.imread(io.BytesIO(image.encoded_image_string))
    values = values.reshape(8, 8, -1)[..., 0]
    assert image.step == 10
    np.testing.assert_allclose(values[0], 1)
    np.testing.assert_allclose(values[1:4], 0)
    np.testing.assert_allclose(values[4:], 0.5, atol=0.01)


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are written from here on."""
    written = []
    monkeypatch.setattr("training.run_log.write_figure", lambda path, figure: written.append(figure))
    return written


def test_curves_are_the_losses_over_the_steps(tmp_path, figures):
    draw_curves(tmp_path / "curves.png", ROWS)
    lines = figures[0].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["training", "validation", "best: step 30, 0.0833"]
    assert lines[2].get_xdata() == [30, 30]
    for line, name in zip(lines, ("train_loss", "val_loss"), strict=False):
        np.testing.assert_allclose(line.get_xydata(), [(row["step"], row[name]) for row in ROWS])
    assert figures[0].axes[0].get_yscale() == "log"
    (rate,) = figures[0].axes[1].get_lines()
    np.testing.assert_allclose(rate.get_xydata(), [(row["step"], row["learning_rate"]) for row in ROWS])


def test_reconstructions_are_drawn_from_black_to_white(tmp_path, figures):
    pictures = make_pictures()
    draw_reconstructions(tmp_path / "reconstructions.png", pictures)
    axes = figures[0].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["healthy slice", "", "reconstruction", ""]
    for axis, values in zip(axes, np.concatenate(list(pictures.values())), strict=True):
        image = axis.get_images()[0]
        np.testing.assert_array_equal(image.get_array(), values)
        assert image.get_clim() == (0, 1)
        assert image.origin == "lower"


def test_what_was_corrupted_is_outlined_in_all_rows_but_the_first(tmp_path, figures):
    healthy = np.full((2, 32, 32), 0.5)
    corrupted = healthy.copy()
    corrupted[1, 8:24, 8:24] = 0.9
    draw_reconstructions(tmp_path / "a.png", {"healthy slice": healthy, "corrupted": corrupted, "error x 4": healthy})
    outlined = [bool(axis.collections) for axis in figures[0].axes]
    assert outlined == [False, False, False, True, False, True]
    (outline,) = figures[0].axes[3].collections
    (path,) = outline.get_paths()
    np.testing.assert_allclose(path.get_extents().extents, [6.5, 6.5, 24.5, 24.5], atol=1.5)
