"""Records every byte that compression stores and every number that its models give, and compares two such records.

    python benchmarks/record_bytes.py record --into before.json --only tiny --only families
    python benchmarks/record_bytes.py record --into before.json --data MODELS --text calibration.txt      # all groups
    python benchmarks/record_bytes.py compare before.json after.json

For changes that must not move a single number: record before, record after on the same machine with the same versions of
Python, torch and transformers, and compare. Groups of cases:

tiny        every shipped recipe, and recipes for what none of them uses, on one random Llama of two blocks
families    two recipes on a random model of every architecture that the tests know, mixtures of experts among them
real        slim, gptq and best on trained models: stories260K-hf and babyllama-tok105-hf in the folder --data
bundled     every shipped recipe on the bundled model, calibrated on Python's standard library; `best-24` takes minutes

Of each case are kept: dtype, shape and SHA-256 of every stored tensor; the figures of its record (errors, bits, perplexities,
the plan); and for each choice of kernels that the CPU has the SHA-256 of the logits on fixed tokens, the greedy
tokens after a fixed prompt, the SHA-256 of the logits of each of these steps, and the bytes that the kernels' packing makes.

Names may change: a tensor or figure that is gone and one that is new and holds the same are reported as renamed. All else that
differs, is missing or was added fails (exit 1); of figures, those that were added are only reported.

The file is written after every case, and cases that it holds are passed over, so that an interrupted recording resumes.
Everything runs in this process, by default with one thread: sums are made in the same order, whatever else the machine does.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import slimlm
from slimlm.core.errors import KernelError
from slimlm.inference.generate import generate
from slimlm.kernels import native, processor
from slimlm.models.bundled import bundled_model
from slimlm.recipe import shipped
from slimlm.runtime.cpu import bindings
from tiny_models import FAMILIES, TINY, made_text, random_model, save

GROUPS = ("tiny", "families", "real", "bundled")
KINDS = ("tensors", "packed", "figures", "answers")
"""What is kept of a case, each by name: what the comparison goes through."""
SHOWN = 4
"""Lines of a kind that are printed of a case; the others are counted."""

Data = dict[str, Any]


# What is recorded


@dataclass(frozen=True)
class Case:
    """One compression."""

    group: str
    name: str
    model: str
    """"tiny", one of FAMILIES, or the name of a model's folder"""
    recipe: str
    """a shipped recipe's name, or the text of a recipe file"""
    samples: int = 8
    length: int = 48
    options: Data = field(default_factory=dict)
    """more arguments of `slimlm.compress`"""

    @property
    def key(self) -> str:
        """Its name in the record."""
        return f"{self.group}/{self.name}"

    def asked(self) -> Data:
        """What must be the same for two records of it to be compared."""
        return {"model": self.model, "recipe": self.recipe, "samples": self.samples, "length": self.length, **self.options}


SHORT = """
[[steps]]
joint = "alternation"
rounds = 2
descent_rounds = 1
"""
"""`best-24` in little time."""

