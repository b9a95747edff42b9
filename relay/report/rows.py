"""The rows that are passed on as they are read, and where a segment of the journal has none yet."""

from collections.abc import Mapping
from typing import Any, NamedTuple

type Row = Mapping[str, Any]
"""A row that is passed on as it is, to a table or as JSON."""


class SegmentPosition(NamedTuple):
    """Up to where the messages of a segment have rows. `sealed`: all have."""

    committed_to: int
    sealed: bool
