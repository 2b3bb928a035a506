"""Make a regular expression one that is followed from left to right, with a look at one character on either side.

Only whether there is a match counts, not how long it is. So what gives nothing back may give it back at the end of a
pattern, and what must follow a match can be read as a part of it.
"""

from __future__ import annotations

from mara_integrations.engine.patterns.syntax import refused
from mara_integrations.engine.patterns.tree import (
    END,
    NEWLINE,
    Atomic,
    Beside,
    Beyond,
    Chain,
    Characters,
    Either,
    LineEnd,
    Look,
    Node,
    Read,
    Repeat,
)


def simplified(node: Node, shown: str, *, is_last: bool = True) -> Node:
    """Return a tree of `Read`, `Beside`, `Chain`, `Either`, `Repeat` and `Beyond` that matches in the same texts.

    Args:
        node: The tree.
        shown: What messages call the pattern.
        is_last: Whether nothing of the pattern comes after it.

    Raises:
        ConfigError: If there is none.
    """
    if isinstance(node, Chain):
        last = len(node.parts) - 1
        return Chain(tuple(simplified(part, shown, is_last=is_last and i == last) for i, part in enumerate(node.parts)))
    if isinstance(node, Either):
        return Either(tuple(simplified(branch, shown, is_last=is_last) for branch in node.branches))
    if isinstance(node, Repeat):
        return _repeat(node, shown, is_last)
    if isinstance(node, Atomic):
        if not is_last and _one_character(node.item) is None:
            raise refused(shown, "an atomic group, (?>...), before its end", hint="write it as (?:...)")
        return simplified(node.item, shown, is_last=is_last)
    if isinstance(node, LineEnd):
        if not is_last:
            raise refused(shown, "$ before its end", hint="begin with (?m) for the ends of lines, or write \\Z")
        return Either((END, Chain((Read(NEWLINE), END))))
    return _look(node, shown, is_last) if isinstance(node, Look) else node


def _repeat(node: Repeat, shown: str, is_last: bool) -> Node:
    item = simplified(node.item, shown, is_last=is_last and node.most == 1)
    if not node.is_possessive or is_last:
        return Repeat(item, node.least, node.most)
    characters = _one_character(item)
    if characters is None:
        raise refused(shown, "a possessive group, as (...)++, before its end", hint="write it without the second sign")
    if node.most == node.least:
        return Repeat(item, node.least, node.most)
    ends = Beside(characters, is_ahead=True, is_in=False)
    if node.most is None:
        return Chain((Repeat(item, node.least, None), ends))
    fewer = Chain((Repeat(item, node.least, node.most - 1), ends))
    return Either((fewer, Repeat(item, node.most, node.most)))


def _look(node: Look, shown: str, is_last: bool) -> Node:
    choices = _looks(node.item, node.is_ahead)
    if choices is not None:
        if node.is_positive:
            return Either(choices)
        return Chain(tuple(Beside(one.characters, one.is_ahead, not one.is_in) for one in choices))
    if node.is_ahead and node.is_positive and is_last:
        return Beyond(simplified(node.item, shown))
    raise refused(
        shown,
        f"a look {'ahead' if node.is_ahead else 'back'} at more than one character",
        hint="write what stands before or behind as a part of the pattern",
    )


def _looks(item: Node, is_ahead: bool) -> tuple[Beside, ...] | None:
    """Return the looks at one character that a longer one chooses from; None if it is none."""
    if isinstance(item, Either):
        found = [_looks(branch, is_ahead) for branch in item.branches]
        return None if None in found else tuple(one for looks in found for one in looks or ())
    if isinstance(item, Beside):
        return (item,) if item.is_ahead == is_ahead else None
    characters = _one_character(item)
    return None if characters is None else (Beside(characters, is_ahead, is_in=True),)


def _one_character(item: Node) -> Characters | None:
    return item.characters if isinstance(item, Read) else None
