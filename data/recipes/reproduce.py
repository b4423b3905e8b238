"""Make the tables of docs/results.md from an unquantized model and its text. Called by reproduce.sh, which says how.

Contents: models; precision; finetuning; drafters; speed; the plan; the page.

Parts of tables are begun in the order of PLAN, what decides most first, and left out when --budget is spent; a run that is begun again goes on
where it was (lab.py).
"""
import argparse
import pathlib
import platform
import shlex
import sys

from lab import Lab, OutOfTime
from tables import Table, mark_pareto, pictures, read, write, write_page

FAMILIES = ["experts", "attn.qkv", "attn.o", "dense", "router", "embed", "head"]
FORMATS = ["bf16", "fp8", "mxfp4"]
MIXED = ["all=fp8", "all=fp8,experts=mxfp4", "all=mxfp4"]
RULES = ["mse", "floor", "even", "rceil", "r7.25"]
SCENARIOS = ["coding", "math", "agent", "chat", "all"]


class Study:
    """Options, lab and tables of a run; what several parts use is made once."""

    def __init__(self, args):
        self.a, self.lab = args, Lab(args.out, args.jobs, args.budget, args.limit)
        self.tables = {name: Table(args.out, name) for name in ("precision", "qat", "drafter", "speed")}
        self.tables["precision"].finish = lambda rows: mark_pareto(rows, "active_bytes", "kl")
        self.families, self.sweep, self.optimizers, self.logs = {}, [], [], {}
        self.gpu = args.device != "cpu"

    # -- models --

    def where(self):
        return (["--device", self.a.device] if self.gpu else []) + ["--threads", self.a.threads]

    def quantize(self, *options, rule="mse", tokens=0, windows=0):
        """qat-quant with measurements. Returns the model's path and the rows of original, PTQ and QAT."""
        a, expected = self.a, tokens / 1.2e6 if self.gpu else 0
        folder = self.lab("qat-quant", a.model, "--data", a.data, "-o", "@q.h5", "--metrics", "@m.tsv", "--seed", a.seed, "--eval-windows",
                          windows or a.windows, "--log", "@log.tsv", "--scale-rule", rule, "--fp8-scale", a.fp8_scale, *options, *self.where(),
                          seconds=expected, alone=expected > 20)
        return folder / "q.h5", {row["model"]: row for row in read(folder / "m.tsv")}

    def finetune(self, steps, rate, loss="kl", scope="all", optimizer="adamw", batch=0, schedule="cosine", rule="mse", beta2="0.95",
                 precision=None):
        batch, tokens = batch or self.a.batch, steps * (batch or self.a.batch) * self.a.length
        return self.quantize("--precision", precision or self.a.precision, "--steps", steps, "--lr", rate, "--loss", loss, "--train", scope,
                             "--optimizer", optimizer, "-b", batch, "-l", self.a.length, "--schedule", schedule, "--floor", "0.02",
                             "--beta2", beta2,
                             "--probe-every", 0, rule=rule, tokens=tokens, windows=self.windows(tokens))

    def windows(self, tokens):
        """Held-out windows: fewer for the many short runs than for what is long."""
        return self.a.windows if tokens > 1.5 * self.a.steps * self.a.batch * self.a.length else self.a.sweep_windows

    def served(self):
        """The quantized model that drafters are made for."""
        return self.a.served or self.finetune(self.a.steps, "1e-4")[0]

    def add(self, table, name, function):
        """A row or rows of a table, as a task; its future."""
        t = self.tables[table]
        place = t.place()

        def body():
            rows = function()
            rows = rows if isinstance(rows, list) else [rows]
            t.put(place, rows)
            return rows

        future = self.lab.task(f"{table}: {name}", body)
        future.place = place
        return future


def figures(row):
    return {key: row[key] for key in ("bytes", "tokens", "kl", "kl_error", "top1", "top1_error", "ln_ratio", "ln_ratio_error")}


def found(futures):
    """Rows of those tasks that gave any."""
    return [row for future in futures for row in future.result() or []]


# -- precision --


