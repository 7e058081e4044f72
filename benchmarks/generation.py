"""How fast whole models write, what memory they take and how long they take to open: slimlm, transformers and llama.cpp.

    python benchmarks/generation.py --sizes 110m 1b          # random Llamas of about 134 million and 1.1 billion parameters
    python benchmarks/generation.py --quick                  # a tiny one, half a minute
    python benchmarks/generation.py --markdown               # the table for docs/, from the results alone

Every measurement is a process of its own, so that its memory is its own; all import torch, llama.cpp's, too. The ways take
turns in random order, round after round, and figures are medians. Models of the same shape with random weights are made once
(--folder keeps them): a packed slimlm checkpoint like those of recipe `best-24`, a dense bfloat16 folder, and GGUF files that
llama.cpp's own quantizer makes.
Tokens are counted over all texts of a batch; further tokens by the median time between them, the first with the prompt.
With one thread the clock is the process's CPU time, with more the wall clock (see slimlm/evaluate/layer_speed.py).

A way that cannot be had is named with the reason: in the results, and at the end.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, StoppingCriteria

from llama_shape import LlamaShape
from random_checkpoint import SIZES, write
from results_file import Data, Results, slug, this_run
from slimlm.bench import layer_speed
from slimlm.bench.model_speed import opened
from slimlm.inference.generate import generate
from slimlm.kernels import processor
from slimlm.report.tables import plain_table
from slimlm.runtime.memory import format_bytes

RESULTS = Path(__file__).resolve().parent / "results"
NO_LLAMA = "llama-cpp-python or gguf is not installed (python -m pip install llama-cpp-python gguf; the first is compiled)"
Clock = Callable[[], float]


@dataclass(frozen=True)
class Job:
    """What is written: prompts of equal length, and new tokens after the first."""

    batch: int
    prompt: int
    new: int
    threads: int

    def prompts(self, vocabulary: int) -> Tensor:
        """Random tokens `[batch, prompt]`."""
        return torch.randint(1, vocabulary, (self.batch, self.prompt), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Taken:
    """Seconds that a job took."""

    prompt: float
    """from the start to the first new token"""
    steps: list[float]
    """between new tokens"""

    @classmethod
    def of(cls, began: float, moments: Sequence[float]) -> "Taken":
        return cls(moments[0] - began, [late - early for early, late in pairwise(moments)])


Opened = Callable[[Job, Clock], Taken]
"""A model that is ready for jobs."""


# The ways


def open_slimlm(folder: Path, precision: str, threads: int) -> Opened:
    """A packed checkpoint through slimlm's own loop."""
    model = opened(str(folder), precision)  # type: ignore[arg-type]
    # The way through the model is checked once, before its first text.
    generate(model, torch.zeros(1, 1, dtype=torch.long), max_new_tokens=2, stop_tokens=[])

    def do(job: Job, clock: Clock) -> Taken:
        prompts, moments = job.prompts(model.config.vocab_size), list[float]()
        began = clock()
        generate(model, prompts, max_new_tokens=job.new + 1, stop_tokens=[], each=lambda _: moments.append(clock()))
        return Taken.of(began, moments)

    return do


class _Moments(StoppingCriteria):
    """Notes when each token is there, and never stops."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.moments = clock, list[float]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.moments.append(self.clock())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def open_transformers(folder: Path, dtype: str, threads: int) -> Opened:
    """A dense folder through transformers' own generate, with its static cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def do(job: Job, clock: Clock) -> Taken:
        prompts, moments = job.prompts(model.config.vocab_size), _Moments(clock)
        began = clock()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=job.new + 1,
            min_new_tokens=job.new + 1,
            do_sample=False,
            cache_implementation="static",
            stopping_criteria=[moments],
            pad_token_id=0,
        )
        return Taken.of(began, moments.moments)

    return do


