from __future__ import annotations

import pickle

import pytest

from gm_mlic.errors import ArgumentError, ConfigError, DataError, config_keys


def test_argument_error_is_converted_to_config_key():
    with pytest.raises(ConfigError) as caught, config_keys("model"):
        raise ArgumentError("k", "must be 1 or more, got 0; `widths` has 2.")
    assert str(caught.value) == "model.k must be 1 or more, got 0; model.widths has 2."
    assert isinstance(caught.value.__cause__, ArgumentError)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`download=True` fetches it", "dataset.download=true fetches it"),
        ("set `missing='drop'` or `labels=None`", "set dataset.missing=drop or dataset.labels=null"),
        ("set `columns['file']`", "set dataset.columns.file"),
        ("`columns['labels']='a b'`", "dataset.columns.labels=a b"),
        ("set `size=3`", "set dataset.sizes.val=3"),
        ("run `gm-mlic extract` again; it's `Photo 1.jpg`", "run `gm-mlic extract` again; it's `Photo 1.jpg`"),
    ],
)
def test_arguments_in_other_errors_are_converted(message: str, expected: str):
    with pytest.raises(DataError) as caught, config_keys("dataset", size="dataset.sizes.val"):
        raise DataError(message)
    assert str(caught.value) == expected


def test_innermost_context_applies():
    with pytest.raises(ConfigError, match=r"^loss\.beta must be 0 or more$"), config_keys(), config_keys("loss"):
        raise ArgumentError("beta", "must be 0 or more")
    with pytest.raises(DataError, match=r"^check dataset\.root$"), config_keys("instances"), config_keys("dataset"):
        raise DataError("check `root`")


def test_top_level_config_keys():
    with pytest.raises(ConfigError, match=r"^format is 'x'; export part=network$"), config_keys(form="format"):
        raise ArgumentError("form", "is 'x'; export `part='network'`")


def test_argument_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(ArgumentError("k", "must be 1 or more.")))
    assert (error.argument, error.problem, str(error)) == ("k", "must be 1 or more.", "k must be 1 or more.")
    assert isinstance(error, ValueError)
