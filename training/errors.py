"""The one exception for what a user can cause and mend."""


class UserError(Exception):
    """One clear sentence that says what is wrong and what to do about it.

    The command line prints the sentence alone (`CURVLAB_DEBUG=1` adds the stack trace); any other exception
    counts as a bug and keeps its trace.
    """