def open_llama(file: Path, kind: str, threads: int) -> Opened:
    """A GGUF file through llama.cpp, the likeliest token each time."""
    llama_cpp = llama_library()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def do(job: Job, clock: Clock) -> Taken:
        settings = llama_cpp.llama_context_default_params()
        positions = job.batch * (job.prompt + job.new + 1)
        settings.n_ctx, settings.n_batch, settings.n_seq_max = positions, max(512, job.batch * job.prompt), job.batch
        settings.kv_unified = True
        settings.n_threads = settings.n_threads_batch = job.threads
        context = llama_cpp.llama_init_from_model(model, settings)
        batch = llama_cpp.llama_batch_init(job.batch * job.prompt, 0, 1)
        prompts, moments = job.prompts(vocabulary).numpy(), list[float]()

        def step(tokens: np.ndarray, position: int) -> np.ndarray:
            """Read tokens `[batch, count]`; gives the next ones `[batch, 1]`."""
            count = tokens.shape[1]
            asked = []
            for i, (text, at) in enumerate(np.ndindex(tokens.shape)):
                batch.token[i], batch.pos[i] = int(tokens[text, at]), position + at
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, text
                batch.logits[i] = at == count - 1
                if at == count - 1:
                    asked.append(i)
            batch.n_tokens = tokens.size
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama.cpp could not read its tokens")
            rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocabulary,)) for i in asked]
            return np.array([[row.argmax()] for row in rows])

        began, position = clock(), job.prompt
        tokens = step(prompts, 0)
        moments.append(clock())
        for _ in range(job.new):
            tokens = step(tokens, position)
            position += 1
            moments.append(clock())
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return Taken.of(began, moments)

    return do


@cache
def llama_library() -> Any:
    """llama.cpp's functions, with its output silenced."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    # Without a reference Python would drop what the library goes on calling.
    llama_cpp.silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(llama_cpp.silence, None)
    return llama_cpp


@dataclass(frozen=True)
class Way:
    """One way to run a model of a size."""

    files: str
    """their name in the size's folder"""
    open: Callable[[Path, str, int], Opened]
    option: str


WAYS = {
    "slimlm fast": Way("packed", open_slimlm, "fast"),
    "slimlm precise": Way("packed", open_slimlm, "precise"),
    "transformers float32": Way("dense", open_transformers, "float32"),
    "transformers bfloat16": Way("dense", open_transformers, "bfloat16"),
    "llama.cpp Q4_0": Way("Q4_0.gguf", open_llama, "Q4_0"),
    "llama.cpp Q4_K_M": Way("Q4_K_M.gguf", open_llama, "Q4_K_M"),
}


# The models


def make(folder: Path, name: str, size: LlamaShape) -> dict[str, str]:
    """Make what is not there yet of a size's models; gives the ways that cannot be had, and why."""
    there = folder / name
    there.mkdir(parents=True, exist_ok=True)
    if not (there / "packed").exists():
        write(there / "packed", size)
    if not (there / "dense").exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(size.config()).bfloat16()
        model.save_pretrained(there / "dense.partial")
        (there / "dense.partial").rename(there / "dense")
    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        return {way: NO_LLAMA for way, about in WAYS.items() if about.open is open_llama}
    missing = {}
    for way in ("Q4_0", "Q4_K_M"):
        file = there / f"{way}.gguf"
        if not file.exists():
            source = there / "F16.gguf"
            if not source.exists():
                write_gguf(source, size)
            reason = quantize(source, file, way)
            if reason is not None:
                missing[f"llama.cpp {way}"] = reason
    (there / "F16.gguf").unlink(missing_ok=True)
    return missing


def write_gguf(path: Path, size: LlamaShape) -> None:
    """A float16 GGUF file of this shape; its blocks share their random weights, which changes no time."""
    import gguf

    generator = np.random.default_rng(0)

    def weight(out: int, width: int) -> np.ndarray:
        return (generator.standard_normal((out, width), dtype=np.float32) / width**0.5).astype(np.float16)

    writer = gguf.GGUFWriter(path, "llama")
    head = size.width // size.heads
    writer.add_block_count(size.blocks)
    writer.add_context_length(size.context)
    writer.add_embedding_length(size.width)
    writer.add_feed_forward_length(size.mlp)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.key_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(size.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    keys = size.key_heads * head
    block = {
        "attn_q": weight(size.width, size.width),
        "attn_k": weight(keys, size.width),
        "attn_v": weight(keys, size.width),
        "attn_output": weight(size.width, size.width),
        "ffn_gate": weight(size.mlp, size.width),
        "ffn_up": weight(size.mlp, size.width),
        "ffn_down": weight(size.width, size.mlp),
        "attn_norm": np.ones(size.width, np.float32),
        "ffn_norm": np.ones(size.width, np.float32),
    }
    writer.add_tensor("token_embd.weight", weight(size.vocabulary, size.width))
    for i in range(size.blocks):
        for name, values in block.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", values)
    writer.add_tensor("output_norm.weight", np.ones(size.width, np.float32))
    writer.add_tensor("output.weight", weight(size.vocabulary, size.width))
    partial = path.with_suffix(".partial")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def quantize(source: Path, out: Path, kind: str) -> str | None:
    """Let llama.cpp quantize a GGUF file; why it could not, or None."""
    llama_cpp = llama_library()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    partial = out.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), settings):
        return f"llama.cpp's quantizer refused to make {kind} of a model of this shape"
    partial.rename(out)
    return None


