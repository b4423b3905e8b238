"""What holds for every tool. Usage: generic.py TOOL; TOOL is the path of the executable.

Checks help, version, man page, completion, every documented option, an unknown one, and a full disk behind stdout.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys

TOOL = pathlib.Path(sys.argv[1]).resolve()
problems = []


def run(*args, stdout=subprocess.PIPE):
    env = dict(os.environ, LC_ALL="C")
    return subprocess.run([TOOL, *args], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True,
                          env=env, timeout=600)


def check(condition, sentence, done=None):
    if condition:
        return
    problems.append(sentence)
    if done is not None:
        print(f"exit {done.returncode}\n{done.stdout}{done.stderr}")


def check_pages():
    """Returns the help text."""
    done = run("--help")
    check(done.returncode == 0 and not done.stderr, "--help exits 0 and is silent on stderr", done)
    check(done.stdout.startswith(f"usage: {TOOL.name}"), "--help begins with the usage", done)
    check(all(len(line) < 80 for line in done.stdout.split("\nExamples:")[0].splitlines()), "--help fits 79 columns")
    check(run("-h").stdout == done.stdout, "-h is --help")
    version = run("--version")
    check(version.returncode == 0 and re.fullmatch(rf"{TOOL.name} \d+\.\d+\.\d+ \(\S+\)\n", version.stdout),
          "--version is one line: name, version, revision", version)
    return done.stdout


def values_to_try(kind, help_text):
    default = re.search(r"default ([^)]*)\)", help_text)
    top = re.search(r"above \S+ to ([^,)]+)", help_text) or re.search(r"from ([^,) ]+)", help_text)
    first = kind.split("|")[:1] if "|" in kind else []
    return ([default.group(1)] if default else []) + first + ([top.group(1)] if top else []) + ["1", "a=b", "cpu"]


def check_options(text):
    rows = re.findall(r"^  (?:-(\w), |    )--([\w-]+)(?: (\S+))?(.*(?:\n {26}.*)*)", text, re.M)
    names = [name for _, name, _, _ in rows]
    check(len(names) == len(set(names)), "no option is listed twice")
    check("help" in names and "version" in names, "--help lists the options")
    for letter, name, kind, rest in rows:
        if name == "config":
            continue  # reads its file; a tested path of its own
        spellings = [f"--{name}"] + ([f"-{letter}"] if letter else [])
        for spelling in spellings:
            tries = [[spelling, v, "--help"] for v in values_to_try(kind, " ".join(rest.split()))] if kind \
                else [[spelling, "--help"]]
            check(any(run(*args).returncode == 0 for args in tries), f"{spelling} parses as documented")


def check_misuse():
    done = run("--hepl")
    check(done.returncode == 2 and not done.stdout, "an unknown option exits 2 with nothing on stdout", done)
    check(done.stderr.startswith(f"{TOOL.name}: unknown option '--hepl'; did you mean '--help'?\n"),
          "an unknown option gets a suggestion", done)
    done = run("--config", "no such file")
    check(done.returncode == 4 and done.stderr.count("\n") == 1, "a missing config file is one line and exit 4", done)


def check_full_disk():
    for page in ("--help", "--version", "--man", "--completion"):
        with open("/dev/full", "w") as full:
            done = run(page, stdout=full)
        check(done.returncode == 4 and "No space left" in done.stderr, f"{page} on a full disk exits 4 and says so")


def check_man():
    page = run("--man")
    check(page.returncode == 0 and page.stdout, "--man prints the page", page)
    if not shutil.which("mandoc"):
        print("mandoc is missing: the man page was not linted")
        return
    lint = subprocess.run(["mandoc", "-T", "lint", "-W", "warning"], input=page.stdout, text=True, capture_output=True)
    check(not lint.stdout and lint.returncode == 0, f"the man page is clean for mandoc:\n{lint.stdout}{lint.stderr}")


def check_completion():
    script = run("--completion").stdout
    syntax = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    check(syntax.returncode == 0 and not syntax.stderr, f"the completion is valid bash: {syntax.stderr}")
    function = "_" + TOOL.name.replace("-", "_")
    ask = f"{script}\nCOMP_WORDS=({TOOL.name} --he); COMP_CWORD=1; {function}; echo \"${{COMPREPLY[@]}}\"\n"
    done = subprocess.run(["bash"], input=ask, text=True, capture_output=True)
    check("--help" in done.stdout.split(), "completing --he offers --help", done)


check_options(check_pages())
check_misuse()
check_full_disk()
check_man()
check_completion()
print("\n".join(f"{TOOL.name}: FAILED: {problem}" for problem in problems) or f"{TOOL.name}: all hold")
sys.exit(1 if problems else 0)
