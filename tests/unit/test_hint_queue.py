"""The queue of hints: fresh mail and retries take turns, and a batch ends."""

from worker.producer import HintBatch, HintQueue


def filled(**queues: int) -> tuple[HintQueue, dict[str, HintBatch]]:
    hints, batches = HintQueue(), {}
    for queue, count in queues.items():
        batches[queue] = HintBatch()
        hints.add(batches[queue], [f"{queue}{n}" for n in range(count)], queue)
    return hints, batches


def test_fresh_mail_and_retries_take_turns() -> None:
    hints, _ = filled(fresh=3, retry=3)
    assert [queue_id for queue_id, _ in hints.take(4)] == ["fresh0", "retry0", "fresh1", "retry1"]
    assert len(hints) == 2


def test_an_empty_queue_does_not_delay_the_other() -> None:
    hints, _ = filled(retry=3)
    assert [queue_id for queue_id, _ in hints.take(9)] == ["retry0", "retry1", "retry2"]
    assert hints.take(9) == []


def test_a_batch_ends_when_its_last_hint_is_used() -> None:
    hints, batches = filled(fresh=2, retry=1)
    hints.use(hints.take(2))
    assert (batches["fresh"].wait(0), batches["retry"].wait(0)) == (False, True)
    assert hints.batches == {batches["fresh"]}
    hints.use(hints.take(2))
    assert batches["fresh"].wait(0)


def test_dropping_hints_ends_all_batches() -> None:
    hints, batches = filled(fresh=5, retry=5)
    taken = hints.take(3)
    hints.drop()
    assert all(batch.wait(0) for batch in batches.values())
    assert not hints
    hints.use(taken)
    assert hints.batches == set()


def test_an_unknown_queue_counts_as_fresh_mail() -> None:
    hints, _ = filled(other=1)
    assert hints.take(1)[0][0] == "other0"


def test_a_batch_in_several_queues_ends_with_its_last_hint() -> None:
    batch, queues = HintBatch(), [HintQueue() for _ in range(2)]
    for hints in queues:
        hints.add(batch, ["a"], "fresh")
        assert not batch.wait(0)
    queues[0].use(queues[0].take(1))
    assert not batch.wait(0)
    queues[1].use(queues[1].take(1))
    assert batch.wait(0)
