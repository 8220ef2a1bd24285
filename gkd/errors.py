"""The one exception that a command line shows without a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: says what was expected, what was got and what to do."""