OWN: dict[str, tuple[str, Data]] = {
    "budget-size": (SHORT, {"bits": 3.0}),
    "budget-speed": (SHORT, {"bits": 4.0, "objective": "speed"}),
    "rank-auto": (SHORT + 'rank = "auto"\n', {}),
    "embedding-4": ("slim", {"embedding_bits": 4}),
    "embedding-6": ("gptq", {"embedding_bits": 6}),
    "own-text": ("wanda-gptq", {"data": "self"}),
    "on-disk": ("sequential = true\n" + SHORT, {"memory": 2**16}),
    "other-seed": ("wanda-gptq", {"seed": 1}),
    "matched-frozen": (SHORT + '[block_reconstruction]\npasses = 2\ncodes = "frozen"\ninputs = "dense"\n', {}),
    "matched-compressed": (
        "sequential = true\n" + SHORT + 'adapter_bits = 16\n[block_reconstruction]\npasses = 2\ninputs = "compressed"\n',
        {},
    ),
    "tables": (SHORT + 'bits = 3\ngroup_size = "per-channel"\npattern = ""\ncodebook = "fitted"\n', {}),
    "half-share": (SHORT + "pattern = 0.5\nbits = 5\ngroup_size = 64\nadapter_group_size = 32\n", {}),
    "four-of-eight": ('[[steps]]\nprune = "sparsegpt"\npattern = "4:8"\n[[steps]]\nquantize = "gptq"\nbits = 3\n', {}),
    "one-of-four": ('[[steps]]\nprune = "wanda"\npattern = "1:4"\n[[steps]]\nquantize = "absmax"\nbits = 8\n', {}),
    "input-order": (
        '[[steps]]\nprune = "sparsegpt"\norder = "input"\n[[steps]]\nquantize = "gptq"\norder = "input"\nbits = 2\n',
        {},
    ),
    "svd": (
        '[[steps]]\nquantize = "slim_quant"\nbits = 3\ngroup_size = 32\nweigh = "energy"\n'
        '[[steps]]\ncompensate = "svd"\nrank = 0.2\nbits = 8\nrefit = false\n',
        {},
    ),
    "slim-quant-o": (
        '[[steps]]\nquantize = "slim_quant_o"\n[[steps]]\ncompensate = "qera"\nbits = 4\ngroup_size = 32\n',
        {},
    ),
    "groups": ('[[steps]]\nquantize = "absmax"\nbits = 6\ngroup_size = "per-channel"\n', {}),
    "one-scale": ('[[steps]]\nquantize = "absmax"\nbits = 2\ngroup_size = "per-tensor"\n', {}),
    "pruned-only": ('[[steps]]\nprune = "magnitude"\n', {}),
    "rules": (
        'ignore = ["*.0.*.down_proj"]\n[[steps]]\nquantize = "gptq"\n[[rules]]\nlayers = ["*.mlp.*"]\nbits = 3\n'
        '[[rules]]\nlayers = ["*.1.*"]\ngroup_size = 32\n',
        {},
    ),
}
"""What no shipped recipe asks for: by name the recipe and more arguments."""


def cases(data: Path | None) -> list[Case]:
    """All cases; `real` ones only where there is a folder of models."""
    found = [Case("tiny", name, "tiny", name) for name in shipped()]
    found += [Case("tiny", name, "tiny", recipe, options=options) for name, (recipe, options) in OWN.items()]
    sequential = "sequential = true\nembedding_bits = 8\n" + SHORT
    for name in FAMILIES:
        found += [Case("families", f"{name}/{of}", name, recipe) for of, recipe in (("slim", "slim"), ("short", sequential))]
    if data is not None:
        for model in ("stories260K-hf", "babyllama-tok105-hf"):
            found += [Case("real", f"{model}/{of}", model, of, 16, 256) for of in ("slim", "gptq", "best-24")]
    slow = ("best-24", "hassle-free", "oats", "best-24-matched")
    ordered = sorted(shipped(), key=lambda name: slow.index(name) if name in slow else -1)
    return found + [Case("bundled", name, "pystd-5m", name, 8, 64, {"data": "stdlib"}) for name in ordered]


# What touches slimlm's interface

CHOICES: tuple[tuple[Any, tuple[Any, ...]], ...] = (("reference", ()), ("auto", ("precise", "fast")))
"""Kernels that a model is loaded with, and those that it is then set to use."""


def compress_case(case: Case, model: Path, text: Path, out: Path) -> Data:
    """Compress `model` into `out`; gives the record's figures as plain data, without what differs from run to run."""
    recipe = case.recipe
    if "\n" in recipe:
        recipe = str(out.with_name("own.toml"))
        Path(recipe).write_text(case.recipe, encoding="utf-8")
    options = {"data": str(text), "samples": case.samples, "length": case.length, "device": "cpu", **case.options}
    record = slimlm.compress(model, out, recipe=recipe, **options).record.to_dict()
    # The weight files' size depends on the length of names.
    for key in ("recipe", "calibration", "versions", "seconds", "peak_memory", "stored_bytes"):
        del record[key]
    return record