def precision_row(s, family, form, rules):
    model, m = s.quantize("--precision", rules, "--steps", 0)
    row = m.get("ptq") or m["original"]
    info = (s.lab("us-model", "info", model, stdout="info.tsv") / "info.tsv").read_text()
    active = next(line.split("\t")[3] for line in info.splitlines() if line.startswith("active"))
    return {"family": family, "format": form, **figures(row), "active_bytes": active, "kl": row["kl"] or "0", "top1": row["top1"] or "1",
            "router": row["router"]}


def plan_precision(s):
    cases = [(family, form, f"all=bf16,{family}={form}") for family in FAMILIES for form in FORMATS]
    cases = [case for case in cases if case[:2] == ("experts", "bf16") or case[1] != "bf16" or case[0] == "router"]
    cases = [(f, g, r) for f, g, r in cases if f != "router" or g == "bf16"]  # the formats that a router has
    cases = [("none", g, r) if (f, g) == ("experts", "bf16") else (f, g, r) for f, g, r in cases]
    for family, form, rules in cases + [("several", rules, rules) for rules in MIXED]:
        s.families[rules] = s.add("precision", rules, lambda c=(family, form, rules): precision_row(s, *c))


def plan_exact(s):
    """Share of word problems answered right."""

    def body(rules, future):
        if not future.result():
            return
        model, _ = s.quantize("--precision", rules, "--steps", 0)
        run = s.lab("us-serve", "-m", model, "--chat", "--plain-turns", "--max-tokens", 200, "--cut-loops", "--batch", 8, *s.where(),
                    s.a.questions, stdout="run.jsonl", alone=True, seconds=5 if s.gpu else 0)
        row = read(s.lab("us-eval", "--task", run / "run.jsonl", stdout="eval.tsv") / "eval.tsv")[-1]
        s.tables["precision"].update(future.place, exact=row["exact"], exact_error=row["exact_error"], questions=row["questions"])

    first = [rules for rules in s.families if rules in MIXED + ["all=bf16,experts=bf16", "all=bf16,experts=mxfp4"]]
    for rules in first + [rules for rules in s.families if rules not in first]:
        s.lab.task(f"precision: exact match, {rules}", body, rules, s.families[rules])


# -- finetuning --


def plan_rules(s):
    for precision in ("experts=mxfp4", s.a.precision) if s.a.precision != "experts=mxfp4" else ("experts=mxfp4",):
        for rule in RULES:
            s.add("qat", f"rule {rule}, {precision}",
                  lambda p=precision, r=rule: {"what": "PTQ", "precision": p, "rule": r, "steps": "0",
                                               **figures(s.quantize("--precision", p, "--steps", 0, rule=r)[1]["ptq"])})


def add_qat(s, what, steps, rate, **options):
    """A finetuned row; what is not given is AdamW, KL, all weights, cosine, mse."""

    def body():
        given = {key: value() if callable(value) else value for key, value in {**options, "rate": rate}.items()}
        row = s.finetune(steps, **given)[1]["qat"]
        return {"what": what, "precision": given.get("precision") or s.a.precision, "rule": given.get("rule", "mse"), "loss": given.get("loss", "kl"),
                "weights": given.get("scope", "all"), "optimizer": given.get("optimizer", "adamw"), "schedule": given.get("schedule", "cosine"),
                "beta2": given.get("beta2", "0.95"),
                "steps": str(steps), "batch": str(given.get("batch") or s.a.batch), "rate": given["rate"], **figures(row),
                "gap_closed": row["gap_closed"], "gap_closed_error": row["gap_closed_error"]}

    named = [str(value) for value in (rate, *options.values()) if not callable(value)]
    return s.add("qat", f"{what}, {steps} steps {' '.join(named)}".strip(), body)


def best(s):
    """The row of the sweep that closed most."""
    rows = [row for row in found(s.sweep) if row["gap_closed"]]
    if not rows:
        raise OutOfTime("there is no finetuning to go on from")
    return max(rows, key=lambda row: float(row["gap_closed"]))


