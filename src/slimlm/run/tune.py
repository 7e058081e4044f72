"""What `slimlm.tune` does: a compressed folder opened, its continuous values tuned, and the best stored form written.

config = TuneConfig.of(...)                 slimlm.run.tune_config   what is asked for
prepared = _prepare(config, run)            opened, everything checked, text read, the original's hidden states kept
state = _loop(prepared, run)                slimlm.tuning.loop       steps and checks, the state in the journal
_finish(prepared, state, run)               the folder written, read back, compared
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from operator import or_
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from slimlm.calibration.backward import Hold
from slimlm.core import arguments
from slimlm.core.defaults import usual_defaults
from slimlm.core.errors import CheckpointError, DataError, RanksError, RecipeError
from slimlm.core.parts.trainable import NOTHING, Trains
from slimlm.data.documents import Source, label_of, name_of
from slimlm.data.windows import refuse_unknown_tokens, tokens_of, windows_of
from slimlm.display import Show, shown
from slimlm.distributed.environment import world_size
from slimlm.evaluation.stored_model import StoredModel, stored_checkpoint
from slimlm.events import Event, Notify, logged
from slimlm.inference.load import load, read_description, refuse_other
from slimlm.models.lazy import LazyModel, open_lazy
from slimlm.models.opening import open_tokenizer, read_config
from slimlm.models.structure import blocks_of, context_length, vocabulary_size
from slimlm.record import Record, Tuning
from slimlm.run.assemble import peak_memory
from slimlm.run.config import environment, pick_device
from slimlm.run.resume import Run, open_run
from slimlm.run.tune_config import TuneConfig, TuneOptions, settings_of
from slimlm.run.tune_needs import BLOCK, TuneNeeds, refuse_too_large
from slimlm.runtime.memory import total_and_free
from slimlm.storage import checkpoint
from slimlm.storage.activations import ActivationStore, FileBatches
from slimlm.storage.entries import Description
from slimlm.storage.identity import files_identity
from slimlm.storage.journal import INSIDE_LOG, MOVING, STATE, STEPS, TEACHER, TEXT
from slimlm.storage.mapping import MappedFiles, map_file
from slimlm.storage.streams import write_stream
from slimlm.tuning.entrance import Entrance, last_hidden
from slimlm.tuning.loop import AT_ONCE, Loop, Original, State, Task
from slimlm.tuning.student import Student
from slimlm.tuning.tuner import Tuner, tuners
from slimlm.tuning.windows import HELD_BACK_TOKENS, Windows
from slimlm.verification.folder import verify

_READ_AHEAD = 2
"""Windows are drawn from up to this many times the text that is needed."""
_HIDDEN = "hidden"
"""The name of the tensor in the file of the original's hidden states."""


@dataclass(frozen=True, repr=False)
class Tuned:
    """The result of `tune`; printed, it is a few lines."""

    path: Path
    """The folder that was written."""
    record: Record
    """The record of the compression, with what tuning did as the last of `tuning`."""

    @property
    def tuning(self) -> Tuning:
        """What was done, and the losses before and after."""
        return self.record.tuning[-1]

    def __repr__(self) -> str:
        """Where the model is, and the losses before and after."""
        done = self.tuning
        held = done.before.perplexity, done.after.perplexity
        lines = [
            f"slimlm.Tuned: {self.record.model} by {done.method}, {done.tokens} tokens in {done.steps} steps",
            f"path             {self.path}",
            f"loss held back   {done.before.loss:.5f} -> {done.after.loss:.5f}, best after step {done.best_step}",
            f"perplexity       {held[0].value:.3f} -> {held[1].value:.3f}",
        ]
        if done.before.divergence is not None and done.after.divergence is not None:
            means = done.before.divergence.mean.value, done.after.divergence.mean.value
            lines.append(f"KL to original   {means[0]:.5f} -> {means[1]:.5f} nats per token")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Prepared:
    """An opened model, its original and the text, all checked."""

    config: TuneConfig
    tuner: Tuner
    steps: int
    files: MappedFiles
    task: Task


