"""Make the tables of docs/results.md from an unquantized model and its text. Called by reproduce.sh, which says how.

A step is a tool's command line. What it writes lies in OUT/cache/KEY, KEY being the hash of the command with every input file replaced by the
hash of its content, so that a step is run again only when its inputs, its options or its tool's version change. Tables are TSV beside OUT/cache,
each with a picture; results.md is made of them.
"""
import argparse
import csv
import hashlib
import json
import pathlib
import platform
import subprocess
import sys
import time

FAMILIES = ["experts", "attn.qkv", "attn.o", "dense", "router", "embed", "head"]
FORMATS = ["bf16", "fp8", "mxfp4"]
RULES = ["mse", "floor", "even", "rceil", "r7.25"]


class Lab:
    """Runs tools, once for the same inputs."""

    def __init__(self, args):
        self.args, self.cache = args, args.out / "cache"
        self.hashes, self.versions, self.run_count = {}, {}, 0
        self.started = time.time()
        self.cache.mkdir(parents=True, exist_ok=True)

    def hash(self, path):
        path = pathlib.Path(path)
        key = (str(path), path.stat().st_mtime_ns, path.stat().st_size)
        if key not in self.hashes:
            self.hashes[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self.hashes[key]

    def version(self, tool):
        if tool not in self.versions:
            self.versions[tool] = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        return self.versions[tool]

    def __call__(self, *words, stdout=None):
        """Run a command; words that begin with '@' are outputs. Returns the folder with them. Paths of files are inputs."""
        words = [str(word) for word in words]
        named = [self.hash(word) if pathlib.Path(word).is_file() else word for word in words]
        key = hashlib.sha256(json.dumps([self.version(words[0]), named, stdout]).encode()).hexdigest()[:16]
        folder = self.cache / key
        if (folder / "done").exists():
            return folder
        folder.mkdir(exist_ok=True)
        command = [str(folder / word[1:]) if word.startswith("@") else word for word in words]
        begun = time.time()
        with open(folder / (stdout or "stdout"), "w") as out, open(folder / "stderr", "w") as errors:
            status = subprocess.run(command, stdout=out, stderr=errors, timeout=self.args.limit).returncode
        if status:
            raise RuntimeError(f"{' '.join(command)}: exit {status}: {(folder / 'stderr').read_text().strip()[-300:]}")
        self.run_count += 1
        (folder / "command").write_text(" ".join(command) + "\n")
        (folder / "done").write_text(f"{time.time() - begun:.1f}\n")
        print(f"{time.time() - self.started:6.0f} s  {' '.join(words)[:150]}", file=sys.stderr)
        return folder

    def where(self):
        device = [] if self.args.device == "cpu" else ["--device", self.args.device]
        return device + ["--threads", self.args.threads]


def read(path):
    with open(path, newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def write(path, rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as out:
        writer = csv.DictWriter(out, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def mark_pareto(rows, cost, loss):
    """A row is marked when no other is at most as large and better."""
    for row in rows:
        better = [o for o in rows if o is not row and float(o[cost]) <= float(row[cost]) and float(o[loss]) < float(row[loss])]
        row["pareto"] = "" if better else "*"


# -- models --

def active_bytes(lab, model):
    info = lab("us-model", "info", model, stdout="info.tsv") / "info.tsv"
    return next(line.split("\t")[3] for line in info.read_text().splitlines() if line.startswith("active"))


def quantize(lab, *options):
    """qat-quant with measurements. Returns the model's path and the rows of original, PTQ and QAT."""
    folder = lab("qat-quant", lab.args.model, "--data", lab.args.data, "-o", "@q.h5", "--metrics", "@m.tsv", "--seed", lab.args.seed,
                 "--eval-windows", lab.args.windows, "--log", "@log.tsv", *options, *lab.where())
    return folder / "q.h5", {row["model"]: row for row in read(folder / "m.tsv")}


def figures(row):
    return {key: row[key] for key in ("bytes", "kl", "kl_error", "top1", "top1_error", "ln_ratio", "ln_ratio_error")}


def exact_match(lab, model):
    """Share of word problems answered right."""
    if not lab.args.questions:
        return {}
    run = lab("us-serve", "-m", model, "--chat", "--plain-turns", "--max-tokens", 200, "--cut-loops", *lab.where(), lab.args.questions, stdout="run.jsonl")
    row = read(lab("us-eval", "--task", run / "run.jsonl", stdout="eval.tsv") / "eval.tsv")[-1]
    return {"exact": row["exact"], "exact_error": row["exact_error"], "questions": row["questions"]}


def table_precision(lab):
    rows = []
    for family in FAMILIES:
        for form in FORMATS:
            try:
                model, m = quantize(lab, "--precision", f"all=bf16,{family}={form}", "--steps", 0)
            except RuntimeError as error:  # a format that the family does not have
                print(f"{family}={form}: {error}", file=sys.stderr)
                continue
            row = m.get("ptq") or m["original"]
            rows.append({"family": family, "format": form, "bytes": row["bytes"], "active_bytes": active_bytes(lab, model), "kl": row["kl"] or "0",
                         "kl_error": row["kl_error"], "top1": row["top1"] or "1", "ln_ratio": row["ln_ratio"], "ln_ratio_error": row["ln_ratio_error"],
                         **exact_match(lab, model)})
    mark_pareto(rows, "active_bytes", "kl")
    write(lab.args.out / "precision.tsv", rows)
    lab("us-plot", lab.args.out / "precision.tsv", "-x", "active_bytes", "-y", "kl", "-g", "family", "--points", "-o", "@p.png", "--x-title",
        "bytes a token (B)", "--y-title", "KL to the original (nats a token)", "--title", "precision by module family")


def table_qat(lab):
    a, rows = lab.args, []

    def add(what, *options, kind="qat", **fields):
        _, m = quantize(lab, *options)
        row = m[kind]
        rows.append({"what": what, **fields, **figures(row), "gap_closed": row.get("gap_closed", ""),
                     "gap_closed_error": row.get("gap_closed_error", "")})

    precision = ["--precision", a.precision]
    for rule in RULES:
        add("scale rule", *precision, "--scale-rule", rule, "--steps", 0, kind="ptq", rule=rule, loss="", steps=0)
    for loss in ("ce", "kl"):
        for rate in a.rates:
            add("loss and rate", *precision, "--loss", loss, "--steps", a.steps, "--lr", rate, rule="mse", loss=loss, steps=a.steps, rate=rate)
    for steps in (a.steps // 4, a.steps // 2, 2 * a.steps):
        add("steps", *precision, "--loss", "kl", "--steps", steps, "--lr", a.rates[len(a.rates) // 2], rule="mse", loss="kl", steps=steps,
            rate=a.rates[len(a.rates) // 2])
    for rate in a.rates:  # as many steps without any rounding
        model, _ = quantize(lab, "--precision", "experts=bf16", "--train", "experts", "--loss", "ce", "--steps", a.steps, "--lr", rate)
        row = read(lab("us-eval", "-m", model, "--against", a.model, "--data", a.data, "--windows", a.windows, *lab.where(), stdout="eval.tsv")
                   / "eval.tsv")[1]
        rows.append({"what": "control: the original trained", "loss": "ce", "steps": a.steps, "rate": rate, **figures(row)})
    write(a.out / "qat.tsv", rows)
    lab("us-plot", a.out / "qat.tsv", "-x", "steps", "-y", "kl", "-g", "what", "--points", "--y-log", "-o", "@p.png", "--y-title",
        "KL to the original (nats a token)", "--title", "quantization-aware finetuning")


# -- drafters --

def answers(lab, model, *options):
    """Runs of every prompt set; questions and chats as user turns."""
    sets = sorted(pathlib.Path(lab.args.prompts).glob("*.jsonl"))
    rows = []
    for chat in (False, True):
        files = [path for path in sets if (path.stem in ("math", "chat")) == chat]
        if files:
            run = lab("us-serve", "-m", model, "--plain-turns", "--cut-loops", "--ignore-end", "--max-tokens", lab.args.tokens,
                      *(["--chat"] if chat else []), *options, *lab.where(), *files, stdout="run.jsonl")
            rows.append(run / "run.jsonl")
    return rows


def acceptance(lab, model, *options):
    return {row["scenario"]: row for row in read(lab("us-eval", *answers(lab, model, *options), stdout="eval.tsv") / "eval.tsv")}


def distil(lab, target, *options, seed=None):
    a = lab.args
    shape = ["--layers", 3, "--block", 8, "--window", 128]
    given = [str(word) for word in options]
    base = [word for pair in zip(shape[::2], shape[1::2]) if pair[0] not in given for word in pair]
    folder = lab("dflash-train", "--target", target, "--data", a.data, "-o", "@d.h5", "--steps", a.draft_steps, "-b", 8, "-l", a.length, "--anchors", 64,
                 "--log", "@log.tsv", "--seed", seed or a.seed, *base, *options, *lab.where())
    return folder / "d.h5", folder / "log.tsv"


def add_draft(lab, rows, what, target, served, *options, use=(), seed=None, **fields):
    draft, log = distil(lab, target, *options, seed=seed)
    for scenario, row in acceptance(lab, served, "--draft", draft, *use).items():
        rows.append({"what": what, **fields, "seed": seed or lab.args.seed, "scenario": scenario, "acceptance_length": row["acceptance_length"],
                     "length_error": row["length_error"], "tokens_per_s": row["tokens_per_s"], "loop_share": row["loop_share"],
                     **{key: value for key, value in row.items() if key.startswith("accept_")}})
    return draft, log


def table_drafter(lab):
    a, rows, logs = lab.args, [], {}
    served, _ = quantize(lab, "--precision", a.precision, "--steps", a.steps, "--lr", a.rates[len(a.rates) // 2])
    recorded = lab.args.answers or answers(lab, served, "--temperature", "0.2")[0]
    own = ["--answers", recorded, "--text-share", "0.25"]
    for scenario, row in acceptance(lab, served).items():
        rows.append({"what": "plain decoding", "scenario": scenario, "acceptance_length": row["acceptance_length"], "tokens_per_s": row["tokens_per_s"],
                     "loop_share": row["loop_share"]})
    for optimizer, rates in (("muon", a.muon_rates), ("adamw", a.adamw_rates)):
        for rate in rates:
            _, logs[f"{optimizer} {rate}"] = add_draft(lab, rows, "optimizer", served, served, *own, "--optimizer", optimizer, "--lr", rate,
                                                       optimizer=optimizer, rate=rate)
        for seed in a.seeds:
            add_draft(lab, rows, "seeds at the middle rate", served, served, *own, "--optimizer", optimizer, "--lr", rates[len(rates) // 2], seed=seed,
                      optimizer=optimizer, rate=rates[len(rates) // 2])
    own += ["--lr", a.muon_rates[len(a.muon_rates) // 2]]
    for block in (4, 8, 16):
        for used in (4, 8, 16):
            if used <= block:
                add_draft(lab, rows, "block trained and used", served, served, *own, "--block", block, use=["--block", used], block=block, used=used)
    for layers in (1, 3, 5):
        add_draft(lab, rows, "layers", served, served, *own, "--layers", layers, layers=layers)
    for taps in a.taps:
        add_draft(lab, rows, "taps", served, served, *own, "--taps", taps, taps=taps)
    for window in (32, 128, 512):
        add_draft(lab, rows, "window", served, served, *own, "--window", window, window=window)
    for loss, weights in (("ce", "dpace"), ("ce", "exp"), ("ce", "uniform"), ("kl", "dpace")):
        add_draft(lab, rows, "loss", served, served, *own, "--loss", loss, "--weights", weights, loss=loss, weights=weights)
    add_draft(lab, rows, "text", served, served, *own[4:], text="original text")
    add_draft(lab, rows, "text", served, served, *own, text="the target's answers")
    add_draft(lab, rows, "target", a.model, served, *own, trained_on="the original")
    add_draft(lab, rows, "target", served, served, *own, trained_on="the quantized model")
    write(a.out / "drafter.tsv", rows)
    positions(lab, rows)
    names = [word for name in logs for word in ("--name", name)]
    lab("us-plot", *logs.values(), *names, "-x", "tokens", "-y", "loss", "-o", "@p.png", "--title", "drafter: training loss by optimizer and rate")


def positions(lab, rows):
    """Acceptance by position, a line a scenario, of the first drafter."""
    found = [row for row in rows if row["what"] == "optimizer"]
    first = [row for row in found if row["rate"] == found[0]["rate"] and row["optimizer"] == found[0]["optimizer"]]
    write(lab.args.out / "positions.tsv", [{"scenario": row["scenario"], "position": key[7:], "accepted": value} for row in first
                                           for key, value in row.items() if key.startswith("accept_")])
    lab("us-plot", lab.args.out / "positions.tsv", "-x", "position", "-y", "accepted", "-g", "scenario", "--from-zero", "-o", "@p.png", "--y-title",
        "share of drafts accepted", "--title", "acceptance by position")


def table_verify(lab):
    a, rows = lab.args, []
    served, _ = quantize(lab, "--precision", a.precision, "--steps", a.steps, "--lr", a.rates[len(a.rates) // 2])
    draft, _ = distil(lab, served, "--lr", a.muon_rates[len(a.muon_rates) // 2])
    cases = [("match, T = 0", []), ("match, T = 1", ["-t", 1]), ("reject, T = 1", ["-t", 1, "--verify", "reject"]),
             ("block, T = 1", ["-t", 1, "--verify", "block"]), ("adaptive length, T = 0", ["--adaptive"])]
    for what, options in cases:
        for scenario, row in acceptance(lab, served, "--draft", draft, *options).items():
            rows.append({"what": what, "scenario": scenario, "acceptance_length": row["acceptance_length"], "length_error": row["length_error"],
                         "tokens_per_s": row["tokens_per_s"], "loop_share": row["loop_share"]})
    write(a.out / "verify.tsv", rows)


TABLES = {"precision": table_precision, "qat": table_qat, "drafter": table_drafter, "verify": table_verify}
TITLES = {"precision": "Precision by module family", "qat": "MXFP4 experts: scale rules, finetuning, control",
          "drafter": "The drafter", "verify": "Verification and adaptive length"}

# -- the page --


def cell(value):
    try:
        return f"{float(value):.4g}" if "." in value or "e" in value else value
    except ValueError:
        return value


def markdown(path):
    rows = read(path)
    hidden = [key for key in rows[0] if key.startswith("accept_")]
    columns = [key for key in rows[0] if key not in hidden]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join(lines + ["| " + " | ".join(cell(row[key] or "") for key in columns) + " |" for row in rows])


def write_page(lab):
    a = lab.args
    parts = [f"# Results: {a.model.stem}\n\nMade by `{a.command}`, seed {a.seed}, on {a.hardware or platform.processor() or platform.machine()}. "
             "`_error` columns are standard errors (windows, requests or questions). Acceptance length: committed tokens / rounds, bonus token "
             f"included, pooled; {a.tokens} new tokens, cut where a 24-gram occurs three times (`loop_share`)."]
    for name, title in TITLES.items():
        if (a.out / f"{name}.tsv").exists():
            parts.append(f"## {title}\n\n{markdown(a.out / f'{name}.tsv')}")
    (a.out / "results.md").write_text("\n\n".join(parts) + "\n")


def collect_pictures(lab):
    for done in lab.cache.glob("*/p.png"):
        title = (done.parent / "command").read_text()
        name = next((n for n in ("precision", "qat", "positions", "drafter") if f"/{n}.tsv" in title), "drafter-loss")
        (lab.args.out / f"{name}.png").write_bytes(done.read_bytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="the unquantized model")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="token shards")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--prompts", type=pathlib.Path, required=True)
    parser.add_argument("--questions", type=pathlib.Path, help="questions with answers, JSON lines")
    parser.add_argument("--answers", type=pathlib.Path, help="recorded answers of the quantized model to distil on")
    parser.add_argument("--table", action="append", choices=list(TABLES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", default="0")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="few steps and windows: does every table come out?")
    parser.add_argument("--limit", type=float, default=480, help="seconds of a step")
    parser.add_argument("--precision", default="experts=mxfp4")
    parser.add_argument("--taps", nargs="+", default=None)
    parser.add_argument("--hardware", default="")
    args = parser.parse_args()
    small = args.small
    words = [word for word in sys.argv[1:] if not word.startswith("/")]  # the machine's own paths are nobody's concern
    args.command = "data/recipes/reproduce.sh " + " ".join(w for i, w in enumerate(words) if not w.startswith("--") or w == "--small" or
                                                           (i + 1 < len(words) and not words[i + 1].startswith("--")))
    args.steps, args.windows, args.draft_steps = (8, 8, 6) if small else (400, 200, 800)
    args.tokens, args.length = (48, 256) if small else (256, 512)
    args.rates, args.muon_rates, args.adamw_rates = ["1e-4", "3e-4", "1e-3"], ["2e-3", "4e-3", "1e-2"], ["3e-4", "6e-4", "2e-3"]
    args.seeds = [2] if small else [2, 3, 4]
    args.taps = args.taps or ["0,2", "1,3,5"]
    args.out.mkdir(parents=True, exist_ok=True)
    lab = Lab(args)
    for name in args.table or TABLES:
        TABLES[name](lab)
        collect_pictures(lab)
        write_page(lab)
    print(f"{lab.run_count} steps run, {time.time() - lab.started:.0f} s", file=sys.stderr)


main()
