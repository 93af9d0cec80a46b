"""The two errors that the command line turns into one line; anything else is a bug of ours."""


class InputError(ValueError):
    """A recipe, list, video or checkpoint is wrong; the message says where and what to do."""


class StateError(RuntimeError):
    """A run folder or cache is not in the state that was asked for."""