@usual_defaults()
def tune(
    model: str | Path,
    out: str | Path,
    *,
    data: Source | Path,
    tokens: int,
    restart: bool = False,
    progress: Show = "auto",
    notify: Notify = logged,
    **options: Unpack[TuneOptions],
) -> Tuned:
    """Tune the continuous values of a compressed model by gradient descent, and write it to a folder.

    Masks, codes of the base and zeros never change, and the result takes not a byte more. One block with its gradients is in
    memory at a time, besides the trained values themselves (scales, codebooks, adapters, norms). Every few steps all values are
    rounded to their stored form and measured on windows of the text that are held back; the best form is written, and the given
    model is among them. A run that was stopped goes on when this is called again with the same arguments, and gives the same
    weights as one that was not.

    Args:
        model: The folder of a compressed model.
        out: The folder to write, which must not hold anything.
        data: The text: a file, a folder, a hub data set, "stdlib", or a list of texts.
        tokens: The number of tokens that all steps take at most.
        restart: Drop the journal of an unfinished run and start again.
        progress: As for `compress`.
        notify: As for `compress`.
        **options: The fields of `TuneConfig`, with the same defaults:
            method: "end_to_end" (scales, codebooks, adapters, norms), "peqa" (scales), "slim_peft" (adapters), or
                "slim_peft_paper" (adapters, with the paper's settings).
            against: The original model, a folder or a hub name; needed where the method's loss compares with it.
            rate: The largest rate; left out, the method's.
            batch: Windows per step; left out, the method's.
            length: Tokens per window; left out, the method's, or the model's context where that is shorter.
            seed: The seed by which windows are drawn.
            device: "auto", "cpu", "cuda" or "cuda:N"; one block at a time is run there.
            memory: Bytes ("8GB") that activations and blocks may take before they stay on the disk; None: half of the free
                memory.

    Returns:
        The folder, and the record with the losses before and after.

    Raises:
        SlimlmError: The folder, the original, the method or the text does not suit the run; raised before the work begins.
    """
    arguments.flag(restart, "restart")
    arguments.function(notify, "notify", "each message for the user")
    config = TuneConfig.of(model, out, data, tokens, **options)
    refuse_other(str(config.model))
    if world_size() > 1:
        raise RanksError(f"tuning is work for one process, and {world_size()} were started; start one", reported_here=True)
    with (
        shown(progress) as observer,
        open_run(config.out, config.model, restart=restart, progress=observer, notify=notify) as run,
    ):
        prepared = _prepare(config, run)
        run.journal.begin()
        state = _loop(prepared, run)
        if state.done and not state.best_step and not state.diverged:
            run.notify(
                "no form was better than the given model on the windows that are held back, so its weights are written as they "
                "were; a smaller `rate` or more tokens may work"
            )
        record = _finish(prepared, state, run)
        run.journal.remove()
    return Tuned(config.out, record)


