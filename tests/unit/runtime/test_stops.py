import hypothesis
import hypothesis.strategies as st
from internvl_runtime.server import stops


def shown(pieces, stop):
    finder = stops.StopFinder(stop)
    text = "".join(finder.push(piece) for piece in pieces) + finder.push("", final=True)
    return text, finder.is_found


def test_a_stop_text_across_pieces_is_cut_out():
    assert shown(["Hello ST", "O", "P there"], ["STOP"]) == ("Hello ", True)


def test_text_that_only_began_like_a_stop_is_shown_in_the_end():
    assert shown(["Hello ST", "O"], ["STOP"]) == ("Hello STO", False)


def test_text_that_may_become_a_stop_is_kept():
    finder = stops.StopFinder(["STOP"])
    assert finder.push("Hello ST") == "Hello "
    assert finder.push("ARS") == "STARS"[:4]


def test_the_earliest_stop_counts():
    assert shown(["abc def"], ["def", "bc"]) == ("a", True)


texts = st.text(alphabet="ab", max_size=12)


@hypothesis.given(st.lists(texts, max_size=8), st.lists(texts.filter(bool), max_size=3))
def test_pieces_show_what_the_whole_text_shows(pieces, stop):
    whole = "".join(pieces)
    ends = [whole.find(one) for one in stop if one in whole]
    # Found piece by piece, a stop counts as soon as it is complete.
    text, is_found = shown(pieces, stop)
    assert is_found == bool(ends)
    assert whole.startswith(text)
    if not is_found:
        assert text == whole
    else:
        assert not any(one in text for one in stop)
