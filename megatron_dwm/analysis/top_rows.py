"""Exact selection of the best rows within a budget, in memory that does not grow with their number.

The rows' numbers are a table on the disk. The key of the last kept row is found 16 bits at a time: four passes over the
table, each with a histogram of what the rows cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ROW = np.dtype([("key", np.float64), ("cost", np.int64), ("source", np.int32)])
"""A row of the table: the key that it is ranked by, highest first, its cost, and the number of its source."""
Table = npt.NDArray[Any]
_BLOCK = 1 << 16  # rows that are looked at together
_DIGITS = 16  # bits of a key that one pass finds
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True)
class Group:
    """The sources whose rows compete for one budget."""

    name: str
    members: npt.NDArray[np.bool_]
    """For each source, whether it belongs to the group."""
    budget: int


def blocks(table: Table) -> Iterator[Table]:
    """Yield the table in pieces that fit into memory."""
    for start in range(0, len(table), _BLOCK):
        yield table[start : start + _BLOCK]


def draw_keys(table: Table, seed: int) -> None:
    """Give every row a random key."""
    generator = np.random.default_rng(seed)
    for block in blocks(table):
        block["key"] = generator.random(len(block))


def add_gumbel(table: Table, temperature: float, seed: int) -> None:
    """Divide the keys by the temperature and add Gumbel noise to them (Gumbel top-k, arXiv 1903.06059).

    The highest are then a sample without replacement, drawn with probabilities in proportion to exp(key / temperature).

    Raises:
        OverflowError: the temperature is too small for the keys.
    """
    generator = np.random.default_rng(seed)
    for block in blocks(table):
        with np.errstate(over="ignore"):
            keys = block["key"] / temperature
        if not np.isfinite(keys).all():
            raise OverflowError(f"a key divided by {temperature} is no number")
        block["key"] = keys + generator.gumbel(size=len(block))


def costs_by_source(table: Table, masks: Iterator[npt.NDArray[np.bool_]] | None, sources: int) -> npt.NDArray[np.int64]:
    """Return the number of rows and the cost of each source [sources, 2], of all rows or those that the masks keep."""
    totals = np.zeros((sources, 2), np.int64)
    for block in blocks(table):
        kept = block if masks is None else block[next(masks)]
        np.add.at(totals[:, 0], kept["source"], 1)
        np.add.at(totals[:, 1], kept["source"], kept["cost"])
    return totals


class TopRows:
    """The rows that are kept of each group: from the highest key on, until the next one would exceed the budget.

    Of equal keys the earlier row comes first.
    """

    def __init__(self, table: Table, groups: Sequence[Group]) -> None:
        self._table, self._groups = table, groups
        self._cutoffs = [_cutoff(table, group) for group in groups]

    def masks(self) -> Iterator[npt.NDArray[np.bool_]]:
        """Yield, for each block, which of its rows are kept."""
        tied_cost = [0] * len(self._groups)
        for block in blocks(self._table):
            ordered = _ordered(block["key"])
            mask = np.zeros(len(block), np.bool_)
            for number, (group, (last, left)) in enumerate(zip(self._groups, self._cutoffs, strict=True)):
                members = group.members[block["source"]]
                mask |= members & (ordered > last)
                ties = members & (ordered == last)
                reached = tied_cost[number] + np.cumsum(block["cost"][ties])
                mask[ties] = reached <= left
                tied_cost[number] = int(reached[-1]) if len(reached) else tied_cost[number]
            yield mask

    def thresholds(self) -> dict[str, float | None]:
        """Return, for each group, the key above which all rows are kept; None where no row was left out.

        Rows whose key is the threshold are kept in their order as far as the budget goes.
        """
        return {
            group.name: None if last == 0 else _key(last)
            for group, (last, _) in zip(self._groups, self._cutoffs, strict=True)
        }


def _cutoff(table: Table, group: Group) -> tuple[np.uint64, int]:
    """Return the ordered key that does not fit as a whole, and the budget that the rows above it leave.

    The key is 0, which belongs to no number, if all rows fit.
    """
    prefix, left = 0, group.budget
    for shift in range(64 - _DIGITS, -1, -_DIGITS):
        costs = np.zeros(1 << _DIGITS, np.int64)
        for block in blocks(table):
            head = _ordered(block["key"]) >> np.uint64(shift)
            inside = group.members[block["source"]] & (head >> np.uint64(_DIGITS) == np.uint64(prefix))
            digits = head[inside] & np.uint64((1 << _DIGITS) - 1)
            np.add.at(costs, digits.astype(np.int64), block["cost"][inside])
        reached = np.cumsum(costs[::-1])
        place = int(np.searchsorted(reached, left, side="right"))  # the first that exceeds it
        if place == len(reached):
            return np.uint64(0), left
        left -= int(reached[place - 1]) if place else 0
        prefix = prefix << _DIGITS | (len(reached) - 1 - place)
    return np.uint64(prefix), left


def _ordered(keys: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Return whole numbers that are in the order of the keys; the two zeros are one."""
    bits = (keys + 0.0).view(np.uint64)
    return np.where(bits >= _SIGN, ~bits, bits | _SIGN)


def _key(ordered: np.uint64) -> float:
    """Return the key of a number of :func:`_ordered`."""
    bits = ordered ^ _SIGN if ordered >= _SIGN else ~ordered
    return float(np.array([bits], np.uint64).view(np.float64)[0])
