"""Make the tokenizer's goldens with the `tokenizers` library. Usage: make_tokenizer_goldens.py (writes fixtures).

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install tokenizers==0.23.3
    /tmp/venv/bin/python tests/parity/make_tokenizer_goldens.py

The independent truth is that library: what it gives for the text and vocabularies below is written to
tests/unit/formats/tokenizer_goldens.h, and tests/unit/formats/t_tokenizer.c must reach the same from the same inputs.

- text: `mixed_text`, 2.5 MB from a fixed generator (code, prose, CJK, emoji, combining marks, invalid UTF-8), which
  t_tokenizer.c repeats in C; both sides check its SHA-256.
- 4 K: trained by the library on that text, committed as tests/fixtures/tokenizer/4k.json.
- 150 K: `large_vocabulary`, built from the text by splitting words at positions that a hash decides, repeated in C;
  both sides check the SHA-256 of the list of merges. Rank order has nothing to do with frequency there, so merges
  compete in ways that a trained vocabulary rarely shows.
Invalid UTF-8 becomes U+FFFD by bytes.decode("utf-8", "replace") before the library sees it.
With --sweep every character is compared too, through a us-tokenize given by --tool (slow; nothing is written): with PCRE2
10.42 (Unicode 14) and Python 3.11 (Unicode 14) there is no difference. Letters that Unicode added later are letters for the
library's engine and not yet for that PCRE2.
"""
import argparse
import hashlib
import json
import pathlib
import struct
import subprocess
import sys
import tempfile
import unicodedata

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TESTS = pathlib.Path(__file__).resolve().parent.parent
FIXTURES = TESTS / "fixtures" / "tokenizer"
HEADER = TESTS / "unit" / "formats" / "tokenizer_goldens.h"
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>",
           "</tool_response>", "<think>", "</think>", "<|mask|>"]
MASK = (1 << 64) - 1
TEXT_BYTES = 2_500_000
LARGE = 150_000

# What the generator strings together.
FRAGMENTS = json.loads((FIXTURES / "fragments.json").read_text())
# Inclusive ranges of code points, all assigned in Unicode 9.
RANGES = [(0x4E00, 0x9FA5), (0x3041, 0x3096), (0x30A1, 0x30FA), (0xAC00, 0xD7A3), (0x1F600, 0x1F64F),
          (0x1F300, 0x1F5FF), (0x300, 0x36F), (0x3B1, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x620, 0x64A),
          (0x905, 0x939), (0x94B, 0x951), (0xE01, 0xE2E), (0x1100, 0x1112), (0x1161, 0x1175), (0x20A0, 0x20BE),
          (0x2190, 0x21FF), (0x2F00, 0x2FD5), (0xF900, 0xFA6D), (0xFF01, 0xFF5E), (0x1D400, 0x1D454), (0x2000, 0x200F)]


class Random:
    """SplitMix64."""

    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, n):
        return self.next() % n


