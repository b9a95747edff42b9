"""The error of a fault that had no effect, so that its books prove nothing."""


class FaultMissed(Exception):
    """The text says what did not happen."""
