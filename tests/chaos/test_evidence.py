"""What a hanging process is shown with: without it a timeout on another machine tells nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.run_fixture import Site

pytestmark = pytest.mark.integration


def test_a_process_that_does_not_end_is_named_with_what_it_wrote_and_its_stacks(tmp_path: Path) -> None:
    with Site(tmp_path, empty=True) as site:
        coordinator = site.start_coordinator()
        with pytest.raises(AssertionError, match=r"\(01-coordinator\.log\) still runs after 1 s") as caught:
            coordinator.wait(1)
        shown = str(caught.value)
        assert "Volunteers join with" in shown
        # Of the main thread, and of the others.
        assert "in run_until_signalled" in shown
        assert "in run_forever" in shown
        assert coordinator.poll() is None, "it goes on"
        site.stop_coordinator()
