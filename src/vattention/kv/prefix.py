"""Which rows hold which tokens: a radix tree over the tokens of all rows, one for each salt.

The idea of a radix tree over cached prefixes is SGLang's RadixAttention (arXiv 2312.07104, section 3). There a node
owns memory; here memory belongs to rows of the virtual range, and a node names the rows that begin with its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Node:
    """A run of tokens behind those of its parent.

    Attributes:
        edge: the run; the children's first tokens differ.
        depth: tokens from the root to the end of the edge.
        rows: that have all these tokens, their own and their ancestors'.
        ends: those of `rows` that have no more.
    """

    edge: Tokens
    depth: int
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    rows: set[int] = field(default_factory=set)
    ends: set[int] = field(default_factory=set)


class PrefixTree:
    """Rows by the tokens they begin with. Finding and changing cost comparisons of runs, not of single tokens."""

    def __init__(self) -> None:
        self._roots: dict[str, _Node] = {}
        self._ends: dict[int, tuple[str, _Node]] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def insert(self, row: int, tokens: Sequence[int], salt: str) -> None:
        """`row` has these tokens now, and no other ones."""
        self.remove(row)
        if not tokens:
            return
        tokens = tuple(tokens)
        node = self._roots.setdefault(salt, _Node((), 0, None))
        while node.depth < len(tokens):
            child = node.children.get(tokens[node.depth])
            if child is None:
                child = _Node(tokens[node.depth :], len(tokens), node)
                node.children[tokens[node.depth]] = child
            else:
                common = common_length(child.edge, tokens[node.depth : child.depth])
                if common < len(child.edge):
                    child = _split(child, common)
            child.rows.add(row)
            node = child
        node.ends.add(row)
        self._ends[row] = salt, node

    def remove(self, row: int) -> None:
        """Forget a row, if it is known."""
        if row not in self._ends:
            return
        salt, node = self._ends.pop(row)
        node.ends.remove(row)
        while node.parent is not None:
            parent = node.parent
            node.rows.remove(row)
            if not node.rows:
                del parent.children[node.edge[0]]
            elif len(node.children) == 1 and not node.ends:
                _join(node)
            node = parent
        if not node.children:
            del self._roots[salt]

    def matches(self, tokens: Tokens, salt: str) -> Iterator[tuple[int, int]]:
        """Yield (row, how many first tokens it has in common with `tokens`) for all rows that have any, longest
        first, and among equals first those that have no more tokens than that.
        """
        path: list[tuple[_Node, int]] = []
        node = self._roots.get(salt)
        while node is not None and node.depth < len(tokens):
            child = node.children.get(tokens[node.depth])
            if child is None:
                break
            common = node.depth + common_length(child.edge, tokens[node.depth : child.depth])
            path.append((child, common))
            if common < child.depth:
                break
            node = child
        below = None
        for node, common in reversed(path):
            if common < node.depth:
                yield from ((row, common) for row in node.rows)
            else:
                yield from ((row, common) for row in node.ends)
                for child in node.children.values():
                    if child is not below:
                        yield from ((row, common) for row in child.rows)
            below = node


def common_length(left: Tokens, right: Tokens) -> int:
    """How many first tokens two runs have in common."""
    count = min(len(left), len(right))
    if left[:count] == right[:count]:
        return count
    # Halving keeps the comparisons inside the interpreter's own loops.
    equal, differs = 0, count
    while differs - equal > 1:
        middle = (equal + differs) // 2
        if left[equal:middle] == right[equal:middle]:
            equal = middle
        else:
            differs = middle
    return equal


def _split(node: _Node, count: int) -> _Node:
    """Give the first `count` tokens of a node's edge a node of their own, and return it."""
    assert node.parent is not None
    upper = _Node(node.edge[:count], node.depth - len(node.edge) + count, node.parent, rows=set(node.rows))
    node.parent.children[node.edge[0]] = upper
    node.edge, node.parent = node.edge[count:], upper
    upper.children[node.edge[0]] = node
    return upper


def _join(node: _Node) -> None:
    """Make one of a node where no row ends and its only child: otherwise splits would outlive their reason."""
    (child,) = node.children.values()
    assert node.parent is not None
    child.edge, child.parent = node.edge + child.edge, node.parent
    node.parent.children[child.edge[0]] = child