def answers_of(folder: Path, *, variants: bool) -> Data:
    """What the compressed model gives under each choice of kernels; `variants`: also under those for older processors."""
    found: Data = {}
    for first, others in CHOICES:
        model = slimlm.load(folder, kernels=first, notify=lambda _: None)
        found |= logits_of(model, first)
        for other in others:
            try:
                slimlm.use_kernels(model, other)
            except KernelError:
                found[other] = "refused"
                continue
            found |= logits_of(model, other)
            for variant in runnable() if variants else ():
                bindings.use_variant(variant)
                found |= logits_of(model, f"{other} {variant}")
            if variants:
                bindings.use_variant(str(native.status().active))
    return found


def logits_of(model: PreTrainedModel, name: str) -> Data:
    """Digest of the logits on fixed tokens, greedy tokens of one text and of two, and digests of the logits of their steps."""
    size = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(1, 49).reshape(2, 24) * 7 % size
    with torch.no_grad():
        found: Data = {f"{name}, logits": fingerprint(model(tokens).logits)}
    for count in (1, 2):
        with StepLogits() as steps:
            made = generate(model, tokens[:count, :8], max_new_tokens=16, stop_tokens=[])
        found[f"{name}, tokens of {count}"] = made.tokens.tolist()
        found[f"{name}, steps of {count}"] = f"{steps.count} of {steps.digest.hexdigest()}"
    return found


def runnable() -> list[str]:
    """The variants of the CPU kernels, besides the active one, that this processor can run."""
    found = []
    for variant in native.NEEDS:
        with suppress(KernelError):
            bindings.use_variant(variant)
            found.append(variant)
    return [variant for variant in found if variant != native.status().active]


def environment(threads: int) -> Data:
    """What the bytes may depend on. The state of slimlm's source tells one recording from another."""
    library = native.library_path()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors", "tokenizers")},
        "processor": processor.name(),
        "platform": f"{platform.system()} {platform.machine()}",
        "kernels": native.status().active,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "source": source_state(Path(slimlm.__file__).parent),
        "kernel_library": hashlib.sha256(library.read_bytes()).hexdigest()[:16] if library.exists() else None,
    }


OURS = ("source", "kernel_library")
"""What of the environment a change of slimlm's is expected to change."""


# Measuring


class StepLogits(TorchFunctionMode):
    """Within this context: the digest of all that the likeliest number is looked for in, as greedy generation does."""

    def __init__(self) -> None:
        super().__init__()
        self.digest, self.count = hashlib.sha256(), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.argmax:
            self.digest.update(fingerprint(args[0]).encode())
            self.count += 1
        return func(*args, **(kwargs or {}))


def fingerprint(tensor: Tensor) -> str:
    """Dtype, shape and SHA-256 of a tensor's bytes."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def stored_tensors(files: Iterable[Path]) -> dict[str, str]:
    """Dtype, shape and SHA-256 of every tensor of safetensors files, by name, straight from the files' bytes."""
    found = {}
    for file in files:
        content = memoryview(file.read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8:begin]))
        for name, about in header.items():
            # The kernels' cache fills gaps with tensors of such names.
            if name != "__metadata__" and not name.startswith("#"):
                first, last = about["data_offsets"]
                digest = hashlib.sha256(content[begin + first : begin + last]).hexdigest()
                found[name] = f"{about['dtype']} {about['shape']} {digest}"
    return dict(sorted(found.items()))