def mixed_text():
    """Runs of one kind: fragments of code and prose, made-up words, a script, numbers, raw bytes."""
    random, out = Random(2026), bytearray()
    while len(out) < TEXT_BYTES:
        kind = random.below(16)
        n = 1 + random.below(40)
        if kind < 8:
            for _ in range(n):
                out += FRAGMENTS[random.below(len(FRAGMENTS))].encode()
        elif kind < 11:
            for _ in range(n):
                out += b" "
                for _ in range(1 + random.below(5)):
                    out.append(b"bcdfghjklmnpqrstvwxz"[random.below(20)])
                    out.append(b"aeiouy"[random.below(6)])
        elif kind < 14:
            low, high = RANGES[random.below(len(RANGES))]
            for _ in range(n):
                out += chr(low + random.below(high - low + 1)).encode()
        elif kind == 14:
            for _ in range(n):
                out += str(random.below(1000000)).encode() + b" ,.\n\t"[random.below(5):][:1]
        else:
            for _ in range(1 + n // 8):
                out.append(random.below(256))
    return bytes(out[:TEXT_BYTES])


def large_vocabulary(words):
    """Merges in the order in which the halves of each word come together, at most LARGE tokens in all."""
    tokens, merges = {bytes([b]) for b in range(256)}, []

    def build(word):
        if word in tokens or 256 + len(merges) + len(SPECIAL) >= LARGE:
            return word in tokens
        cut = 1 + (sum(word) * 31 + len(word) * 7) % (len(word) - 1)
        if not (build(word[:cut]) and build(word[cut:])) or 256 + len(merges) + len(SPECIAL) >= LARGE:
            return False
        tokens.add(word)
        merges.append((word[:cut], word[cut:]))
        return True

    for word in words:
        if len(word) <= 48:
            build(word)
    return merges


def byte_chars():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, other = {b: chr(b) for b in plain}, 0x100
    for b in range(256):
        if b not in table:
            table[b] = chr(other)
            other += 1
    return table


def with_settings(model):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces_in_order(text):
    """Distinct pieces, as bytes, in the order of their first appearance."""
    tokenizer = with_settings(models.BPE())
    back = {c: b for b, c in byte_chars().items()}
    seen = dict.fromkeys(p for p, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)))
    return [bytes(back[c] for c in piece) for piece in seen]


def small_tokenizer(text):
    tokenizer = with_settings(models.BPE())
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=4096, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return tokenizer


def large_tokenizer(merges):
    table = byte_chars()
    spell = lambda word: "".join(table[b] for b in word)
    vocab = {table[b]: b for b in range(256)}
    for left, right in merges:
        vocab[spell(left + right)] = len(vocab)
    tokenizer = with_settings(models.BPE(vocab=vocab, merges=[(spell(a), spell(b)) for a, b in merges]))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def ids_digest(ids):
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()


TRICKY = ["", " ", "  x", "x  ", "\r\n\r\n  \n", "it's IT'S 'ſ 'ſx I'LL we're", "12345 ١٢٣ ½²", "e\u0301 \u212b \u1100\u1161\u11a8",
          "a\u0301\u0323\u0316", "<|im_start|>user\nhi<|im_end|><think></think>", "<|im_start|<|im_end|>|>", "\u180e\u0085\u00a0\u2003\u200b",
          "\U0001f469\u200d\U0001f4bb\U0001f3fd", "def f(x):\n    return x\t+ 1\n", "ŉ ǆ ﬀ ﬁ", "\ufeffa", "\u0d3b\u033a"]


FLAGGED = ["a <left> b", "a\u3000\n<left>b<left>", "<right>  \n b", " <right> <left> ", "wordy word sword word", "word",
           "_word word_ (word)", "cafe\u0301 caf\u00e9 cafes", " unreachable", "unreachable unreachables"]


def flagged_tokenizer(small):
    """The 4 K vocabulary with every flag of added tokens, and ignore_merges with a token no merge leads to."""
    data = json.loads(small.to_str())
    data["model"]["ignore_merges"] = True
    data["model"]["vocab"]["\u0120unreachable"] = 4096
    off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    data["added_tokens"] += [{"id": 4097, "content": "<left>", **off, "lstrip": True},
                             {"id": 4098, "content": "<right>", **off, "rstrip": True, "special": True},
                             {"id": 4099, "content": "word", **off, "single_word": True, "normalized": True},
                             {"id": 4100, "content": "cafe\u0301", **off, "normalized": True}]
    return Tokenizer.from_str(json.dumps(data)), data["added_tokens"][len(SPECIAL):]


def c_string(text):
    return '"' + "".join(f"\\{b:03o}" if b < 32 or b > 126 or b in b'"\\?' else chr(b) for b in text.encode()) + '"'


