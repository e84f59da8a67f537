"""When it is a node's fault that a trial fails, and when it is the trial's."""

from search.tuning.node_health import NodeHealth

TWO = {"10.0.0.1": "a", "10.0.0.2": "b"}


def test_a_trial_that_fails_is_tried_on_another_node_once() -> None:
    health = NodeHealth(lambda: TWO)
    assert health.avoided_by(4) == []
    assert health.note_failure("10.0.0.2", 4)
    assert health.avoided_by(4) == ["b"]
    assert health.avoided_by(5) == []
    # There it fails, too: it is the trial.
    assert not health.note_failure("10.0.0.1", 4)


def test_a_node_is_left_alone_once_two_trials_have_got_on_elsewhere() -> None:
    health = NodeHealth(lambda: TWO)
    for number in (4, 7):
        assert health.note_failure("10.0.0.2", number)
    assert health.note_report(4) == []
    assert health.avoided_by(9) == []
    assert health.note_report(7) == ["10.0.0.2"]
    assert health.avoided_by(9) == ["b"]


def test_one_trial_that_fails_again_and_again_does_not_condemn_a_node() -> None:
    health = NodeHealth(lambda: TWO)
    for _ in range(9):
        health.note_failure("10.0.0.2", 4)
        assert health.note_report(4) == []
    assert health.avoided_by(9) == []


def test_where_there_is_one_node_nothing_is_tried_elsewhere_or_left_alone() -> None:
    health = NodeHealth(lambda: {"127.0.0.1": "a"})
    for number in (1, 2, 3):
        assert not health.note_failure("127.0.0.1", number)
        assert health.avoided_by(number) == []
        assert health.note_report(number) == []


def test_the_last_node_is_not_left_alone() -> None:
    nodes = dict(TWO)
    health = NodeHealth(lambda: nodes)
    for number in (4, 7):
        health.note_failure("10.0.0.2", number)
        health.note_report(number)
    assert health.avoided_by(9) == ["b"]
    assert health.is_alone("10.0.0.1")
    del nodes["10.0.0.1"]
    assert health.avoided_by(9) == []


def test_a_node_that_is_started_anew_is_another() -> None:
    nodes = dict(TWO)
    health = NodeHealth(lambda: nodes)
    for number in (4, 7):
        health.note_failure("10.0.0.2", number)
        health.note_report(number)
    nodes["10.0.0.2"] = "b, started anew"
    assert not health.is_alone("10.0.0.1")
