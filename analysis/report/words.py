"""Numbers as text, and the verdict in two sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from analysis.report.reading import is_share
from analysis.report.results import LEVEL, Results, Row
from analysis.statistics import Interval


def digits(value: float, count: int = 3) -> str:
    """A number to so many significant digits, without an exponent where that is readable.

    Args:
        value: any; NaN is a dash.
        count: of digits.
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{count}g}"
    return str(np.format_float_positional(value, count, unique=False, fractional=False, trim="-"))


def score(value: float, metric: str, unit: bool = True) -> str:
    """A value of a metric: "97.9 %", "0.0796".

    Args:
        value: NaN is a dash.
        metric: what it is of.
        unit: whether the per cent sign is written.
    """
    if math.isnan(value) or not is_share(metric):
        return digits(value, 4)
    places = 2 if abs(value) > 0.99 else 1
    return f"{100 * value:.{places}f}{' %' if unit else ''}"


def scores(interval: Interval | None, metric: str) -> str:
    """A mean with its interval: "97.9 % (97.5 to 98.2)".

    Args:
        interval: None is a dash; one without ends is its middle alone.
        metric: what it is of.
    """
    if interval is None:
        return "–"
    middle = score(interval.middle, metric)
    if math.isinf(interval.low):
        return middle
    return f"{middle} ({score(interval.low, metric, False)} to {score(interval.high, metric, False)})"


def gap(value: float, metric: str, unit: bool = True) -> str:
    """A difference of two values of a metric, its sign left out: "1.1 points".

    Args:
        value: signed.
        metric: what it is of.
        unit: whether "points" is written.
    """
    if not is_share(metric):
        return digits(abs(value))
    return f"{100 * abs(value):.{2 if abs(value) < 0.0095 else 1}f}{' points' if unit else ''}"


def gaps(interval: Interval, metric: str, higher: bool) -> str:
    """Ends of the interval of how much better the leader is: "0.6 to 1.6 points".

    Args:
        interval: of the leader's value less the other's.
        metric: what it is of.
        higher: more is better.
    """
    ends = (interval.low, interval.high) if higher else (-interval.high, -interval.low)
    texts = [("-" if end < 0 else "") + gap(end, metric, False) for end in ends]
    return f"{texts[0]} to {texts[1]}{' points' if is_share(metric) else ''}"


def probability(value: float) -> str:
    """A probability without its zero: ".93", "> .99".

    Args:
        value: NaN is a dash.
    """
    if math.isnan(value):
        return "–"
    return "> .99" if value > 0.995 else "< .01" if value < 0.005 else f"{value:.2f}".lstrip("0")


def p_value(value: float) -> str:
    """A p value with its sign: "= .004", "< .001"."""
    if math.isnan(value):
        return "–"
    return "< .001" if value < 0.001 else f"= {value:.{3 if value < 0.1 else 2}f}".replace(" 0.", " .")


def seconds(value: float) -> str:
    """A time: "4.2 s", "12 min", "3.5 h"; infinity is "not reached".

    Args:
        value: seconds.
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "not reached"
    if value < 0.0995:
        return f"{digits(1000 * value)} ms"
    if value < 600:
        return f"{digits(value)} s"
    return f"{digits(value / 60)} min" if value < 7200 else f"{digits(value / 3600)} h"


def times(row: Row) -> str:
    """The median time to the target: "4.2 s (3.9 s to not reached), 5 of 5".

    Args:
        row: of an arm.
    """
    if row.to_target is None:
        return "–"
    found, count = row.to_target, f"{row.reached} of {len(row.times)}"
    if math.isinf(found.middle) or len(row.times) == 1:
        return f"{seconds(found.middle)} ({count})"
    if found.note:
        known = sorted(time for time in row.times.values() if math.isfinite(time))
        return f"{seconds(found.middle)} ({count}; {seconds(known[0])} to {seconds(max(row.times.values()))})"
    return f"{seconds(found.middle)} ({seconds(found.low)} to {seconds(found.high)}; {count})"


def memory(value: float | None) -> str:
    """Bytes: "61 kB", "1.2 GB"; None is a dash.

    Args:
        value: bytes.
    """
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{digits(value)} {unit}"


def joined(names: Sequence[str], last: str = "and") -> str:
    """Names as a sentence has them: "a, b and c".

    Args:
        names: one or more.
        last: the word before the last of them.
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def sentences(found: Results) -> list[str]:
    """The verdict in two sentences; a third in front where it is not finished.

    Args:
        found: the results.
    """
    ranked = [row for row in found.ranked if row.value]
    said = _unfinished(found)
    if not ranked:
        return [*said, "Nothing can be said yet: no run that counts has come to an end."]
    leader, rest = ranked[0], ranked[1:]
    if not rest:
        return [*said, f"{leader.name} alone has runs that came to an end: {_with_interval(leader, found)}; "
                "there is nothing to compare it with."]  # fmt: skip
    if all(row.difference is None for row in rest):
        return [
            *said,
            f"{leader.name} is ahead with {_alone(leader, found)}{_equality(found)}, {_ahead(leader, rest[0], found)}.",
            "How sure that is cannot be said: it takes two seeds or more that all arms have.",
        ]
    tied = [row for row in rest if row.difference is None or not row.p < LEVEL]
    return said + (_tie(found, leader, tied, rest) if tied else _lead(found, leader, rest))


