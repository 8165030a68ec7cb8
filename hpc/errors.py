"""One exception hierarchy. What derives from `UserError` ends the program with exit code 2 and its text, no traceback."""


class EquiHPCError(Exception):
    """Base of every error that this package raises on purpose. Exit code 1."""


class UserError(EquiHPCError):
    """Bad input: the text names file, line, field, value and what is allowed. Exit code 2."""
