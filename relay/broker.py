"""The address of the broker: RELAY_BROKER_URL as publishers and Celery's workers understand it.

It is a URL of kombu: `redis://`, `rediss://` (TLS), or `redis+socket://` with a path. Publishers
use redis-py, which has other names for some parts of it.

What must stay true: both verify the certificate of a broker unless the URL says
`ssl_cert_reqs=none`. (kombu alone verifies it only if the URL says so.)
"""

from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

KEY_PREFIX = "qmqp-relay:"
"""Before the name of each list: several applications may share a Redis database."""
CONNECT_TIMEOUT = 2.0  # seconds
HEALTH_CHECK = 25  # seconds without traffic after which a connection is tried before it is used
_ANSWER_TIMEOUT = 2.0  # seconds


def connect(url: str) -> Redis:
    """A client with one connection, which does not try again after an error. Raises redis' errors,
    OSError, ValueError and TypeError (parts of the URL that do not exist)."""
    options: dict[str, Any] = {
        "socket_timeout": _ANSWER_TIMEOUT,
        "health_check_interval": HEALTH_CHECK,
        "retry": Retry(NoBackoff(), 0),
        "single_connection_client": True,
    }
    if not url.startswith("redis+socket:"):
        options |= {"socket_connect_timeout": CONNECT_TIMEOUT, "socket_keepalive": True}
    return Redis.from_url(redis_url(url), **options)


def redis_url(url: str) -> str:
    """The URL for redis-py."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    if "ssl_cert_reqs" in query:
        query["ssl_cert_reqs"] = query["ssl_cert_reqs"].removeprefix("CERT_").lower()
    if "virtual_host" in query:
        query["db"] = query.pop("virtual_host")
    scheme = "unix" if parts.scheme == "redis+socket" else parts.scheme
    return f"{scheme}://{parts.netloc}{parts.path}?{urlencode(query)}"


def celery_url(url: str) -> str:
    """The URL for Celery."""
    if not url.startswith("rediss:") or "ssl_cert_reqs=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"