def golden_array(name, tokenizer, texts):
    lines = [f"static const struct golden {name}[] = {{"]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert len(ids) <= 48
        lines.append(f"    {{{c_string(text)}, {len(text.encode())}, {len(ids)}, {{{', '.join(map(str, ids)) or '0'}}}}},")
    return lines + ["};"]


def write_goldens(text, text_bytes, small, flagged, large, merges):
    merges_text = "".join(f"{a.hex()} {b.hex()}\n" for a, b in merges)
    lines = ["/* Made by tests/parity/make_tokenizer_goldens.py with the `tokenizers` library; not to be edited. */",
             "/* clang-format off */",
             f'#define GOLDEN_TEXT_SHA256 "{hashlib.sha256(text_bytes).hexdigest()}"',
             f'#define GOLDEN_MERGES_SHA256 "{hashlib.sha256(merges_text.encode()).hexdigest()}"']
    for name, tokenizer in (("SMALL", small), ("LARGE", large)):
        for plain in (False, True):
            tokenizer.encode_special_tokens = plain
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            suffix = "_PLAIN" if plain else ""
            lines += [f"#define GOLDEN_{name}{suffix}_COUNT {len(ids)}", f'#define GOLDEN_{name}{suffix}_SHA256 "{ids_digest(ids)}"']
    small.encode_special_tokens = False
    lines += ["", "struct golden {", "  const char *text;", "  int bytes, n;", "  int ids[48];", "};"]
    lines += golden_array("goldens", small, TRICKY) + golden_array("flagged_goldens", flagged, FLAGGED)
    HEADER.write_text("\n".join(lines + [""]))


def sweep(tool):
    """Every character of planes 0, 1 and 14 that Python's Unicode has, in several surroundings, encoded by both sides."""
    characters = [chr(c) for c in [*range(1, 0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0200)]]
    text = "".join(f"a{c}1 {c}!{c}\n'{c} {c}{c} x\u0345{c}\u0334\u0301" for c in characters
                   if unicodedata.category(c) != "Cn")
    path = FIXTURES / "4k.json"
    ours = subprocess.run([tool, "-t", path], input=text.encode(), stdout=subprocess.PIPE, check=True).stdout
    theirs = Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    return [int(line) for line in ours.split()] == theirs


def trained_by_us(tool, text_bytes):
    """A vocabulary that us-data trained loads in the library and gives the same ids there."""
    with tempfile.TemporaryDirectory() as folder:
        source, path = pathlib.Path(folder, "text.txt"), pathlib.Path(folder, "tokenizer.json")
        source.write_bytes(text_bytes)
        subprocess.run([pathlib.Path(tool).with_name("us-data"), "--text", source, "--train-vocab", "2048", "-o", path],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        ours = subprocess.run([tool, "-t", path, source], stdout=subprocess.PIPE, check=True).stdout
        theirs = Tokenizer.from_file(str(path)).encode(text_bytes.decode("utf-8", "replace"), add_special_tokens=False).ids
        return [int(line) for line in ours.split()] == theirs


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", help="us-tokenize, with us-data beside it: also check vocabularies trained by us")
    parser.add_argument("--sweep", action="store_true", help="compare every code point")
    args = parser.parse_args()
    if args.sweep:
        sys.exit(0 if sweep(args.tool) else "the sweep differs")
    text_bytes = mixed_text()
    text = text_bytes.decode("utf-8", "replace")
    small = small_tokenizer(text)
    (FIXTURES / "4k.json").write_text(small.to_str(pretty=False))
    merges = large_vocabulary(pieces_in_order(text))
    print(f"{len(merges)} merges in the large vocabulary")
    flagged, added = flagged_tokenizer(small)
    (FIXTURES / "flagged_tokens.json").write_text(json.dumps(added, indent=1) + "\n")
    write_goldens(text, text_bytes, small, flagged, large_tokenizer(merges), merges)
    if args.tool and not trained_by_us(args.tool, text_bytes):
        sys.exit("a vocabulary trained by us-data encodes differently in the library")


if __name__ == "__main__":
    main()
