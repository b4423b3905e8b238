#!/usr/bin/env python3
"""failures.py: name the tests of a meson log that failed, each with the end of what it printed.

Usage: tests/failures.py FOLDER/meson-logs/testlog.json
"""
import json
import sys

GOOD = {"OK", "EXPECTEDFAIL", "SKIP"}
LINES = 30  # of each test's output; its whole output stands where the test ran


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with open(sys.argv[1], encoding="utf-8", errors="replace") as log:
        tests = [json.loads(line) for line in log if line.strip()]
    for test in tests:
        if test["result"] in GOOD:
            continue
        print(f"{test['result']} after {test['duration']:.1f} s, status {test['returncode']}: {test['name']}")
        printed = "\n".join(test.get(name) or "" for name in ("stdout", "stderr"))
        for line in printed.splitlines()[-LINES:]:
            print("  " + line)


if __name__ == "__main__":
    main()
