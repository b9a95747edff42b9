"""The command line `qmqp-relay`: the queue, the checks, the web pages and the standalone relay."""
