"""Compare columns of two TSV logs by step. Usage: compare_logs.py A B BOUND COLUMN...; the last line says how far they are apart.

Rows are matched by the column "step" where there is one (the last row of a step counts: a resumed run repeats some), else by
order. Differences are relative to the larger magnitude. Exits 1 when one exceeds BOUND or nothing could be compared.
"""
import sys


def read(path):
    rows, header = {}, None
    for line in open(path):
        cells = line.rstrip("\n").split("\t")
        if header is None or cells == header:
            header = cells
            continue
        row = dict(zip(header, cells))
        rows[row.get("step", len(rows))] = row
    return rows


def main():
    a, b, bound = read(sys.argv[1]), read(sys.argv[2]), float(sys.argv[3])
    worst, where, compared = 0.0, "", 0
    for step in a:
        for column in sys.argv[4:]:
            x, y = a[step].get(column, ""), b.get(step, {}).get(column, "")
            if not x or not y:
                continue
            x, y = float(x), float(y)
            compared += 1
            apart = abs(x - y) / max(abs(x), abs(y), 1e-30)
            if not apart <= worst:
                worst, where = apart, f" at {step}, {column}: {x:.9g} and {y:.9g}"
    good = compared > 0 and worst <= bound and len(a) == len(b)
    print(f"{'ok' if good else 'FAILED'}: {compared} values, {len(a)} and {len(b)} rows, at most {worst:.3g} apart{where}")
    return 0 if good else 1


sys.exit(main())
