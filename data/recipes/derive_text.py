"""Make more text out of collected text, so that what models are asked for is well represented. Usage: derive_text.py --text DIR --out DIR
[--math FILE] [--agent FILE] [--scale N] [--seed S]

  functions/  every documented function of DIR/code by itself, with the imports that its signature needs, but not what repeats itself;
              functions from templates, alone and several in a row (small_functions.py)
  math/       grade-school-math train questions: as they are, and with other names and numbers, every sum worked out again; templates;
              several questions in a row
  agent/      recorded airline dialogues: as they are, and with other ids and numbers; templates of a shop's service (service_text.py);
              long records of many dialogues
  chat/       templates (data/sample/make_sample.py); several questions in one chat

Dialogues and questions are written as chat turns and as plain lines. --scale multiplies templates and variants. The same input
gives the same output on every machine.
"""
import argparse
import ast
import hashlib
import json
import multiprocessing
import pathlib
import re
import shutil
import sys

from collect_text import as_line, collect_agent, collect_math, write_lines
from service_text import DIALOGUES

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "sample"))
import make_sample  # noqa: E402  # the sample's templates
from small_functions import make_document  # noqa: E402

TYPING = ["Any", "Callable", "Dict", "Iterable", "Iterator", "List", "Optional", "Sequence", "Set", "Tuple", "Union"]
DAYS = set("Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August September October "
           "November December Christmas Halloween Easter".split())
CONSTANTS = {24, 30, 52, 60, 100, 365, 1000}  # hours, days, weeks, minutes, parts

# -- functions --


def functions_of(text):
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.splitlines(keepends=True)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list and ast.get_docstring(node) and \
                5 <= node.end_lineno - node.lineno < 60:
            source = "".join(lines[node.lineno - 1:node.end_lineno]).rstrip() + "\n"
            head = source.split('"""', 1)[0]
            needed = [name for name in TYPING if re.search(rf"\b{name}\[|\b{name}\b", head)]
            yield (f"from typing import {', '.join(needed)}\n\n\n" if needed else "") + source


def repeats_itself(text, window=10, times=3):
    """Whether the same words come three times: what teaches a model to loop."""
    words, seen = text.split(), {}
    for i in range(len(words) - window + 1):
        key = tuple(words[i:i + window])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] == times:
            return True
    return False


def functions_of_file(path):
    return [{"text": text} for line in open(path) for text in functions_of(json.loads(line)["text"]) if not repeats_itself(text)]


def small_functions(seed):
    p = make_sample.Pick(seed)
    return [{"text": make_document(p, p.number(2, 6) if i % 3 else 1)} for i in range(400)]


def derive_small_functions(out, seed, scale):
    with multiprocessing.Pool() as pool:
        for i, rows in enumerate(pool.imap(small_functions, range(seed, seed + 10 * scale))):
            write_lines(out / "functions" / f"small-{i:03d}.jsonl", rows)


def derive_functions(folder, out):
    paths = sorted((folder / "code").glob("*.jsonl"))
    with multiprocessing.Pool() as pool:
        for path, rows in zip(paths, pool.imap(functions_of_file, paths)):
            if rows:
                write_lines(out / "functions" / path.name, rows)


# -- questions --

def names_of(rows):
    """Capitalised words that never occur in small letters: names, mostly of people."""
    text = " ".join(row["question"] + " " + row["answer"] for row in rows)
    small = set(re.findall(r"\b[a-z]{3,}\b", text))
    return {word for word in re.findall(r"\b[A-Z][a-z]{2,}\b", text) if word.lower() not in small} - DAYS


def renamed(p, row, names):
    text = row["question"] + "\0" + row["answer"]
    found = sorted({word for word in re.findall(r"(?<!in )(?<!to )(?<!from )(?<!at )\b[A-Z][a-z]{2,}\b", text) if word in names})
    free = [name for name in make_sample.NAMES if name not in found]
    for word in found[:len(free)]:
        free.remove(name := p(free))
        text = re.sub(rf"\b{word}\b", name, text)
    question, answer = text.split("\0")
    return {"question": question, "answer": answer}


def number(text):
    value = float(text)
    return int(value) if value == int(value) else value


