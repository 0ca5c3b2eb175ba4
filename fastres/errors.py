"""Errors that a user can cause and mend; the command line prints them as one line, without a traceback.

Each message says what was given and what was expected.
"""


class UserError(Exception):
    """Base of all errors raised on purpose: something the user gave can't be used."""


class BackendError(UserError, RuntimeError):
    """A backend that was asked for can't serve the problem."""


class ModelError(UserError, ValueError):
    """An unknown model name, an option a model does not have, or a state dict of another architecture."""


class FusionError(ModelError):
    """A network that ``fastres.fuse`` can't turn into a fused one. The message says which part and what to do."""


class CompileError(UserError, RuntimeError):
    """A network that ``fastres.compile`` can't turn into a plan. The message names the layer, what it does and what to do."""


class InputError(UserError, ValueError):
    """A tensor of the wrong shape, dtype or device."""


class DataError(UserError, RuntimeError):
    """A data set is missing, incomplete or damaged. The message names the file or folder."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, damaged or of another network. The message names the file."""


class ExportError(UserError, RuntimeError):
    """A network can't be written in a format, or what was written computes something else. No file is left behind."""


class DivergedError(UserError, RuntimeError):
    """The loss of a training run is no longer finite."""


class RecipeError(UserError, ValueError):
    """A recipe has an unknown key or a value that doesn't fit. The message names it and what is close to it."""


class RankError(UserError, RuntimeError):
    """Another process of a distributed run ended; the message holds its error."""
