"""Everything Trimtab can tell a user is wrong: what was found, what was expected, what to do."""


class TrimtabError(Exception):
    """Root of all expected errors; the CLI prints it without a traceback and exits with 2."""

    def __init__(self, message: str, *, hint: str) -> None:
        """Keep the finding and the remedy apart so that every surface can show both.

        Args:
            message: What was found and what was expected, with the values.
            hint: What to do next, in one sentence.
        """
        super().__init__(f"{message}\n  hint: {hint}")
        self.message = message
        self.hint = hint


class InputError(TrimtabError):
    """Text, a file of text, or an option that cannot be used."""


class ModelError(TrimtabError):
    """A model that cannot be found, opened, or used in the asked way."""


class RecordingError(TrimtabError):
    """A recording that is incomplete, changed, or of another format version."""


class AdapterError(TrimtabError):
    """An adapter that is incomplete, changed, of another format version, or for another model."""


class NumericalError(TrimtabError):
    """A loss or a weight that is not a finite number."""


class MissingDependencyError(TrimtabError):
    """An optional package that is not installed."""


class StorageError(TrimtabError):
    """A disk that is full or a folder that cannot be written."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
