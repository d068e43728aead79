"""Every error that lorafit raises on purpose.

Each type also inherits the builtin that a caller would expect, so that ``except ValueError`` and
``except FileNotFoundError`` keep working for people who never heard of lorafit. A message says in one line what is
wrong, where, and what to do about it. ``exit_code`` is what the command line ends with: 2 when the user can mend it,
1 when the run itself failed.
"""


class LorafitError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user."""

    exit_code = 2


class ConfigError(LorafitError, ValueError):
    """An option or a combination of options that cannot work."""


class MissingFileError(LorafitError, FileNotFoundError):
    """A model, data set, run or cached file that is not where it was looked for."""

    # OSError would format (errno, text) pairs; the message alone is wanted.
    __str__ = Exception.__str__


class OutputExistsError(LorafitError, FileExistsError):
    """Something stands where the output should go and overwriting was not asked for."""

    __str__ = Exception.__str__


class DownloadError(LorafitError, ConnectionError):
    """A model could not be fetched, or what arrived is not what was published."""

    __str__ = Exception.__str__


class FormatError(LorafitError, ValueError):
    """Block data that does not fit its format, or a format that lorafit does not know."""


class ContainerError(LorafitError, ValueError):
    """A file whose structure is broken: truncated, corrupted, or not what its name says."""


class ModelError(LorafitError, ValueError):
    """A model that cannot be loaded: unknown architecture, missing or misshapen tensors, no chat template."""


class DataError(LorafitError, ValueError):
    """A row of training or evaluation data that cannot be used; names file and line."""


class AdapterError(LorafitError, ValueError):
    """An adapter that does not fit the model, or that lorafit cannot represent."""


class MergeError(LorafitError, ValueError):
    """A merge or export that would not give what it promises."""


class TrainingError(LorafitError, RuntimeError):
    """A run that cannot go on, for example after a loss that is not finite."""

    exit_code = 1


class DependencyError(LorafitError, ImportError):
    """An optional package that this operation needs is not installed."""


class LorafitWarning(UserWarning):
    """Something that works and may still not be what was meant; its text is meant for the user."""
