"""The results on real models: lines of a file, the tables of docs/real-models.md, and pictures of KL against bits."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, Self, TypeVar

from real_sources import SOURCES, TASKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real-models.jsonl"
PAGE = ROOT / "docs" / "real-models.md"
BEGIN, END = "<!-- Written by benchmarks/real_models.py. -->", "<!-- As far as here. -->"
FOUR_BITS = (3.9, 5.1)
"""Bits per weight at which a grid of 4-bit codes, scales included, can give back source weights that lie on one."""

Data = dict[str, Any]


@dataclass(frozen=True)
class Common:
    """How a result came about."""

    model: str
    setting: str
    family: str
    blocks: int | None
    """the first blocks that were compressed; None: all"""
    seed: int
    calibration: str
    state: str
    """a hash of the code that made the model"""
    commit: str
    machine: Data

    def same_as(self, other: Data) -> bool:
        """Whether this is a result of the same model, setting and code, whatever the commit and the machine."""
        return all(getattr(self, name) == value for name, value in other.items() if name not in ("commit", "machine"))

    @property
    def place(self) -> tuple[Any, ...]:
        """What a later result replaces an earlier one by."""
        return (self.model, self.blocks, self.setting, self.seed)


@dataclass(frozen=True)
class Row(Common):
    """A compressed model compared with the original."""

    evaluation: str
    bits: float
    """stored bits per weight of what was compressed"""
    bytes: int
    """of all tensors"""
    divergence: Data
    """as slimlm.record.Divergence has it"""
    perplexity: Data
    """as slimlm.record.Measured has it"""
    dense_perplexity: float
    seconds: float
    cpu_seconds: float
    peak_memory: int | None

    @property
    def kl(self) -> float:
        """The mean KL divergence from the original, in nats per token."""
        return self.divergence["mean"]["value"]

    @property
    def place(self) -> tuple[Any, ...]:
        return (*super().place, self.calibration, self.evaluation)


@dataclass(frozen=True)
class Score(Common):
    """A score on a task by one metric."""

    asked: int
    """the limit of items"""
    task: str
    metric: str
    items: int
    score: Data

    @property
    def place(self) -> tuple[Any, ...]:
        return (*super().place, self.calibration, self.asked, self.task, self.metric)


Kind = TypeVar("Kind", Row, Score)


def append(path: Path, result: Row | Score) -> None:
    """Add a line to the file of results."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": type(result).__name__, **asdict(result)}) + "\n")


