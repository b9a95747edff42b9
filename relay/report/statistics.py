"""Statistics of the mail for `stats` and the overview: rates, latency, the slowest, ages.

Counts by state, route and server are views (`relay.report.queries`); no view answers these
questions. What must stay true: each query reads the last hours or unfinished mail, never the whole
history.
"""

from datetime import datetime
from itertools import islice
from typing import Any

from relay.report.filters import id_at
from relay.report.queries import QueueReader, Row

AGES = {
    "under_5m": 300.0,
    "under_20m": 1200.0,
    "under_1h": 3600.0,
    "under_4h": 14400.0,
    "under_1d": 86400.0,
}
# The part after the last @: one expression that both databases understand.
DOMAIN = "lower(substr(recipient, length(rtrim(recipient, replace(recipient, '@', ''))) + 1))"


class Statistics:
    """Questions about the queue as a whole."""

    def __init__(self, queue: QueueReader) -> None:
        self._queue = queue

    def rates(self) -> list[Row]:
        """Attempts of the last hour by outcome: the number, the number in the last minute, bytes, mean
        seconds."""
        return self._queue.all(
            """SELECT outcome, count(*) AS last_hour, sum(CASE WHEN finished_at > @ago(60) THEN 1 ELSE 0 END) AS
                last_minute, sum(bytes_sent) AS bytes_sent, CAST(avg(@micros(finished_at) - @micros(started_at)) AS
                float8) / 1e6 AS seconds
            FROM attempts WHERE finished_at > @ago(3600) AND attempt_index > 0 GROUP BY outcome ORDER BY outcome"""
        )

    def slowest(self, most: int = 5) -> list[Row]:
        """The longest attempts of the last hour."""
        return self._queue.all(
            """SELECT @hex(queue_id) AS queue_id, server, outcome, bytes_sent, reply,
                (@micros(finished_at) - @micros(started_at)) / CAST(1e6 AS float8) AS seconds
            FROM attempts WHERE finished_at > @ago(3600) AND attempt_index > 0 ORDER BY seconds DESC LIMIT :most""",
            most=most,
        )

    def ages(self, most: int = 20) -> list[Row]:
        """The ages of unfinished mail by the recipients' domain, the longest queues first.

        A row has `domain`, `domains` (1), `waiting`, and the numbers in each range of ages, named
        by its upper end: `under_5m` ... `older`. After `most` rows one more has the sums of all
        other domains: `domain` None, and their number in `domains`.
        """
        ids = [id_at(seconds) for seconds in AGES.values()]
        bounds = {f"bound{n}": bound for n, bound in enumerate(ids)}
        columns: list[str] = []
        above = "1 = 1"
        for n, name in enumerate(AGES):
            columns.append(
                f"sum(CASE WHEN {above} AND queue_uuid >= @id(:bound{n}) THEN 1 ELSE 0 END) AS {name}"
            )
            above = f"queue_uuid < @id(:bound{n})"
        columns.append(f"sum(CASE WHEN {above} THEN 1 ELSE 0 END) AS older")
        sql = f"""SELECT {DOMAIN} AS domain, 1 AS domains, count(*) AS waiting, {", ".join(columns)}
            FROM mail_queue GROUP BY 1 ORDER BY 3 DESC, 1"""
        stream = self._queue.select(sql, bounds)
        rows = list(islice(stream, most))
        others: dict[str, Any] = {}
        for row in stream:
            row["domain"] = None
            others = {name: value and value + others.get(name, 0) for name, value in row.items()}
        return [*rows, others] if others else rows

    def received(self) -> Row:
        """Accepted messages, without DSNs: of the last minute and hour, bytes of the last hour."""
        # Ids begin with the time of smtpd's clock, which may differ by ten minutes.
        (row,) = self._queue.all(
            """SELECT coalesce(sum(CASE WHEN received_at > @ago(60) THEN 1 ELSE 0 END), 0) AS last_minute,
                count(*) AS last_hour, coalesce(sum(size), 0) AS bytes FROM messages
            WHERE id >= @id(:since) AND received_at > @ago(3600) AND dsn_of IS NULL""",
            since=id_at(4200),
        )
        return row

    def history(self, seconds: int, step: int) -> tuple[datetime, list[Row]]:
        """Attempts by outcome in steps of so many seconds: (the time now, rows).

        A row has `step` (0 is the newest), `outcome`, `tries` (their number), and `seconds`, their
        mean length.
        """
        rows = self._queue.all(
            """SELECT (@micros(@now) - @micros(finished_at)) / CAST(:step AS bigint) AS step, outcome,
                count(*) AS tries, CAST(avg(@micros(finished_at) - @micros(started_at)) AS float8) / 1e6 AS seconds
            FROM attempts WHERE finished_at > @ago(:seconds) AND attempt_index > 0 GROUP BY 1, 2 ORDER BY 1, 2""",
            step=step * 1_000_000, seconds=seconds,
        )  # fmt: skip
        (now,) = self._queue.all("SELECT @when(@now) AS now_at")
        return now["now_at"], rows