# Measuring


def measure_one(way: str, files: Path, jobs: Sequence[Job], repeats: int) -> Data:
    """In this process: open a model and do the jobs; gives seconds and memory."""
    about = WAYS[way]
    threads = jobs[0].threads
    torch.set_num_threads(threads)
    clock = layer_speed.clock_for(threads)
    if about.open is open_llama:
        # The other ways' packages are imported already.
        llama_library()
    at_first, before, began = peak_memory(), layer_speed.processor_seconds(), time.perf_counter()
    with torch.inference_mode():
        do = about.open(files, about.option, threads)
        loading = time.perf_counter() - began
        rows = []
        for job in jobs:
            taken = [do(job, clock) for _ in range(repeats)]
            rows.append(
                {
                    "batch": job.batch,
                    "prompt_tokens_per_second": job.batch * job.prompt / median(each.prompt for each in taken),
                    "new_tokens_per_second": job.batch / median([step for each in taken for step in each.steps]),
                }
            )
    elsewhere = layer_speed.taken_elsewhere(before, layer_speed.processor_seconds())
    memory = {"memory_before": at_first, "peak_memory": peak_memory()}
    return {"load_seconds": loading, **memory, "elsewhere": elsewhere, "jobs": rows}


def peak_memory() -> int:
    """Bytes that this process had in memory at most so far, mapped files included.

    Linux's getrusage counts what the parent had when it started this process, so it is asked only elsewhere.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def file_bytes(path: Path) -> int:
    """Of a file, or of a folder's weight files; what kernels keep next to a checkpoint does not count."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.glob("*.safetensors"))


