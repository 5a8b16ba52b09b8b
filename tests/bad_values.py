"""For each type of setting, texts that no setting of it takes. A field of a new type needs a line here."""

from __future__ import annotations

from dataclasses import fields

from sgl_vtensor.config import VTensorConfig

_HUGE = "9" * 400
_BAD: dict[str, tuple[str, ...]] = {
    "int": ("", "many", "16.5", "1e3", "0x10", "-1", "0", "1" * 30, _HUGE),
    "float": ("", "soon", "-1", "-0.1", "nan", "inf", "-inf", "1e999"),
    "Size": ("", "lots", "12", "GiB", "%", "-1GiB", "-5%", "101%", "1.5.5GiB", "1GiB2", "2000TiB", f"{_HUGE}GiB"),
    "bool": ("2", "-1", "maybe"),
    "Path": ("", "  "),
    "Kernel": ("", "Triton", "cuda", "auto,torch"),
}


def bad_values() -> dict[str, tuple[str, ...]]:
    """Field of the configuration -> what it refuses."""
    return {field.name: _BAD[str(field.type).removesuffix(" | None")] for field in fields(VTensorConfig)}
