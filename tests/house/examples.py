"""Headers' examples against what they show. Usage: examples.py SOURCE_ROOT

A header opens with a comment whose lines indented by four columns are an example of use. Its names are real: every
function that it calls is declared somewhere with as many arguments, every US_ constant exists, and every field that it
sets is its struct's. What an example leaves out it writes as `...` (or `..`); us_thing_ is nobody's.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(sys.argv[1])
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
STRING = re.compile(r'"(?:\\.|[^"\\\n])*"')
DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.M)
CALL = re.compile(r"\b(us_\w+)\s*\(")
problems = []


def plain(text):
    return STRING.sub('""', COMMENT.sub(" ", text))


def arguments(text, at):
    """The arguments of the list that opens at `at`, and where it ends; None when it does not."""
    depth, begin, found = 0, at + 1, []
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0 or depth == 1 and text[i] == ",":
            found.append(text[begin:i].strip())
            begin = i + 1
        if depth == 0:
            return ([] if found in ([""], ["void"]) else found), i + 1
    return None, at


def declarations(texts):
    """Numbers of arguments of each function; -n: n and more. A declaration has a type before its name."""
    known = {}
    for text in texts:
        code = DIRECTIVE.sub("", text)
        for match in CALL.finditer(code):
            before = re.split(r"[;{}]", code[max(0, match.start() - 300):match.start()])[-1].rstrip()
            before = re.sub(r"template\s*<[^>]*>", "", before)
            if not re.search(r"(\w|\*)$", before) or re.search(r"[=(,?:&|!<>+-]|\b(return|else|do)\b", before):
                continue
            found, _ = arguments(code, match.end() - 1)
            if found is not None:
                open_end = bool(found) and found[-1] == "..."
                known.setdefault(match.group(1), set()).add(1 - len(found) if open_end else len(found))
        for name, listed in re.findall(r"#define (us_\w+)\(([^)]*)\)", text):
            known.setdefault(name, set()).add(len(listed.split(",")))
    return known


def fields_of(texts, struct):
    for text in texts:
        match = re.search(r"\bstruct\s+" + struct + r"\s*\{", text)
        if match:
            _, end = arguments(text, match.end() - 1)
            return set(re.findall(r"\w+", text[match.end():end]))
    return None


def check_calls(path, code, known):
    for match in CALL.finditer(code):
        name = match.group(1)
        found, end = arguments(code, match.end() - 1)
        if name.startswith("us_thing_") or found is None or ".." in code[match.start():end]:
            continue
        if not re.match(r"\s*[;),\]}&|=!<>?:*/+-]", code[end:]):
            continue  # a sketch in words, or a definition
        counts = known.get(name)
        if counts is None:
            problems.append(f"{path}: the example calls {name}, which is declared nowhere")
        elif not any(n == len(found) or n < 0 and len(found) >= -n for n in counts):
            problems.append(f"{path}: the example calls {name} with {len(found)} arguments, expected {sorted(counts)}")


def check_fields(path, code, texts):
    for match in re.finditer(r"struct (us_\w+)(?:\s+\w+\s*=\s*|\)\s*)\{", code):
        inside, _ = arguments(code, match.end() - 1)
        known = fields_of(texts, match.group(1))
        if known is None:
            problems.append(f"{path}: the example has a struct {match.group(1)}, which is defined nowhere")
        for field in (re.match(r"\.(\w+)", part) for part in inside or []):
            if known and field and field.group(1) not in known:
                problems.append(f"{path}: the example sets {field.group(1)}, which struct {match.group(1)} lacks")


def example_of(text):
    opening = re.match(r"/\*(.*?)\*/", text, re.S)
    lines = (re.sub(r"^ \* ?", "", line) for line in opening.group(1).split("\n")) if opening else []
    return plain("\n".join(line for line in lines if line.startswith("    ")))


def main():
    headers = [p for folder in ("libcore", "kernels", "training", "tools") for p in sorted((ROOT / folder).rglob("*"))
               if p.suffix in (".h", ".cuh")]
    sources = {path: path.read_text() for path in headers}
    texts = [plain(text) for text in sources.values()]
    known, constants = declarations(texts), set(re.findall(r"\bUS_\w+", "\n".join(texts)))
    shown = 0
    for path in headers:
        code, rel = example_of(sources[path]), path.relative_to(ROOT)
        shown += bool(code)
        check_calls(rel, code, known)
        check_fields(rel, code, texts)
        problems.extend(f"{rel}: the example names {name}, which does not exist"
                        for name in sorted(set(re.findall(r"\bUS_\w+", code)) - constants))
    print("\n".join(problems) or f"{shown} examples in {len(headers)} headers name what there is")
    return 1 if problems or not shown else 0


sys.exit(main())
