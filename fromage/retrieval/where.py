"""Filters: "year >= 2019 and place = 'Rome'" over the columns of an index's metadata.

The grammar is a small part of SQL's conditions, and nothing of it is ever run as SQL or as Python:

    condition  = condition or condition | condition and condition | not condition | ( condition ) | test
    test       = column (= | != | < | <= | > | >=) value | column [not] in (value, ...) | column is [not] null
               | column [not] between value and value | column [not] like 'Ro%'
    column     = name | "any name"
    value      = number | 'text' (a quote in it is doubled) | true | false

Times are compared with texts such as '2019-05-01' or '2019-05-01T12:30'. As in SQL no test but `is null` holds where the
column has no value; `not` is therefore moved into the tests as they are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

from fromage.checks import HALVES
from fromage.errors import UserError

MOST, DEPTH, TESTS = 4096, 32, 32  # characters, parentheses inside each other, tests
COLUMNS = 12  # that a message names
WHOLE = 1 << 63  # whole numbers are smaller
NOT = {"=": "!=", "<": ">=", ">": "<=", "in": "not in", "like": "not like", "is null": "is not null"}
NOT |= {negated: op for op, negated in NOT.items()}
SAME = {"<>": "!=", "==": "="}
WORDS = {"and", "or", "not", "in", "between", "like", "is", "null", "true", "false"}
TOKEN = re.compile(
    r"""\s*(?:(?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<text>'(?:[^']|'')*')"""
    r"""|(?P<column>"(?:[^"]|"")+")|(?P<word>[^\W\d]\w*)|(?P<mark><=|>=|!=|<>|==|[=<>(),]))"""
)
Value = bool | int | float | str | date | datetime
KINDS = {"int64": "whole numbers", "double": "numbers", "string": "texts", "bool": "true and false"}
KINDS |= {"timestamp[us]": "times", "date32[day]": "dates", "json": "lists or objects"}
WANTED = {"int64": "a number", "double": "a number", "string": "a text in single quotes", "bool": "true or false"}
WANTED |= dict.fromkeys(("timestamp[us]", "date32[day]"), "a time such as '2019-05-01'")


class Comparison(NamedTuple):
    """A test of one column. op: a key of NOT; values: one, any number of 'in', none of 'is null'."""

    column: str
    op: str
    values: tuple[Value, ...] = ()


class Both(NamedTuple):
    """Conditions of which all must hold, or (every: False) one."""

    every: bool
    parts: tuple[Condition, ...]


Condition = Comparison | Both


def parse(text: str) -> Condition:
    """A filter as tests joined by and and or. Raises UserError for what is not of the grammar."""
    if len(text) > MOST:
        raise UserError(f"where: {len(text):,} characters; a filter may have {MOST:,}")
    if HALVES.search(text):
        raise UserError("where: holds half a character; write it again")
    found = _Reader(text).whole()
    if (count := sum(1 for _ in tests(found))) > TESTS:
        raise UserError(f"where: {count} tests; a filter may have {TESTS}: column in (...) is one")
    return found


