"""Scripts that users start: help and a mistyped option. Usage: t_scripts.py SOURCE_ROOT

--help prints what the script is to stdout and exits 0; an option that there is not exits 2 with a reason on stderr. Neither
leaves anything in the folder that it was started in.
"""
import os
import pathlib
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


for script in SCRIPTS:
    name = pathlib.Path(script).name
    check(script, "--help", 0, lambda done: done.stdout.startswith(f"{name}: ") and not done.stderr)
    check(script, "--no-such-option", 2, lambda done: not done.stdout and name in done.stderr)
print("\n".join(failed) or f"{len(SCRIPTS)} scripts help, and refuse what they do not know")
sys.exit(1 if failed else 0)
