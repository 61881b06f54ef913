"""The time of a token in a group of equal members, by arithmetic: products divided by rows alone, or some by columns.

A layer is two pairs of products with an exchange behind each of the second ones, whose sums the whole next norm needs:
attention with its output, feed-forward up and down. Between the products of a pair, rows need a gather and columns
none. Times are microseconds, and of one member, since all are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

MOST_PIECES = (1, 2, 4, 8)
"""Into how many pieces an exchange is cut, to send some while others are computed."""


@dataclass(frozen=True, slots=True)
class Model:
    """Widths in channels."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int

    @property
    def kv_width(self) -> int:
        return 2 * self.kv_heads * self.hidden // self.heads


MODELS = {"8b": Model(4096, 14336, 32, 8, 32, 128256), "70b": Model(8192, 28672, 64, 8, 80, 128256)}


@dataclass(frozen=True, slots=True)
class Link:
    """One way, of each member; a message costs the processor of its sender as much as that of its receiver."""

    latency_us: float
    gbit_s: float
    message_us: float
    byte_us: float

    def wire_us(self, n_bytes: float) -> float:
        return n_bytes * 8e-3 / self.gbit_s

    def cost_us(self, n_bytes: float) -> float:
        return self.message_us + n_bytes * self.byte_us


class Wire:
    """The messages that a member sends to all others, one after the other, and when they arrive."""

    def __init__(self, link: Link, others: int) -> None:
        self._link, self._others = link, others
        self._free_us = 0.0
        self.arrivals: list[float] = []

    def send(self, at_us: float, n_bytes: float) -> float:
        """Sends to each of the others; returns the time in us at which the processor is free again."""
        sent = at_us + self.cost_us(n_bytes)
        self._free_us = max(sent, self._free_us) + self._others * self._link.wire_us(n_bytes)
        self.arrivals.append(self._free_us + self._link.latency_us)
        return sent

    def cost_us(self, n_bytes: float) -> float:
        """The processor's time for as many messages as go to or come from the others."""
        return self._others * self._link.cost_us(n_bytes)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two products: their times on one member, and bytes of the whole rows between and behind them. `second_us` by
    how it is divided; `halves_us`: by rows, in two passes over k."""

    first_us: float
    rows_us: float
    halves_us: float
    columns_us: float
    whole_us: float
    between_bytes: float
    behind_bytes: float
    most_pieces: int
    """The number of KV heads, or of segments quantized together, that one member has of the first product."""


def streamed(wire: Wire, at_us: float, work_us: float, n_bytes: float, pieces: int) -> float:
    """When a product has been computed whose results are sent in pieces, and all of the others' are there."""
    for _ in range(pieces):
        at_us = wire.send(at_us + work_us / pieces, n_bytes / pieces)
    return max(at_us, wire.arrivals[-1]) + pieces * wire.cost_us(n_bytes / pieces)


@dataclass(frozen=True, slots=True)
class Begun:
    """A product that has multiplied what was there of its inputs, and waited for the rest: its end is a pass over the
    rest of k, in which results become complete one after the other."""

    at_us: float
    rest_us: float


def begun(wire: Wire, at_us: float, times_us: tuple[float, float], n_bytes: float, early: float) -> Begun:
    """Multiplies no more than covers the wait beforehand: some pieces of `wire` that are there, and `early`, the
    share of a member itself if blocks of k may be summed in any order. `times_us`: in one pass over k, and in two."""
    count = len(wire.arrivals)
    piece_us = wire.cost_us(n_bytes)
    there = sum(arrival <= at_us for arrival in wire.arrivals)
    for taken in range(there + 1):
        share = (early + (1 - early) * taken / count) if taken > 0 or early > 0 else 0.0
        work_us = times_us[0 < share < 1]
        ends_us = at_us + taken * piece_us + share * work_us
        if ends_us >= wire.arrivals[-1]:
            break
    return Begun(max(ends_us, wire.arrivals[-1]) + (count - taken) * piece_us, (1 - share) * work_us)


def by_rows(pair: Pair, members: int, link: Link, pieces: tuple[int, int], early: float) -> float:
    """Both products by rows. Pieces of the first are sent in the order of k."""
    count = min(pieces[0], pair.most_pieces)
    wire, at_us, size = Wire(link, members - 1), 0.0, pair.between_bytes / members / count
    for _ in range(count):
        at_us = wire.send(at_us + pair.first_us / count, size)
    second = begun(wire, at_us, (pair.rows_us, pair.halves_us), size, early)
    behind = Wire(link, members - 1)
    return streamed(behind, second.at_us, second.rest_us, pair.behind_bytes / members, pieces[1])


def by_rows_throughout(layer: tuple[Pair, Pair], members: int, link: Link, pieces: int) -> float:
    """A layer of which all products begin with the inputs that are there, since factors of norms come behind them."""
    steps = []
    for pair in layer:
        two_passes = pair.halves_us / pair.rows_us
        steps.append((pair.first_us, two_passes, pair.between_bytes, min(pieces, pair.most_pieces)))
        steps.append((pair.rows_us, two_passes, pair.behind_bytes, pieces))
    at_us, rest_us, before_us = 0.0, steps[0][0], 0.0
    for step in range(3 * len(steps)):
        _, _, n_bytes, count = steps[step % len(steps)]
        next_us, two_passes, _, _ = steps[(step + 1) % len(steps)]
        wire, size = Wire(link, members - 1), n_bytes / members / count
        for _ in range(count):
            at_us = wire.send(at_us + rest_us / count, size)
        before_us = at_us if step == 2 * len(steps) - 1 else before_us
        following = begun(wire, at_us, (next_us, two_passes * next_us), size, 0.0)
        last_us, at_us, rest_us = at_us, following.at_us, following.rest_us
    return last_us - before_us


