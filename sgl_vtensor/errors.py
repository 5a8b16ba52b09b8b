"""The exceptions that callers act on. Each says what to do next."""


class VTensorError(Exception):
    """Base class of everything this package raises on purpose."""


class ConfigError(VTensorError):
    """A flag, variable or model that cannot work. Correct the setting that the message names and start again."""


class DriverError(VTensorError):
    """A virtual-memory call was refused and changed nothing.

    Attributes:
        call: the driver's own name of the call, for example ``cuMemCreate``.
        code: the driver's own name of the error, for example ``CUDA_ERROR_OUT_OF_MEMORY``.
    """

    def __init__(self, call: str, code: str, remedy: str) -> None:
        super().__init__(f"{call} failed with {code}: {remedy}")
        self.call = call
        self.code = code


class OutOfMemory(DriverError):
    """The driver has no physical memory (or no mapping) left. Free something, then try again."""
