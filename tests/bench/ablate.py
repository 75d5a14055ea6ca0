#!/usr/bin/env python3
"""What each choice of a recipe is worth: quantize with and without it, measure from the file.

    ablate.py --gptq target/release/gptq --model DIR --variants FILE [--only NAME ...]
              [--settings 4-128-act ...] [--seeds 0 1 2] [--texts DATASET ...] [--jobs 6] --out FILE.jsonl

A variants file holds one variant a line: a name, then options of `gptq quantize`; `#` begins a
comment. A setting is BITS-GROUP[-act]. Every (variant, setting, seed) is quantized into a temporary
folder and measured on every text with `gptq ppl --base`; a line of JSON each is appended to --out,
and combinations that it holds already are not run again. The table is printed at the end, mean over
seeds (and half the spread between the lowest and the highest).
"""
import argparse, concurrent.futures, json, os, pathlib, shutil, statistics, subprocess, tempfile, threading

CARD = ["4-32-act", "4-64-act", "4-128-act", "4-128", "4-none-act", "3-64-act", "3-128-act", "3-128", "3-none-act"]
TEXTS = ["Salesforce/wikitext:wikitext-2-raw-v1:test"]


def options(setting):
    bits, group, *act = setting.split("-")
    return ["--bits", bits, "--group-size", group, f"--act-order={'true' if act else 'false'}"]


def run_json(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def one(args, job):
    """Quantizes and measures one combination."""
    name, extra, setting, seed = job
    folder = tempfile.mkdtemp(prefix="ablate-", dir=args.scratch)
    try:
        out = os.path.join(folder, "out")
        made = run_json([args.gptq, "quantize", args.model, "--out", out, "--json", "--quiet", "--seed", str(seed),
                         *options(setting), *args.calibration.split(), *extra])
        row = {"variant": name, "setting": setting, "seed": seed, "choices": made["choices"],
               "seconds": round(made["seconds"], 2), "file_bytes": made["file_bytes"], "texts": {}}
        for text in args.texts:
            got = run_json([args.gptq, "ppl", out, "--base", args.model, "--dataset", text, "--json", "--quiet"])
            row["texts"][text] = {"perplexity": got["perplexity"], "kl": got["base"]["kl"],
                                  "base_perplexity": got["base"]["perplexity"], "windows": got["windows"]}
        return row
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows, texts):
    """Variants down, settings across: perplexity and KL on each text."""
    measured = list(dict.fromkeys(r["setting"] for r in rows))
    settings = sorted(measured, key=lambda s: CARD.index(s) if s in CARD else len(CARD))
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    lines = []
    for text in texts:
        for key, digits in (("perplexity", 2), ("kl", 4)):
            lines += ["", f"{key}, {text}", "", "| variant | " + " | ".join(settings) + " |",
                      "| --- |" + " ---: |" * len(settings)]
            for variant in variants:
                cells = []
                for setting in settings:
                    values = [r["texts"][text][key] for r in rows
                              if r["variant"] == variant and r["setting"] == setting and text in r["texts"]]
                    if not values:
                        cells.append("")
                        continue
                    half = (max(values) - min(values)) / 2
                    spread = f" ± {half:.{digits}f}" if len(values) > 1 else ""
                    cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
                lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptq", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--variants", required=True)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--settings", nargs="*", default=CARD)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--texts", nargs="*", default=TEXTS)
    parser.add_argument("--calibration", default="", help="options of gptq quantize, such as '--windows 32'")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--scratch", default=None)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    jobs = []
    for line in pathlib.Path(args.variants).read_text().splitlines():
        words = line.split("#")[0].split()
        if words and (not args.only or words[0] in args.only):
            jobs += [(words[0], words[1:], setting, seed) for setting in args.settings for seed in args.seeds]
    out = pathlib.Path(args.out)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(r["variant"], r["setting"], r["seed"]) for r in rows}
    jobs = [j for j in jobs if (j[0], j[2], j[3]) not in done]
    lock = threading.Lock()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(one, args, job) for job in jobs]):
            try:
                row = future.result()
            except RuntimeError as error:
                print(f"failed: {error}", flush=True)
                continue
            with lock, out.open("a") as file:
                rows.append(row)
                file.write(json.dumps(row) + "\n")
    print(table(rows, args.texts))


if __name__ == "__main__":
    main()
