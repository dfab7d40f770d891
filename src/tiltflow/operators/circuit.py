"""Circuits as text: parse, and draw."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeAlias, final

from tiltflow.errors import ConfigError
from tiltflow.operators.gates import (
    Circuit,
    Contrast,
    Gate,
    Interpolation,
    Intersection,
    Prior,
    Union,
)
from tiltflow.potential import Potential

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)|(?P<word>[^\W\d]\w*)|(?P<sign>[&|\u2227\u2228*(),\[\]-]))"
)
_SIGNS = {"\u2227": "&", "\u2228": "|"}  # logical and, logical or
_WORDS: dict[str, Callable[..., Gate]] = {
    "intersection": Intersection, "union": Union, "interpolation": Interpolation,
    "interpolation_w1": functools.partial(Interpolation, power=1), "contrast": Contrast,
}  # fmt: skip


def circuit(
    text: str,
    models: Iterable[str] | None = None,
    rewards: Mapping[str, Potential] | None = None,
) -> Circuit:
    """Read a circuit::

        a | b & c             & binds most strongly, then -, then |
        0.3*a & 0.7*b         weights; 1 where none is written
        (a & b) & c           nested: exponents 1/4, 1/4, 1/2; a & b & c has 1/3 each
        a - b                 a and not b
        interpolation(a, b)   also interpolation_w1(...), intersection(...), union(...), ...
        (a & b)[lean] | c     a gate with the reward that is called lean

    Args:
        text: the expression; ``∧`` and ``∨`` are read as ``&`` and ``|``.
        models: names that may be used; any if not given.
        rewards: of gates, by name.

    Raises:
        ConfigError: with the position, for anything that is not a circuit, and for unknown names.
    """
    reader = _Reader(text, None if models is None else tuple(models), rewards or {})
    return reader.whole()


@final
@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    where: int


_Weighted: TypeAlias = tuple[float, Circuit]


def _gate(kind: Callable[..., Gate], parts: list[_Weighted]) -> Gate:
    return kind(*(part for _, part in parts), weights=[weight for weight, _ in parts])


@final
class _Reader:
    """Recursive descent, one method per level of precedence."""

    def __init__(
        self, text: str, models: tuple[str, ...] | None, rewards: Mapping[str, Potential]
    ) -> None:
        self.text, self.models, self.rewards, self.at = text, models, rewards, 0
        self.tokens: list[_Token] = []
        end = 0
        while text[end:].strip():
            match = _TOKEN.match(text, end)
            if match is None:
                where = end + len(text[end:]) - len(text[end:].lstrip())
                self._refuse(where, f"{text[where]!r} has no meaning here")
            assert match.lastgroup is not None
            word = match[match.lastgroup]
            self.tokens.append(
                _Token(match.lastgroup, _SIGNS.get(word, word), match.start(match.lastgroup))
            )
            end = match.end()

    def whole(self) -> Circuit:
        """The circuit, with nothing left."""
        weight, found = self._union()
        if self.at < len(self.tokens):
            self.fail("expected &, |, - or the end")
        if weight != 1:
            self._refuse(0, f"the weight {weight:g} is of no gate")
        return found

    def _union(self) -> _Weighted:
        return self._row("|", Union, self._difference)

    def _difference(self) -> _Weighted:
        left = self._intersection()
        while self._takes("-"):
            right = self._intersection()
            left = 1.0, Contrast(left[1], right[1], weights=(left[0], right[0]))
        return left

    def _intersection(self) -> _Weighted:
        return self._row("&", Intersection, self._weighted)

    def _row(
        self, sign: str, gate: Callable[..., Gate], part: Callable[[], _Weighted]
    ) -> _Weighted:
        """Parts between signs, under one gate; a single part as it is."""
        found = [part()]
        while self._takes(sign):
            found.append(part())
        return found[0] if len(found) == 1 else (1.0, _gate(gate, found))

    def _weighted(self) -> _Weighted:
        if self._kind() != "number":
            return 1.0, self._atom()
        token = self._take()
        if float(token.text) <= 0:
            self._refuse(token.where, f"the weight {token.text} must be positive")
        if not self._takes("*"):
            self.fail("expected * after a weight")
        return float(token.text), self._atom()

    def _atom(self) -> Circuit:
        if self._takes("("):
            weight, inner = self._union()
            if not self._takes(")"):
                self.fail("expected )")
            if weight != 1:
                self._refuse(0, f"the weight {weight:g} is of no gate: write it before the (")
            return self._guided(inner)
        if self._kind() != "word":
            self.fail("expected a model, a gate or (")
        token = self._take()
        if token.text in _WORDS and self._takes("("):
            return self._guided(self._called(token))
        if self.models is not None and token.text not in self.models:
            known = ", ".join(self.models) or "none"
            self._refuse(token.where, f"there is no model {token.text!r} (models: {known})")
        return self._guided(Prior(token.text))

    def _guided(self, inner: Circuit) -> Circuit:
        """With the reward whose name follows in brackets, if one does."""
        opening = self.at
        if not self._takes("["):
            return inner
        if not isinstance(inner, Gate) or inner.reward is not None:
            told = "has a reward already" if isinstance(inner, Gate) else "is no gate"
            self._refuse(
                self.tokens[opening].where,
                f"{inner} {told}; rewards are of gates: (a & b)[reward]",
            )
        token = self._take() if self._kind() == "word" else self.fail("expected a reward")
        if token.text not in self.rewards:
            known = ", ".join(self.rewards) or "none"
            self._refuse(token.where, f"there is no reward {token.text!r} (rewards: {known})")
        if not self._takes("]"):
            self.fail("expected ]")
        return inner.guided(self.rewards[token.text])

    def _called(self, token: _Token) -> Circuit:
        """The arguments of a gate that is written as a word."""
        found = [self._union()]
        while self._takes(","):
            found.append(self._union())
        if not self._takes(")"):
            self.fail("expected , or )")
        if len(found) < 2:
            self._refuse(token.where, f"{token.text} needs at least two parts")
        return _gate(_WORDS[token.text], found)

    def _kind(self) -> str:
        return self.tokens[self.at].kind if self.at < len(self.tokens) else "end"

    def _take(self) -> _Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def _takes(self, sign: str) -> bool:
        """Whether the sign is next; it is then behind us."""
        found = self._kind() == "sign" and self.tokens[self.at].text == sign
        self.at += found
        return found

    def fail(self, why: str) -> NoReturn:
        """Refuse the token at hand."""
        if self.at < len(self.tokens):
            token = self.tokens[self.at]
            self._refuse(token.where, f"{why}, found {token.text!r}")
        self._refuse(len(self.text), f"{why}, found the end")

    def _refuse(self, where: int, why: str) -> NoReturn:
        raise ConfigError(
            f"circuit: at position {where + 1}, {why}:\n  {self.text}\n  {' ' * where}^"
        )


def drawn(root: Circuit) -> str:
    """The circuit as a tree of lines: the result on top, parts below it with their shares."""
    lines = [_label(root)]
    _branches(root, "", lines)
    return "\n".join(lines)


def _branches(node: Circuit, indent: str, lines: list[str]) -> None:
    if not isinstance(node, Gate):
        return
    for i, (part, share) in enumerate(zip(node.parts, node.shares, strict=True)):
        last = i == len(node.parts) - 1
        lines.append(f"{indent}{'└─' if last else '├─'} {share:.3g} {_label(part)}")
        _branches(part, indent + ("   " if last else "│  "), lines)


def _label(node: Circuit) -> str:
    if not isinstance(node, Gate):
        return str(node)
    name = type(node).__name__
    return name if node.reward is None else f"{name}, reward {node.reward}"
