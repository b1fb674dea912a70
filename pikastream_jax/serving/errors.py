"""What a person is told when a run cannot go on."""


class ServeError(Exception):
    """Bad input or an impossible output. Its text is one line: the bad value, the limit, and the fix."""


class ReaderClosed(Exception):
    """Whoever read the stream went away (`| head`, a closed player). A way to end, not a failure."""
