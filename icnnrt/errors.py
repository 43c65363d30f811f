"""Every exception icnnrt raises on purpose; one parent, so one `except` catches them all."""

from icnnrt.printable import printable


class IcnnrtError(Exception):
    """The parent of every error icnnrt raises on purpose.

    Its text is one line and safe to print, whatever the names in it hold: they may come from anybody's file.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(one) if isinstance(one, str) else one for one in args))


class PackageError(IcnnrtError):
    """A package on disk is damaged, hostile, or of a format this icnnrt does not read."""


class InputError(IcnnrtError, ValueError):
    """An argument has the wrong shape, dtype, name or range."""


class SampleError(InputError, IndexError):
    """A sample is asked for that a batch has not; an IndexError too, as loops over a batch end with one."""


class ProviderError(IcnnrtError):
    """The execution provider that was asked for is missing from this onnxruntime."""


class ExportError(IcnnrtError):
    """A model cannot be exported faithfully, and the message says which part of it and why."""


class CertificateError(IcnnrtError):
    """With `strict=True`, at least one sample's certificate does not vouch for its answer."""


class LimitError(IcnnrtError):
    """A graph takes longer, or more memory, than the limits that it was given; see `icnnrt.Limits`."""


class MissingDependencyError(IcnnrtError, ImportError):
    """An optional dependency is not installed; the message gives the command that installs it."""
