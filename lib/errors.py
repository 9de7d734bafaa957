"""Exceptions for user mistakes and interruptions, and the exit statuses of all commands."""

EXIT_BUG = 1
EXIT_MISTAKE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal after saving everything; run the command again
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141  # as in a shell, for a program that wrote to a closed pipe


class UserError(ValueError):
    """A user's mistake in a flag, a file or an annotation. The message is one line: what is wrong, and what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user has to provide does not exist."""


class LostWorkerError(UserError):
    """A data-loading worker was killed, usually because memory is too small."""


class CommonError(UserError):
    """A mistake that all processes raise with the same message; only the main process reports it."""


class StoppedError(Exception):
    """The program was stopped by a signal after saving its work."""