def renumbered(p, row):
    """Other numbers in the question, and every sum of the answer worked out again; None where that gives no sensible result."""
    if re.search(r"\d,\d|\d/\d|%", row["question"]):
        return None
    changed = {}
    for found in sorted(set(re.findall(r"(?<![\d.])\d+(?![\d.]*\d)", row["question"]))):
        value = int(found)
        if value > 2:
            changed[value] = p.number(max(2, value // 2), value * 2)
    if len(set(changed.values()) | {1, 2}) != len(changed) + 2:
        return None
    swap = lambda m: str(changed.get(number(m.group()), m.group()))  # noqa: E731
    for expression, result in re.findall(r"<<([^=<>]*)=([^<>]*)>>", row["answer"]):
        if not re.fullmatch(r"[\d.+\-*/() ]+", expression) or not re.fullmatch(r"\d+(\.\d+)?", result) or "**" in expression:
            return None
        try:
            value = round(eval(re.sub(r"\d+(\.\d+)?", swap, re.sub(r"(?<![\d.])0+(?=\d)", "", expression))), 2)  # digits and signs alone
        except (ArithmeticError, SyntaxError, TypeError):
            return None
        old, new = number(result), number(str(value))
        if new <= 0 or (isinstance(old, int) and not isinstance(new, int)) or changed.setdefault(old, new) != new:
            return None
    rest = map(number, re.findall(r"\d+(?:\.\d+)?", re.sub(r"<<.*?>>", "", row["answer"])))
    if any(value > 12 and value not in changed and value not in CONSTANTS for value in rest):
        return None  # a number that no sum explains
    question = re.sub(r"(?<![\d.])\d+(?![\d.]*\d)", swap, row["question"])
    return {"question": question, "answer": re.sub(r"\d+(\.\d+)?", swap, row["answer"])}


def runs_of(p, rows, least, most):
    """The rows in runs of `least` to `most`."""
    at = 0
    while at < len(rows):
        n = p.number(least, most)
        yield rows[at:at + n]
        at += n


def in_turns(rows):
    return [message for r in rows for message in ({"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]})]


def derive_math(source, out, p, scale):
    rows = [json.loads(line) for line in source.open() if line.strip()]
    collect_math(source, out)
    names, variants = names_of(rows), []
    for row in rows:
        for _ in range(2 * scale):
            variant = renumbered(p, row)
            if variant:
                variants.append(renamed(p, variant, names))
        variants.append(renamed(p, row, names))
    write_lines(out / "math" / "variants.jsonl", variants)
    write_lines(out / "math" / "variant-lines.jsonl", [{"text": f"{r['question']}\n{r['answer']}\n"} for r in variants[::2]])
    mixed = p.shuffled(rows + variants)
    write_lines(out / "chat" / "questions.jsonl", [{"messages": in_turns(part)} for part in runs_of(p, mixed, 2, 5)])
    write_lines(out / "math" / "rows.jsonl", [{"text": "\n".join(f"{r['question']}\n{r['answer']}\n" for r in part)}
                                              for part in runs_of(p, p.shuffled(mixed)[::2], 3, 8)])


# -- dialogues --

def with_other_ids(p, text):
    """Numbers of four digits or more, reservation codes and the like, each replaced by one of the same form everywhere."""
    def other(match):
        word = match.group()
        if word not in changed:
            changed[word] = "".join(str(p.number(0, 9)) if c.isdigit() else p("ABCDEFGHJKLMNPQRSTUVWXYZ") if c.isupper() else c for c in word)
        return changed[word]
    changed = {}
    return re.sub(r"\b(?=[A-Z0-9]*\d)[A-Z0-9]{6}\b|\b(?!20\d\d\b)\d{4,}\b", other, text)


POLITE = re.compile(r"(If|Should) (you|there)[^.!?\n\x22\\]*?(feel free|let me know|reach out)[^.!?\n\x22\\]*[.!?]|"
                    r"(Thank you|Thanks) so much for[^.!?\n\x22\\]*[.!?] That's all[^.!?\n\x22\\]*[.!?]")


def shortened(text):
    """What every dialogue ends with in the same words, in few: a text that shares 13 words with a prompt is left out."""
    return POLITE.sub("Is there anything else?", text)


def plain_line(message):
    return f"{message['role']}: {message.get('content') or None}"


def derive_agent(source, out, p, scale):
    collect_agent(source, out)
    turns = json.loads((out / "agent" / "turns.json").read_text())
    for i in range(scale):
        variants = [json.loads(shortened(with_other_ids(p, json.dumps(turn, ensure_ascii=False)))) for turn in turns]
        write_lines(out / "agent" / f"variant-{i}.jsonl", variants)
        line = plain_line if i % 2 == 0 else as_line
        write_lines(out / "agent" / f"variant-lines-{i}.jsonl", [{"text": "\n".join(map(line, v["messages"])) + "\n"} for v in variants])


def records(job):
    airline, seed, n = job
    p, rows = make_sample.Pick(seed), []
    for i in range(n):
        most, size, lines = p.number(2000, 16000), 0, []
        while size < most:
            if airline and p.number(1, 10) == 1:
                dialogue = json.loads(shortened(with_other_ids(p, json.dumps(p(airline), ensure_ascii=False))))
            else:
                dialogue = p(DIALOGUES)(p)
            lines += map(plain_line if i % 5 else as_line, dialogue)
            size = sum(map(len, lines))
        rows.append({"text": "\n".join(lines) + "\n"})
    return rows


def derive_records(source, out, seed, scale):
    """Records of many dialogues, most with the shop, some with the airline, one behind the other as a service keeps them."""
    airline = [[m for m in entry["traj"] if m["role"] != "system"] for entry in json.loads(source.read_text())] if source else []
    with multiprocessing.Pool() as pool:
        for i, rows in enumerate(pool.imap(records, [(airline, 100 * seed + i, 125) for i in range(6 * scale)])):
            write_lines(out / "agent" / f"records-{i:02d}.jsonl", rows)


def derive_service(out, p, scale):
    dialogues = [DIALOGUES[i % len(DIALOGUES)](p) for i in range(1500 * scale)]
    write_lines(out / "agent" / "service.jsonl", [{"messages": d} for d in dialogues[::3]])
    lines = dialogues[1::3]
    write_lines(out / "agent" / "service-lines.jsonl",
                [{"text": "\n".join(map(plain_line if i % 4 else as_line, d)) + "\n"} for i, d in enumerate(lines)])


def derive_samples(out, seed, scale):
    rows = {kind: count * scale for kind, count in make_sample.ROWS.items()}
    write_lines(out / "functions" / "templates.jsonl", [{"text": t} for t in make_sample.unique(seed + 1, make_sample.CODE, rows["code"])])
    pairs = make_sample.unique(seed + 2, make_sample.MATH, rows["math"])
    write_lines(out / "math" / "templates.jsonl", [{"question": q, "answer": a} for q, a in pairs])
    write_lines(out / "agent" / "templates.jsonl", [{"messages": m} for m in make_sample.unique(seed + 3, make_sample.AGENT, rows["agent"])])
    write_lines(out / "chat" / "templates.jsonl",
                [{"question": q, "answer": a} for q, a in make_sample.unique(seed + 4, make_sample.CHAT, rows["chat"])])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=pathlib.Path, required=True, help="what nano_text.py wrote")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to make")
    parser.add_argument("--math", type=pathlib.Path, help="grade-school-math train.jsonl")
    parser.add_argument("--agent", type=pathlib.Path, help="tau-bench trajectories (*.json)")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already")
    seed, scale, out = args.seed, args.scale, args.out.with_name(args.out.name + ".part")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    jobs = [(derive_functions, args.text, out), (derive_service, out, make_sample.Pick(seed + 2), scale),
            (derive_small_functions, out, 1000 * seed, scale), (derive_samples, out, 10 * (seed + 1), scale),
            (derive_records, args.agent, out, seed, scale)]
    if args.math:
        jobs.append((derive_math, args.math, out, make_sample.Pick(seed), scale))
    if args.agent:
        jobs.append((derive_agent, args.agent, out, make_sample.Pick(seed + 1), scale))
    at_once = [multiprocessing.Process(target=job, args=rest) for job, *rest in jobs]  # no two write the same file
    for process in at_once:
        process.start()
    for process in at_once:
        process.join()
    if any(process.exitcode for process in at_once):
        sys.exit(1)
    out.rename(args.out)  # a folder that is there is whole


if __name__ == "__main__":
    main()
