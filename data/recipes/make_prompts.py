"""Make prompts from training text, for a model to answer what its drafter is trained on.
Usage: make_prompts.py --text DIR... --out FILE [--count N] [--prompts PATH]... [--shares KIND=SHARE,...]

Of documented functions the head with its docstring, of questions the question as a chat turn, of chats the beginning up to a user's turn,
of dialogues the beginning up to where the assistant speaks or to where one ends, or a few turns out of the middle, of other text a
beginning. Files are told apart by the folders that nano_text.py and derive_text.py make. Prompts that share 13 words with a set in
--prompts are left out, as us-data does with documents. Each prompt once; the order is a shuffle by hash.
"""
import argparse
import hashlib
import json
import multiprocessing
import pathlib
import re
import unicodedata

SHARES = {"coding": 0.22, "math": 0.17, "agent": 0.25, "recorded": 0.2, "chat": 0.11, "text": 0.05}
FOLDERS = {"functions": "coding", "math": "math", "agent": "agent", "words": "text", "chat": "chat", "prose": "text", "code": "text"}
DIALOGUES = {"agent", "recorded"}
WINDOW = 13
RECORDED = re.compile(r"(variant-)?lines")  # files of dialogues that people had, among those that templates made
CUTS = 24  # prompts of a dialogue, or of a record of many
EXCERPT = range(100, 1500)  # characters of a few turns


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
            for line in file.open():  # str.splitlines would end a line at U+2028, which JSON does not escape
                found |= windows_of(text_of(json.loads(line))) if line.strip() else set()
    return found


def number(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def excerpt(text, draw):
    """A few turns from where a user speaks to where the assistant does: what went before is missing, and the model has to make it up."""
    users = [m.start() for m in re.finditer(r"(?m)^user:", text)]
    begin = users[draw % len(users)] if users else 0
    ends = [m.start() for m in re.finditer(r"(?m)^assistant:", text[begin:begin + EXCERPT.stop]) if m.start() in EXCERPT]
    return {"prompt": text[begin:begin + ends[draw // 7 % len(ends)]] + "assistant:"} if users and ends else None


def dialogue_prompt(text, draw):
    """Up to where the assistant speaks, up to the end of a dialogue, or an excerpt, whichever `draw` says."""
    starts = [m.start() for m in re.finditer(r"(?m)^assistant:", text) if m.start() < MOST]
    ends = [m.end() for m in re.finditer(r"###STOP###|\ntool: Transfer successful", text) if m.end() < MOST]
    if draw % 5 < 2:
        return excerpt(text, draw // 5)
    found = ends if ends and draw % 5 < 4 else starts
    return {"prompt": text[:found[draw // 5 % len(found)]]} if found else None


def prompt_of(kind, row, draw):
    """A prompt as us-serve reads it, or None."""
    text = row.get("text")
    if kind == "coding":
        end = text.find('"""', text.find('"""') + 3)
        return {"prompt": text[:end + 3] + "\n"} if 0 < end < 1500 else None
    if "question" in row:
        return {"messages": [{"role": "user", "content": row["question"]}]}
    if "messages" in row:
        turns = [i for i, m in enumerate(row["messages"]) if m["role"] == "user"]
        return {"messages": row["messages"][:turns[draw % len(turns)] + 1]} if kind == "chat" and turns else None
    if kind in DIALOGUES and text:
        return dialogue_prompt(text, draw)
    if kind == "math" and text and "\n" in text:
        return {"prompt": text[:text.index("\n") + 1]}
    if kind == "text" and text and len(text) > 800:
        at = draw % (len(text) - 600)
        return {"prompt": text[at:at + 60 + draw // 7 % 240]}
    return None


def kind_of(path):
    kind = FOLDERS[path.parent.name]
    return "recorded" if kind == "agent" and RECORDED.match(path.stem) else kind


def candidates_of(path):
    """(key, kind, prompt) of a file's rows, those that share no words with KNOWN."""
    kind, found = kind_of(path), []
    for line in path.open():
        row = json.loads(line)
        for cut in range(CUTS if kind in DIALOGUES and len(line) > 1000 else 1):
            draw = number(f"{cut} {line}")
            prompt = prompt_of(kind, row, draw)
            if prompt and len(text_of(prompt)) <= MOST and windows_of(text_of(prompt)).isdisjoint(KNOWN):
                found.append((draw, kind, prompt))
    return found


def shares_of(text):
    """SHARES, with those that `text` names in their place."""
    given = {kind: float(share) for kind, share in (pair.split("=") for pair in text.split(","))} if text else {}
    if not given.keys() <= SHARES.keys() or not all(0 <= share <= 1 for share in given.values()):
        raise ValueError(text)
    return SHARES | given


def main():
    global KNOWN, MOST
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--prompts", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--most", type=int, default=16000, help="characters of a prompt")
    parser.add_argument("--shares", type=shares_of, default=SHARES, help="of the count, by kind: " + ", ".join(f"{k}={v}" for k, v in SHARES.items()))
    args = parser.parse_args()
    MOST = args.most
    KNOWN = known_windows(args.prompts)
    left, rows, seen = {kind: int(share * args.count) for kind, share in args.shares.items()}, [], set()
    paths = [path for folder in args.text for path in sorted(folder.rglob("*.jsonl")) if path.parent.name in FOLDERS]
    with multiprocessing.get_context("fork").Pool() as pool:
        found = [c for part in pool.imap(candidates_of, paths) for c in part]
    for key, kind, prompt in sorted(found, key=lambda c: c[0]):
        if left[kind] and text_of(prompt) not in seen:
            left[kind] -= 1
            seen.add(text_of(prompt))
            rows.append(dict(prompt, id=f"{kind}-{key:x}", scenario="agent" if kind in DIALOGUES else kind))
    part = args.out.with_name(args.out.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    part.rename(args.out)  # a file that is there is whole


main()
