"""Run command-line cases. Usage: run.py [--refresh] --path DIR... FOLDER

FOLDER holds *.case files. The cases of a file run in order in one fresh folder, through sh, with the tools' folders first
in PATH, LC_ALL=C, $DATA the repository's data folder and $CASES the case folder. A case:

    # an unknown option is refused with a suggestion
    $ us-thing --stpes 3
    exit 2
    stderr
    | us-thing: unknown option '--stpes'; did you mean '--steps'?
    ~ try 'us-thing *'
    ...

The sentence, one command line, its exit code (0 unless given), and what it writes. `|` lines are exact, `~` lines are
patterns (* ? [abc]), `...` is any number of lines. A stream that is not mentioned must stay empty. --refresh rewrites
the expectations of the cases that fail; read the difference before you commit it.
"""
import argparse
import fnmatch
import os
import pathlib
import subprocess
import sys
import tempfile

TIMEOUT = 900  # of one command: only to end what hangs; the time is never judged here
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Case:
    def __init__(self, title, number):
        self.title, self.number = title, number
        self.command, self.code = None, 0
        self.streams = {"stdout": [], "stderr": []}


def read_cases(path):
    cases, stream = [], None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("# "):
            cases.append(Case(line[2:], number))
            stream = None
        elif line.startswith("$ "):
            if not cases or cases[-1].command:
                sys.exit(f"{path}:{number}: a command needs its sentence")
            cases[-1].command = line[2:]
        elif line.startswith("exit "):
            cases[-1].code = int(line[5:])
        elif line in ("stdout", "stderr"):
            stream = cases[-1].streams[line]
        elif line[:2] in ("| ", "~ ") or line in ("|", "~", "..."):
            stream.append(line)
        elif line:
            sys.exit(f"{path}:{number}: not understood: {line}")
    for case in cases:
        if not case.command:
            sys.exit(f"{path}:{case.number}: no command")
    return cases


def line_matches(expected, line):
    if expected.startswith("~"):
        return fnmatch.fnmatchcase(line, expected[2:])
    return line == expected[2:]


def matches(expected, lines):
    """Whether `lines` fit the expectation, `...` standing for any number of them."""
    if not expected:
        return not lines
    if expected[0] == "...":
        return any(matches(expected[1:], lines[i:]) for i in range(len(lines) + 1))
    return bool(lines) and line_matches(expected[0], lines[0]) and matches(expected[1:], lines[1:])


def run_case(case, env, folder):
    """Run it; sets case.got to (code, {stream: lines}) and returns what is wrong, a list of texts."""
    done = subprocess.run(["sh", "-c", case.command], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=TIMEOUT)
    code = done.returncode if done.returncode >= 0 else 128 - done.returncode
    got = {"stdout": done.stdout, "stderr": done.stderr}
    got = {name: text.decode("utf-8", "replace").splitlines() for name, text in got.items()}
    case.got = code, got
    problems = [] if code == case.code else [f"exit {code}, expected {case.code}"]
    for name, lines in got.items():
        if not matches(case.streams[name], lines):
            problems += [f"{name}:"] + [f"  {line}" for line in lines[:40]] + ["expected:"]
            problems += [f"  {line}" for line in case.streams[name][:40]]
    return problems


def write_cases(path, cases):
    blocks = []
    for case in cases:
        lines = [f"# {case.title}", f"$ {case.command}"]
        if case.failed:
            code, got = case.got
            streams = {name: [f"| {line}".rstrip() for line in text] for name, text in got.items()}
        else:
            code, streams = case.code, case.streams
        lines += [f"exit {code}"] if code else []
        for name in ("stdout", "stderr"):
            lines += [name] + streams[name] if streams[name] else []
        blocks.append("\n".join(lines) + "\n")
    path.write_text("\n".join(blocks))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--refresh", action="store_true")
    parser.add_argument("--path", action="append", default=[])
    parser.add_argument("folder", type=pathlib.Path)
    options = parser.parse_args()
    env = dict(os.environ, LC_ALL="C", DATA=str(ROOT / "data"), CASES=str(options.folder.resolve()),
               PATH=os.pathsep.join([os.path.abspath(p) for p in options.path] + [os.environ["PATH"]]))
    passed = failed = 0
    files = sorted(options.folder.glob("*.case"))
    if not files:
        sys.exit(f"{options.folder}: no cases")
    for path in files:
        cases = read_cases(path)
        with tempfile.TemporaryDirectory() as folder:
            for case in cases:
                problems = run_case(case, env, folder)
                case.failed = bool(problems)
                passed, failed = passed + (not problems), failed + bool(problems)
                if problems:
                    print(f"{path}:{case.number}: {case.title}\n$ {case.command}", *problems, sep="\n")
        if options.refresh and any(case.failed for case in cases):
            write_cases(path, cases)
    print(f"{passed} cases passed, {failed} failed")
    return 1 if failed else 0


sys.exit(main())
