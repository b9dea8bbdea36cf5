"""Every error that we raise on purpose; the command line prints each as one line and exits with its code.

A message names the thing, its value, the rule with its numbers, and the fix. Anything that is not an
:class:`LceError` is a bug (ours or a library's) and keeps its traceback.
"""


class LceError(Exception):
    """Base of all our errors. ``exit_code`` is what a script sees."""

    exit_code = 1


class RunError(LceError):
    """A run started and could not finish (exit 1)."""


class NotFiniteError(RunError):
    """A loss or a gradient has left the finite numbers, on every rank in the same step; nothing was updated by it."""


class ConfigError(LceError):
    """A config, a flag or a combination of them is wrong (exit 2)."""

    exit_code = 2


class DataError(LceError):
    """A data set, a shard, an image or a label is wrong (exit 2)."""

    exit_code = 2


class FindingsError(LceError):
    """A check did its work and found something (exit 3)."""

    exit_code = 3


class CheckpointError(LceError):
    """A checkpoint or a weights file is damaged, foreign or from another config (exit 2)."""

    exit_code = 2


class SetupError(LceError):
    """The machine or the cluster lacks something that the run needs (exit 4)."""

    exit_code = 4


class Interrupted(LceError):  # noqa: N818 - not an error of anybody's
    """The run was stopped from outside and goes on with the same command (exit 5)."""

    exit_code = 5
