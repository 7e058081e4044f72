"""The code blocks of the README and of docs/ are run as a reader would type them, page by page and in order."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import slimlm
from tests.docs import typed

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL = Path("examples/pystd-5m")
INSTALL = "python -m pip install "
TEST = "python -m pytest "
NOT_HERE = (INSTALL, TEST, "slimlm demo")
SECONDS = 600
"""A page compresses a model of five million parameters three times at most, none by `best-24`: half a minute when idle."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    line: int
    """of its first line of code, in the page"""
    code: str

    @property
    def file(self) -> str | None:
        """The file it is to be written to, where its first line is a comment with nothing but a name."""
        match = re.match(r"# ([\w./-]+\.\w+)\n", self.code)
        return match[1] if match else None


def blocks_of(text: str) -> list[Block]:
    """The blocks in python, bash and toml, in order."""
    found = re.finditer(r"^```(python|bash|toml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], text.count("\n", 0, m.start(2)) + 1, m[2]) for m in found]


def script_of(page: Path) -> str:
    """One Python program that does what the page says, its line numbers those of the page.

    Lines that install, test or run the demo are left out: CI types them itself, and the tests run in what they made.
    """
    lines = []
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.file is not None:
            continue
        if block.language == "python":
            # Leading empty lines make a traceback point into the page.
            code = "\n" * (block.line - 1) + block.code
            lines.append(f"exec(compile({code!r}, {str(page)!r}, 'exec'), page)")
        elif block.language == "bash":
            lines += statements_of([line for line in block.code.splitlines() if line.strip() and not line.startswith(NOT_HERE)])
    begin = ["import subprocess", "from tests.docs import typed", "page = {}"]
    if any(line.startswith("typed.run(") for line in lines):
        begin.append("typed.start()")
    return "\n".join(begin + lines) + "\n"


def statements_of(lines: list[str]) -> list[str]:
    """The Python statements that run lines of a shell."""
    words = [typed.words_of(line) for line in lines]
    if None not in words:
        return [f"typed.run({own!r})" for own in words]
    code = "\n".join(lines)
    return [f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {code!r}], check=True)"]


def needs_the_model(page: Path) -> bool:
    return str(MODEL) in "".join(block.code for block in blocks_of(page.read_text(encoding="utf-8")))


def write_files(page: Path, folder: Path) -> bool:
    """Write the blocks that name a file into the folder; gives whether they add to a copy of slimlm's source there."""
    files = {block.file: block.code for block in blocks_of(page.read_text(encoding="utf-8")) if block.file is not None}
    adds = any(name.startswith("src/slimlm/") for name in files)
    if adds:
        # A method is added to a copy, so that neither the checkout nor the installed package changes.
        unneeded = shutil.ignore_patterns("__pycache__", "bundled")
        shutil.copytree(Path(slimlm.__file__).parent, folder / "src/slimlm", ignore=unneeded)
    for name, code in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code, encoding="utf-8")
    return adds


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path) -> None:
    script = script_of(page)
    if needs_the_model(page) and not (ROOT / MODEL / "config.json").is_file():
        pytest.skip(f"{MODEL} is not there yet; train it with examples/train_example_model.py")
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    added = write_files(page, tmp_path)
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {
        **os.environ,
        # The commands of the environment that runs this test, whether or not it is activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([*([str(tmp_path / "src")] if added else []), *inherited, str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{page.name} does not run:\n{done.stdout[-4000:]}"


def test_every_fence_opens_with_a_language_or_closes_a_block() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(\w*)", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) % 2 == 0, page
        assert all(fence in {"python", "bash", "toml"} for fence in fences[::2]), page
        assert not any(fences[1::2]), page


def test_blocks_are_found_with_their_line_language_and_file() -> None:
    text = "one\n```python\n# a/b.py\nx = 1\n```\ntwo\n```bash\nls\n```\n```text\nno\n```\n"
    first, second = blocks_of(text)
    assert (first.language, first.line, first.file) == ("python", 3, "a/b.py")
    assert (second.language, second.line, second.file, second.code) == ("bash", 8, None, "ls\n")


def test_every_link_of_a_page_to_a_file_leads_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_ci_types_the_commands_of_the_readme() -> None:
    """Set-up and demo as they stand there; the tests in two lanes, which together are all tests."""
    blocks = [block.code.strip() for block in blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    commands = [block for block in blocks if block.startswith((INSTALL, "slimlm demo", TEST))]
    assert len(commands) == 3
    [fast] = re.findall(r"^fast=\((.*)\)$", ci, re.MULTILINE)
    assert all((ROOT / folder).is_dir() for folder in fast.split())
    [test] = [command for command in commands if command.startswith(TEST)]
    for command in commands:
        lanes = [f'{test} "${{fast[@]}}"', f'{test} "${{fast[@]/#/--ignore=}}"'] if command == test else [command]
        assert all(lane in ci.splitlines() for lane in lanes)


def test_add_a_method_adds_one_of_each_kind_in_one_new_file() -> None:
    added = [block.file for block in blocks_of((ROOT / "docs/add-a-method.md").read_text(encoding="utf-8")) if block.file]
    sources = [Path(file).relative_to("src/slimlm") for file in added if file.startswith("src/slimlm/")]
    folders = ["methods/quantize", "methods/prune", "methods/compensate", "core/parts", "core/statistics"]
    assert sorted(str(source.parent) for source in sources) == sorted(folders)
    assert not any((ROOT / "src/slimlm" / source).exists() for source in sources)