def plan_sweep(s):
    a = s.a
    for scope in ("all", "experts"):
        for rate in a.rates:
            s.sweep.append(add_qat(s, "weights and rate", a.steps, rate, scope=scope))
    for rate in a.rates[-2:]:
        add_qat(s, "experts alone are rounded", a.steps, rate, scope="experts", precision="experts=mxfp4")


def plan_qat_long(s, steps, alone=0):
    for n in steps:
        add_qat(s, "steps", n, lambda: best(s)["rate"], scope=lambda: best(s)["weights"])
    if alone:
        add_qat(s, "experts alone are rounded", alone, lambda: best(s)["rate"], scope="experts", precision="experts=mxfp4")


def plan_qat_rest(s):
    a = s.a
    rate, scope = (lambda: best(s)["rate"]), (lambda: best(s)["weights"])
    scaled = lambda factor: (lambda: f"{float(best(s)['rate']) * factor:.3g}")
    for r in a.rates[-3:-1]:
        add_qat(s, "cross-entropy", a.steps, r, loss="ce", scope=scope)
    for r in a.rates[-3:-1]:
        s.add("qat", f"control, {r}", lambda r=r: control_row(s, r))
    for r in a.rates[-2:]:
        add_qat(s, "Muon", a.steps, r, optimizer="muon", scope=scope)
    for factor in (1, 2):
        add_qat(s, "four times the batch", a.steps // 4, scaled(factor), scope=scope, batch=4 * a.batch)
    for beta2 in ("0.99", "0.999"):
        add_qat(s, "memory of second moments", a.steps, rate, scope=scope, beta2=beta2)
    add_qat(s, "weights and rate", a.steps, rate, scope="rounded")
    for schedule in ("constant", "linear"):
        add_qat(s, "schedule", a.steps, rate, scope=scope, schedule=schedule)
    for rule in ("r7.25", "rceil"):
        add_qat(s, "scale rule", a.steps, rate, scope=scope, rule=rule)


def control_row(s, rate):
    """As many steps without any rounding."""
    a = s.a
    model, _ = s.finetune(a.steps, rate, loss="ce", scope="experts", precision="experts=bf16")
    row = read(s.lab("us-eval", "-m", model, "--against", a.model, "--data", a.data, "--windows", a.sweep_windows, *s.where(),
                     stdout="eval.tsv") / "eval.tsv")[1]
    return {"what": "control: the original trained", "precision": "experts=bf16", "loss": "ce", "weights": "experts", "steps": str(a.steps),
            "batch": str(a.batch), "rate": rate, **figures(row)}


# -- drafters --


def answers(s, model, *options, prompts=None, cpu=False):
    """Runs of every prompt set; questions and chats as user turns."""
    sets, runs = sorted(pathlib.Path(prompts or s.a.prompts).glob("*.jsonl")), []
    where = ["--threads", 0] if cpu else s.where()
    for chat in (False, True):
        files = [path for path in sets if (path.stem in ("math", "chat")) == chat]
        if files:
            run = s.lab("us-serve", "-m", model, "--plain-turns", "--cut-loops", "--ignore-end", "--max-tokens",
                        s.a.tokens // 2 if cpu else s.a.tokens, *(["--chat"] if chat else []), *options, *where, *files,
                        stdout="run.jsonl", alone=True, seconds=4 if s.gpu else 0)
            runs.append(run / "run.jsonl")
    return runs


def summary(s, *words):
    return {row["scenario"]: row for row in read(s.lab("us-eval", *words, stdout="eval.tsv") / "eval.tsv")}


def replay(s, draft, *options):
    """Acceptance by scenario on the served model's own greedy answers."""
    served = s.served()
    return summary(s, *answers(s, served), "-m", served, "-d", draft, *options, *s.where())


def lengths(found_rows):
    """The figures of a drafter as one row."""
    whole = found_rows["all"]
    return {**{name: found_rows[name]["acceptance_length"] for name in SCENARIOS if name in found_rows}, "all_error": whole["length_error"],
            **{key: value for key, value in whole.items() if key.startswith("accept_")}}


def recorded(s):
    """What the served model answered, for drafters to learn: given, or written now to prompts that are not measured on, or to those that are."""
    a = s.a
    if a.answers:
        return a.answers
    if not a.answer_prompts:
        return answers(s, s.served(), "--temperature", "0.2")[0]
    return s.lab("dflash-train", "--target", s.served(), "--generate", a.answer_count, "--prompts", a.answer_prompts, "--max-tokens", a.tokens,
                 "--temperature", 0, "--ignore-end", "-l", a.draft_length, "--answers-out", "@answers.jsonl", *s.where()) / "answers.jsonl"


def distil(s, *options, target=None, seed=None, own=True):
    """dflash-train; options replace those that every drafter has, in their places, so that the same drafter is the same step."""
    a = s.a
    words = ["--layers", "3", "--block", "8", "--window", "128", "--optimizer", "muon", "--lr", a.muon_rates[1], *shlex.split(a.draft_options)]
    words += ["--answers", recorded(s), "--text-share", "0.25"] if own else []
    chosen = dict(zip(words[::2], words[1::2])) | dict(zip(options[::2], options[1::2]))
    folder = s.lab("dflash-train", "--target", target or s.served(), "--data", a.data, "-o", "@d.h5", "--steps", a.draft_steps, "-b",
                   a.draft_batch, "-l", a.draft_length, "--anchors", a.anchors, "--log", "@log.tsv", "--seed", seed or a.seed,
                   *(word for pair in chosen.items() for word in pair), *s.where(), seconds=a.draft_steps / 100 if s.gpu else 0)
    return folder / "d.h5", folder / "log.tsv"


def add_draft(s, what, *options, use=(), target=None, seed=None, own=True, keep=None, **fields):
    def body():
        draft, log = distil(s, *options, target=target, seed=seed, own=own)
        rows = replay(s, draft, *use)
        last = read(log)[-1]
        if keep:
            s.logs[keep] = log
        if keep == "base":
            write(s.a.out / "positions.tsv", [{"scenario": name, "position": key[7:], "accepted": value} for name, row in rows.items()
                                              for key, value in row.items() if key.startswith("accept_")])
        return {"what": what, **fields, "seed": str(seed or s.a.seed), **lengths(rows), "training_length": last["length"],
                "heldout_length": last["heldout_len"], "steps": last["step"], "tokens": last["tokens"]}

    return s.add("drafter", f"{what} {fields} {seed or ''}", body)


def plan_optimizer(s):
    a = s.a
    for optimizer, rates in (("muon", a.muon_rates), ("adamw", a.adamw_rates)):
        for i, rate in enumerate(rates):
            keep = "base" if optimizer == "muon" and i == 1 else f"{optimizer} {rate}"
            s.optimizers.append(add_draft(s, "optimizer", "--optimizer", optimizer, "--lr", rate, keep=keep, optimizer=optimizer, rate=rate))


def plan_seeds(s):
    def rows(optimizer, seed):
        sweep = [row for row in found(s.optimizers) if row["optimizer"] == optimizer]
        if not sweep:
            raise OutOfTime("there is no rate to go on from")
        rate = max(sweep, key=lambda row: float(row["all"]))["rate"]
        draft, log = distil(s, "--optimizer", optimizer, "--lr", rate, seed=seed)
        last = read(log)[-1]
        return {"what": "seeds at the best rate", "optimizer": optimizer, "rate": rate, "seed": str(seed), **lengths(replay(s, draft)),
                "training_length": last["length"], "heldout_length": last["heldout_len"], "steps": last["step"], "tokens": last["tokens"]}

    for seed in s.a.seeds:
        for optimizer in ("muon", "adamw"):
            s.add("drafter", f"seed {seed} of {optimizer}", lambda o=optimizer, n=seed: rows(o, n))


def plan_text(s):
    add_draft(s, "text", own=False, text="original text")
    add_draft(s, "text", "--text-share", "0", text="the target's answers alone")
    if s.a.model != s.a.served:
        add_draft(s, "target", target=s.a.model, trained_on="the original")
    add_draft(s, "Markov head", "--markov", 64, markov="64")
    for loss, weights in (("ce", "exp"), ("ce", "uniform"), ("kl", "dpace")):
        add_draft(s, "loss", "--loss", loss, "--weights", weights, loss=loss, weights=weights)


def plan_block(s):
    for block in (8, 4, 16):
        for used in (4, 8, 16):
            if used <= block:
                add_draft(s, "block trained and used", "--block", block, use=["--block", used], block=str(block), used=str(used))


def plan_shape(s):
    for layers in (1, 5):
        add_draft(s, "layers", "--layers", layers, layers=str(layers))
    for taps in s.a.taps:
        add_draft(s, "taps", "--taps", taps, taps=taps)
    for window in (32, 512):
        add_draft(s, "window", "--window", window, window=str(window))


def plan_together(s):
    """Do the gains of single options add up?"""
    for layers in (None, 5):
        for taps in (None, *s.a.taps):
            if layers or taps:
                add_draft(s, "together", "--markov", 64, *(("--layers", layers) if layers else ()), *(("--taps", taps) if taps else ()),
                          markov="64", layers=str(layers or ""), taps=taps or "")


# -- speed --


def speed_rows(s, what, where, rows):
    return [{"what": what, "where": where, "scenario": name, "acceptance_length": row["acceptance_length"], "length_error": row["length_error"],
             "tokens_per_s": row["tokens_per_s"], "loop_share": row["loop_share"]} for name, row in rows.items()]


def draft_of(s):
    return s.a.draft or distil(s)[0]


def plan_speed(s):
    served, place = s.served, s.a.device
    s.add("speed", "plain", lambda: speed_rows(s, "plain", place, summary(s, *answers(s, served()))))
    s.add("speed", "speculative", lambda: speed_rows(s, "match, T = 0", place, summary(s, *answers(s, served(), "--draft", draft_of(s)))))
    s.add("speed", "replayed", lambda: speed_rows(s, "match, T = 0, replayed", place, replay(s, draft_of(s))))


def plan_verify(s):
    cases = [("match, T = 1", ["-t", 1]), ("reject, T = 1", ["-t", 1, "--verify", "reject"]), ("block, T = 1", ["-t", 1, "--verify", "block"]),
             ("adaptive length, T = 0", ["--adaptive"])]
    for what, options in cases:
        s.add("speed", what, lambda w=what, o=options: speed_rows(s, w, s.a.device, summary(s, *answers(s, s.served(), "--draft", draft_of(s), *o))))


def plan_cpu(s):
    """On a GPU's host: four prompts of each set."""
    if not s.gpu:
        return
    some = s.a.out / "some"
    some.mkdir(exist_ok=True)
    for path in pathlib.Path(s.a.prompts).glob("*.jsonl"):
        (some / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    for what, options in (("plain", lambda: []), ("match, T = 0", lambda: ["--draft", draft_of(s)])):
        s.add("speed", f"{what} on the CPU",
              lambda w=what, o=options: speed_rows(s, w, "cpu", summary(s, *answers(s, s.served(), *o(), prompts=some, cpu=True))))


# -- the plan --

PLAN = [("speed", plan_speed), ("speed", plan_verify), ("speed", plan_cpu), ("precision", plan_precision), ("qat", plan_rules),
        ("qat", plan_sweep), ("drafter", plan_optimizer), ("drafter", plan_seeds), ("drafter", plan_text), ("drafter", plan_shape),
        ("drafter", plan_together), ("drafter", plan_block), ("qat", lambda s: plan_qat_long(s, s.a.more_steps[:3])), ("qat", plan_qat_rest),
        ("qat", lambda s: plan_qat_long(s, s.a.more_steps[3:], s.a.alone_steps)), ("precision", plan_exact)]

# -- the page --


def draw(s):
    """Pictures of the tables that are there."""
    for name, words in pictures(s.a.out, s.logs):
        s.lab.task(f"picture {name}", lambda n=name, w=words: (s.a.out / f"{n}.png").write_bytes(
            (s.lab("us-plot", *w, "-o", "@p.png") / "p.png").read_bytes()))


def page(s):
    a = s.a
    head = (f"# Results: {a.model.stem}\n\nMade by `{a.command}`, seed {a.seed}, on {a.hardware or platform.processor() or platform.machine()}, in "
            f"{s.lab.seconds():.0f} s. `_error` columns are standard errors (windows, requests or questions). Acceptance length: committed tokens / "
            f"rounds, the target's own token included, pooled; {a.tokens} new tokens, cut where a 24-gram occurs three times (`loop_share`). Acceptance of "
            "drafters is replayed on the served model's recorded greedy answers; that of `speed` comes from decoding. A finetuning step is "
            f"{a.batch} x {a.length} tokens unless `batch` says otherwise, a drafter's {a.draft_batch} x {a.draft_length} with {a.anchors} blocks a sequence. "
            "`tokens` of a model are the held-out ones it was measured on, of a drafter those it was trained on.")
    notes = [f"Not made: {'; '.join(names)}." for names in (s.lab.late + s.lab.failures,) if names]
    write_page(a.out, head, notes)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "out", "prompts"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    for name in ("questions", "answers", "answer-prompts", "served", "draft"):
        parser.add_argument(f"--{name}", type=pathlib.Path)
    parser.add_argument("--table", action="append", choices=["precision", "qat", "drafter", "speed"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", default="0")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--limit", type=float, default=480)
    parser.add_argument("--precision", default="experts=mxfp4")
    parser.add_argument("--taps", action="append")
    parser.add_argument("--draft-options", default="")
    parser.add_argument("--hardware", default="")
    return parser.parse_args()


def sizes(a):
    """How much of everything: --small, a GPU, or two CPU cores."""
    gpu = a.device != "cpu"
    a.fp8_scale = "ue8m0" if gpu else "f32"
    a.steps, a.batch, a.length, a.windows = (8, 4, 128, 8) if a.small else (300, 32, 512, 200) if gpu else (400, 8, 256, 200)
    a.sweep_windows = a.windows // 2 if a.small else 64 if gpu else a.windows
    a.draft_steps, a.draft_batch, a.draft_length, a.anchors = (6, 4, 256, 16) if a.small else (600, 16, 512, 128) if gpu else (800, 8, 512, 64)
    a.taps = a.taps or ["0,2", "1,3,5"]
    a.tokens = 48 if a.small else 256
    a.rates = ["3e-5", "1e-4", "3e-4"] if a.small else ["1e-5", "3e-5", "1e-4", "3e-4"]
    a.more_steps = [n * a.steps // 8 for n in ((4,) if a.small else (2, 16, 32, 64, 128))]
    a.alone_steps = 4 * a.steps if gpu and not a.small else 0
    a.muon_rates, a.adamw_rates = ["4e-3", "1e-2", "2e-2"], ["5e-4", "1e-3", "2e-3"]
    a.answer_count = 20 if a.small else 10000 if gpu else 600
    a.seeds = [2] if a.small else [2, 3]
    words = [word for word in sys.argv[1:] if not word.startswith("/")]  # the machine's own paths are nobody's concern
    a.command = "data/recipes/reproduce.sh " + " ".join(w for i, w in enumerate(words) if not w.startswith("--") or w == "--small" or
                                                        (i + 1 < len(words) and not words[i + 1].startswith("--")))


def main():
    a = parse()
    sizes(a)
    a.out.mkdir(parents=True, exist_ok=True)
    s = Study(a)
    for table, part in PLAN:
        if not a.table or table in a.table:
            part(s)
    s.lab.pool.shutdown(wait=True)
    spent, lab = s.lab.seconds(), s.lab
    s.lab = Lab(a.out)  # pictures are not counted
    draw(s)
    s.lab.pool.shutdown(wait=True)
    lab.failures += s.lab.failures
    s.lab = lab
    page(s)
    print(f"{lab.run_count} steps run, {spent:.0f} s; {len(lab.late)} late, {len(lab.failures)} failed", file=sys.stderr)
    sys.exit(1 if lab.failures else 0)


main()