def by_first_rows(pair: Pair, members: int, link: Link, pieces: int) -> float:
    """The first product by rows, the second as a whole by every member."""
    wire = Wire(link, members - 1)
    return streamed(wire, 0.0, pair.first_us, pair.between_bytes / members, pieces) + pair.whole_us


def by_columns(pair: Pair, members: int, link: Link, pieces: int) -> float:
    """The second by columns; every member sends its sums to all others."""
    wire = Wire(link, members - 1)
    return streamed(wire, pair.first_us, pair.columns_us, pair.behind_bytes, pieces)


def by_reduced_columns(pair: Pair, members: int, link: Link, pieces: int) -> float:
    """The second by columns; every member adds the sums of some rows and sends those on."""
    part = pair.behind_bytes / members
    wire, gathers = Wire(link, members - 1), Wire(link, members - 1)
    at_us = streamed(wire, pair.first_us, pair.columns_us, part, pieces)
    return streamed(gathers, at_us, 0.0, part, 1)


@dataclass(frozen=True, slots=True)
class Setting:
    """A model on a group. `pair_us` has the times of its products by name, for this number of members."""

    model: Model
    members: int
    link: Link
    layer_us: float
    """Norms, sums and attention of a layer, which are alike in all ways."""


Times = Mapping[str, float]


def pairs(setting: Setting, times: Times) -> tuple[Pair, Pair]:
    """`times`: of a member's products, by the names of `products`."""
    model, hidden = setting.model, setting.model.hidden
    given = ("qkv", "output", hidden, model.kv_heads), ("up", "down", model.ffn, model.ffn // 256)
    return tuple(
        Pair(
            first_us=times[first],
            rows_us=times[f"{second} rows"],
            halves_us=2 * times[f"{second} half"],
            columns_us=times[f"{second} columns"],
            whole_us=times[f"{second} whole"],
            between_bytes=width * (1 + 4 / 256),
            behind_bytes=4 * hidden,
            most_pieces=units // setting.members,
        )
        for first, second, width, units in given
    )  # type: ignore[return-value]


def products(model: Model, members: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of a member's products."""
    hidden, ffn = model.hidden, model.ffn
    return {
        "qkv": ((hidden + model.kv_width) // members, hidden),
        "output rows": (hidden // members, hidden),
        "output half": (hidden // members, hidden // 2),
        "output columns": (hidden, hidden // members),
        "output whole": (hidden, hidden),
        "up": (2 * ffn // members, hidden),
        "down rows": (hidden // members, ffn),
        "down half": (hidden // members, ffn // 2),
        "down columns": (hidden, ffn // members),
        "down whole": (hidden, ffn),
        "head": (model.vocabulary // members // 16 * 16, hidden),
    }


Division = Callable[[Pair, int, Link], float]


def row_divisions(early: float = 0.0, *, overlapped: bool = True) -> Iterator[Division]:
    counts = MOST_PIECES if overlapped else (1,)
    for cut in product(counts, counts):
        yield partial(by_rows, pieces=cut, early=early)
    for count in counts:
        yield partial(by_first_rows, pieces=count)


def column_divisions(*, overlapped: bool = True) -> Iterator[Division]:
    for count in MOST_PIECES if overlapped else (1,):
        yield partial(by_columns, pieces=count)
        yield partial(by_reduced_columns, pieces=count)


def token_us(setting: Setting, times: Times, layer_us: float) -> float:
    """All layers, and the head with the gather of its logits at one member."""
    logits = 4 * setting.model.vocabulary / setting.members
    others = setting.members - 1
    head = (
        times["head"] + setting.link.latency_us + others * (setting.link.wire_us(logits) + setting.link.cost_us(logits))
    )
    return setting.model.layers * (layer_us + setting.layer_us) + head


@dataclass(frozen=True, slots=True)
class Estimate:
    """Microseconds of a token: rows alone, one exchange after the other; rows that overlap; what blocks of k allow;
    rows that overlap throughout, with factors of norms behind products."""

    one_us: float
    plain_rows_us: float
    plain_columns_us: float
    rows_us: float
    blocks_us: float
    throughout_us: float

    @property
    def plain_gain(self) -> float:
        """The gain of the better of columns and rows over rows, where nothing is overlapped."""
        return self.plain_rows_us / self.plain_columns_us

    @property
    def gain(self) -> float:
        return self.rows_us / self.blocks_us


def estimate(setting: Setting, times: Times, one: Times) -> Estimate:
    """`one`: of the same products on one member that has all."""
    model, members, link, layer = setting.model, setting.members, setting.link, pairs(setting, times)
    rows, plain = list(row_divisions()), list(row_divisions(overlapped=False))

    def best_us(*ways: Division) -> float:
        return token_us(setting, times, sum(min(way(pair, members, link) for way in ways) for pair in layer))

    alone = one["qkv"] + one["output rows"] + one["up"] + one["down rows"] + setting.layer_us
    throughout = min(by_rows_throughout(layer, members, link, pieces) for pieces in MOST_PIECES)
    return Estimate(
        one_us=model.layers * alone + one["head"],
        plain_rows_us=best_us(*plain),
        plain_columns_us=best_us(*plain, *column_divisions(overlapped=False)),
        rows_us=best_us(*rows),
        blocks_us=best_us(*rows, *row_divisions(1 / members), *column_divisions()),
        throughout_us=token_us(setting, times, throughout),
    )
