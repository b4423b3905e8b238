"""t_lab: steps run once for the same inputs, alone where they must, and stop with the budget. Usage: t_lab.py RECIPES"""
import os
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, sys.argv[1])
from lab import Lab  # noqa: E402
from tables import Table, mark_pareto, read  # noqa: E402

# A tool that notes when it runs: tool NAME SECONDS INPUT @out; p and q run until there is tool.go
TOOL = """#!/bin/sh
[ "$1" = --version ] && { cat "$0.version"; exit 0; }
echo "begin $1" >>"$0.log"
case $1 in [pq]) for i in $(seq 2400); do [ -e "$0.go" ] && break; sleep 0.05; done ;; esac
sleep "$2"; echo "end $1" >>"$0.log"
[ "$1" != bad ] || { echo "no such thing" >&2; exit 3; }
cat "$3" >"$4"
"""


def check(condition, what):
    if not condition:
        sys.exit(f"t_lab: {what}")


def wait_for(condition, what):
    """Machines may be slow: a minute is no answer, whatever else runs."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    print(f"t_lab: not within a minute: {what}", file=sys.stderr, flush=True)
    os._exit(1)  # the pool's threads wait for tools that would never end


def main():
    folder = pathlib.Path(tempfile.mkdtemp())
    tool, given = folder / "tool", folder / "given"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    (folder / "tool.version").write_text("1")
    given.write_text("one")
    log = folder / "tool.log"
    step = lambda lab, name, seconds=0, **options: lab(tool, name, seconds, given, "@out", **options) / "out"  # noqa: E731

    lab = Lab(folder)
    check(step(lab, "a").read_text() == "one", "an output is where the step said")
    check(step(lab, "a") == step(Lab(folder), "a") and log.read_text().count("begin a") == 1, "the same step runs once")
    given.write_text("other")
    check(step(Lab(folder), "a").read_text() == "other", "another input is another step")
    (folder / "tool.version").write_text("2")
    step(Lab(folder), "a")
    check(log.read_text().count("begin a") == 3, "another version of the tool is another step")

    log.write_text("")
    lab = Lab(folder, jobs=3)
    for name in "pq":
        lab.task(name, lambda n=name: step(lab, n))
    wait_for(lambda: sorted(log.read_text().splitlines()) == ["begin p", "begin q"], "steps run beside each other")
    lab.task("alone", lambda: step(lab, "alone", 0.5, alone=True))
    wait_for(lambda: lab.slots.waiting == 1, "one that runs alone waits for the others")
    lab.task("r", lambda: step(lab, "r"))
    (folder / "tool.go").touch()
    lab.pool.shutdown(wait=True)
    lines = log.read_text().splitlines()
    check(sorted(lines[2:4]) == ["end p", "end q"], f"it runs when they have ended: {lines}")
    check(lines[4:] == ["begin alone", "end alone", "begin r", "end r"], f"those behind it wait: {lines}")

    lab = Lab(folder, budget=1000)
    done = lab.task("s", lambda: step(lab, "s")).result()
    lab.started -= 998  # two seconds are left
    late = [lab.task(name, lambda n=name: step(lab, n, 60)) for name in "tu"]
    lab.pool.shutdown(wait=True)
    check(done is not None and [task.result() for task in late] == [None, None] and lab.late == ["t", "u"],
          f"the budget ends a run: {lab.late}")
    lab = Lab(folder, budget=60)
    check(lab.task("s", lambda: step(lab, "s")).result() and lab.run_count == 0, "a run goes on where it was")
    check(lab.task("bad", lambda: step(lab, "bad")).result() is None and lab.failures == ["bad"], "a failure is noted and the rest goes on")

    table = Table(folder, "t")
    table.finish = lambda rows: mark_pareto(rows, "bytes", "kl")
    places = [table.place() for _ in range(3)]
    table.put(places[2], [{"name": "c", "bytes": "3", "kl": "5"}])
    table.put(places[0], [{"name": "a", "bytes": "1", "kl": "4"}, {"name": "b", "bytes": "2", "kl": "2"}])
    table.update(places[2], exact="0.5")
    rows = read(table.path)
    check([row["name"] for row in rows] == ["a", "b", "c"], "rows lie in the order of their places")
    check([row["pareto"] for row in rows] == ["*", "*", ""] and rows[2]["exact"] == "0.5", f"what pays is marked: {rows}")


os.environ["LC_ALL"] = "C"
main()