def numbers_in(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every number within plain data, with the way to it as its name."""
    if isinstance(data, Mapping | list | tuple):
        pairs = data.items() if isinstance(data, Mapping) else enumerate(data)
        for key, value in pairs:
            yield from numbers_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield path, repr(data)


def source_state(folder: Path) -> str:
    """A short hash of a package's Python and recipe files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".toml")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Ground:
    """Where models and text are found or made."""

    scratch: Path
    data: Path | None
    """real models"""
    text: Path | None
    """what these are calibrated on"""

    def model(self, case: Case) -> Path:
        """The folder of a case's model, which is made where it is a random one."""
        if case.group == "bundled":
            return bundled_model()
        if case.group == "real" and self.data is not None:
            return self.data / case.model
        folder = self.scratch / case.model
        if not folder.exists():
            tiny = case.model == "tiny"
            model = random_model(TINY if tiny else FAMILIES[case.model])
            save(model.to(torch.float16 if tiny else torch.bfloat16), folder)
        return folder

    def text_for(self, case: Case) -> Path:
        """The file of a case's calibration text."""
        if case.group == "real" and self.text is not None:
            return self.text
        path = self.scratch / "text.txt"
        if not path.exists():
            made_text(path)
        return path


def recorded(case: Case, ground: Ground) -> Data:
    """Compress, and take down everything."""
    model, text = ground.model(case), ground.text_for(case)
    given = {"model": stored_tensors(sorted(model.glob("*.safetensors"))), "text": text.read_text(encoding="utf-8")}
    began = time.monotonic()
    with TemporaryDirectory(dir=ground.scratch) as scratch:
        torch.manual_seed(0)
        out = Path(scratch) / "out"
        figures = dict(numbers_in(compress_case(case, model, text, out)))
        tensors = stored_tensors(sorted(out.glob("*.safetensors")))
        compressed = time.monotonic()
        answers = answers_of(out, variants=case.group == "tiny")
        packed = stored_tensors(sorted(set(out.rglob("*.safetensors")) - set(out.glob("*.safetensors"))))
    return {
        "asked": case.asked(),
        "given": hashlib.sha256(json.dumps(given).encode()).hexdigest(),
        "seconds": [round(compressed - began, 2), round(time.monotonic() - compressed, 2)],
        "tensors": tensors,
        "packed": packed,
        "figures": figures,
        "answers": answers,
    }


def record(given: argparse.Namespace) -> int:
    """Record the cases that are asked for and not there yet; gives the exit status."""
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    around = environment(given.threads)
    kept = read(given.into) if given.into.exists() else {"environment": around, "cases": {}}
    if kept["environment"] != around:
        changed = [key for key in around if kept["environment"].get(key) != around[key]]
        print(f"{given.into} was begun in another environment ({', '.join(changed)}); give another file")
        return 2
    wanted = [case for case in cases(given.data) if asked_for(case.key, given.only)]
    missing = [case for case in wanted if given.again or case.key not in kept["cases"]]
    print(f"{len(missing)} of {len(wanted)} cases to record", flush=True)
    if around["kernels"] is None:
        print(f"without CPU kernels: {native.status().reason}", flush=True)
    failed = 0
    with TemporaryDirectory() as scratch:
        ground = Ground(Path(scratch), given.data, given.text)
        for case in missing:
            try:
                kept["cases"][case.key] = found = recorded(case, ground)
            except Exception as error:
                failed += 1
                print(f"{case.key}: failed: {type(error).__name__}: {error}", flush=True)
                continue
            write(given.into, kept)
            print(f"{case.key}: {found['seconds'][0]} s, then {found['seconds'][1]} s for its answers", flush=True)
    print(f"{len(missing) - failed} recorded, {failed} failed; {given.into} holds {len(kept['cases'])}")
    return 1 if failed else 0


def asked_for(key: str, only: list[str]) -> bool:
    """Whether a case is among these groups or patterns; all are where none is given."""
    return not only or any(key.partition("/")[0] == pattern or fnmatchcase(key, pattern) for pattern in only)


def read(path: Path) -> Data:
    """A record from its file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, kept: Data) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


# Comparing


@dataclass
class Difference:
    """What became of the entries of one kind of one case."""

    equal: int = 0
    renamed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """of other content under the same name, or not there any more"""


def difference(before: Data, after: Data) -> Difference:
    """Compare entries by name; those whose names are in one record only, by what they hold."""
    found = Difference()
    found.equal = sum(after.get(name) == value for name, value in before.items() if name in after)
    found.wrong = [f"{name} differs" for name, value in before.items() if name in after and after[name] != value]
    holders = defaultdict(list)
    for name, value in after.items():
        if name not in before:
            holders[json.dumps(value)].append(name)
    for name, value in before.items():
        if name in after:
            continue
        if same := holders[json.dumps(value)]:
            found.renamed.append(f"{name} is {same.pop(0)} now")
        else:
            found.wrong.append(f"{name} is gone")
    found.added = [f"{name} is new" for names in holders.values() for name in names]
    return found


def compared(before: Data, after: Data, counts: Counter[str], tell: Callable[[str, list[str]], None]) -> bool:
    """Whether two records of one case agree; tells what does not, and counts what was compared."""
    for key, what in (("asked", "what was asked for"), ("given", "the original model or the text")):
        if before[key] != after[key]:
            tell("not comparable", [f"{what} differs"])
            return False
    right = True
    for kind in KINDS:
        found = difference(before[kind], after[kind])
        wrong = found.wrong + ([] if kind == "figures" else found.added)
        counts[f"{kind} equal"] += found.equal
        counts[f"{kind} renamed"] += len(found.renamed)
        counts[f"{kind} wrong"] += len(wrong)
        tell(f"{kind} renamed", found.renamed)
        tell(f"{kind} added", found.added if kind == "figures" else [])
        tell(f"{kind} WRONG", wrong)
        right = right and not wrong
    return right


def compare(given: argparse.Namespace) -> int:
    """Compare two records; gives the exit status."""
    first, second = read(given.first), read(given.second)
    for key, value in first["environment"].items():
        other = second["environment"].get(key)
        if value != other:
            print(f"{key}: {value}, then {other}" + ("" if key in OURS else "  -- NOT THE SAME ENVIRONMENT"))
    counts: Counter[str] = Counter()
    failed = []
    for key in [key for key in first["cases"] if asked_for(key, given.only)]:

        def tell(what: str, lines: list[str], key: str = key) -> None:
            shown = lines if given.all else lines[:SHOWN]
            for line in shown:
                print(f"{key}: {what}: {line}")
            if len(lines) > len(shown):
                print(f"{key}: {what}: and {len(lines) - len(shown)} more")

        after = second["cases"].get(key)
        if after is None:
            print(f"{key}: MISSING in {given.second}")
        if after is None or not compared(first["cases"][key], after, counts, tell):
            failed.append(key)
        counts["cases"] += 1
    new = [key for key in second["cases"] if key not in first["cases"] and asked_for(key, given.only)]
    print(f"cases: {counts.pop('cases', 0)} compared, {len(failed)} fail, {len(new)} only in {given.second}")
    for kind in KINDS:
        print(f"{kind}: " + ", ".join(f"{counts[f'{kind} {what}']} {what}" for what in ("equal", "renamed", "wrong")))
    print("EQUAL" if not failed else f"DIFFERENT: {', '.join(failed)}")
    return 1 if failed else 0


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    recording = verbs.add_parser("record", help="compress every case and write down what came out")
    recording.add_argument("--into", type=Path, required=True, help="the record, which grows case by case")
    recording.add_argument("--data", type=Path, help="folder that holds the trained models of the group real")
    recording.add_argument("--text", type=Path, help="text file that these are calibrated on")
    recording.add_argument("--again", action="store_true", help="record again cases that the file holds")
    recording.add_argument("--threads", type=int, default=1)
    recording.set_defaults(run=record)
    comparing = verbs.add_parser("compare", help="two records: equal or not")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    comparing.add_argument("--all", action="store_true", help=f"show every line instead of {SHOWN} of a kind")
    comparing.set_defaults(run=compare)
    for verb in (recording, comparing):
        told = f"a group ({', '.join(GROUPS)}) or a pattern of cases such as 'tiny/best*'; may be given several times"
        verb.add_argument("--only", action="append", default=[], help=told)
    given = parser.parse_args()
    if given.run is record and given.data is not None and given.text is None:
        parser.error("--data needs --text")
    sys.exit(given.run(given))


if __name__ == "__main__":
    main()
