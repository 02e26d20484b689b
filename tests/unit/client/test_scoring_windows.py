from __future__ import annotations

import math

import pytest

from cbtm._results import Score, perplexity_of
from cbtm._scoring import windows


@pytest.mark.parametrize("length", [2, 7, 8, 9, 10, 23, 64])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 3), (8, 1), (1, 1), (100, 50)])
@pytest.mark.parametrize("first", [1, 5, 17])
def test_windows_score_every_position_once_with_enough_before_it(
    length: int, window: int, stride: int, first: int
) -> None:
    seen: list[int] = []
    for view in windows(0, length, first, window=window, stride=stride):
        assert 0 <= view.start < view.begin <= view.last < length
        assert view.last - view.start <= window
        for position in range(view.begin, view.last + 1):
            before = position - view.start
            assert before == position or before > window - stride
            seen.append(position)
    assert seen == list(range(first, length))


def test_a_short_text_is_one_window() -> None:
    assert len(list(windows(0, 9, 1, window=8, stride=4))) == 1


def test_perplexity_is_exp_of_the_mean_negative_log_probability() -> None:
    score = Score(token_ids=(1, 2), token_log_probs=(math.log(0.5), math.log(0.125)))
    assert score.perplexity == pytest.approx(4.0)
    assert math.isnan(perplexity_of(0.0, 0))
    assert perplexity_of(-1e9, 1) == math.inf
