"""Every error sdvae raises on purpose. A message is one sentence: what, where, what to do next."""


class SdvaeError(Exception):
    """Base of all errors a user can cause; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(SdvaeError):
    """A VAE configuration that is unknown, incomplete or contradicts itself."""


class WeightsError(SdvaeError):
    """A weights file that is absent, unreadable or does not fit the model it is loaded into."""


class UnsafeFileError(WeightsError):
    """A file refused because reading it would run code."""

    exit_code = 4


class ImageError(SdvaeError):
    """An image that cannot be read, or should not be (too large, truncated, an unknown format)."""


class ShapeError(SdvaeError):
    """A tensor of the wrong shape, channel count or size."""


class LatentsError(SdvaeError):
    """A latents file that cannot be decoded: wrong channels, not finite, or unknown scaling."""


class SourceError(SdvaeError):
    """A source of photos that cannot be listed or read: missing, damaged, or contradicting itself."""


class OutputError(SdvaeError):
    """A file or folder that cannot be written: no space, no right, or something else is there."""


class StoreError(SdvaeError):
    """A latent store that cannot be begun, resumed or read."""


class VerifyError(StoreError):
    """Stored bytes that differ from their digest."""

    exit_code = 5


class TrainError(SdvaeError):
    """A training run that cannot begin or go on: other settings, no photos, a loss that is not finite."""


class DeviceError(SdvaeError):
    """A device or dtype this machine cannot serve."""


class BudgetError(SdvaeError):
    """A memory budget that is no amount of memory, or that no plan can keep: one can keep `least_bytes`."""

    def __init__(self, message: str, least_bytes: int | None = None) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class BenchError(SdvaeError):
    """A measurement that cannot be made, or would mean nothing: outputs that differ, a library that is not there."""


class ReportError(SdvaeError):
    """An evaluation or its report that cannot be made, continued or read."""
