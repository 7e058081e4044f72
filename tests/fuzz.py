"""Damaged checkpoints, thousands of them: `python -m tests.fuzz --count 10000 --seed 0`; and models whose files hold codes,
GGUF files among them, as they are opened to be compressed: `python -m tests.fuzz sources`; and texts and conversations, as they
are read to calibrate on: `python -m tests.fuzz texts`.

Each takes one of a few small checkpoints, spoils a file (bytes, or values and keys of its JSON; of weight files the header, the
length before it, or the data), mostly puts the recorded sizes and checksums right again, so that more than these is met, and
goes through load, a forward pass, inspect and verify. Allowed are success and errors of slimlm's own tree. Not allowed: other
errors, over ten seconds of processor time, memory beyond a multiple of the files' size, a dead process. The same seed gives
the same damage.
"""

import argparse
import contextlib
import copy
import functools
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pyarrow
import pyarrow.parquet
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

import slimlm
from slimlm.calibration.samples import Drawn
from slimlm.cli.inspect import inspect as show
from slimlm.core.errors import SlimlmError
from slimlm.data.rows import Chat, Reading
from slimlm.data.windows import chat_template_of, tokens_of
from slimlm.models.lazy import open_lazy
from slimlm.models.structure import blocks_of
from slimlm.preflight.refusals import compressible
from slimlm.preflight.rehearsal import rehearse
from slimlm.recipe import open_recipe
from slimlm.run.prepare import refuse_unfit_model
from slimlm.storage import checkpoint
from slimlm.storage.streams import sha256_of
from tests.conftest import ENDS, byte_tokenizer, save
from tests.gguf_models import write as write_gguf
from tests.models.test_dequantize import coded

SECONDS = 10
"""of processor time for one damaged checkpoint"""
ROOM = 2**30
"""bytes of address space beyond what the process has when the run begins"""
GROWTH = 2**27
"""bytes by which the most memory ever held may grow, whatever is met; the checkpoints take under 2**18"""
IDS = torch.arange(6)[None]
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def small_llama(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **ENDS, **options)).half()


def small_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


BASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "plain": (lambda: small_llama(attention_bias=True), {"recipe": "slim"}),
    "tied": (lambda: small_llama(tie_word_embeddings=True), {"recipe": "slim", "embedding_bits": 8}),
    "embedding": (small_llama, {"recipe": "gptq-zero", "embedding_bits": 4}),
    "tables": (small_llama, {"recipe": "best-24"}),
    "sharded": (small_gpt2, {"recipe": "slim"}),
}


def make_bases(folder: Path) -> dict[str, Path]:
    """The checkpoints that are damaged, with the kernels' file where there are kernels."""
    text = folder / "text.txt"
    text.write_text("alpha beta gamma river stone tree " * 60)
    found = {}
    for name, (make, options) in BASES.items():
        dense = save(make(), folder / f"{name}-dense")
        shard = 20_000 if name == "sharded" else checkpoint.SHARD_BYTES
        windows = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
        with (
            mock.patch.object(checkpoint, "SHARD_BYTES", shard),
            # The tokenizer knows 256 tokens, the model 64.
            mock.patch("slimlm.calibration.samples.draw_samples", mock.Mock(return_value=Drawn(windows, None))),
        ):
            slimlm.compress(dense, folder / name, data=str(text), samples=8, length=16, **options)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).unlink(missing_ok=True)
        repair_beside(folder / name)
        slimlm.load(folder / name)
        shutil.rmtree(dense)
        found[name] = folder / name
    return found


# --- damage ----------------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 5, 7, 255, 2**16, 2**31, 2**40, 2**63, -(2**63), 10**30, 0.5, 1e308, -0.0,
    float("nan"), "", "x", "x" * 300, "../../elsewhere", "/etc/passwd", "float16", "float64", "uint8", "int64",
    "complex64", "U8", "F64", "2:4", "4:2", "0:0", "1:1", "0.9", "per-channel", "per-tensor", "uniform", "pruned", "low_rank",
    "plain", "codebook", "slimlm", "gpt2", "llama", "mixtral", "model.embed_tokens", "lm_head", "weight",
    [], [0], [1, 1], [2**40, 2**40], [-1, 4], [16, 16], {}, {"a": 1}, [[]],
]  # fmt: skip


