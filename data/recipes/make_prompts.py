"""Make prompts from training text, for a model to answer what its drafter is trained on.
Usage: make_prompts.py --text DIR... --out FILE [--count N] [--prompts PATH]...

Of documented functions the head with its docstring, of questions the question as a chat turn, of dialogues the beginning up to where
the assistant speaks, of other text a beginning. Files are told apart by the folders that nano_text.py and derive_text.py make.
Prompts that share 13 words with a set in --prompts are left out, as us-data does with documents. The order is a shuffle by hash.
"""
import argparse
import hashlib
import json
import pathlib
import re
import unicodedata

SHARES = {"coding": 0.4, "math": 0.25, "agent": 0.2, "text": 0.15}
FOLDERS = {"functions": "coding", "math": "math", "agent": "agent", "words": "math", "chat": "math", "prose": "text", "code": "text"}
WINDOW = 13
MOST = 6000  # characters of a dialogue's beginning


def words_of(text):
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).lower())


def windows_of(text):
    words = words_of(text)
    return {tuple(words[i:i + WINDOW]) for i in range(len(words) - WINDOW + 1)}


def text_of(row):
    messages = row.get("messages") or []
    return "\n".join([row.get("prompt") or row.get("question") or "", *row.get("turns", []), *[m.get("content") or "" for m in messages]])


def known_windows(paths):
    found = set()
    for path in paths:
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            for line in file.read_text().splitlines():
                found |= windows_of(text_of(json.loads(line)))
    return found


def number(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def prompt_of(kind, row):
    """A prompt as us-serve reads it, or None."""
    text = row.get("text")
    if kind == "coding":
        end = text.find('"""', text.find('"""') + 3)
        return {"prompt": text[:end + 3] + "\n"} if end > 0 and end < 1500 else None
    if "question" in row:
        return {"messages": [{"role": "user", "content": row["question"]}]}
    if kind == "agent" and text:
        starts = [m.start() for m in re.finditer(r"(?m)^assistant:", text) if m.start() < MOST]
        return {"prompt": text[:starts[number(text) % len(starts)]]} if starts else None
    if kind == "math" and text and "\n" in text:
        return {"prompt": text[:text.index("\n") + 1]}
    if kind == "text" and text and len(text) > 800:
        at = number(text) % (len(text) - 600)
        return {"prompt": text[at:at + 60 + number(text[::-1]) % 240]}
    return None


def candidates(folders):
    for folder in folders:
        for path in sorted(folder.rglob("*.jsonl")):
            kind = FOLDERS.get(path.parent.name)
            if kind is None:
                continue
            for line in path.open():
                row = json.loads(line)
                if number(line) % 2 == 0 and (prompt := prompt_of(kind, row)):
                    yield number(line), kind, prompt


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--prompts", type=pathlib.Path, action="append", default=[])
    args = parser.parse_args()
    known, left = known_windows(args.prompts), {kind: int(share * args.count) for kind, share in SHARES.items()}
    rows = []
    for key, kind, prompt in sorted(candidates(args.text), key=lambda c: c[0]):
        if left[kind] and not windows_of(text_of(prompt)) & known:
            left[kind] -= 1
            rows.append(dict(prompt, id=f"{kind}-{key:x}", scenario=kind))
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


main()
