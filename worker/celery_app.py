"""The Celery application of a worker (docs/design.md says where each value comes from)."""

from celery import Celery
from kombu.entity import Exchange, Queue

from relay.broker import CONNECT_TIMEOUT, HEALTH_CHECK, KEY_PREFIX, celery_url
from relay.hints import FRESH, QUEUES
from relay.settings import Settings


def celery_app(settings: Settings) -> Celery:
    """The application, without a connection."""
    app = Celery("qmqp-relay", set_as_current=True)
    app.conf.update(
        broker_url=celery_url(settings.broker_url),
        result_backend=None,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[Queue(name, exchange=Exchange("mail"), routing_key=name) for name in QUEUES],
        task_default_queue=FRESH,
        task_create_missing_queues=False,
        task_acks_late=False,
        worker_pool="threads",
        worker_concurrency=4,  # tasks only wait; WORKER_CONNECTIONS limits sending
        # Not worker_disable_prefetch: with early ack nothing wakes the consumer when a task ends.
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_disable_rate_limits=True,
        worker_send_task_events=False,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": KEY_PREFIX,
            "socket_timeout": 5,
            "socket_connect_timeout": CONNECT_TIMEOUT,
            "socket_keepalive": True,
            "health_check_interval": HEALTH_CHECK,
            "ack_emulation": False,
        },
        timezone="UTC",
    )
    return app