def nested(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place in plain data, and what is there."""
    if path:
        yield path, value
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nested(inner, (*path, key))


def damage_json(data: Any, draw: random.Random) -> Any:
    """Plain data with one to three places changed."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = list(nested(data))
        if not places:
            return draw.choice(VALUES)
        (*above, key), value = draw.choice(places)
        owner = data
        for step in above:
            owner = owner[step]
        way = draw.randrange(7)
        if way == 0:
            del owner[key]
        elif way == 1 and isinstance(value, int) and not isinstance(value, bool):
            owner[key] = value + draw.choice([-8, -1, 1, 2, 8, 2**20, -value, -2 * value, value, 9 * value])
        elif way == 2 and isinstance(value, str):
            owner[key] = value[: len(value) // 2] + draw.choice(["", "x", "/", "..", ".", "\0", "é"]) + value[len(value) // 2 :]
        elif way == 3:
            owner[key] = copy.deepcopy(draw.choice(places)[1])
        elif way == 4 and isinstance(owner, dict):
            owner[draw.choice([*(str(step[-1]) for step, _ in places), "x", "", "attn_implementation", "auto_map"])] = value
        elif way == 5 and isinstance(owner, list):
            owner.insert(draw.randrange(len(owner) + 1), draw.choice(VALUES))
        else:
            owner[key] = draw.choice(VALUES)
        data = json.loads(json.dumps(data))
    return data


def damage_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Bytes with some flipped, cut, added, cleared or moved."""
    out, way = bytearray(raw), draw.randrange(6)
    at = draw.randrange(len(out) + 1)
    if way == 0:
        for _ in range(draw.choice([1, 1, 4, 64])):
            if out:
                out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    elif way == 1:
        del out[at:]
    elif way == 2:
        out[at:at] = draw.randbytes(draw.choice([1, 8, 1000]))
    elif way == 3:
        del out[at : at + draw.choice([1, 8, 100])]
    elif way == 4:
        out[at : at + 64] = bytes([draw.choice([0, 255, 0x7C, 0xFE])]) * len(out[at : at + 64])
    else:
        out[at : at + 32] = draw.randbytes(len(out[at : at + 32]))
    return bytes(out)


def damage_weights(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file with its length, header or data spoiled."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    way = draw.randrange(8)
    if way == 0:
        other = draw.choice([0, 1, 7, length - 1, length + 1, len(raw), 2**31, 2**63, 2**64 - 1])
        return other.to_bytes(8, "little") + raw[8:]
    if way in (1, 2, 3):
        header = json.dumps(damage_json(json.loads(header), draw)).encode()
    elif way == 4:
        header = damage_bytes(header, draw)
    elif way == 5:
        # Two tensors' entries change places: a sound file of other tensors.
        about = json.loads(header)
        one, other = draw.choices([name for name in about if name != "__metadata__"], k=2)
        about[one], about[other] = about[other], about[one]
        header = json.dumps(about).encode()
    else:
        data = damage_bytes(data, draw)
    return len(header).to_bytes(8, "little") + header + data


def repair_record(folder: Path) -> None:
    """Let the record give the sizes and checksums that the shards have now."""
    with own_record(folder) as record:
        for name, entry in record["files"].items():
            entry |= {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            entry.pop("tensors", None)


def repair_beside(folder: Path) -> None:
    """Let the record give the checksums that config and tokenizer have now, where they are there."""
    with own_record(folder) as record:
        record["beside"] = {name: sha256_of(folder / name) for name in record["beside"] if (folder / name).is_file()}


@contextlib.contextmanager
def own_record(folder: Path) -> Iterator[Any]:
    """A folder's record, to be changed; its file may be a link to that of others."""
    path = folder / checkpoint.RECORD
    record = json.loads(path.read_text())
    yield record
    path.unlink()
    path.write_text(json.dumps(record))


def damaged(base: Path, folder: Path, draw: random.Random) -> str:
    """Put a damaged copy of a checkpoint into `folder`; says what was spoiled."""
    shutil.copytree(base, folder, copy_function=os.link)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors" and path.parent == folder]
    kernels = [path for path in files if path.suffix == ".safetensors" and path.parent != folder]
    plain = [path for path in files if path.suffix == ".json" and path.name != "config.json"]
    kind = draw.choices(["config", "weights", "plain", "kernels"], [8, 8, 3, 1])[0]
    choice = {"config": [folder / "config.json"], "weights": weights, "plain": plain, "kernels": kernels or weights}[kind]
    path = draw.choice(choice)
    raw = path.read_bytes()
    if path.suffix == ".safetensors":
        new = damage_weights(raw, draw)
    elif draw.random() < 0.1:
        new = damage_bytes(raw, draw)
    else:
        new = json.dumps(damage_json(json.loads(raw), draw)).encode()
    path.unlink()
    path.write_bytes(new)
    repair = repair_record if path in weights else repair_beside if path.name == "config.json" else None
    if repair is not None and draw.random() < 0.8:
        repair(folder)
        return f"{path.name}, and the record repaired"
    return str(path.relative_to(folder)) + (" as it was" if new == raw else "")


CODED = ("fp8", "fbgemm", "gptq", "awq", "compressed-tensors", "mixture", "mxfp4")
HEADER = 2**14
"""Bytes at the beginning of a GGUF file that are damaged more often than the rest: its header and the first weights."""


def make_sources(folder: Path) -> dict[str, Path]:
    """Models of every format that is read, without tokenizers where these are files of their own."""
    found = {name: coded(name, folder / name) for name in CODED}
    for path in folder.glob("*/tokenizer*"):
        path.unlink()
    for name, model, kinds in (("gguf", "llama3", ("Q4_1", "Q6_K", "F16")), ("gguf-gemma", "gemma2", ("BF16", "Q8_0"))):
        (folder / name).mkdir()
        write_gguf(folder / name / "m.gguf", model, kinds)
        found[name] = folder / name
    return found


def damaged_source(base: Path, folder: Path, draw: random.Random) -> str:
    """Put a damaged copy of a model into `folder`; says what was spoiled."""
    shutil.copytree(base, folder, copy_function=os.link)
    path = draw.choice(sorted(path for path in folder.iterdir() if path.name != "generation_config.json"))
    raw = path.read_bytes()
    if path.suffix == ".gguf":
        new = damage_bytes(raw[:HEADER], draw) + raw[HEADER:] if draw.random() < 0.8 else damage_bytes(raw, draw)
    elif path.suffix == ".safetensors":
        new = damage_weights(raw, draw)
    else:
        new = json.dumps(damage_json(json.loads(raw), draw)).encode()
    path.unlink()
    path.write_bytes(new)
    return str(path.name) + (" as it was" if new == raw else "")


def make_texts(folder: Path) -> dict[str, Path]:
    """Files of text and of conversations, each of its format and compression in a folder of its own."""
    turns = [{"role": "user", "content": [{"text": "what is a river?"}]}, {"role": "assistant", "content": [{"text": "water"}]}]
    shared = [{"from": "human", "value": "and a stone?"}, {"from": "gpt", "value": "no water"}]
    rows: list[dict[str, Any]] = [
        {"messages": turns, "text": "written before"},
        {"conversations": shared, "system": "be brief"},
        {"instruction": "count", "input": "trees", "output": "three"},
        {"prompt": "one", "completion": "two"},
        {"question": "who?", "answer": "nobody"},
        {"content": "plain text"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    written = "one document\n<|endoftext|>\nand another \u00e4\n"
    found = {}
    for name, content in (
        ("a.jsonl", lines),
        ("a.jsonl.gz", gzip.compress(lines)),
        ("a.json", json.dumps(rows, indent=1).encode()),
        ("a.txt", written.encode()),
        ("a.md", written.encode("utf-16")),
        ("a.parquet", None),
    ):
        found[name] = folder / name
        found[name].mkdir(parents=True)
        if content is None:
            tables = [pyarrow.Table.from_pylist([row]) for row in rows]
            pyarrow.parquet.write_table(pyarrow.concat_tables(tables, promote_options="default"), found[name] / name)
        else:
            (found[name] / name).write_bytes(content)
    return found


def damaged_text(base: Path, folder: Path, draw: random.Random) -> str:
    """Put a damaged copy of a text into `folder`; says what was spoiled."""
    shutil.copytree(base, folder)
    (path,) = folder.iterdir()
    raw = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.7:
        new = json.dumps(damage_json(json.loads(raw), draw)).encode()
    elif path.suffix == ".jsonl" and draw.random() < 0.7:
        rows = damage_json([json.loads(line) for line in raw.splitlines()], draw)
        new = "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])).encode()
    else:
        new = damage_bytes(raw, draw)
    path.write_bytes(new)
    return str(path.name) + (" as it was" if new == raw else "")


# --- what is asked of each -------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """Raised in the middle of what takes too much time; no `except Exception` keeps it."""


def _alarm(*_: Any) -> None:
    raise TooLong


def load(folder: Path) -> None:
    model = slimlm.load(folder, notify=lambda _: None)
    vocabulary = model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        logits = model(IDS.clamp(max=vocabulary - 1), use_cache=False).logits
    assert logits.shape == (*IDS.shape, vocabulary), f"logits of the shape {list(logits.shape)}"


def inspect(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        show(folder, as_json=False)
        show(folder, as_json=True)


def verify(folder: Path) -> None:
    slimlm.verify(folder).raise_if_unsound()


def open_source(folder: Path) -> None:
    """Open a model as a run does, and rehearse it."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        dense = open_lazy(str(folder), Path(scratch), lambda _: None)
        blocks = blocks_of(dense.model)
        refuse_unfit_model(dense, blocks)
        rehearse(dense, blocks, compressible(blocks, open_recipe("absmax")))


@functools.cache
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose chat template has rules, as real ones have."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role') }}"
        "{% endif %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
    )
    return tokenizer


def read(folder: Path) -> None:
    """Read a text as a run does, its conversations in every way; refuses if one of them is refused."""
    (path,) = folder.iterdir()
    for chat in get_args(Chat):
        reading = Reading(chat_template_of(chat_tokenizer()), chat)
        tokens = tokens_of(chat_tokenizer(), str(path), "calibration", at_most=4096, reading=reading)
        assert tokens.ndim == 1 and len(tokens) <= 4096


Verbs = dict[str, Callable[[Path], None]]
VERBS: Verbs = {"load": load, "inspect": inspect, "verify": verify}


@dataclass(frozen=True)
class Pool:
    """What is damaged, how, and what is then asked of it."""

    names: tuple[str, ...]
    make: Callable[[Path], dict[str, Path]]
    damage: Callable[[Path, Path, random.Random], str]
    verbs: Verbs


POOLS = {
    "checkpoints": Pool(tuple(BASES), make_bases, damaged, VERBS),
    "sources": Pool((*CODED, "gguf", "gguf-gemma"), make_sources, damaged_source, {"open": open_source}),
    "texts": Pool(("a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.md", "a.parquet"), make_texts, damaged_text, {"read": read}),
}


def outcome(verb: Callable[[Path], None], folder: Path) -> tuple[str, str]:
    """ "fine", "refused" or what went wrong, and the traceback of that."""
    try:
        verb(folder)
    except SlimlmError as error:
        chain = list(_chain(error))
        short = [own for own in chain if isinstance(own, MemoryError) or "allocate" in str(own)]
        return ("too much memory", "".join(traceback.format_exception(error))) if short else ("refused", "")
    except TooLong as error:
        return "too long", "".join(traceback.format_exception(error))
    except BaseException as error:
        return type(error).__name__, "".join(traceback.format_exception(error))
    return "fine", ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def run(pool: Pool, bases: dict[str, Path], first: int, count: int, seed: int, at: Path) -> dict[str, Any]:
    """Damage and try; gives counts of outcomes and the failures. The number that is being tried is written to `at`."""
    signal.signal(signal.SIGPROF, _alarm)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=at.parent) as place:
        for number in range(first, first + count):
            at.write_text(str(number))
            draw = random.Random(f"{seed} {number}")
            folder = Path(place) / "damaged"
            what = pool.damage(bases[draw.choice(sorted(bases))], folder, draw)
            spoiled = "repaired" not in what and "as it was" not in what and what.endswith(".safetensors") and "/" not in what
            for name, verb in pool.verbs.items():
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                found, told = outcome(verb, folder)
                signal.setitimer(signal.ITIMER_PROF, 0)
                if name == "verify" and spoiled and found == "fine":
                    found, told = "not noticed", what
                counts[f"{name}: {found}"] += 1
                if found not in ("fine", "refused"):
                    failures.append({"number": number, "verb": name, "damage": what, "found": found, "told": told})
            shutil.rmtree(folder)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if number == first:
                # Whatever libraries load at the first use of all.
                before += grown // 1024
            elif grown > GROWTH:
                failures.append(
                    {"number": number, "verb": "all", "damage": what, "found": "too much memory", "told": str(grown)}
                )
                before += grown // 1024
    return {"tried": count, "counts": dict(sorted(counts.items())), "failures": failures, "grown_bytes": grown}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("pool", nargs="?", choices=sorted(POOLS), default="checkpoints")
    options.add_argument("--count", type=int, default=10_000)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--work", type=Path, help="a folder to keep the checkpoints in, for the next run")
    asked = options.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work, pool = (asked.work or Path(scratch)) / asked.pool, POOLS[asked.pool]
        if not (work / pool.names[-1]).is_dir():
            work.mkdir(parents=True, exist_ok=True)
            pool.make(work)
        began = time.monotonic()
        found = run(
            pool, {name: work / name for name in pool.names}, asked.first, asked.count, asked.seed, work / f"at-{asked.first}"
        )
    found["seconds"] = round(time.monotonic() - began, 1)
    json.dump(found, sys.stdout, indent=1)
    print()
    sys.exit(1 if found["failures"] else 0)


if __name__ == "__main__":
    main()
