"""Does run.sh compile what its programs call? Usage: links.py SOURCE BUILD

run.sh builds the GPU test programs without meson, from lists of its own, and nobody without a GPU waits for it. With the objects that meson has
compiled in BUILD: every function of this project that a program's own sources call must be defined in them or in a source of run.sh's lists.
"""
import pathlib
import re
import subprocess
import sys


def symbols(objects, option):
    """Names with us_ in them that are defined (--defined-only) or wanted (--undefined-only) by any of the objects."""
    lines = subprocess.run(["nm", option, *map(str, objects)], check=True, capture_output=True, text=True).stdout.splitlines()
    return {words[-1] for words in map(str.split, lines) if len(words) > 1 and "us_" in words[-1]}


def library(source, build):
    """Objects of what run.sh puts into its archive."""
    script = (source / "tests/gpu/run.sh").read_text()
    devices = [path for pattern in re.search(r"for source in (.*\.cu); do", script)[1].split()
               for path in source.glob(pattern.replace('"$root"/', ""))]
    hosts = re.search(r"for source in (base/err.*?); do", script, re.S)[1].replace("\\", "").split()
    found = [build / "libultraspeed_cuda.a.p" / f"{path.name}.o" for path in devices]
    for name in hosts:
        path = (source / "libcore" / f"{name}.c").resolve().relative_to(source.resolve())
        found += build.glob(f"*.a.p/{str(path).replace('/', '_')}.o")
    return found


def main():
    source, build = map(pathlib.Path, sys.argv[1:])
    given = symbols(library(source, build), "--defined-only")
    programs = re.findall(r"^    \['([a-z0-9_]+)'", (source / "tests/gpu/meson.build").read_text(), re.M)
    missing = 0
    for program in programs:
        objects = sorted((build / "tests/gpu" / f"{program}.p").glob("*.o"))
        if not objects:
            sys.exit(f"{program}: there are no objects of it in {build}")
        for name in sorted(symbols(objects, "--undefined-only") - symbols(objects, "--defined-only") - given):
            print(f"run.sh: {program} calls {name}, which no source of its lists defines")
            missing += 1
    print(f"{len(programs)} programs of run.sh's list find what they call" if not missing else f"{missing} are missing")
    sys.exit(missing > 0)


main()
