"""Make the pages of docs/results that have logs beside them anew, so that no figure in them is typed by hand.

    python scripts/studies/results.py                                 # `make results`
    python scripts/studies/results.py keep multirun/verdict_mlp_digits digits   # a verdict's logs, for the next time
    python scripts/studies/results.py keep multirun/sensitivity_mlp_digits sensitivity      # any runs' logs, likewise
    python scripts/studies/results.py keep fisher_quality/fisher_quality.jsonl fisher_quality   # what a script measured

Tables of default values, ranges of rates and fewest steps come of their `.jsonl`. Of a verdict, docs/results/verdicts
has what its page is made of, NAME.tar.xz: the plan, the trials, and of the final runs the configuration, the summary
and the events, those of training in means; docs/results/verdict.md and docs/results/verdicts/NAME.html come of it. What
stands in verdict.md from "## Notes" on stays. Logs of other runs are kept in docs/results/logs, and so are files of
JSON that a script has written, compressed, eight digits a number; what comes of them, and of records of measurements
there, is in the pages' marked places: scripts/studies/marks.py.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import lzma
import math
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from PIL import Image

from analysis import compare, pages, report
from analysis.report import tables
from scripts import Parser
from scripts.benchmarks import forecast
from scripts.problems.tables import write_page
from scripts.studies import marks, robustness, speedrun
from training.errors import UserError
from training.runs.folder import atomic_file

RESULTS = ROOT / "docs" / "results"
#: What of a verdict's folder is kept beside its final runs.
PLANS = ("verdict.json", "tuning.json", "trials.jsonl")
#: Of the training events of a run, about how many are kept; each stands for the mean of those in front of it.
EVENTS = 100
#: Of what a script has measured, digits that are kept of a number.
DIGITS = 8
#: Of the figures of a page, those that verdict.md shows, and what they are.
SHOWN = {
    "final": "the last value of every run, means with 95 % intervals",
    "curves_seconds": "by training time, means over seeds",
    "tuning": "what the best of k trials would be",
    "sensitivity": "the trials by their learning rate",
}
HEAD = """# Verdicts

