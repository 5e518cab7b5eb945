"""The one exception for what the user can mend."""


class UserError(ValueError):
    """Say in one line what is wrong with what the user gave, where, and what to do about it.

    The commands print it as it is and end with code 2. Whatever else is raised is a defect of this package, but for
    an OSError: that is the disk's or the network's.
    """