def _lead(found: Results, leader: Row, rest: Sequence[Row]) -> list[str]:
    metric, difference = found.material.metric, rest[0].difference
    assert difference is not None
    first = f"Use {leader.name}: {_with_interval(leader, found)}{_equality(found)}, {_ahead(leader, rest[0], found)}"
    if not math.isnan(leader.probability):
        first += f"; its probability of being best is {probability(leader.probability)}"
    second = (
        f"The difference holds over {len(difference.seeds)} common seeds (paired t, Holm-adjusted p "
        f"{p_value(rest[0].p)}; its 95 % interval is {gaps(difference.interval, metric, found.material.higher)})"
    )
    if len(rest) > 1:
        others = _some([row.name for row in rest[1:]])
        second += f", and so {'do those' if len(rest) > 2 else 'does that'} to {others} (p {_largest(rest[1:])})"
    return [f"{first}.", f"{second}."]


def _tie(found: Results, leader: Row, tied: Sequence[Row], rest: Sequence[Row]) -> list[str]:
    together, metric = [leader, *tied], found.material.metric
    shown = _some([f"{row.name} ({score(row.value.middle, metric)})" for row in together if row.value])
    tested = [row for row in tied if row.difference]
    over = ""
    if tested:
        seeds = min(len(row.difference.seeds) for row in tested if row.difference)
        smallest = "" if len(tested) == 1 else "smallest "
        over = f" over {seeds} common seeds (paired t, {smallest}Holm-adjusted p "
        over += f"{p_value(min(row.p for row in tested))})"
    more = "between" if len(together) == 2 else "among"
    first = f"No difference is shown {more} {shown} in {spoken(metric)}{_equality(found)}{over}"
    likeliest = max(together, key=lambda row: -1 if math.isnan(row.probability) else row.probability)
    cheap, why = _cheapest(together)
    taken = cheap if why else likeliest
    second = f"Take {taken.name}, which {why}" if why else f"They cost alike: take {taken.name}"
    if not math.isnan(likeliest.probability):
        likely = f"the likeliest to be best, with probability {probability(likeliest.probability)}"
        second += f"{' and' if why else ','} is {likely}" if likeliest is taken else f"; {likeliest.name} is {likely}"
        second = second.replace(", is the likeliest", ", the likeliest")
    if beaten := [row for row in rest if row not in tied]:
        verb = "is" if len(beaten) == 1 else "are"
        second += f"; {_some([row.name for row in beaten])} {verb} worse than {leader.name} (p {_largest(beaten)})"
    return [f"{first}.", f"{second}."]


def _some(names: Sequence[str], most: int = 5) -> str:
    """Names as a sentence has them, of many the first ones and how many more there are."""
    return joined(names) if len(names) <= most + 1 else joined([*names[:most], f"{len(names) - most} more"])


def _largest(rows: Sequence[Row]) -> str:
    text = p_value(max(row.p for row in rows))
    return text.replace("= ", "≤ ") if len(rows) > 1 else text


def _cheapest(rows: Sequence[Row]) -> tuple[Row, str]:
    """The best of the arms that cost least, and by what: memory where it differs, else the seconds of a step."""
    for cost, what in (
        ([row.memory or math.nan for row in rows], "the least memory"),
        ([row.step_seconds for row in rows], "the least time for a step"),
    ):
        low, high = min(cost), max(cost)
        if not any(map(math.isnan, cost)) and high > 1.05 * low:
            place = next(i for i, value in enumerate(cost) if value <= 1.05 * low)
            text = memory(cost[place]) if "memory" in what else seconds(cost[place])
            about = "" if cost[place] == low else "about "  # others need less by what counts as alike
            return rows[place], f"needs {about}{what} ({text})"
    return rows[0], ""


def spoken(metric: str) -> str:
    """A metric's name in words: "validation accuracy".

    Args:
        metric: "val/accuracy".
    """
    split, _, name = metric.rpartition("/")
    return f"{ {'val': 'validation', 'train': 'training'}.get(split, split) } {name.replace('_', ' ')}".strip()


def _with_interval(row: Row, found: Results) -> str:
    assert row.value is not None
    text = _alone(row, found)
    if math.isfinite(row.value.low):
        ends = [score(end, found.material.metric, False) for end in (row.value.low, row.value.high)]
        text += f" (95 % interval {ends[0]} to {ends[1]})"
    return text


def _alone(row: Row, found: Results) -> str:
    assert row.value is not None
    metric, text = found.material.metric, score(row.value.middle, found.material.metric)
    return f"{text} {spoken(metric)}" if is_share(metric) else f"{spoken(metric)} {text}"


def _ahead(leader: Row, other: Row, found: Results) -> str:
    assert leader.value is not None and other.value is not None
    # Over common seeds where there are several: what the test is about.
    amount = other.difference.interval.middle if other.difference else leader.value.middle - other.value.middle
    word = "above" if found.material.higher else "below"
    return f"{gap(amount, found.material.metric)} {word} the next, {other.name}"


def _equality(found: Results) -> str:
    """What all arms had alike: training time, steps or epochs; "" where nothing was."""
    ended = [row for row in found.rows if row.value]
    for values, word, text in (
        ([row.training_seconds for row in ended], "training time", seconds),
        ([row.steps for row in ended], "steps", lambda value: f"{value:.0f}"),
    ):
        if values and min(values) > 0 and max(values) <= 1.05 * min(values):
            return f" at equal {word} ({text(sum(values) / len(values))} a run)"
    return ", at unequal training time (see the warnings)"


def _unfinished(found: Results) -> list[str]:
    expected = len(found.material.verdict.get("seeds") or ()) * len(found.rows)
    begun = sum(row.statuses.total() for row in found.rows)
    ended = begun - sum(row.statuses["unfinished"] for row in found.rows)
    total = max(expected, begun)
    if ended >= total:
        return []
    return [f"Not finished: {ended} of {total} runs have ended so far."]
