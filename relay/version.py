"""The version of the running program, as workers record it and `relay_build_info` shows it.

It is that of the installed distribution when the process started: an older process shows its own
version until it is restarted.
"""

from functools import cache
from importlib.metadata import version

DISTRIBUTION = "qmqp-relay"


@cache
def running_version() -> str:
    """The version of this process."""
    return version(DISTRIBUTION)
