"""What goes wrong, as one tree: catch `GlobeError` for all of it.

Every message says what was asked, what was found and what to do.
"""


class GlobeError(Exception):
    """Base of every error that GloBE raises on purpose."""


class SettingsError(GlobeError, ValueError):
    """A setting is out of its range, unknown, or at odds with another."""


class CheckpointError(GlobeError, ValueError):
    """A checkpoint's files are missing, damaged, unsafe, or hold values that cannot be fitted."""


class UntrustedCodeError(CheckpointError):
    """A model's tokenizer is code of its own, and nobody said that it may be run."""


class UnsupportedModelError(GlobeError, ValueError):
    """The model is not a mixture of experts, or of a kind that GloBE does not handle."""


class OutputError(GlobeError, OSError):
    """The output exists, belongs to another run, or cannot be written."""


class FinishedError(OutputError):
    """The output is there already, whole, and this very run wrote it: there is nothing to do."""


class OutOfMemoryError(GlobeError, MemoryError):
    """The machine, the container or the device has too little memory for what was asked."""


class RankError(GlobeError, ConnectionError):
    """Another of the processes that share a run has ended."""
