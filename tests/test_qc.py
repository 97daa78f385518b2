"""The contact sheet shows every scan the right way up, with letters that say which side is which."""

import numpy as np
import pytest

from preprocessing.qc import draw_contact_sheet
from preprocessing.store import read_scan, write_scan
from preprocessing.strip import Extracted
from tests.test_store import RECORD

SIZE = 16


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, in place of their files."""
    drawn = []
    monkeypatch.setattr("preprocessing.qc.write_figure", lambda path, figure: (path.touch(), drawn.append(figure)))
    return drawn


def make_scan(root, name, place="train/normal", marks=None, stripped=None):
    """A stored scan of three slices; only the middle one is marked, at (row, column)."""
    stack = np.full((3, SIZE, SIZE), 0.5, np.float16)
    if marks:
        stack[1][marks] = 1
    if stripped:
        stack[:, : SIZE // 2] = 0
    record = RECORD | {"slices": [4, 5, 6], "size": SIZE, "subject": name, "axes": "PSR", "shape": [30, 30, 30]}
    del record["lesion_voxels"]
    write_scan(root / place / name, stack, None, record, stripped)
    return read_scan(root / place / name)


def find_letters(axes):
    """{letter: its place on the page, in display coordinates}."""
    return {text.get_text(): text.get_transform().transform(text.get_position()) for text in axes.texts}


@pytest.mark.parametrize(
    ("marks", "near"),
    [((SIZE - 1, 8), "A"), ((0, 8), "P"), ((8, 0), "L"), ((8, SIZE - 1), "R")],
)
def test_the_letters_stand_at_the_sides_they_name(marks, near, tmp_path, figures):
    """Rows run from posterior to anterior, columns from left to right."""
    draw_contact_sheet([make_scan(tmp_path, "a", marks=marks)], tmp_path)
    axes = figures[0].axes[0]
    figures[0].draw_without_rendering()
    letters = find_letters(axes)
    assert set(letters) == set("LRAP")
    row, column = np.unravel_index(np.argmax(axes.images[0].get_array()), (SIZE, SIZE))
    left, right, bottom, top = axes.images[0].get_extent()
    y = row if axes.images[0].origin == "lower" else SIZE - 1 - row
    place = axes.transData.transform((left + (column + 0.5) / SIZE * (right - left), min(bottom, top) + y + 0.5))
    nearest = min(letters, key=lambda letter: np.linalg.norm(letters[letter] - place))
    assert nearest == near


def test_the_nose_is_up_and_left_is_left(tmp_path, figures):
    draw_contact_sheet([make_scan(tmp_path, "a")], tmp_path)
    letters = find_letters(figures[0].axes[0])
    assert letters["A"][1] > letters["P"][1]
    assert letters["L"][0] < letters["R"][0]
    assert figures[0].axes[0].images[0].origin == "lower"


def test_each_scan_shows_its_middle_slice_from_0_to_1_with_its_name_place_and_axes(tmp_path, figures):
    scans = [make_scan(tmp_path, "a", marks=(3, 4)), make_scan(tmp_path, "b" * 20 + "c" * 20, "test/abnormal")]
    draw_contact_sheet(scans, tmp_path)
    first, second, *others = figures[0].axes
    image = first.images[0]
    np.testing.assert_array_equal(image.get_array(), scans[0].read_stack()[1])
    assert image.get_clim() == (0, 1)
    assert first.get_title() == "a\ntrain/normal PSR"
    assert second.get_title() == "b" * 12 + "…" + "c" * 13 + "\ntest/abnormal PSR"
    assert not any(axes.images or axes.texts for axes in others)
    assert not any(axes.axison for axes in figures[0].axes)


@pytest.mark.parametrize(("number", "pages"), [(1, ["qc.png"]), (40, ["qc.png"]), (41, ["qc.png", "qc-2.png"])])
def test_forty_scans_a_page(number, pages, tmp_path, figures):
    (tmp_path / "qc-2.png").touch()  # of an earlier, larger set
    (tmp_path / "qc-3.png").touch()
    drawn = draw_contact_sheet([make_scan(tmp_path, "a")] * number, tmp_path)
    assert [path.name for path in drawn] == pages
    assert sorted(path.name for path in tmp_path.glob("qc*")) == sorted(pages)
    assert sum(len(axes.images) for figure in figures for axes in figure.axes) == number
    assert len(figures[-1].axes) == -(-(number - 40 * (len(pages) - 1)) // 8) * 8


def test_a_page_is_a_picture_whatever_the_names_hold(tmp_path):
    (path,) = draw_contact_sheet([make_scan(tmp_path, "$x_{$ 脳")], tmp_path)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_an_extracted_brain_is_an_outline_in_the_head(tmp_path, figures):
    head = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.float16)
    stripped = Extracted(np.ones((30, 30, 30), bool), head)
    draw_contact_sheet([make_scan(tmp_path, "a", stripped=stripped), make_scan(tmp_path, "b")], tmp_path)
    with_head, without = figures[0].axes[:2]
    np.testing.assert_array_equal(with_head.images[0].get_array(), head)
    (outline,) = with_head.collections
    assert set(outline.get_paths()[0].vertices[:, 1]) == {SIZE // 2 - 1 + 0.5}, "between background and brain"
    assert not without.collections
