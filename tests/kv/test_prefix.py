from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vattention.kv.prefix import PrefixTree, Tokens, common_length

TOKENS = st.lists(st.integers(0, 2), max_size=12).map(tuple)


def common(left: Tokens, right: Tokens) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right))
    )


@given(TOKENS, TOKENS)
def test_common_length(left: Tokens, right: Tokens) -> None:
    assert common_length(left, right) == common(left, right)


def test_rows_that_end_in_the_request_come_before_longer_ones() -> None:
    tree = PrefixTree()
    tree.insert(0, (1, 2, 3, 4, 5), "")
    tree.insert(1, (1, 2, 3), "")
    tree.insert(2, (1, 2), "")
    assert list(tree.matches((1, 2, 3, 9), "")) == [(1, 3), (0, 3), (2, 2)]
    assert list(tree.matches((1, 2, 3, 9), "other")) == []


def test_splits_do_not_outlive_the_rows_that_made_them() -> None:
    tree = PrefixTree()
    tree.insert(0, tuple(range(100)), "")
    for end in range(1, 100):
        tree.insert(end, tuple(range(end)), "")
    for end in range(1, 100):
        tree.remove(end)
    (node,) = tree._roots[""].children.values()
    assert (node.edge, node.children) == (tuple(range(100)), {})
    tree.remove(0)
    assert tree._roots == {}


class TreeMachine(RuleBasedStateMachine):
    """Rows come, change and go; what is found is what comparing with each would find."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = PrefixTree()
        self.model: dict[int, tuple[Tokens, str]] = {}

    @rule(row=st.integers(0, 9), tokens=TOKENS, salt=st.sampled_from(["", "a"]))
    def insert(self, row: int, tokens: Tokens, salt: str) -> None:
        self.tree.insert(row, tokens, salt)
        self.model[row] = tokens, salt

    @rule(row=st.integers(0, 9))
    def remove(self, row: int) -> None:
        self.tree.remove(row)
        self.model.pop(row, None)

    @rule(tokens=TOKENS, salt=st.sampled_from(["", "a"]))
    def find(self, tokens: Tokens, salt: str) -> None:
        found = list(self.tree.matches(tokens, salt))
        expected = {
            row: length
            for row, (own, where) in self.model.items()
            if where == salt and (length := common(own, tokens))
        }
        assert dict(found) == expected
        assert len(found) == len(expected)
        lengths = [length for _, length in found]
        assert lengths == sorted(lengths, reverse=True)

    @invariant()
    def no_empty_or_needless_nodes(self) -> None:
        assert len(self.tree) == sum(bool(tokens) for tokens, _ in self.model.values())
        nodes = [child for root in self.tree._roots.values() for child in root.children.values()]
        while nodes:
            node = nodes.pop()
            assert node.rows == node.ends.union(*(child.rows for child in node.children.values()))
            assert node.ends or len(node.children) > 1
            nodes += node.children.values()


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
