"""40 kills at random moments over every command that writes, recipes included: the same command gives the same result."""

import pytest
from kills import COMMANDS, run


@pytest.mark.slow
def test_the_same_command_gives_the_same_result(tmp_path):
    assert sum(kills for _, kills in COMMANDS.values()) == 40
    assert not run(tmp_path)


@pytest.mark.slow
def test_a_kill_of_train_tasks(tmp_path):
    """The quick part of it."""
    assert not run(tmp_path, names=["tasks"], kills=3)
