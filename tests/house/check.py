"""House rules that a build can check. Usage: check.py SOURCE_ROOT; prints each violation, exits 1 if there is one
(0 with US_HOUSE_CHECK=warn in the environment, for the middle of a change).

- layering: who may include whom (docs/internals.md);
- nothing below the tools exits, aborts or prints;
- every test source is listed in its folder's meson.build, and every listed one exists.
"""
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(sys.argv[1])
LAYERS = {  # folder: folders whose headers it may include
    "libcore/base": {"libcore/base"},
    "libcore/formats": {"libcore/base", "libcore/formats"},
    "kernels": {"libcore/base", "libcore/formats", "kernels"},
    "libcore/model": {"libcore/base", "libcore/formats", "kernels", "libcore/model"},
    "libcore/plan": {"libcore/base", "libcore/formats", "kernels", "libcore/model", "libcore/plan"},
    "libcore/decode": {"libcore/base", "libcore/formats", "kernels", "libcore/model", "libcore/plan", "libcore/decode"},
    "libcore/device": {"libcore/base", "libcore/formats", "kernels", "libcore/model", "libcore/plan", "libcore/decode",
                       "libcore/device"},
    "training": {"libcore/base", "libcore/formats", "kernels", "libcore/model", "libcore/plan", "libcore/decode",
                 "libcore/device", "training"},
    "tools": {"libcore/base", "libcore/formats", "kernels", "libcore/model", "libcore/plan", "libcore/decode",
              "libcore/device", "training", "tools"},
}
# The engine under kernels/ knows the tile program's data structures and nothing else of the plan.
EXTRA = {"kernels": {"libcore/plan/program.h"}}
FORBIDDEN = re.compile(r"(?<![A-Za-z0-9_.>])(exit|_exit|abort|printf|puts|putchar|perror|assert)\s*\(")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"", re.S)
SUFFIXES = {".c", ".h", ".cu", ".cuh"}


def layer_of(path):
    rel = path.relative_to(ROOT).as_posix()
    return max((f for f in LAYERS if rel.startswith(f + "/")), key=len, default=None)


def resolve(include, origin):
    for base in (ROOT / "libcore", ROOT, origin.parent):
        if (base / include).is_file():
            return base / include
    return None


def check_source(path, problems):
    text = path.read_text()
    layer = layer_of(path)
    for include in INCLUDE.findall(text):
        target = resolve(include, path)
        if target is None or layer_of(target) is None:
            continue
        if layer_of(target) not in LAYERS[layer] and target.relative_to(ROOT).as_posix() not in EXTRA.get(layer, ()):
            problems.append(f"{path.relative_to(ROOT)}: {layer} must not include {include}")
    if layer != "tools":
        code = COMMENT.sub(lambda m: "\n" * m.group().count("\n"), text)
        for match in FORBIDDEN.finditer(code):
            line = code.count("\n", 0, match.start()) + 1
            problems.append(f"{path.relative_to(ROOT)}:{line}: {match.group(1)}() below the tools")


def check_tests(problems):
    for listing in (ROOT / "tests").rglob("meson.build"):
        listed = set(re.findall(r"'([A-Za-z0-9_]+)'", listing.read_text()))
        for source in listing.parent.glob("[tf]_*.c"):
            if source.stem not in listed:
                problems.append(f"{source.relative_to(ROOT)}: not listed in {listing.relative_to(ROOT)}")
    for source in (ROOT / "tests").rglob("t_*.c"):
        if not (source.parent / "meson.build").is_file():
            problems.append(f"{source.relative_to(ROOT)}: its folder has no meson.build")


def main():
    problems = []
    for folder in ("libcore", "kernels", "training", "tools"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and layer_of(path):
                check_source(path, problems)
    check_tests(problems)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems and os.environ.get("US_HOUSE_CHECK") != "warn" else 0


sys.exit(main())