def _prepare(config: TuneConfig, run: Run) -> _Prepared:
    """Open the models, check everything, read the text, and keep the original's hidden states."""
    device = pick_device(config.device)
    run.progress(Event("open the model", 0, 1))
    checkpoint.verify_files(config.model)
    about, files = read_description(config.model), MappedFiles.of(checkpoint.check_files(config.model))
    stored = stored_checkpoint(config.model, files, about)
    tuner = config.tuner(context_length(stored.meta_model))
    _refuse_nothing_to_train(config, about, stored)
    dense = None
    if config.against is not None:
        read_config(config.against)
        dense = open_lazy(config.against, run.journal.folder / "original", run.notify)
        _refuse_other_vocabulary(config, dense, stored)
    identity = None if dense is None else files_identity(dense.files)
    run.journal.match_identity(config.identity(tuner, checkpoint.fingerprint(config.model), identity, device))
    steps = config.tokens // (tuner.batch * tuner.length)
    windows = _windows(config, tuner, steps, stored, dense, run)
    needs = TuneNeeds(config.model, stored, tuner, steps, dense is not None)
    memory = _memory(config)
    entrance = Entrance.of(stored, device)
    student = Student(stored, tuner.trains, device, keep_blocks=BLOCK * sum(needs.block_weights) < memory // 2)
    parameters = sum(own.numel() for own in student.parameters.values())
    refuse_too_large(needs, parameters, config.out, config.memory)
    original = None if dense is None else _original(dense, windows, 2 * needs.hidden <= memory, device, run)
    hold = _hold(run, tuner.batch, in_memory=needs.step_activations <= memory // 2)
    task = Task(student, entrance, original, windows, tuner, steps, hold)
    return _Prepared(config, tuner, steps, files, task)


def _refuse_nothing_to_train(config: TuneConfig, about: Description, stored: StoredModel) -> None:
    """Raise RecipeError where the layers have none of the values that the method trains."""
    blocks = tuple(f"{name}." for name in blocks_of(stored.meta_model))
    layers = {name: entry for name, entry in about.layers.items() if name.startswith(blocks)}
    held = reduce(or_, (part.trains for entry in layers.values() for part in entry.parts), NOTHING)
    wanted = config.asked_tuner.trains & ~(Trains.NORMS | Trains.BIASES)
    if not wanted & held:
        summaries = list(dict.fromkeys(entry.parts.summary() for entry in layers.values()))
        kinds = ", ".join(str(kind.name).lower() for kind in wanted)
        fit = [name for name, each in tuners().items() if each.trains & held]
        raise RecipeError(
            f"{config.method} trains {kinds}, and {config.model} has none: its layers are {'; '.join(summaries[:3])}. Methods "
            f"that suit it: {', '.join(fit) or 'none'}"
        )


def _refuse_other_vocabulary(config: TuneConfig, dense: LazyModel, stored: StoredModel) -> None:
    ours, theirs = vocabulary_size(stored.meta_model), vocabulary_size(dense.model)
    if ours != theirs:
        raise DataError(
            f"{config.model} predicts {ours} tokens and `against={config.against}` {theirs}; give the model that "
            f"{config.model} was made of"
        )


def _windows(config: TuneConfig, tuner: Tuner, steps: int, stored: StoredModel, dense: LazyModel | None, run: Run) -> Windows:
    """The windows of the text.

    Raises:
        DataError: There is too little text, or the original cuts it into other tokens.
        CheckpointError: The text is not the one that the run was begun on.
    """
    tokenizer = open_tokenizer(str(config.model))
    if tokenizer is None:
        raise DataError(f"{config.model} has no tokenizer, so text cannot be read; add its tokenizer files to the folder")
    needed = _READ_AHEAD * (steps * tuner.batch * tuner.length + HELD_BACK_TOKENS)
    tokens = tokens_of(tokenizer, config.data, "calibration", at_most=needed, notify=run.notify)
    if dense is not None and dense.tokenizer is not None:
        theirs = tokens_of(dense.tokenizer, config.data, "calibration", at_most=needed)
        if not torch.equal(tokens, theirs):
            raise DataError(
                f"`against={config.against}` cuts text into other tokens than {config.model}; give the model that "
                f"{config.model} was made of"
            )
    all_windows = windows_of(tokens, tuner.length, source=label_of(config.data))
    refuse_unknown_tokens(all_windows, stored.meta_model, tokenizer)
    windows = Windows.drawn(all_windows, steps, tuner.batch, config.seed)
    both = torch.cat([windows.train, windows.held_back])
    noted = run.journal.noted_tensor(TEXT)
    if noted is None:
        run.journal.note_tensor(TEXT, both)
    elif not torch.equal(noted, both):
        raise CheckpointError(
            f"the run in {run.journal.folder} was begun on another text: {label_of(config.data)} has changed since, or the "
            "tokenizer has. Bring it back to resume the run, or give `restart=True` to begin again"
        )
    if len(windows.train) < steps * tuner.batch:
        run.notify(
            f"{label_of(config.data)} gives {windows.train.numel()} tokens to train on, which are used "
            f"{steps * tuner.batch / len(windows.train):.1f} times"
        )
    return windows


def _memory(config: TuneConfig) -> int:
    """Bytes that activations and blocks may take in memory."""
    if config.memory is not None:
        return config.memory
    free = total_and_free()[1]
    return 2**63 if free is None else free // 2


def _hold(run: Run, windows: int, *, in_memory: bool) -> Hold:
    """Keeps outputs of blocks for so many windows, in memory or in files."""
    store = ActivationStore(run.journal.folder, in_memory=in_memory)
    return lambda name, batches: store.hold(name, batches, windows)


def _original(dense: LazyModel, windows: Windows, in_memory: bool, device: torch.device, run: Run) -> Original:
    """The original and its last hidden states, which are computed once and kept in the journal."""
    entrance = Entrance.of(StoredModel(dense.model, dense.weights, dense.release), device)
    path = run.journal.noted_file(TEACHER)
    tokens = torch.cat([windows.train, windows.held_back])
    if path is None:
        run.progress(Event("run the original model", 0, 1))
        path = run.journal.folder / "original.safetensors"
        hold = _hold(run, len(tokens), in_memory=in_memory)
        batches = last_hidden(entrance, tokens, AT_ONCE, hold)
        first = next(batches)
        layout = {_HIDDEN: (first.dtype, (len(tokens), *first.shape[1:]))}
        run.journal.note_file(TEACHER, path.name, write_stream(path, layout, chain([first], batches)))
    return Original(entrance, FileBatches(map_file(path), _HIDDEN, 1, slice(len(tokens))))


def _loop(prepared: _Prepared, run: Run) -> State:
    """All steps, from where an earlier run stopped."""
    loop, journal = Loop(prepared.task), run.journal
    if (path := journal.noted_file(STATE)) is not None:
        loop.restore(journal.notes[STEPS], map_file(path).tensors)
        run.notify(f"resuming after step {loop.state.done} of {prepared.steps}, stored in {journal.folder}")
    return loop.run(journal.commit_steps, run.progress, run.notify)


def _finish(prepared: _Prepared, state: State, run: Run) -> Record:
    """Write the best form, read it back and compare, and move it to its place."""
    config = prepared.config
    run.progress(Event("write", 0, 1))
    tensors = {**prepared.files.tensors, **state.best}
    with checkpoint.written_beside(config.out, run.journal.folder / "finished", partial(run.journal.note, MOVING)) as folder:
        files = checkpoint.write_weights(folder, tensors, prepared.files.release)
        for path in checkpoint.files_beside(config.model):
            if path.name not in (checkpoint.INDEX, INSIDE_LOG):
                shutil.copyfile(path, folder / path.name)
        before = checkpoint.read_record(config.model)
        kept = {key: value for key, value in before.items() if key not in ("format", "files", "beside")}
        done = dataclasses.asdict(_tuning(prepared, state, run))
        record = {**kept, "stored_bytes": checkpoint.stored_bytes(folder), "tuning": [*kept.get("tuning", ()), done]}
        checkpoint.write_record(folder, json.loads(json.dumps(record)), files)
        run.progress(Event("verify", 0, 1))
        verify(folder).raise_if_unsound()
        load(folder, kernels="reference")
        _refuse_different(MappedFiles.of(checkpoint.check_files(folder)), tensors)
        found = Record.from_dict(checkpoint.read_record(folder))
    run.progress(Event("verify", 1, 1))
    return found


def _tuning(prepared: _Prepared, state: State, run: Run) -> Tuning:
    config, tuner = prepared.config, prepared.tuner
    return Tuning(
        method=config.method,
        settings={**settings_of(tuner), "seed": config.seed},
        data=name_of(config.data),
        against=None if config.against is None else name_of(config.against),
        tokens=state.done * tuner.batch * tuner.length,
        steps=state.done,
        best_step=state.best_step,
        before=state.first,
        after=state.least,
        seconds=run.journal.elapsed,
        peak_memory=peak_memory(),
        versions=environment(),
    )


def _refuse_different(files: MappedFiles, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError where a tensor reads back different from what was to be written."""
    for name, tensor in files.tensors.items():
        if not torch.equal(tensor, tensors[name]):
            raise CheckpointError(f"verification failed: {name} reads back different from what was written")
        files.release([tensor])
