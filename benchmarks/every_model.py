"""prototype"""

import json, sys, time, traceback, warnings, multiprocessing, shutil, os
from pathlib import Path
from tempfile import TemporaryDirectory
import torch, transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
import slimlm
from slimlm.core.errors import SlimlmError
from slimlm.models.experts import fused_in, take_apart, ROUTER
from slimlm.models.structure import put_weight
from slimlm.calibration import capture
from record_bytes import byte_tokenizer, made_text
import tiny_configs


def random_values(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if own.endswith("bias") or (parameter.ndim == 1 and not parameter.any()):
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.15)


def tried(mt, dtype, scratch, text):
    row = {"model_type": mt, "class": NAMES[mt]}
    try:
        config = tiny_configs.tiny_config(mt)
        torch.manual_seed(0)
        used = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].config_class is type(config)
        whole = transformers.AutoModelForImageTextToText
        if not used:
            row["part_of"] = True
        try:
            model = (AutoModelForCausalLM if used else whole).from_config(config).eval()
        except ValueError as e:
            if "Unrecognized" not in str(e):
                raise
            model = AutoModelForCausalLM.from_config(config).eval()
        random_values(model)
        model.to(dtype).save_pretrained(scratch / "dense")
        byte_tokenizer().save_pretrained(scratch / "dense")
        row["class"] = type(model).__name__
        probe = torch.randint(1, 256, (2, 32), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            AutoModelForCausalLM.from_pretrained(scratch / "dense")(probe, use_cache=False)
        row["weights"] = sum(p.numel() for p in model.parameters())
    except Exception as e:
        return {
            **row,
            "outcome": "not made",
            "words": f"{type(e).__name__}: {e}"[:300],
            "trace": traceback.format_exc()[-1500:],
        }
    ids = torch.randint(1, 256, (2, 32), generator=torch.Generator().manual_seed(3))
    began, told = [], []

    def progress(event):
        if event.stage == "compress":
            began.append(event.done)

    try:
        record = slimlm.compress(
            scratch / "dense",
            scratch / "out",
            recipe="absmax",
            data=str(text),
            samples=8,
            length=32,
            progress=progress,
            notify=told.append,
            device="cpu",
        ).record
    except Exception as e:
        left = sorted(p.name for p in scratch.iterdir() if p.name != "dense")
        after = bool(began) and max(began) > 0
        kind = ("refused" if isinstance(e, SlimlmError) else "crashed") + (
            " after the work" if after else (" in the work" if began else "")
        )
        return {
            **row,
            "outcome": kind,
            "words": f"{e}",
            "type": type(e).__name__,
            "left": left,
            "trace": traceback.format_exc()[-2500:],
            "told": told,
        }
    row["whole"] = any("loaded as a whole" in t for t in told)
    row["told"] = told
    row["routers"] = sorted(n for n, why in record.skipped.items() if why == ROUTER)
    row["narrow"] = sorted(l.name for l in record.layers if l.shape[0] in (1, 6))
    row["skipped"] = record.skipped
    row["coverage"] = record.coverage
    try:
        ours = slimlm.load(scratch / "out", kernels="reference", dtype=torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(scratch / "out", dtype=torch.float32)
        slimlm.use_kernels(theirs, "reference")
        dense = AutoModelForCausalLM.from_pretrained(scratch / "dense", dtype=torch.float32).eval().requires_grad_(False)
        with torch.no_grad():
            before = dense(ids).logits
            for fused in fused_in(dense):
                take_apart(dense, fused)
            row["apart"] = float((dense(ids).logits - before).abs().max())
            for layer in record.layers:
                put_weight(dense.get_submodule(layer.name), ours.get_submodule(layer.name).parts().dense())
            a, b, c = dense(ids).logits, ours(ids).logits, theirs(ids).logits
        row["difference"] = float((a - b).abs().max())
        row["scale"] = float(a.abs().max())
        row["auto"] = bool(torch.equal(b, c))
        row["moved"] = float((a - before).abs().max())
        row["spread"] = float(a.std())
        ok = torch.allclose(a, b, atol=1e-4 * max(1, row["scale"]), rtol=1e-4) and row["auto"]
        row["outcome"] = "works" if ok else "WRONG"
    except Exception as e:
        return {
            **row,
            "outcome": "written, cannot be compared",
            "words": f"{type(e).__name__}: {e}",
            "trace": traceback.format_exc()[-2500:],
        }
    return row


def child(mt, dtype, pipe):
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    capture.TOKENS_AT_ONCE = 128
    started = time.time()
    with TemporaryDirectory() as s:
        s = Path(s)
        text = Path(s) / "text.txt"
        made_text(text)
        (s / "w").mkdir()
        row = tried(mt, dtype, s / "w", text)
    row["seconds"] = round(time.time() - started, 1)
    pipe.send(row)


def main():
    out = Path(sys.argv[1])
    dtype = getattr(torch, sys.argv[2])
    which = sys.argv[3:] or list(NAMES)
    rows = json.loads(out.read_text()) if out.exists() else {}
    ctx = multiprocessing.get_context("fork")
    for mt in which:
        if mt in rows and not sys.argv[3:]:
            continue
        a, b = ctx.Pipe(False)
        p = ctx.Process(target=child, args=(mt, dtype, b))
        p.start()
        b.close()
        row = {"model_type": mt, "outcome": "hung"}
        if a.poll(120):
            try:
                row = a.recv()
            except EOFError:
                row = {"model_type": mt, "outcome": "died"}
        p.kill()
        p.join()
        rows[mt] = row
        print(mt, row["outcome"], row.get("seconds"), str(row.get("words", ""))[:160].replace("\n", " "), flush=True)
        out.write_text(json.dumps(rows, indent=1))


main()