Which optimizer for a problem, tuned alike, at equal training time ([how](../verdict.md)): each verdict is one command,
whose logs are kept in `verdicts/`, and `make results` writes this page and the verdicts' own pages
(`verdicts/NAME.html`, to be opened in a browser) of them. What they say together is in the notes at the end.
"""


def keep(folder: Path, name: str, home: Path = RESULTS) -> Path:
    """Pack what pages are made of: of a verdict its plan, its trials and its final runs, else all runs of a folder.

    Args:
        folder: of the verdict, or with runs anywhere below it; or a file of JSON, or of a line of it a row.
        name: of the archive, in `verdicts/` or `logs/`.
        home: folder of the results' pages.

    Returns:
        The archive. The same folder gives the same bytes.

    Raises:
        ValueError: there is no run, or the file is not of JSON.
    """
    if folder.is_file():
        return _packed(folder, home / "logs" / f"{name}{folder.suffix}.xz")
    verdict = report.is_verdict(folder)
    runs = compare.find_runs([folder / "final" if verdict else folder])
    path = home / ("verdicts" if verdict else "logs") / f"{name}.tar.xz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w:xz", preset=9) as archive:
        for where, content in _kept(folder.resolve(), runs):
            info = tarfile.TarInfo(where)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _packed(file: Path, path: Path) -> Path:
    if file.suffix not in (".json", ".jsonl"):
        raise ValueError(f"what is kept must be a folder, or a file of JSON (.json, .jsonl), got {file}")
    content = file.read_text(encoding="utf-8")
    parts = [content] if file.suffix == ".json" else content.splitlines()
    values = [json.loads(part, parse_float=_rounded) for part in parts]
    text = "".join(f"{json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n" for value in values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as packed:
        packed.write(lzma.compress(text.encode(), preset=9))
    return path


def _rounded(text: str) -> float:
    return float(f"{float(text):.{DIGITS}g}")


def _kept(folder: Path, runs: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for name in PLANS:
        if (folder / name).is_file():
            yield name, (folder / name).read_bytes()
    for run in runs:
        where = run.relative_to(folder).as_posix()
        values, text = compare.read_run(run, []).values, (run / "config.yaml").read_text(encoding="utf-8")
        data = {values["paths"]["data"], values["dataset"].get("root"), values["dataset"].get("path")}
        for path in sorted({*data, *values["paths"].values()} - {None}, key=len, reverse=True):
            if Path(path).is_absolute():  # where it lay is nobody's concern
                text = text.replace(path, "datasets" if path in data else Path(path).name)
        yield f"{where}/config.yaml", text.encode()
        if (run / "samples.png").is_file():
            yield f"{where}/samples.png", _few_shades(run / "samples.png")
        yield f"{where}/metrics.jsonl", _thinned((run / "metrics.jsonl").read_text(encoding="utf-8"))
        if (run / "summary.json").is_file():
            summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            summary.get("hardware", {}).pop("system", None)
            yield f"{where}/summary.json", json.dumps(summary).encode()


def _few_shades(path: Path) -> bytes:
    """A picture in grey, of 16 shades."""
    drawn = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("L").quantize(16).save(drawn, format="png", optimize=True)
    return drawn.getvalue()


def _thinned(text: str) -> bytes:
    events = [json.loads(line) for line in text.splitlines() if line.strip()]
    training = [event for event in events if event["event"] == "train"]
    means = iter(_means(training) if len(training) > EVENTS else training)
    short, lines = next(means, None), []
    for event in [*(event for event in events if event["event"] != "train"), {}]:
        while short and (not event or short["step"] <= event.get("step", 0)):
            lines.append({key: value for key, value in short.items() if not key.startswith("time/")})
            short = next(means, None)
        lines += [event] if event else []
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _means(training: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """About ``EVENTS`` of training, at least one an epoch and none over two: their losses are means over all steps."""
    last = training[-1]
    length = last["step"] / last["epoch"] if last.get("epoch") else last["step"]
    epochs = math.ceil(last["step"] / length - 1e-6)
    parts = max(1, round(EVENTS / epochs))
    ends = sorted({min(round(i * length / parts), last["step"]) for i in range(1, epochs * parts + 1)} - {0})
    steps = [0, *(event["step"] for event in training)]
    for start, end in itertools.pairwise([0, *ends]):
        inside = range(bisect.bisect_right(steps, start) - 1, bisect.bisect_left(steps, end))
        whole = {key: value for i in inside for key, value in training[i].items()}
        event = whole | {"step": end, "epoch": round(end / length, 6)}
        for key in whole:
            at = [(min(steps[i + 1], end) - max(steps[i], start), training[i].get(key)) for i in inside]
            known = [(weight, value) for weight, value in at if value is not None]
            if key.startswith("train/"):
                event[key] = sum(weight * value for weight, value in known) / sum(weight for weight, _ in known)
            elif key in ("seconds", "wall"):
                before = training[inside[-1] - 1][key] if inside[-1] else 0.0
                share = (end - steps[inside[-1]]) / (whole["step"] - steps[inside[-1]])
                event[key] = before + share * (whole[key] - before)
        yield event


def verdicts(home: Path = RESULTS) -> Path:
    """Write the pages of all verdicts that are kept, and the one that shows them all.

    Args:
        home: folder of the results' pages, whose `verdicts/` has the archives.

    Returns:
        `verdict.md`.
    """
    parts = [HEAD]
    for path in sorted((home / "verdicts").glob("*.tar.xz")):
        name = path.name.partition(".")[0]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / name
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
            found = report.read(folder)
            page = report.write(found, command="make results", linked=False)
            shutil.copyfile(page, home / "verdicts" / f"{name}.html")
            said = report.sentences(found)
            command = str(found.material.verdict.get("command"))
            parts += [
                f"## {name.replace('_', ' ').capitalize()}: {found.material.title}\n", f"    {command}\n",
                tables.to_markdown(found, said), f"The page: `verdicts/{name}.html`.\n",
            ]  # fmt: skip
            for figure, what in SHOWN.items():
                drawn = page.parent / f"{figure}.png"
                if drawn.exists():
                    shutil.copyfile(drawn, home / "verdicts" / f"{name}_{figure}.png")
                    parts.append(f"![{found.material.title}: {what}](verdicts/{name}_{figure}.png)\n")
    return pages.write_page(home / "verdict.md", lambda notes: "\n".join([*parts, notes] if notes else parts))


#: What writes the pages that are made of their records alone, one a line.
PAGES: tuple[Callable[[], Path], ...] = (
    lambda: write_page(RESULTS / "defaults.jsonl"),
    lambda: robustness.write(robustness.Choices(results=str(RESULTS / "robustness.jsonl"))),
    lambda: speedrun.write(speedrun.Choices(results=str(RESULTS / "speedrun.jsonl"))),
    lambda: forecast.write(RESULTS / "forecast.jsonl"),
    verdicts,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    parser = Parser(__doc__)
    parser.add_argument(
        "words", nargs="*", metavar="keep FOLDER NAME", help="pack logs of runs, or a file of JSON, under a name"
    )
    try:
        words = parser.parse_args(argv).words
        if words:
            if len(words) != 3 or words[0] != "keep":
                raise UserError("give nothing, or keep FOLDER NAME (see --help)")
            print(keep(Path(words[1]), words[2]))
            return 0
        for write in PAGES:
            print(write())
        for page in marks.renew():
            print(page)
    except (ValueError, UserError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
