"""What a volunteer reads."""

from __future__ import annotations

import io

from rich.console import Console

from cbtm_worker.display import Display, TaskView
from cbtm_worker.speed import Speed


def view(**changes: object) -> TaskView:
    values: dict[str, object] = {"run": "demo", "what": "cluster 3", "total_steps": 1500, "phase": "train"}
    return TaskView(**{**values, **changes})  # type: ignore[arg-type]


def test_a_line_says_what_is_done_how_fast_and_what_is_safe() -> None:
    line = view(
        step=1234, loss=3.14159, tokens_per_second=5678.9, seconds_left=125.0, saved_step=1000, lease_seconds=17.6
    ).line()
    expected = "demo/cluster 3  step 1,234/1,500  loss 3.142  5,679 tokens/s  2 min 05 s left  saved 1,000  lease 18 s"
    assert line == expected


def test_before_the_first_step_there_is_neither_loss_nor_speed() -> None:
    line = view(phase="download", fetched_bytes=1536, lease_seconds=20.0).line()
    assert line == "demo/cluster 3  step 0/1,500  saved 0  download 1.5 KiB  lease 20 s"


def test_an_upload_shows_how_far_it_is_and_never_more_than_all_of_it() -> None:
    assert "upload of 900: 512 B of 1.0 KiB" in view(sending=(900, 512, 1024)).line()
    assert "upload of 900: 1.0 KiB of 1.0 KiB" in view(sending=(900, 4096, 1024)).line()


def test_a_coordinator_that_is_silent_is_named_in_place_of_the_lease() -> None:
    line = view(silent_seconds=75.0, lease_seconds=-15.0).line()
    assert "no answer from the coordinator for 1 min 15 s" in line
    assert "lease" not in line


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_away_from_a_terminal_there_is_a_plain_line_every_few_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    with Display(Console(file=out, width=200), clock=clock) as display:
        for tenth in range(121):
            clock.now = tenth / 10
            display.show(view(step=tenth))
        display.say("[brackets] stay")
    lines = out.getvalue().splitlines()
    assert [line.split("step ")[1].split("/")[0] for line in lines[:-1]] == ["0", "50", "100"]
    assert lines[-1] == "[brackets] stay"


def test_on_a_terminal_the_line_is_live() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=200, force_terminal=True)
    with Display(console, clock=clock) as display:
        display.show(view(step=1))
        clock.now = 0.3
        display.show(view(step=2))
        display.say("a message")
    assert "step 1/" in out.getvalue()
    assert "step 2/" in out.getvalue()
    assert "a message" in out.getvalue()


class Closed(io.StringIO):
    """A terminal that is gone."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    display = Display(Console(file=Closed()))
    display.say("nobody reads this")
    display.show(view())
    display.say("nor this")


def test_speed_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    speed = Speed(clock)
    assert speed.tokens_per_second == 0.0
    _run(speed, clock, seconds=20, tokens=100)
    assert speed.tokens_per_second == 100
    _run(speed, clock, seconds=20, tokens=300)
    assert 280 <= speed.tokens_per_second <= 300


def _run(speed: Speed, clock: Clock, *, seconds: int, tokens: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        speed.add(tokens)
