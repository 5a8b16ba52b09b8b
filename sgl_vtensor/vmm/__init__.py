"""Virtual memory: reserve addresses, create physical memory, map one onto the other."""

from __future__ import annotations

from typing import Literal

from sgl_vtensor.errors import ConfigError
from sgl_vtensor.vmm.driver import VmmDriver

__all__ = ["VmmDriver", "open_driver"]


def open_driver(
    name: Literal["cuda", "host"], *, device_index: int = 0, capacity_bytes: int | None = None
) -> VmmDriver:
    """Open the driver ``name``. The other one's module is not imported.

    Args:
        device_index: which GPU (cuda only).
        capacity_bytes: the most physical memory to hand out (host only; default: what is available).

    Raises:
        ConfigError: there is no driver of that name, or its Python package is missing.
        DriverError: the system or the device refused.
    """
    driver: VmmDriver
    if name == "host":
        from sgl_vtensor.vmm.host import HostDriver

        driver = HostDriver(capacity_bytes)
    elif name == "cuda":
        try:
            from sgl_vtensor.vmm.cuda import CudaDriver
        except ImportError as error:
            raise ConfigError(
                f"driver 'cuda' needs the package cuda-python: pip install cuda-python ({error})"
            ) from error
        driver = CudaDriver(device_index)
    else:
        raise ConfigError(f"there is no driver {name!r}; the drivers are 'cuda' and 'host'")
    return driver