def in_its_own_process(way: str, files: Path, jobs: Sequence[Job], repeats: int) -> Data:
    """`measure_one` in a new process; raises RuntimeError with its last words where that fails."""
    about = {"way": way, "files": str(files), "jobs": [vars(job) for job in jobs], "repeats": repeats}
    line = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(about)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["(nothing said)"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_all(arguments: argparse.Namespace, folder: Path, results: Results) -> None:
    """Every size by every way, round after round, into the results."""
    for name in arguments.sizes:
        missing = make(folder, name, SIZES[name])
        results.missing |= {f"{way} ({name})": reason for way, reason in missing.items()}
        ways = [way for way in WAYS if way not in missing and (not arguments.ways or way in arguments.ways)]
        for threads in arguments.threads:
            jobs = [Job(batch, arguments.prompt, arguments.new, threads) for batch in arguments.batches]
            found: dict[str, list[Data]] = {way: [] for way in ways}
            order = random.Random(0)
            for _ in range(arguments.rounds):
                for way in order.sample(ways, len(ways)):
                    if way not in found:
                        continue
                    try:
                        one = in_its_own_process(way, folder / name / WAYS[way].files, jobs, arguments.repeats)
                    except RuntimeError as error:
                        results.missing[f"{way} ({name})"] = f"failed: {error}"
                        del found[way]
                        continue
                    found[way].append(one)
                    print(json.dumps({"size": name, "threads": threads, "way": way, **one}), file=sys.stderr, flush=True)
            for way, measured in found.items():
                size = file_bytes(folder / name / WAYS[way].files)
                for row in rows_of(measured, arguments):
                    results.add({"size": name, "way": way, "threads": threads, "file_bytes": size, **row})
            results.write()


def rows_of(measured: Sequence[Data], arguments: argparse.Namespace) -> list[Data]:
    """Medians over rounds, a row per batch."""
    shares = [each["elsewhere"] for each in measured if each["elsewhere"] is not None]
    shared = {
        "load_seconds": median(each["load_seconds"] for each in measured),
        "peak_memory": median(each["peak_memory"] for each in measured),
        "memory_before": median(each["memory_before"] for each in measured),
        "rounds": len(measured),
        "prompt_tokens": arguments.prompt,
        "new_tokens": arguments.new,
        "elsewhere": median(shares) if shares else None,
        "load_average": layer_speed.load_average(),
    }
    rows = []
    for i, batch in enumerate(arguments.batches):
        jobs = [each["jobs"][i] for each in measured]
        rates = {key: median(job[key] for job in jobs) for key in ("prompt_tokens_per_second", "new_tokens_per_second")}
        rows.append({"batch": batch, **rates, **shared})
    return rows


# What is shown


def table(results: Data) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, columns and a row for each size, way, number of threads and batch."""
    lines = [
        (
            row["size"],
            row["way"],
            str(row["threads"]),
            str(row["batch"]),
            f"{row['prompt_tokens_per_second']:.0f}",
            f"{row['new_tokens_per_second']:.1f}",
            f"{row['load_seconds']:.1f}",
            format_bytes(row["peak_memory"] - row["memory_before"]),
            format_bytes(row["file_bytes"]),
            "" if row["elsewhere"] is None else f"{row['elsewhere']:.0%}",
        )
        for row in results["rows"]
    ]
    columns = (
        "model",
        "by",
        "threads",
        "batch",
        "prompt tokens/s",
        "new tokens/s",
        "load, s",
        "peak memory",
        "files",
        "others",
    )
    title = "whole models of random weights; memory: the peak above what Python and its packages held before; "
    return title + "others: what other programs took of the processor", columns, lines


def markdown(results: Data) -> str:
    """The table as docs/ shows it, and who is missing."""
    title, columns, lines = table(results)
    rule = ["---", "---", *["---:"] * (len(columns) - 2)]
    shown = "\n".join([f"{title}\n", *("| " + " | ".join(row) + " |" for row in (columns, rule, *lines))])
    return "\n\n".join([shown, *missing_words(results)])


def missing_words(results: Data) -> list[str]:
    """A line for each way that was not measured."""
    return [f"not measured: {name}: {reason}" for name, reason in results["missing"].items()]


# The command line


def read_line(line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["110m", "1b"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="[default: all]")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each text")
    parser.add_argument("--new", type=int, default=32, help="tokens of each text after the first")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each way")
    parser.add_argument("--repeats", type=int, default=2, help="in one process")
    parser.add_argument("--folder", type=Path, help="where the models are made and kept  [default: one that is removed]")
    parser.add_argument("--quick", action="store_true", help="a tiny model, little of everything; a file of its own")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--markdown", action="store_true", help="print the results as markdown and measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(line)
    if arguments.quick:
        arguments.sizes, arguments.batches = ["tiny"], [1, 2]
        arguments.prompt, arguments.new, arguments.rounds, arguments.repeats = 16, 4, 1, 1
    return arguments


def main() -> None:
    arguments = read_line()
    if arguments.one is not None:
        about = json.loads(arguments.one)
        jobs = [Job(**job) for job in about["jobs"]]
        print(json.dumps(measure_one(about["way"], Path(about["files"]), jobs, about["repeats"])))
        return
    path = arguments.results / f"generation-{slug(processor.name())}{'-quick' if arguments.quick else ''}.json"
    if arguments.markdown:
        print(markdown(json.loads(path.read_text(encoding="utf-8"))))
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    run = this_run("generation.py", "llama-cpp-python", "gguf")
    results = Results(path, ("size", "way", "threads", "batch"), run)
    results.missing = {}
    if arguments.folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            measure_all(arguments, Path(scratch), results)
    else:
        measure_all(arguments, arguments.folder, results)
    found, console = results.to_dict(), Console(width=160)
    title, columns, lines = table(found)
    console.print(plain_table(title, columns, lines, left=2))
    for words in missing_words(found):
        console.print(words, markup=False, highlight=False)


if __name__ == "__main__":
    main()
