"""The flags of the preprocessing script: their limits, their defaults, and that each reaches what it is for."""

import pytest

from preprocessing.preprocess_oasis import parse
from preprocessing.store import list_scans
from tests.conftest import SIZE
from tests.trees import make_tree, run


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep", "0"], "--keep"),
        (["--keep", "1.01"], "--keep"),
        (["--size", "24"], "--size"),
        (["--size", "0"], "--size"),
        (["--fov-mm", "0"], "--fov-mm"),
        (["--split", "0.5", "0.5", "0.1"], "--split"),
        (["--split", "1.5", "-0.5", "0"], "--split"),
        (["--workers", "0"], "--workers"),
        (["--volume", "-1"], "--volume"),
        (["--json", "--dry-run"], "--json"),
        (["--axes", "RAL"], "--axes"),
        (["--axes", "RASA"], "--axes"),
        (["--subject-pattern", "p[0-9]+"], "--subject-pattern"),
        (["--subject-pattern", "(p"], "--subject-pattern"),
        (["--lab", "normal"], "--lab"),
    ],
)
def test_wrong_usage_ends_with_2(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("given", "meant"), [("--lab", "--label"), ("--worker=3", "--workers"), ("--moddality", "--modality")]
)
def test_a_misspelled_flag_names_the_one_that_was_meant(given, meant, capsys):
    with pytest.raises(SystemExit):
        parse([given, "normal"])
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_defaults_and_limits_of_flags():
    args = parse([])
    assert (args.keep, args.size, args.fov_mm, args.seed, args.modality) == (0.7, 128, None, 0, "t1")
    assert args.split == [0.8, 0.1, 0.1]
    args = parse(["--keep", "1", "--size", "16", "--fov-mm", "100", "--workers", "1", "--volume", "0", "--axes", "asl"])
    assert (args.keep, args.size, args.axes) == (1, 16, "ASL")


def test_flags_of_the_cut_reach_the_slices(tree):
    assert run(tree / "raw", tree / "out", "--keep", "0.5", "--fov-mm", "160", "--axes", "LPI", "--volume", "0") == 0
    for scan in list_scans(tree / "out"):
        record = scan.record
        assert (record["keep"], record["pixel_mm"], record["volume"]) == (0.5, 160 / SIZE, 0)
        assert record["axes_rule"] == ["LPI", None]


def dry_run(raw, capsys, *flags):
    """The lines of a dry run in which nothing needs to be read."""
    assert run(raw, raw / "none", "--dry-run", *flags) == 0
    return capsys.readouterr().out.splitlines()


def test_flags_of_the_plan_reach_the_plan(tmp_path, capsys):
    for subject in range(10):
        for contrast in ("T1", "T2"):
            (tmp_path / f"IXI00{subject}-Guys-0828-{contrast}.nii").touch()
    (tmp_path / "table.csv").write_text("ID,CDR\n" + "".join(f"IXI00{i},{'' if i else 0}\n" for i in range(10)))
    table = ("--clinical", str(tmp_path / "table.csv"))
    first = "{}: {} scans of {} subjects in {} sessions in " + str(tmp_path)
    plain = dry_run(tmp_path, capsys, "--label", "normal")
    assert plain[:2] == [first.format("IXI", 10, 10, 10), "  train/normal: 8 scans of 8 subjects, 0 with a brain mask"]
    assert dry_run(tmp_path, capsys, "--label", "normal", "--seed", "1") != plain
    assert "T2.nii" in dry_run(tmp_path, capsys, "--label", "normal", "--modality", "t2")[2]
    folder = dry_run(tmp_path, capsys, "--label", "normal", "--layout", "folder")
    assert folder[0] == first.format("a folder of volumes", 10, 10, 10), "T1 is asked for"
    assert dry_run(tmp_path, capsys, *table)[0] == first.format("IXI", 1, 1, 1)
    assert dry_run(tmp_path, capsys, *table, "--blank-cdr", "normal")[0] == first.format("IXI", 10, 10, 10)
