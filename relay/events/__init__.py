"""Events: what became of mail, for programs that must know it (docs/webhooks.md).

A trigger writes an event into the outbox `events` in the statement that makes the outcome, while
there is a row in `subscriptions`; a second trigger gives each subscription that wants it a row in
`notifications`. A worker delivers those (`worker.notifier`).
"""
