"""What an experiment refuses before the work."""

import pytest

from tnt_jax.experiments import experiment
from tnt_jax.runtime.errors import UsageError


def test_there_is_a_round_at_least():
    with pytest.raises(UsageError, match=r"^NUM_ROUNDS: expected at least 1, found 0\.$"):
        experiment.check_rounds(0)
