from internvl_operator.conditions import Condition, Type, list_transitions, roll_up, write


def valid(status=True, reason="Valid", message="m", **options):
    return Condition(type=Type.VALIDATED, status=status, reason=reason, message=message, **options)


def test_a_time_changes_only_with_its_status():
    first = write([valid()], previous=[], generation=1, now="t1")
    same = write([valid(message="other")], previous=first, generation=2, now="t2")
    flipped = write([valid(status=False, reason="Bad")], previous=same, generation=3, now="t3")

    times = [written[0]["lastTransitionTime"] for written in (first, same, flipped)]
    assert times == ["t1", "t1", "t3"]
    assert flipped[0]["observedGeneration"] == 3


def test_ready_repeats_the_first_child_that_is_not():
    children = [valid(), valid(status=False, reason="Bad", message="why")]
    ready = roll_up(children)
    assert (ready.type, ready.status, ready.reason, ready.message) == ("Ready", False, "Bad", "why")


def test_an_unknown_child_keeps_ready_false():
    assert roll_up([valid(status=None)]).status is False


def test_an_event_is_told_once_per_change():
    before = write([valid()], previous=[], generation=1, now="t")

    assert list_transitions([valid()], previous=before) == []
    (event,) = list_transitions(
        [valid(status=False, reason="Bad", is_failure=True)], previous=before
    )
    assert (event.reason, event.is_warning) == ("Bad", True)


def test_what_nobody_can_tell_yet_is_no_event():
    assert list_transitions([valid(status=None, reason="Waiting")], previous=[]) == []
