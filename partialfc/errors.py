"""Exceptions of the package.

Every exception of the package derives from :class:`PartialFCError`, so a trainer can catch exactly what this package
explains. An error that one rank finds inside the head travels to all ranks with the batch: every rank raises the same
exception with the same message, and none is left waiting in a collective.
"""

from __future__ import annotations


class PartialFCError(Exception):
    """Base of all errors raised by partialfc.

    Attributes:
        exit_code: of the command that this error ends: 1 failed, 2 starting it again cannot help.
    """

    exit_code = 1


class ConfigError(PartialFCError, ValueError):
    """A config key or a command's option is unknown, of the wrong type, or out of range."""

    exit_code = 2


class DataError(PartialFCError):
    """Data is missing, incomplete, or does not match its index."""


class InvalidData(DataError):
    """A data set that no run can read, however often it starts: missing, damaged, or at odds with its own index."""

    exit_code = 2


class DataUnavailable(DataError):
    """Data could not be read this time: an I/O error, or a loader process that died. Starting again may help."""


class MissingDependency(PartialFCError, ImportError):
    """A program or package that this feature needs is not installed; the message says how to get it."""


class BatchMismatch(PartialFCError, ValueError):
    """Embeddings and labels do not fit each other, the head, or the other ranks' batches."""


class LabelOutOfRange(PartialFCError, ValueError):
    """A label is neither -1 (ignore) nor a class id in [0, num_classes)."""


class NonFiniteEmbeddings(PartialFCError, ArithmeticError):
    """An embedding holds NaN or Inf."""


class RankLost(PartialFCError, RuntimeError):
    """A collective failed: another rank died, hangs, or cannot be reached."""


class DoubleBackward(PartialFCError, RuntimeError):
    """A gradient of the head was differentiated: it has no derivatives of its own."""


class Interrupted(PartialFCError):
    """A second Ctrl-C ended the run before it could stop cleanly."""


class ExportFailed(PartialFCError):
    """An exported file computes different embeddings than its backbone."""


class CheckpointFailed(PartialFCError, OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


class DamagedCheckpoint(DataError):
    """A checkpoint folder does not match its manifest, or has none."""


class Diverged(PartialFCError, ArithmeticError):
    """The numbers stay non-finite, or the loss keeps jumping, although steps are skipped."""
