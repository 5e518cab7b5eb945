"""The one exception for what the user can fix."""


class UserError(ValueError):
    """An error that says in one line what is wrong with what the user gave, where, and what to do about it.

    The commands print it as it is and end with code 2. Any other exception is a defect of this package, except
    OSError: the cause of that is the disk or the network.
    """
