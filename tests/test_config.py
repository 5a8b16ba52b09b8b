"""Settings from flags and variables."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sgl_vtensor.config import KERNELS, VTensorConfig, load_config, switched_on
from sgl_vtensor.errors import ConfigError
from tests.bad_values import bad_values


def test_defaults() -> None:
    assert load_config({}, {}) == VTensorConfig(page_tokens=None, kernel="auto", num_rows=None, debug=False)


def test_variables() -> None:
    environ = {
        "SGL_VTENSOR": "1",
        "SGL_VTENSOR_PAGE_TOKENS": "64",
        "SGL_VTENSOR_KERNEL": "triton",
        "SGL_VTENSOR_NUM_ROWS": "100",
        "SGL_VTENSOR_DEBUG": "yes",
        "PATH": "/bin",
    }
    assert load_config({}, environ) == VTensorConfig(page_tokens=64, kernel="triton", num_rows=100, debug=True)


def test_flags_win_and_none_is_silent() -> None:
    environ = {"SGL_VTENSOR_PAGE_TOKENS": "64", "SGL_VTENSOR_KERNEL": "triton"}
    assert load_config({"page_tokens": 16, "kernel": None}, environ) == VTensorConfig(page_tokens=16, kernel="triton")


@pytest.mark.parametrize("text", ["1", "true", "YES", " on "])
def test_switched_on(text: str) -> None:
    assert switched_on({"SGL_VTENSOR": text})


@pytest.mark.parametrize("environ", [{}, {"SGL_VTENSOR": "0"}, {"SGL_VTENSOR": ""}, {"SGL_VTENSOR": "No"}])
def test_switched_off(environ: dict[str, str]) -> None:
    assert not switched_on(environ)


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        ({}, {"SGL_VTENSOR_PAGETOKENS": "16"}, ["SGL_VTENSOR_PAGETOKENS", "accepted are", "SGL_VTENSOR_PAGE_TOKENS"]),
        ({}, {"SGL_VTENSOR_PAGE_TOKENS": "16.0"}, ["SGL_VTENSOR_PAGE_TOKENS", "'16.0'", "whole number"]),
        ({}, {"SGL_VTENSOR_PAGE_TOKENS": ""}, ["SGL_VTENSOR_PAGE_TOKENS", "whole number"]),
        ({}, {"SGL_VTENSOR_DEBUG": "2"}, ["SGL_VTENSOR_DEBUG", "'2'", "1 or 0"]),
        ({}, {"SGL_VTENSOR_KERNEL": "Triton"}, ["kernel", "'Triton'", *KERNELS]),
        ({"page_tokens": 0}, {}, ["page_tokens is 0", "between 1 and 4096"]),
        ({"page_tokens": -1}, {}, ["page_tokens is -1", "between 1 and 4096"]),
        ({"page_tokens": 4097}, {}, ["page_tokens is 4097", "between 1 and 4096"]),
        ({"num_rows": 1}, {}, ["num_rows is 1", "between 2 and 65536"]),
        ({"row_count": 4}, {}, ["--vtensor-row-count", "not known"]),
    ],
)
def test_refused(flags: dict[str, Any], environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(flags, environ)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, bad in bad_values().items() for text in bad])
def test_no_field_takes_a_bad_variable(name: str, text: str) -> None:
    variable = f"SGL_VTENSOR_{name.upper()}"
    with pytest.raises(ConfigError) as refusal:
        load_config({}, {variable: text})
    said = str(refusal.value)
    assert variable in said or said.startswith(f"{name} is "), said
    assert re.search(r"; (write|give|choose|there must)| is not a (whole )?number", said), f"no way out: {said}"
    assert "\n" not in said and len(said) < 600


@pytest.mark.parametrize("name", bad_values())
def test_a_misspelt_variable_is_named_with_the_right_ones(name: str) -> None:
    wrong, right = f"SGL_VTENSOR_{name.upper()}S", f"SGL_VTENSOR_{name.upper()}"
    with pytest.raises(ConfigError, match=rf"{wrong} is not known; accepted are .*\b{right}\b"):
        load_config({}, {wrong: "1"})


def test_switch_that_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="SGL_VTENSOR='perhaps'"):
        switched_on({"SGL_VTENSOR": "perhaps"})


def test_config_does_not_change() -> None:
    with pytest.raises(AttributeError):
        VTensorConfig().page_tokens = 3  # type: ignore[misc]
