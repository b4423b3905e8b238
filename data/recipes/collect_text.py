"""Collect the text that pico is trained on. Usage: collect_text.py --out DIR [--code DIR]... [--docs DIR] [--math FILE] [--agent FILE]

Writes DIR/code, DIR/prose, DIR/math and DIR/agent for us-data --text DIR --template plain. Python sources keep their
names; tests, generated tables and files over 150 KB are left out. Questions and dialogues are written twice: as they
are, for us-data to put into chat turns, and as plain lines ("question, newline, answer", "role: content"), since prompts
come in both forms. Nothing here depends on time or on the order of a folder's entries.
"""
import argparse
import json
import pathlib
import shutil

MAX_BYTES = 150_000
SKIPPED = {"test", "tests", "idlelib", "dist-packages", "encodings", "lib2to3", "pydoc_data", "c-api", "whatsnew",
           "__pycache__"}


def copy_tree(source, target, suffix):
    for path in sorted(source.rglob("*" + suffix)):
        inside = path.relative_to(source)
        if path.is_symlink() or SKIPPED & set(inside.parts) or path.stat().st_size > MAX_BYTES:
            continue
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / inside)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def collect_math(source, out):
    rows = [json.loads(line) for line in source.open() if line.strip()]
    write_lines(out / "math" / "questions.jsonl", [{"question": r["question"], "answer": r["answer"]} for r in rows])
    write_lines(out / "math" / "lines.jsonl", [{"text": f"{r['question']}\n{r['answer']}\n"} for r in rows])


def as_line(message):
    content = message.get("content")
    if content is None:
        content = json.dumps([call["function"] for call in message.get("tool_calls") or []])
    return f"{message['role']}: {content}"


def collect_agent(source, out):
    dialogues = [[m for m in entry["traj"] if m["role"] != "system"] for entry in json.loads(source.read_text())]
    (out / "agent").mkdir(parents=True, exist_ok=True)
    (out / "agent" / "turns.json").write_text(json.dumps([{"messages": d} for d in dialogues], ensure_ascii=False))
    write_lines(out / "agent" / "lines.jsonl", [{"text": "\n".join(map(as_line, d)) + "\n"} for d in dialogues])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--code", type=pathlib.Path, action="append", default=[], help="folder of Python sources")
    parser.add_argument("--docs", type=pathlib.Path, help="folder of reStructuredText (*.rst.txt)")
    parser.add_argument("--math", type=pathlib.Path, help="grade-school-math train.jsonl")
    parser.add_argument("--agent", type=pathlib.Path, help="tau-bench trajectories (*.json)")
    args = parser.parse_args()
    for i, folder in enumerate(args.code):
        copy_tree(folder, args.out / "code" / f"{i}-{folder.name}", ".py")
    if args.docs:
        copy_tree(args.docs, args.out / "prose", ".rst.txt")
    if args.math:
        collect_math(args.math, args.out)
    if args.agent:
        collect_agent(args.agent, args.out)


if __name__ == "__main__":
    main()
