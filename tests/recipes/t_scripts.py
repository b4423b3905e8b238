"""Scripts that users start: help and a mistyped option. Usage: t_scripts.py SOURCE_ROOT

--help prints what the script is to stdout and exits 0; an option that there is not exits 2 with a reason on stderr. Neither
leaves anything in the folder that it was started in. And the quickstart, in a folder with a space in its name, with tools that
only write down what they are given: every prompt set reaches us-serve, whole, with the drafter and without.
"""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(sys.argv[1]).resolve()
SCRIPTS = [*(f"data/recipes/{name}.sh" for name in ("quickstart", "pico", "nano", "mini", "reproduce")),
           "data/fetch/fetch.sh", "tests/run.sh", "tests/fuzz/run.sh", "tests/gpu/run.sh"]
failed = []


def check(script, option, code, said):
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["sh", ROOT / script, option], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=60)
        left = os.listdir(folder)
    if done.returncode != code or left or not said(done):
        failed.append(f"{script} {option}: exit {done.returncode}, expected {code}; left {left}\n{done.stdout}{done.stderr}")


def check_spaces():
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder) / "a clone"
        shutil.copytree(ROOT / "data/recipes", place / "data/recipes")
        shutil.copytree(ROOT / "data/prompts", place / "data/prompts")
        (place / "build/tools").mkdir(parents=True)
        for tool in ("us-data", "qat-quant", "dflash-train", "us-serve", "us-eval", "tile-profile"):
            stub = place / "build/tools" / tool
            stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>"{place}/{tool}.given"\n')
            stub.chmod(0o755)
        for script in ("same_tokens.py", "quickstart_table.py"):
            (place / "data/recipes" / script).write_text("")
        done = subprocess.run(["sh", place / "data/recipes/quickstart.sh", "--no-install", "--no-build"],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        given = (place / "us-serve.given").read_text().splitlines() if done.returncode == 0 else []
        wanted = sorted(str(path) for path in (place / "data/prompts").glob("*.jsonl")) * 2
        if sorted(word for word in given if word.endswith(".jsonl")) != sorted(wanted):
            failed.append(f"quickstart.sh in '{place}': exit {done.returncode}; us-serve was given {given}\n{done.stderr}")


def check_refused():
    """The longer recipes keep lists of words: they say so of a path with a blank in it."""
    with tempfile.TemporaryDirectory() as folder:
        text = pathlib.Path(folder) / "my text"
        text.mkdir()
        for name in ("pico", "nano", "mini"):
            done = subprocess.run(["sh", ROOT / f"data/recipes/{name}.sh", "--text", text, "--out", folder + "/out"],
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
            said = f"{name}.sh: '{text.resolve()}' has a blank in it, which this recipe cannot take\n"
            if done.returncode != 2 or done.stderr != said or os.path.exists(folder + "/out"):
                failed.append(f"{name}.sh --text '{text}': exit {done.returncode}, expected 2\n{done.stderr}")


check_spaces()
check_refused()
for script in SCRIPTS:
    name = pathlib.Path(script).name
    check(script, "--help", 0, lambda done: done.stdout.startswith(f"{name}: ") and not done.stderr)
    check(script, "--no-such-option", 2, lambda done: not done.stdout and name in done.stderr)
print("\n".join(failed) or f"{len(SCRIPTS)} scripts help, and refuse what they do not know")
sys.exit(1 if failed else 0)
