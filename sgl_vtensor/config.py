"""What the user may set, read once. Flags win over ``SGL_VTENSOR_*`` variables; unknown names are errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sgl_vtensor.errors import ConfigError

Kernel = Literal["auto", "triton", "fa3", "torch"]
KERNELS: tuple[str, ...] = get_args(Kernel)

PREFIX = "SGL_VTENSOR"
SWITCH = PREFIX
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


@dataclass(frozen=True)
class VTensorConfig:
    """Settings of one server. The flag of field ``page_tokens`` is ``--vtensor-page-tokens``, its variable
    ``SGL_VTENSOR_PAGE_TOKENS``."""

    page_tokens: int | None = None
    """Tokens in one page; None lets the layout choose."""
    kernel: Kernel = "auto"
    """Which attention kernels read the rows."""
    num_rows: int | None = None
    """Rows to keep mapped as a cache; None: twice the requests that may run."""
    idle_seconds: float = 10.0
    """After so long without a launch, free pages' memory goes back to the device; 0: never."""
    debug: bool = False
    """Check every invariant before each launch. Slow."""

    def __post_init__(self) -> None:
        if self.page_tokens is not None and not (1 <= self.page_tokens <= 4096):
            raise ConfigError(f"page_tokens is {self.page_tokens}; give a number of tokens between 1 and 4096")
        if self.kernel not in KERNELS:
            raise ConfigError(f"kernel is {self.kernel!r}; choose one of {', '.join(KERNELS)}")
        if self.num_rows is not None and self.num_rows < 2:
            raise ConfigError(f"num_rows is {self.num_rows}; there must be at least 2")
        if not 0 <= self.idle_seconds < float("inf"):
            raise ConfigError(f"idle_seconds is {self.idle_seconds}; give seconds, or 0 for never")


def _parse_bool(name: str, text: str) -> bool:
    value = text.strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ConfigError(f"{name}={text!r} is neither yes nor no; write 1 or 0")


def _parse_int(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not a whole number") from error


def _parse_float(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not a number") from error


_PARSERS = {"page_tokens": _parse_int, "num_rows": _parse_int, "idle_seconds": _parse_float, "debug": _parse_bool}


def switched_on(environ: Mapping[str, str]) -> bool:
    """Whether ``SGL_VTENSOR=1`` asks for vTensor memory."""
    return _parse_bool(SWITCH, environ.get(SWITCH, "0"))


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str]) -> VTensorConfig:
    """Read the settings from flags (``None``: not given) and, where they are silent, from variables.

    Raises:
        ConfigError: a name is unknown or a value cannot be read; the message says which.
    """
    known = {field.name for field in fields(VTensorConfig)}
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(f"{PREFIX}_"):
            continue
        name = variable.removeprefix(f"{PREFIX}_").lower()
        if name not in known:
            accepted = ", ".join(sorted(f"{PREFIX}_{field.upper()}" for field in known))
            raise ConfigError(f"{variable} is not known; accepted are {SWITCH} and {accepted}")
        parse = _PARSERS.get(name)
        values[name] = parse(variable, text) if parse else text
    for name, value in flags.items():
        if name not in known:
            raise ConfigError(f"--vtensor-{name.replace('_', '-')} is not known")
        if value is not None:
            values[name] = value
    return VTensorConfig(**values)