def read(path: Path, kind: type[Kind]) -> list[Kind]:
    """The results of a kind; of those that were measured again, the last."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = [line for line in lines if line.pop("kind") == kind.__name__]
    return list({row.place: row for row in (kind(**line) for line in own)}.values())


# Tables


@dataclass(frozen=True)
class Line:
    """A setting over its seeds; `middle` is the row of the median KL."""

    middle: Row
    low: float
    high: float
    seeds: int
    seconds: float
    cpu_seconds: float
    peak_memory: int | None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Self:
        ranked = sorted(rows, key=lambda row: row.kl)
        peaks = [row.peak_memory for row in rows if row.peak_memory is not None]
        times = median(row.seconds for row in rows), median(row.cpu_seconds for row in rows)
        return cls(
            ranked[(len(ranked) - 1) // 2], ranked[0].kl, ranked[-1].kl, len(rows), *times, max(peaks) if peaks else None
        )

    @property
    def remark(self) -> str:
        """What must be known where 4 bits are compared."""
        return SOURCES[self.middle.model].remark if FOUR_BITS[0] <= self.middle.bits <= FOUR_BITS[1] else ""

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        row, mean = self.middle, self.middle.divergence["mean"]
        return (
            row.setting,
            f"{row.bits:.3f}",
            f"{row.bytes / 1e6:.1f}",
            f"{mean['value']:.4f} ± {mean['standard_error']:.4f}",
            f"{self.low:.4f} to {self.high:.4f}" if self.seeds > 1 else "one seed" if row.calibration != "none" else "no seed",
            f"{row.divergence['percentile_99']['value']:.2f}",
            f"{100 * row.divergence['same_top']['value']:.1f} %",
            f"{row.perplexity['value']:.2f}",
            f"{self.seconds:.0f}",
            f"{self.cpu_seconds:.0f}",
            "" if self.peak_memory is None else f"{self.peak_memory / 1e6:.0f}",
            row.commit,
            self.remark,
        )


COLUMNS = ("setting", "block bits", "file MB", "KL", "KL of seeds", "KL 99 %", "same top", "perplexity")
COLUMNS += ("seconds", "CPU seconds", "peak MB", "commit", "remark")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first column is a name."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (columns, rule, *rows)]


def ground_of(row: Row) -> tuple[str, str, str]:
    """What rows of one table have in common."""
    blocks = "all blocks" if row.blocks is None else f"the first {row.blocks} blocks, the others as they are"
    return (row.model, row.evaluation, blocks)


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """One line per setting and calibration, by rising bits."""

    def own(row: Row) -> tuple[str, str]:
        return (row.setting, row.calibration)

    lines = [Line.of(list(group)) for _, group in groupby(sorted(rows, key=own), own)]
    return sorted(lines, key=lambda line: (line.middle.bits, line.middle.kl))


def section(path: Path) -> str:
    """What the page says of the results."""
    rows, parts = read(path, Row), []
    order = list(SOURCES)
    for (model, evaluation, blocks), group in groupby(
        sorted(rows, key=lambda row: (order.index(row.model), *ground_of(row))), ground_of
    ):
        own = [row for row in group if row.family != "dense"]
        calibrated = "; ".join(sorted({row.calibration for row in own} - {"none"})) or "none"
        original = f"Perplexity of the original {own[0].dense_perplexity:.2f}; {evaluation}."
        parts += [f"### {SOURCES[model].title}: {blocks}", "", f"{original} Calibration: {calibrated}."]
        parts += ["", *markdown(COLUMNS, [line.cells() for line in lines_of(own)]), ""]
    return "\n".join([*parts, *scores_section(read(path, Score))]).rstrip()


def scores_section(scores: Sequence[Score]) -> list[str]:
    """Tables of scores on tasks: acc_norm where a task has it, else acc; medians over seeds."""
    parts: list[str] = []
    for model in [name for name in SOURCES if any(score.model == name for score in scores)]:
        own = [score for score in scores if score.model == model]
        asked = sorted({score.items for score in own})
        parts += [
            f"### {SOURCES[model].title}: tasks",
            "",
            f"Items of each task: {', '.join(map(str, asked))}; in percent.",
            "",
        ]
        rows = []
        for setting in dict.fromkeys(score.setting for score in own):
            cells = [score_cell([score for score in own if score.setting == setting and score.task == task]) for task in TASKS]
            rows.append((setting, *cells))
        parts += [*markdown(("setting", *TASKS), rows), ""]
    return parts


def score_cell(scores: Sequence[Score]) -> str:
    """A score in percent with its standard error; empty where it was not measured."""
    preferred = [score for score in scores if score.metric == "acc_norm"] or list(scores)
    if not preferred:
        return ""
    middle = sorted(preferred, key=lambda score: score.score["value"])[(len(preferred) - 1) // 2]
    return f"{100 * middle.score['value']:.1f} ± {100 * (middle.score['standard_error'] or 0.0):.1f}"


def write_page(page: Path, results: Path) -> None:
    """Write the results into the page, between its marks."""
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{after}", encoding="utf-8")


# Pictures


def pictures(path: Path, folder: Path) -> list[Path]:
    """A picture of KL against bits for each model, and number of blocks; without matplotlib it says so."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is missing (python -m pip install '.[benchmark]')", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "slimlm"
    from matplotlib import pyplot

    drawn = []
    compared = [row for row in read(path, Row) if row.family != "dense"]
    for model, blocks in dict.fromkeys((row.model, row.blocks) for row in compared):
        lines = lines_of([row for row in compared if (row.model, row.blocks) == (model, blocks)])
        part = "" if blocks is None else f", the first {blocks} blocks"
        figure, axes = pyplot.subplots(figsize=(10, 7))
        axes.set_yscale("log")
        for family, marker in zip(dict.fromkeys(line.middle.family for line in lines), "o*sD^vP", strict=False):
            own = [line.middle for line in lines if line.middle.family == family]
            joined = "-" if family != "recipes" and family != "llama.cpp" else ""
            axes.plot([row.bits for row in own], [row.kl for row in own], marker=marker, linestyle=joined, label=family)
            for row in own:
                axes.annotate(row.setting, (row.bits, row.kl), fontsize=7, xytext=(4, 3), textcoords="offset points")
        axes.set_xlabel("bits per weight of what was compressed, everything counted")
        axes.set_ylabel("mean KL divergence from the original, nats per token")
        axes.set_title(f"{SOURCES[model].title}{part}\n{SOURCES[model].remark}".rstrip())
        axes.grid(which="both", alpha=0.2)
        axes.legend()
        figure.tight_layout()
        drawn.append(folder / f"real-models-{model}{'' if blocks is None else f'-{blocks}'}.svg")
        figure.savefig(drawn[-1], metadata={"Date": None})
        pyplot.close(figure)
    return drawn
