"""The credential of a worker: replaced before it ends, kept while the coordinator is away, asked for by one thread."""

from __future__ import annotations

import threading
from collections import deque
from datetime import UTC, datetime
from typing import Any

import pytest

from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import Unauthenticated, Unavailable
from cbtm_common.keys import SignedRequest, new_key, public_key_of
from cbtm_common.protos import duration
from cbtm_worker.credential import WorkerCredential
from cbtm_worker.identity import Identity

LIFE = 900.0


class Coordinator:
    """Answers with "c1", "c2", … unless `answers` has an error; notes what it was shown."""

    def __init__(self) -> None:
        self.key = new_key()
        self.now = 1000.0
        self.behind = 0.0
        self.shown: list[SignedRequest] = []
        self.answers: deque[Exception] = deque()

    def issue(self, authorization: str) -> ws.IssueCredentialResponse:
        signed = SignedRequest(authorization.removeprefix("Signature "))
        assert signed.is_by(public_key_of(self.key))
        self.shown.append(signed)
        if self.answers:
            raise self.answers.popleft()
        return ws.IssueCredentialResponse(credential=f"c{len(self.shown)}", life=duration(LIFE))

    def credential(self) -> WorkerCredential:
        identity = Identity(worker_id="worker_1", private_key=self.key.hex())
        clock: dict[str, Any] = {"clock": lambda: self.now - self.behind, "monotonic": lambda: self.now}
        return WorkerCredential(identity, self.issue, **clock)


@pytest.fixture
def there() -> Coordinator:
    return Coordinator()


def test_one_is_used_for_two_thirds_of_its_life(there: Coordinator) -> None:
    credential = there.credential()
    assert credential.bearer() == "c1"
    there.now += LIFE * 2 / 3 - 1
    assert credential.bearer() == "c1"
    there.now += 1
    assert credential.bearer() == "c2"


def test_each_signature_is_of_a_later_time_also_when_the_clock_goes_back(there: Coordinator) -> None:
    credential = there.credential()
    for behind in (0.0, 500.0, 1000.0):
        there.behind = behind
        credential.refused(credential.bearer())
    times = [signed.time_us for signed in there.shown]
    assert times == sorted(set(times))


def test_while_the_coordinator_is_away_the_old_one_is_used_as_long_as_it_is_good(there: Coordinator) -> None:
    credential = there.credential()
    credential.bearer()
    there.now += LIFE - 20
    there.answers += [Unavailable("away")] * 3
    assert credential.bearer() == credential.bearer() == "c1"
    # It was asked once, and will be again in a while.
    assert len(there.shown) == 2
    there.now += 10
    assert credential.bearer() == "c1"
    there.now += 10
    with pytest.raises(Unavailable):
        credential.bearer()
    assert credential.bearer() == "c5"


def test_a_refused_one_is_replaced_at_once(there: Coordinator) -> None:
    credential = there.credential()
    assert credential.refused(credential.bearer())
    assert credential.bearer() == "c2"
    # Another thread that was refused with the former one does not throw the new one away.
    credential.refused("c1")
    assert credential.bearer() == "c2"


@pytest.mark.parametrize("behind", [86_400.0, -86_400.0])
def test_a_wrong_clock_is_set_by_what_the_coordinator_says(there: Coordinator, behind: float) -> None:
    there.behind = behind
    told = {"server_time": datetime.fromtimestamp(there.now, UTC).isoformat(), "last_time_us": "5"}
    there.answers.append(Unauthenticated("clock", metadata=told))
    credential = there.credential()
    assert credential.bearer() == "c2"
    assert there.shown[-1].time_us == int(1e6 * there.now)
    credential.refused("c2")
    there.now += 1
    assert credential.bearer() == "c3"


def test_a_key_that_is_not_known_any_more_is_told(there: Coordinator) -> None:
    there.answers.append(Unauthenticated("no worker that is known here"))
    with pytest.raises(Unauthenticated, match="no worker"):
        there.credential().bearer()


def test_threads_that_need_one_at_once_ask_once(there: Coordinator) -> None:
    credential = there.credential()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(credential.bearer())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == ["c1"] * 8