class _Reader:
    """Reads a filter from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.end = text, 0, len(text.rstrip())
        self.depth, self.kind, self.word = 0, "", ""
        self._next()

    def whole(self) -> Condition:
        found = self._joined(False)
        return found if not self.kind else self._wrong("and, or, or the end")

    def _next(self) -> None:
        """Take the next token."""
        self.start = self.at
        if self.at >= self.end:
            self.kind, self.word = "", "the end"
        elif match := TOKEN.match(self.text, self.at):
            name = match.lastgroup or ""
            self.start, self.at, self.kind, self.word = match.start(name), match.end(), name, match[name]
            if self.kind == "word" and self.word.lower() in WORDS:
                self.kind = self.word = self.word.lower()
        else:
            self.kind, self.word = "odd", self.text[self.at :].strip()
            self._wrong("a column, a value or a sign")

    def _take(self, *kinds: str) -> str:
        """The token that is here, if it is of one of these kinds, or one of these signs; '' and it stays otherwise."""
        if self.kind not in kinds and (self.kind != "mark" or self.word not in kinds):
            return ""
        word = self.word
        self._next()
        return word

    def _wrong(self, wanted: str) -> Any:
        shown = self.word if len(self.word) <= 30 else f"{self.word[:30]}..."
        raise UserError(f"where: {shown!r} at character {self.start + 1}, where {wanted} is wanted")

    def _joined(self, negated: bool, by: str = "or") -> Condition:
        """Conditions joined by or, and within these by and; negated: read as not (...)."""
        parts = [self._one(negated) if by == "and" else self._joined(negated, "and")]
        while self._take(by):
            parts.append(self._one(negated) if by == "and" else self._joined(negated, "and"))
        return parts[0] if len(parts) == 1 else Both((by == "and") != negated, tuple(parts))

    def _one(self, negated: bool) -> Condition:
        while self._take("not"):
            negated = not negated
        if not self._take("("):
            return self._test(negated)
        self.depth += 1
        if self.depth > DEPTH:
            raise UserError(f"where: more than {DEPTH} parentheses inside each other; write fewer")
        found = self._joined(negated)
        self._take(")") or self._wrong("and, or, or )")
        self.depth -= 1
        return found

    def _test(self, negated: bool) -> Condition:
        column = self._take("column", "word") or self._wrong("a column")
        column = column[1:-1].replace('""', '"') if column[0] == '"' else column
        if self.kind == "mark" and (op := SAME.get(self.word, self.word)) in NOT:
            self._next()
            return Comparison(column, NOT[op] if negated else op, (self._value(),))
        if self._take("is"):
            negated ^= bool(self._take("not"))
            self._take("null") or self._wrong("null")
            return Comparison(column, NOT["is null"] if negated else "is null")
        negated ^= bool(self._take("not"))
        if self._take("between"):
            low = self._value()
            self._take("and") or self._wrong("and")
            ops = ("<", ">") if negated else (">=", "<=")
            return Both(not negated, (Comparison(column, ops[0], (low,)), Comparison(column, ops[1], (self._value(),))))
        if self._take("like"):
            pattern = self._value("text")
            if "\\" in str(pattern):  # which escapes in some engines
                raise UserError("where: like takes no backslash; write _ in its place, which is any character")
            return Comparison(column, NOT["like"] if negated else "like", (pattern,))
        self._take("in") or self._wrong("=, !=, <, <=, >, >=, in, between, like or is null")
        self._take("(") or self._wrong("(")
        values = [self._value()]
        while self._take(","):
            values.append(self._value())
        self._take(")") or self._wrong(", or )")
        return Comparison(column, NOT["in"] if negated else "in", tuple(values))

    def _value(self, *kinds: str) -> Value:
        kind, wanted = self.kind, "a text in single quotes" if kinds else "a number, a text in single quotes, true or false"
        word = self._take(*(kinds or ("number", "text", "true", "false"))) or self._wrong(wanted)
        if kind in ("true", "false"):
            return kind == "true"
        return word[1:-1].replace("''", "'") if kind == "text" else _number(word)


def _number(word: str) -> int | float:
    if re.fullmatch("[+-]?[0-9]{1,19}", word) and abs(int(word)) < WHOLE:  # as a double it would be rounded
        return int(word)
    if not math.isfinite(value := float(word)):
        raise UserError(f"where: the number {word[:30]} is too large")
    return value


def bound(condition: Condition, kinds: Mapping[str, str]) -> Condition:
    """The condition with values of the columns' kinds: times in place of texts.

    kinds: of the columns, by name, see KINDS. Raises UserError for other columns, and for values that do not fit.
    """
    if isinstance(condition, Both):
        return Both(condition.every, tuple(bound(part, kinds) for part in condition.parts))
    name, op, values = condition
    if name not in kinds:
        known = [f'"{each}"' if not each.isidentifier() else each for each in kinds]
        more = f" and {len(known) - COLUMNS} more" if len(known) > COLUMNS else ""
        raise UserError(f"where: no column {name[:60]}; the index has {', '.join(known[:COLUMNS])}{more}")
    kind = kinds[name]
    if op in ("is null", "is not null"):
        return condition
    if kind == "json":
        raise UserError(f"where: {name} holds {KINDS[kind]}, which can only be asked whether they are there: is not null")
    if ("like" in op and kind != "string") or (kind == "bool" and op[0] in "<>"):
        raise UserError(f"where: {name} holds {KINDS[kind]}, which {op} does not compare")
    test = Comparison(name, op, tuple(_fitting(name, kind, value) for value in values))
    return _of_whole_numbers(test) if kind == "int64" else test


def _of_whole_numbers(test: Comparison) -> Comparison:
    """The test with whole numbers of 64 bits in place of others, which decide as much: > 1.5 is >= 2."""
    name, op, (value, *_) = test
    if op[0] not in "<>":
        whole = tuple(int(each) for each in test.values if float(each).is_integer() and abs(each) < WHOLE)  # type: ignore
        return Comparison(name, op if len(whole) == 1 else {"=": "in", "!=": "not in"}.get(op, op), whole)
    assert isinstance(value, (int, float))
    if abs(value) >= WHOLE:  # above or below all numbers
        return Comparison(name, "not in" if (value > 0) == (op[0] == "<") else "in")
    if isinstance(value, int) or value.is_integer():
        return Comparison(name, op, (int(value),))
    return Comparison(name, op[0] + "=", ((math.ceil if op[0] == ">" else math.floor)(value),))


def _fitting(name: str, kind: str, value: Value) -> Value:
    """A value as one of a column's kind."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in ("timestamp[us]", "date32[day]") and isinstance(value, str):
        try:
            time = datetime.fromisoformat(value)
            return time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time
        except (ValueError, OverflowError):
            raise UserError(f"where: {name} holds {KINDS[kind]}, and {value[:40]!r} is none; write '2019-05-01'") from None
    if kind == "double" and number:
        return float(value)  # type: ignore[arg-type]
    if {"int64": number, "string": isinstance(value, str), "bool": isinstance(value, bool)}.get(kind):
        return value
    shown = repr(value)[:40] if isinstance(value, str) else str(value).lower()
    raise UserError(f"where: {name} holds {KINDS[kind]}; compare it with {WANTED[kind]}, not with {shown}")


def tests(condition: Condition) -> Iterator[Comparison]:
    """All tests of a condition."""
    if isinstance(condition, Comparison):
        yield condition
    else:
        for part in condition.parts:
            yield from tests(part)
