"""A report says when, with which code and from which training it comes."""

import json
import re

from evaluation.origin import describe_origin, read_training


def test_the_origin_has_a_date_versions_and_the_training_set(tmp_path):
    assert read_training(tmp_path / "config.json") is None
    config = {"flags": {"data": ["a", "b"]}, "train_subjects": ["1", "2"], "val_subjects": ["3"], "steps": 70}
    (tmp_path / "config.json").write_text(json.dumps(config))
    origin = describe_origin(tmp_path)
    assert origin["training"] == {"data": ["a", "b"], "train_subjects": 2, "val_subjects": 1, "steps": 70}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", origin["date"])
    assert {"python", "torch", "numpy"} <= set(origin["versions"])
    (tmp_path / "config.json").write_text(json.dumps(config | {"flags": {"data": "a"}}))
    assert read_training(tmp_path / "config.json")["data"] == ["a"]
    for broken in ("{", "[]", json.dumps(config | {"train_subjects": None})):
        (tmp_path / "config.json").write_text(broken)
        assert read_training(tmp_path / "config.json") is None
