"""Print the quickstart's closing table from the files of its run. Usage: quickstart_table.py FOLDER"""
import csv
import pathlib
import sys

OUT = pathlib.Path(sys.argv[1])


def read(name):
    with open(OUT / name, newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def number(row, key, form="{:.4f}"):
    return form.format(float(row[key])) if row.get(key) else "-"


def print_rows(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))
    print()


def quality():
    rows = [["model", "bytes", "KL (nats/token)", "+-", "perplexity", "bits/byte", "same token", "gap closed"]]
    for row in read("quality.tsv"):
        rows.append([row["model"], row["bytes"], number(row, "kl"), number(row, "kl_error"),
                     number(row, "perplexity", "{:.3f}"), number(row, "bits_per_byte", "{:.3f}"),
                     number(row, "top1", "{:.1%}"), number(row, "gap_closed", "{:.1%}")])
    print_rows(rows)


def decoding():
    plain = {row["scenario"]: row for row in read("plain.tsv")}
    rows = [["scenario", "requests", "acceptance length", "+-", "cut for loops", "plain tokens/s",
             "speculative tokens/s"]]
    for row in read("speculative.tsv"):
        rows.append([row["scenario"], row["requests"], number(row, "acceptance_length", "{:.2f}"),
                     number(row, "length_error", "{:.2f}"), number(row, "loop_share", "{:.0%}"),
                     number(plain[row["scenario"]], "tokens_per_s", "{:.0f}"), number(row, "tokens_per_s", "{:.0f}")])
    print_rows(rows)


def main():
    quality()
    decoding()
    print("pictures:")
    for path in sorted(OUT.glob("*.png")):
        print(f"  {path}")


main()
