"""Statistics of the mail for `stats` and the overview: rates, latency, the slowest, ages.

Counts by state, route and server are views (`relay.report.queries`); no view answers these
questions, whose statements are in `statistics.<database>.sql`. What must stay true: each query
reads the last hours or unfinished mail, never the whole history.
"""

from datetime import datetime

from relay.report.filters import id_at
from relay.report.queries import Reader
from relay.report.rows import Row

# The columns of `ages` and their upper bounds in seconds; the last column is `older`.
AGES = {"under_5m": 300, "under_20m": 1200, "under_1h": 3600, "under_4h": 14400, "under_1d": 86400}


class Statistics(Reader):
    """Questions about the queue as a whole."""

    def ages(self, most: int = 20) -> list[Row]:
        """The ages of unfinished mail by the recipients' domain, the longest queues first.

        A row has `domain`, `domains` (1), `waiting`, and the numbers in each range of ages, named
        by its upper end: `under_5m` ... `older`. After `most` rows one more has the sums of all
        other domains: `domain` None, and their number in `domains`.
        """
        bounds = {name: id_at(seconds) for name, seconds in AGES.items()}
        return self.read("ages", most=most, **bounds)

    def received(self) -> Row:
        """Accepted messages, without DSNs: of the last minute and hour, bytes of the last hour."""
        return self.read("received", since=id_at(4200))[0]

    def arrivals(self, seconds: int, step: int) -> list[Row]:
        """Deliveries of accepted messages in steps of so many seconds, also of DSNs: `step` (0 is
        the newest) and `deliveries`."""
        since = id_at(seconds + 600)
        return self.read("arrivals", step=step, seconds=seconds, since=since)

    def rate_limited(self, most: int = 20) -> list[Row]:
        """Who was refused by a rate in the last day: `subject` and `what` name the limit, `name` is
        a client's network, a sender or a user ('' for several others together), `refused` the
        number of refusals, `last_at` the time of the last one. The most refused come first."""
        return self.read("rate_limited", most=most)

    def history(self, seconds: int, step: int) -> tuple[datetime, list[Row]]:
        """Attempts by outcome in steps of so many seconds: (the time now, rows).

        A row has `step` (0 is the newest), `outcome`, `tries` (their number), and `seconds`, their
        mean length.
        """
        rows = self.read("history", step=step, seconds=seconds)
        return self.read("now")[0]["now_at"], rows
