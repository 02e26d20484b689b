"""Fault points: closed list, armed by the environment, act at the pass asked for."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from cbtm_common import faults
from cbtm_common.errors import InvalidArgument
from cbtm_common.faults import POINTS, FaultPlan, InjectedFault


def test_an_armed_point_acts_at_its_pass_only() -> None:
    plan = FaultPlan.parse("worker.step.after=raise@3")
    plan.hit("worker.step.after")
    plan.hit("worker.step.after")
    with pytest.raises(InjectedFault, match=r"worker\.step\.after"):
        plan.hit("worker.step.after")
    plan.hit("worker.step.after")


def test_other_points_are_left_alone() -> None:
    plan = FaultPlan.parse("worker.step.after=raise")
    for name in POINTS:
        if name != "worker.step.after":
            plan.hit(name)


@pytest.mark.parametrize("text", ["worker.nowhere=kill", "worker.step.after=explode", "worker.step.after=kill@x"])
def test_a_plan_with_a_typo_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="CBTM_FAULTS"):
        FaultPlan.parse(text)


def test_passing_an_unlisted_point_is_an_error_even_when_unarmed() -> None:
    with pytest.raises(InvalidArgument, match="not listed"):
        faults.point("worker.nowhere")


def test_kill_ends_the_process_at_the_point() -> None:
    code = (
        "from cbtm_common.faults import point\npoint('worker.step.after')\nprint('alive')\npoint('worker.step.after')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"CBTM_FAULTS": "worker.step.after=kill@2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
