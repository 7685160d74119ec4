"""The drawn plan: every edge can be followed with a finger."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.views import graph


@st.composite
def plans(draw):
    count = draw(st.integers(1, 12))
    return {
        str(i): draw(st.lists(st.sampled_from([str(j) for j in range(i)]), max_size=3, unique=True)) if i else []
        for i in range(count)
    }


def followed(lines: list[str]) -> list[set[int]]:
    """For each line the earlier ones whose lanes reach its node, read back from the characters alone."""
    owner: dict[int, int] = {}
    found = []
    for number, line in enumerate(lines):
        node = line.index("●")
        lanes = {i: sign for i, sign in enumerate(line) if sign in "├╰┼┴"}
        found.append({owner[i] for i in lanes})
        assert all(i < node for i in lanes)
        if lanes:
            between = line[min(lanes) : node]
            assert set(between[1::2]) <= {"─"}
        for i, sign in enumerate(line):
            assert sign not in "│" or i in owner
        owner = {i: n for i, n in owner.items() if i < len(line) and line[i] in "├┼│"}
        owner[node] = number
    return found


@given(plans())
def test_the_drawing_can_be_read_back(reads):
    lines = graph.draw(reads)
    assert followed(list(lines.values())) == [{int(other) for other in others} for others in reads.values()]


@given(plans())
def test_without_unicode_it_has_the_same_shape(reads):
    plain, fine = graph.draw(reads, graph.ASCII), graph.draw(reads)
    assert all(line.isascii() for line in plain.values())
    assert [len(line) for line in plain.values()] == [len(line) for line in fine.values()]


def test_lanes_are_used_again():
    reads = {"teacher": []}
    for i in range(50):
        reads |= {f"student{i}": ["teacher"], f"quality{i}": [f"student{i}"]}
    assert max(map(len, graph.draw(reads).values())) == 5
