"""Pages against the tree that they describe. Usage: docs.py SOURCE_ROOT

What a page names in code marks is there: functions and constants (us_, US_), source files and scripts by their last folders,
and options of tools and scripts. Logs tell of what was: the log in docs/perf.md is not read.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(sys.argv[1])
SOURCES = (".c", ".h", ".cu", ".cuh", ".py", ".sh", ".build")
FOREIGN = re.compile(r"\b(srun|mpirun|torchrun|apt-get|pip|ncu|cmake)\b")  # their options are theirs
problems = []


def tree():
    hidden = re.compile(r"(^|/)(\.git|build[^/]*|out|subprojects)(/|$)")
    return [p for p in sorted(ROOT.rglob("*")) if p.is_file() and not hidden.search(p.relative_to(ROOT).as_posix())]


def words_of(text):
    """What stands in code marks and blocks: (line, word)."""
    text = text.split("\n# The log\n")[0]
    block = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            block = not block
        line = FOREIGN.split(line)[0] if FOREIGN.search(line) else line
        marked = [line] if block or line.startswith("    ") else re.findall(r"`([^`]+)`", line)
        for word in (w.strip(".,;:()'\"") for part in marked for w in re.split(r"[\s,=(]+", part)):
            if word and not re.search(r"[*{}<>$\[\]|]", word):
                yield number, word


def main():
    files = tree()
    names = {"/" + p.relative_to(ROOT).as_posix() for p in files}
    text = "\n".join(p.read_text(errors="replace") for p in files if p.suffix in SOURCES)
    known = set(re.findall(r"\b(?:us|US)_\w+", text))
    options = set(re.findall(r"--[a-z][\w-]+", text)) | {"--" + name for name in re.findall(
        r"US_OPT_\w+\(\s*\"([\w-]+)\"", text)}
    pages = [p for p in files if p.suffix == ".md"]
    for page in pages:
        for number, word in words_of(page.read_text()):
            place = f"{page.relative_to(ROOT)}:{number}"
            if re.fullmatch(r"(us|US)_\w+", word) and word not in known and not word.endswith("_"):
                problems.append(f"{place}: {word} is nowhere in the sources")
            elif re.fullmatch(r"[\w./-]*\w\.(c|h|cu|cuh|py|sh)", word) and not word.startswith(("_", "/")):
                if not any(name.endswith("/" + word) for name in names):
                    problems.append(f"{place}: there is no {word}")
            elif re.fullmatch(r"--[a-z][\w-]+", word) and word not in options:
                problems.append(f"{place}: no tool or script has {word}")
    print("\n".join(problems) or f"{len(pages)} pages name what there is")
    return 1 if problems or not pages else 0


sys.exit(main())
