"""The public name of the built-in metrics, which `loraf_train.grading.builtin` defines."""

from loraf_train.grading.builtin import (
    DEFAULT_NEW_TOKENS,
    LOWER_IS_BETTER,
    MEAN,
    OWN_METRIC_NEW_TOKENS,
    exact_match,
    expected_answer,
    first_choice,
    is_right,
    stated_number,
    wilson_interval,
)

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "LOWER_IS_BETTER",
    "MEAN",
    "OWN_METRIC_NEW_TOKENS",
    "exact_match",
    "expected_answer",
    "first_choice",
    "is_right",
    "stated_number",
    "wilson_interval",
]
