"""The page itself: one HTML file that loads nothing."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from analysis.report import figures, tables, words
from analysis.report.reading import ArmRuns, run_score
from analysis.report.results import Results, machine, octaves, rates, seconds, steps
from training.show.curves import GREY

HERE = Path(__file__).parent
#: Rows of a table of settings, and columns.
SETTINGS, ARMS = 120, 12
#: A table of more rows than this is scrolled on a screen.
MANY = 24


class Page:
    """Parts of a page, which know where it will lie and what colour each arm has.

    Args:
        found: the results.
        out: folder of the page.
        linked: whether numbers lead to the folders of runs.
        command: that writes it again.
    """

    def __init__(self, found: Results, out: Path, command: str, linked: bool = True) -> None:
        self.found, self.out, self.command, self.linked = found, out.resolve(), command, linked
        self.metric = found.material.metric
        self.colours = figures.palette(found)
        self.number = {arm.name: i for i, arm in enumerate(found.material.arms)}

    def text(self, said: Sequence[str], drawn: dict[str, tuple[str, str]]) -> str:
        """The whole file.

        Args:
            said: the verdict's sentences.
            drawn: SVG and explanation of each figure, by name.
        """
        words_of_title = ["Verdict" if self.found.material.verdict else "Comparison", self.found.material.title]
        title = ": ".join(filter(None, words_of_title))
        parts = {
            "title": escape(title),
            "heading": escape(title),
            "verdict": f"{_p(' '.join(said[:-1])) if len(said) > 1 else ''}{_p(said[-1])}",
            "warnings": self._warnings(),
            "table": self._table(),
            "body": "".join(self._sections(drawn)),
            "foot": self._foot(),
        }
        page = (HERE / "page.html").read_text(encoding="utf-8")
        pieces = []
        for name in ("title", "heading", "verdict", "table", "warnings", "body", "foot"):  # in the order of the page
            before, _, page = page.partition(f"[[{name}]]")
            pieces += [before, parts[name]]
        return "".join([*pieces, page])

    def _sections(self, drawn: dict[str, tuple[str, str]]) -> Iterable[str]:
        def figure(name: str) -> str:
            svg, text = drawn[name]
            links = " ".join(f'<a href="{name}.{ending}">{ending.upper()}</a>' for ending in ("png", "svg", "pdf"))
            inside = figures.inline(svg, name, escape(text, quote=True))
            return f"<figure>{inside}<figcaption>{escape(text)} <span>{links}</span></figcaption></figure>"

        if "final" in drawn:
            yield _section("Results", figure("final"), "results", "half")
        curves = [name for name in ("curves_seconds", "curves_step", "curves_epoch") if name in drawn]
        if curves:
            labels = {"curves_seconds": "training time", "curves_step": "steps", "curves_epoch": "epochs"}
            switch = "".join(
                f'<input type="radio" name="axis" id="by-{name}"{" checked" if not i else ""}>'
                f'<label for="by-{name}">{labels[name]}</label>'
                for i, name in enumerate(curves)
            )
            inside = "".join(f'<div class="pane" data-for="by-{name}">{figure(name)}</div>' for name in curves)
            yield _section("Curves", f'<div class="tabs"><span>by</span>{switch}{inside}</div>', "curves", "half")
        if "tuning" in drawn:
            yield _section("Tuning", figure("tuning") + self._choices() + self._trials(), "tuning", "half")
        if "sensitivity" in drawn:
            inside = figure("sensitivity") + self._octaves()
            yield _section("Sensitivity to the learning rate", inside, "sensitivity", "half")
        if "cost" in drawn:
            yield _section("Cost", figure("cost"), "cost", "half")
        if "diagnostics" in drawn:
            yield _section("Curvature", figure("diagnostics"), "curvature", "half")
        yield _section("What differs between the arms", self._settings(), "settings")
        if failures := self._failures():
            yield _section("Failures", failures, "failures")
        yield _section("Runs", self._runs(), "runs")
        yield _section("Where each number comes from", self._commands(), "commands")

    def _warnings(self) -> str:
        if not self.found.warnings:
            return ""
        items = "".join(f"<li>{escape(text)}</li>" for text in self.found.warnings)
        return f'<aside><h2 id="warnings">Warnings</h2><ul>{items}</ul></aside>'

    def _table(self) -> str:
        made = tables.columns(self.found)
        head = "".join(f"<th>{escape(name)}</th>" for name in made)
        lines = []
        for row in self.found.ranked:
            linked = {words.spoken(self.metric), words.spoken(self.found.material.test_metric), "runs"}
            cells = []
            for name, cell in made.items():
                text = _two_lines(cell(row))
                if (name in linked or name.startswith("time to ")) and text != "–" and row.statuses:
                    text = f'<a href="#runs-{self.number[row.name]}">{text}</a>'
                elif name == "tuning" and row.trials:
                    text = f'<a href="#trials-{self.number[row.name]}">{text}</a>'
                cells.append(f"<td>{text}</td>")
            best = ' class="best"' if row.name == self.found.leader else ""
            lines.append(f"<tr{best}><th>{self._swatch(row.name)}</th>{''.join(cells)}</tr>")
        note = (
            "A row, an arm, is what was trained alike but for the seed. Means over seeds with 95 % intervals "
            "(Student's t). Behind the leader: 95 % interval of the paired difference over common seeds, p adjusted by "
            "Holm. "
        )
        if self.found.target is not None:
            how = "given" if self.found.material.target is not None else "the median of the arms' last means"
            note += (
                f"Time to target: median of training seconds until {words.spoken(self.metric)} is "
                f"{words.score(self.found.target, self.metric)} ({how}), where a run that never gets there takes for "
                "ever; below it how many get there, and the interval or, of fewer than six runs, the extremes. "
            )
        note += "Numbers lead to their runs."
        long = " long" if len(lines) > MANY else ""
        links = " ".join(f'<a href="table.{ending}">{ending}</a>' for ending in ("csv", "md", "tex"))
        return (
            f'<div class="scroll{long}"><table class="main"><thead><tr><th>arm</th>{head}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{escape(note)} <span>{links}</span></p>'
        )

    def _swatch(self, name: str) -> str:
        colour = self.colours.get(name, GREY)
        number = self.number.get(name, -1)
        return (
            f'<span class="name" data-arm="{number}"><i class="swatch" style="background:{colour}"></i>'
            f"{escape(name)}</span>"
        )

    def _choices(self) -> str:
        chosen = [arm for arm in self.found.material.arms if arm.choice]
        if not chosen:
            return ""
        lines = []
        for arm in chosen:
            values = ", ".join(f"{key}={_plain(value)}" for key, value in (arm.choice.get("values") or {}).items())
            edges = ", ".join(map(str, arm.choice.get("at_edge") or ())) or "–"
            value = arm.choice.get("value")
            text = words.score(float(value), self.metric) if isinstance(value, int | float) else "–"
            lines.append([self._swatch(arm.name), escape(text), escape(edges), escape(values or "defaults")])
        return _table(["arm", words.spoken(self.metric), "at an edge", "values that tuning chose"], lines, wide=True)

    def _trials(self) -> str:
        parts = []
        for arm in self.found.material.arms:
            if not arm.trials:
                continue
            lines = []
            for trial in sorted(arm.trials, key=lambda one: (one.rung, one.number)):
                shown = words.score(trial.value, self.metric) if math.isfinite(trial.value) else trial.status
                value = self._link(trial.folder, shown) if trial.folder else escape(shown)
                values = ", ".join(f"{key}={_plain(value)}" for key, value in trial.overrides.items())
                spent = words.seconds(trial.charged)
                lines.append([f"{trial.number}", f"{trial.rung}", escape(values or "defaults"), value, escape(spent)])
            inside = _table(["trial", "rung", "values", words.spoken(self.metric), "charged"], lines)
            parts.append(
                f'<details id="trials-{self.number[arm.name]}"><summary>{self._swatch(arm.name)}: {len(lines)} runs of '
                f"trials</summary>{inside}</details>"
            )
        return "".join(parts)

    def _octaves(self) -> str:
        given, _ = rates(self.found.material)
        lines = []
        better = max if self.found.material.higher else min
        for name, rated in given.items():
            known = {rate: value for rate, value in rated.items() if math.isfinite(value)}
            if known:
                best = better(known, key=lambda rate: known[rate])
                edge = " (an end of what was tried)" if best in (min(rated), max(rated)) else ""
                wide = words.digits(octaves(rated, self.found.material.higher), 2)
                value = words.score(known[best], self.metric)
                lines.append([self._swatch(name), f"{words.digits(best)}{edge}", escape(value), wide, f"{len(rated)}"])
        return _table(["arm", "best rate", words.spoken(self.metric), "octaves near the best", "rates"], lines)

    def _settings(self) -> str:
        arms = [arm for arm in self.found.material.arms if arm.runs]
        if not arms:
            return _p("No run has begun.")
        given = {arm.name: arm.runs[0].settings for arm in arms}
        keys = list(dict.fromkeys(key for own in given.values() for key in own))
        differing = [key for key in keys if len({own.get(key) for own in given.values()}) > 1]
        differing = [key for key in differing if not key.endswith("_target_") or key.count(".") == 1]
        if not differing:
            return _p("Nothing but their names.")
        shown = arms[:ARMS]
        lines = [
            [escape(key), *(escape(given[arm.name].get(key, "–")) for arm in shown)] for key in differing[:SETTINGS]
        ]
        more = []
        if len(arms) > len(shown):
            more.append(f"the first {ARMS} of {len(arms)} arms are shown")
        if len(differing) > SETTINGS:
            more.append(f"{SETTINGS} of {len(differing)} settings are shown")
        note = f"; {', '.join(more)}" if more else ""
        counted = f"{len(differing)} {'setting' if len(differing) == 1 else 'settings'}"
        inside = _table(["setting", *(self._swatch(arm.name) for arm in shown)], lines, raw=True)
        return (
            f"<details><summary>{counted}, as each arm's first run had them{escape(note)}; all others "
            f"are the same</summary>{inside}</details>"
        )

    def _failures(self) -> str:
        lines = []
        for arm in self.found.material.arms:
            for run in arm.runs:
                if run.status in ("failed", "diverged", "interrupted"):
                    why = run.summary.get("error") or run.summary.get("stop_reason") or "its log says more"
                    where = self._link(run.folder, f"seed {run.seed}")
                    lines.append([self._swatch(arm.name), where, escape(run.status), _cut(why)])
            for trial in arm.trials:
                if not math.isfinite(trial.value) and trial.status != "unfinished":
                    name = f"trial {trial.number}, rung {trial.rung}"
                    where = self._link(trial.folder, name) if trial.folder else escape(name)
                    values = ", ".join(f"{key}={_plain(value)}" for key, value in trial.overrides.items())
                    why = trial.error or f"with {values}"
                    lines.append([self._swatch(arm.name), where, escape(trial.status), _cut(why)])
        for folder, why in self.found.material.begun:
            lines.append(["", self._link(folder, folder.name), "not begun", _cut(why)])
        return _table(["arm", "run", "status", "what it said"], lines, wide=True) if lines else ""

    def _runs(self) -> str:
        parts = []
        for arm in self.found.material.arms:
            if not arm.runs:
                continue
            lines = [self._run(arm, i) for i in range(len(arm.runs))]
            header = ["seed", "status", words.spoken(self.metric), words.spoken(self.found.material.test_metric)]
            inside = _table([*header, "to target", "training", "steps", "command"], lines)
            number = f"{len(lines)} {'run' if len(lines) == 1 else 'runs'}"
            parts.append(
                f'<details id="runs-{self.number[arm.name]}"><summary>{self._swatch(arm.name)}: {number}</summary>'
                f"{inside}</details>"
            )
        return "".join(parts) or _p("There are no runs yet.")

    def _run(self, arm: ArmRuns, index: int) -> list[str]:
        run, row = arm.runs[index], self.found.row(arm.name)
        last = run_score(run, self.metric, (run.status,))
        test = run_score(run, self.found.material.test_metric, (run.status,))
        summary = run.folder / "summary.json"
        return [
            self._link(run.folder, str(run.seed)),
            escape(run.status),
            self._link(run.folder / "metrics.jsonl", words.score(math.nan if last is None else last, self.metric)),
            "–" if test is None else self._link(summary, words.score(test, self.found.material.test_metric)),
            escape(words.seconds(row.times.get(run.seed, math.nan))),
            escape(words.seconds(seconds(run))),
            f"{steps(run):.0f}",
            f'<details class="command"><summary>show</summary><code>{escape(_command(run.folder))}</code></details>',
        ]  # fmt: skip

    def _commands(self) -> str:
        material = self.found.material
        lines = []
        if material.command:
            lines.append(["all runs, tuning and choices", f"<code>{escape(material.command)}</code>"])
        lines.append(["this page, its tables and figures", f"<code>{escape(self.command)}</code>"])
        for arm in material.arms:
            for run in arm.runs[:1]:
                what = f"{self._swatch(arm.name)}, seed {run.seed}"
                lines.append([what, f"<code>{escape(_command(run.folder))}</code>"])
        places = (
            "Last values and seconds are of each run's summary.json, curves and times to the target of its "
            "metrics.jsonl, settings of its config.yaml; trials are of trials.jsonl, step times and choices of "
            "verdict.json."
        )
        note = (
            "Of runs with more than 2000 training lines every so many is drawn; what it shows is the mean over those "
            "left out before it. Evaluations are all read."
        )
        return _table(["what", "command"], lines, wide=True) + f'<p class="note">{places} {note}</p>'

    def _foot(self) -> str:
        where = sorted({machine(run) for arm in self.found.material.arms for run in arm.runs} - {""})
        count = sum(len(arm.runs) + len(arm.trials) for arm in self.found.material.arms)
        said = f"{count} runs" + (f", on {'; '.join(where)}" if where else "")
        return escape(said)

    def _link(self, path: Path, text: str) -> str:
        if not self.linked:
            return escape(text)
        relative = os.path.relpath(path.resolve(), self.out)
        return f'<a href="{escape(quote(Path(relative).as_posix()), quote=True)}">{escape(text)}</a>'


def _command(folder: Path) -> str:
    """How a run was started, by the head of its `config.yaml`."""
    with (folder / "config.yaml").open(encoding="utf-8", errors="replace") as file:
        line = file.readline().strip()
    return line.lstrip("# ") if line.startswith("#") else f"python train.py resume={shlex.quote(str(folder))}"


def _plain(value: Any) -> str:
    return words.digits(value, 4) if isinstance(value, float) else str(value)


def _cut(text: Any, longest: int = 400) -> str:
    said = " ".join(str(text).split())
    return escape(said if len(said) <= longest else f"{said[:longest]}…")


def _two_lines(text: str) -> str:
    """A cell whose value stands above what is in brackets, or behind the comma."""
    value, mark, rest = text.partition(" (")
    if not mark:
        value, mark, rest = text.partition(", ")
    rest = rest[:-1] if mark == " (" else rest
    value = re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", value)
    return f"{escape(value)}<small>{escape(rest)}</small>" if mark else escape(text)


def _p(text: str) -> str:
    """A paragraph, whose lines do not break within "p = .004" and "97.9 %"."""
    return f"<p>{escape(re.sub('(?<=[p=<≤]) (?=[=<≤.])| (?=%)', chr(160), text))}</p>"


def _section(title: str, inside: str, name: str, kind: str = "whole") -> str:
    return f'<section id="{name}" class="{kind}"><h2>{escape(title)}</h2>{inside}</section>'


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], raw: bool = False, wide: bool = False) -> str:
    """A table of cells that are HTML already."""
    if not lines:
        return ""
    head = "".join(f"<th>{name if raw else escape(name)}</th>" for name in header)
    # On a phone, the cells of a wide table stand below each other, and those in the middle say what they are.
    named = [f' data-name="{escape(name, quote=True)}"' if wide else "" for name in header]
    begins = [f"<td{name if 0 < i < len(header) - 1 else ''}>" for i, name in enumerate(named)]
    rows = ("".join(f"{begin}{cell}</td>" for begin, cell in zip(begins, line, strict=True)) for line in lines)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    kind = ' class="words"' if wide else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
