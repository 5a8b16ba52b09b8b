"""What the user may set, read once. Flags win over ``SGL_VTENSOR_*`` variables; unknown names are errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from sgl_vtensor.errors import ConfigError

Kernel = Literal["auto", "triton", "fa3", "torch"]
KERNELS: tuple[str, ...] = get_args(Kernel)

PREFIX = "SGL_VTENSOR"
SWITCH = PREFIX
MAX_ROWS = 1 << 16
MAX_BYTES = 1 << 50
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(rf"(\d+(?:\.\d*)?)\s*(%|{'|'.join(_UNITS)})", re.IGNORECASE)


@dataclass(frozen=True)
class Size:
    """An amount of KV memory: bytes, or a share of what the pool can hold."""

    text: str
    amount: float
    """Bytes, or a share between 0 and 1."""
    is_share: bool

    def bytes_of(self, capacity_bytes: int) -> int:
        return int(self.amount * capacity_bytes) if self.is_share else int(self.amount)

    def __str__(self) -> str:
        return self.text


def parse_size(name: str, text: str) -> Size:
    """Read ``24GiB`` or ``60%``.

    Raises:
        ConfigError: it is neither; the message begins with ``name``.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ConfigError(f"{name}={text!r} is not a size; write it like 24GiB, 512MiB or 60%")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if number > 100:
            raise ConfigError(f"{name}={text!r} is more than all there is; give at most 100%")
        return Size(text.strip(), number / 100, True)
    amount = number * next(factor for known, factor in _UNITS.items() if known.lower() == unit.lower())
    if amount > MAX_BYTES:
        raise ConfigError(f"{name}={text[:40]!r} is more than any device has; give at most {MAX_BYTES >> 40}TiB")
    return Size(text.strip(), amount, False)


def is_size(text: str) -> bool:
    """Whether it is written like one."""
    return _SIZE.fullmatch(text.strip()) is not None


def format_bytes(num_bytes: int) -> str:
    """``16.00 GiB``, or the largest smaller unit of which there is one."""
    for unit in ("GiB", "MiB", "KiB"):
        if abs(num_bytes) >= _UNITS[unit]:
            return f"{num_bytes / _UNITS[unit]:.2f} {unit}"
    return f"{num_bytes} B"


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
    unmap_rows: bool = False
    """Unmap the row of a request that has ended, as the vTensor paper does, in place of keeping it. For comparison."""
    idle_seconds: float = 10.0
    """After so long without a launch, free pages' memory goes back to the device; 0: never."""
    memory_limit: Size | None = None
    """KV memory that may be backed at first; None: all that SGLang's ``--mem-fraction-static`` leaves for it."""
    reserve: Size | None = None
    """Free pages that are backed ahead of need; None: 1% of the pool on CUDA, nothing on the host."""
    cache_seconds: float = 600.0
    """Cached prefixes that nobody asked for in so long are dropped; 0: never."""
    cache_keep: Size = Size("0%", 0.0, True)
    """So much of the cache is kept however old it is."""
    trace: Path | None = None
    """Record what the pool does to this file, one for each rank; None: do not."""
    debug: bool = False
    """Check every invariant before each launch. Slow."""

    def __post_init__(self) -> None:
        if self.page_tokens is not None and not (1 <= self.page_tokens <= 4096):
            raise ConfigError(f"page_tokens is {self.page_tokens}; give a number of tokens between 1 and 4096")
        if self.kernel not in KERNELS:
            raise ConfigError(f"kernel is {self.kernel!r}; choose one of {', '.join(KERNELS)}")
        if self.num_rows is not None and not (2 <= self.num_rows <= MAX_ROWS):
            raise ConfigError(f"num_rows is {self.num_rows}; give a number of rows between 2 and {MAX_ROWS}")
        for name in ("idle_seconds", "cache_seconds"):
            seconds = getattr(self, name)
            if not 0 <= seconds < float("inf"):
                raise ConfigError(f"{name} is {seconds}; give seconds, or 0 for never")


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


def _parse_path(name: str, text: str) -> Path:
    if not text.strip():
        raise ConfigError(f"{name} is empty; give a file")
    return Path(text)


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "page_tokens": _parse_int,
    "num_rows": _parse_int,
    "idle_seconds": _parse_float,
    "memory_limit": parse_size,
    "reserve": parse_size,
    "cache_seconds": _parse_float,
    "cache_keep": parse_size,
    "unmap_rows": _parse_bool,
    "trace": _parse_path,
    "debug": _parse_bool,
}


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
            is_text = isinstance(value, str) and name in _PARSERS
            values[name] = _PARSERS[name](f"--vtensor-{name.replace('_', '-')}", value) if is_text else value
    return VTensorConfig(**values)
