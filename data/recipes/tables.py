"""Tables of results: rows that arrive in any order, TSV, a page and pictures."""
import csv
import pathlib
import threading

TITLES = {"precision": "Precision by module family", "qat": "MXFP4 experts: scale rules, finetuning, control",
          "drafter": "The drafter", "speed": "Speed, verification and adaptive length", "positions": None}


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


class Table:
    """Rows in the order in which their places were taken; the file is written anew with each that arrives."""

    def __init__(self, folder, name):
        self.path, self.places, self.lock, self.finish = folder / f"{name}.tsv", [], threading.Lock(), None

    def place(self):
        with self.lock:
            self.places.append([])
            return len(self.places) - 1

    def put(self, place, rows):
        with self.lock:
            self.places[place] = rows
            self.write()

    def update(self, place, **fields):
        with self.lock:
            for row in self.places[place]:
                row.update(fields)
            self.write()

    def write(self):
        rows = [row for place in self.places for row in place]
        if self.finish:
            self.finish(rows)
        write(self.path, rows)


def cell(value):
    try:
        return f"{float(value):.4g}" if "." in value or "e" in value else value
    except ValueError:
        return value


def markdown(path):
    rows = read(path)
    columns = [key for key in rows[0] if not key.startswith("accept_") and any(row[key] for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join(lines + ["| " + " | ".join(cell(row[key] or "") for key in columns) + " |" for row in rows])


def write_page(folder, head, notes):
    parts = [head]
    for name, title in TITLES.items():
        path = folder / f"{name}.tsv"
        if title and path.exists() and read(path):
            parts.append(f"## {title}\n\n{markdown(path)}")
    parts += notes
    (folder / "results.md").write_text("\n\n".join(parts) + "\n")


def plotted(folder):
    """Parts of the finetuning table that are drawn by themselves: the sweep of rates, and the steps with the sweep's best row."""
    qat = read(folder / "qat.tsv") if (folder / "qat.tsv").exists() else []
    swept = [row for row in qat if row["what"] == "weights and rate"]
    write(folder / "qat-rates.tsv", [{**row, "series": f"{row['what']}: {row['weights']}"} for row in qat
                                     if row["what"] in ("weights and rate", "cross-entropy", "Muon")])
    best = max(swept, key=lambda row: float(row["gap_closed"] or "-9"), default=None)
    write(folder / "qat-steps.tsv", [row for row in qat if row["what"] == "steps" or row is best])


def pictures(folder, logs):
    """Names and arguments of us-plot; logs: drafters' training logs by name."""
    plotted(folder)
    kl, gap = "KL to the original (nats a token)", "share of PTQ's KL that is closed"
    named = [word for name, path in logs.items() for word in (str(path), "--name", name)]
    wanted = [("precision", [folder / "precision.tsv", "-x", "active_bytes", "-y", "kl", "-g", "family", "--points", "--y-log", "--x-title",
                             "bytes a token (B)", "--y-title", kl, "--title", "Precision by module family"]),
              ("qat-rates", [folder / "qat-rates.tsv", "-x", "rate", "-y", "gap_closed", "-g", "series", "--x-log", "--y-title", gap, "--title",
                             "Finetuning through MXFP4: rates"]),
              ("qat-steps", [folder / "qat-steps.tsv", "-x", "steps", "-y", "gap_closed", "--points", "--x-log", "--y-title", gap, "--title",
                             "Finetuning through MXFP4: steps"]),
              ("positions", [folder / "positions.tsv", "-x", "position", "-y", "accepted", "-g", "scenario", "--from-zero", "--y-title",
                             "share of drafts accepted", "--title", "Acceptance by position"]),
              ("drafter-length", [*named, "-x", "tokens", "-y", "length", "--y-title", "simulated acceptance length", "--title",
                                  "Drafter: training by optimizer and rate"])]
    tables = {name: words[0] for name, words in wanted if words and str(words[0]).endswith(".tsv")}
    return [(name, words) for name, words in wanted if name in tables and pathlib.Path(tables[name]).is_file() and len(read(tables[name])) > 1]
