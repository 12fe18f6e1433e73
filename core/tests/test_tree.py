"""Equal paths are one node, and what nothing counts on is free."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from unspool.tree import NONE, Tree


def test_children_of_one_parent_have_different_tokens() -> None:
    tree = Tree(lambda node: None)
    root = tree.root([7, 8])
    child = tree.grow(root, 3)
    assert tree.child(root, 3) == child
    assert tree.child(root, 4) is None
    assert tree.path(child).tolist() == [7, 8, 3]
    assert tree.new_tokens(child) == (3,)
    assert (tree.length[root], tree.length[child], tree.path_length(child)) == (0, 1, 3)


def test_a_node_lives_as_long_as_something_counts_on_it_and_frees_its_ancestors_with_it() -> None:
    freed: list[int] = []
    tree = Tree(freed.append)
    root = tree.root([1])
    a = tree.grow(root, 1)
    b = tree.grow(a, 2)
    c = tree.grow(a, 3)
    tree.release(a)
    tree.release(b)
    assert freed == [b], "a has a child that lives"
    tree.hold(c)
    tree.release(c)
    assert freed == [b]
    tree.release(c)
    assert freed == [b, c, a], "the root is counted on by its request"
    tree.release(root)
    assert len(tree) == 0


def test_a_number_is_given_again_only_after_recycling() -> None:
    tree = Tree(lambda node: None)
    root = tree.root([1])
    node = tree.grow(root, 1)
    tree.release(node)
    other = tree.grow(root, 1)
    assert other != node
    tree.recycle()
    assert tree.grow(root, 2) == node


class TreeBesideDictionaries(RuleBasedStateMachine):
    """A tree does what a dictionary of paths does."""

    def __init__(self) -> None:
        super().__init__()
        self.freed: set[int] = set()
        self.tree = Tree(self.freed.add)
        self.path: dict[int, tuple[int, ...]] = {}
        self.count: dict[int, int] = {}
        self.roots = 0

    def some(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.path)))

    @rule(prompt=st.lists(st.integers(0, 3), min_size=1, max_size=3))
    def root(self, prompt: list[int]) -> None:
        node = self.tree.root(prompt)
        self.roots += 1
        self.path[node] = (-self.roots, *prompt)
        self.count[node] = 1

    @precondition(lambda self: self.path)
    @rule(data=st.data(), token=st.integers(0, 2))
    def grow(self, data: st.DataObject, token: int) -> None:
        parent = self.some(data)
        known = [node for node, path in self.path.items() if path == (*self.path[parent], token)]
        assert self.tree.child(parent, token) == (known[0] if known else None)
        if known:
            self.tree.hold(known[0])
            self.count[known[0]] += 1
        else:
            node = self.tree.grow(parent, token)
            assert node not in self.path
            self.path[node], self.count[node] = (*self.path[parent], token), 1

    @precondition(lambda self: any(self.count.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(node for node, count in self.count.items() if count)))
        self.freed.clear()
        self.count[node] -= 1
        self.tree.release(node)
        alive = {
            n
            for n in self.path
            if any(c and self.path[m][: len(self.path[n])] == self.path[n] for m, c in self.count.items())
        }
        assert self.freed == set(self.path) - alive
        for gone in self.freed:
            del self.path[gone], self.count[gone]

    @rule()
    def recycle(self) -> None:
        self.tree.recycle()

    @invariant()
    def paths_are_right(self) -> None:
        assert len(self.tree) == len(self.path)
        for node, path in self.path.items():
            assert self.tree.path(node).tolist() == list(path[1:])
            parent = self.tree.parent[node]
            assert parent == NONE or self.path[parent] == path[:-1]


TestTreeBesideDictionaries = TreeBesideDictionaries.TestCase
TestTreeBesideDictionaries.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
