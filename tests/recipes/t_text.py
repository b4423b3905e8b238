"""The recipes' texts: sums that hold, ids that stay alike, functions by themselves, HTML without navigation, prompts kept apart.

Usage: t_text.py SOURCE_ROOT. Prints one line a test; exit 1 when one fails.
"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(ROOT / "data" / "recipes"))
import derive_text  # noqa: E402
import service_text  # noqa: E402
import text_html  # noqa: E402

Pick = derive_text.make_sample.Pick
ROW = {"question": "Natalia sold clips to 48 friends in April, and 30 in May at $2 each. How much did Natalia get?",
       "answer": "Natalia sold 48+30 = <<48+30=78>>78 clips.\nShe got 78*2 = $<<78*2=156>>156.\n#### 156"}


def sums_of_renumbered_questions_hold():
    found = 0
    for seed in range(200):
        row = derive_text.renumbered(Pick(seed), ROW)
        if row is None:
            continue
        found += 1
        april, may = map(int, re.findall(r"\d+", row["question"])[:2])
        assert f"<<{april}+{may}={april + may}>>" in row["answer"], row
        assert row["answer"].endswith(f"#### {2 * (april + may)}"), row
    assert found > 100, found


def numbers_that_no_sum_explains_are_not_changed():
    row = dict(ROW, answer=ROW["answer"].replace("She got", "Of 777 clips she got"))
    assert all(derive_text.renumbered(Pick(seed), row) is None for seed in range(20))


def names_change_everywhere_alike():
    row = derive_text.renamed(Pick(3), ROW, {"Natalia"})
    name = row["question"].split()[0]
    assert name != "Natalia" and row["answer"].count(name) == 1 and "Natalia" not in row["answer"] + row["question"]


def ids_of_a_dialogue_change_everywhere_alike():
    text = "order 12345 of Z7GOZK, again 12345 in 2024, not 99"
    words = derive_text.with_other_ids(Pick(1), text).split()
    assert words[1] == words[5] != "12345" and len(words[1]) == 5
    assert words[3] != "Z7GOZK," and len(words[3]) == 7 and words[7] == "2024," and words[9] == "99"


def documented_functions_stand_by_themselves():
    source = ('import os\n\n\ndef shown(a: List[int]) -> int:\n    """Adds."""\n    total = 0\n    for x in a:\n        total += x\n'
              '    return total\n\n\ndef bare(a):\n    b = a\n    c = b\n    d = c\n    e = d\n    return e\n')
    texts = list(derive_text.functions_of(source))
    assert len(texts) == 1 and texts[0].startswith("from typing import List\n\n\ndef shown("), texts
    assert list(derive_text.functions_of("def broken(:")) == []


def service_dialogues_call_tools_with_what_was_said():
    p = Pick(5)
    for i in range(100):
        dialogue = service_text.DIALOGUES[i % len(service_text.DIALOGUES)](p)
        calls = [m for m in dialogue if m.get("tool_calls")]
        last = dialogue[-1]
        assert calls
        assert last["role"] == "assistant" or last["content"].endswith("###STOP###") or last["content"] == "Transfer successful", last
        for call in calls:
            arguments = json.loads(call["tool_calls"][0]["function"]["arguments"])
            if "order_id" in arguments:
                assert any(arguments["order_id"] in (m["content"] or "") for m in dialogue), dialogue


def pages_lose_navigation_and_keep_code():
    page = ('<html><head><title>t</title></head><body><nav>home</nav><div class="sidebar">menu</div><div class="withsidebar"><h1>Head</h1>'
            '<p>One\n two.</p><pre>a = 1\n  b</pre><ul><li><p>item</p></li></ul></div><script>x()</script></body></html>')
    assert text_html.to_text(page) == "Head\n\nOne two.\n\na = 1\n  b\n\n- item\n", repr(text_html.to_text(page))


def prompts_that_overlap_with_a_set_are_left_out():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "text" / "math").mkdir(parents=True)
        secret = "one two three four five six seven eight nine ten eleven twelve thirteen"
        rows = [{"question": f"{secret} number {i}?", "answer": "1"} for i in range(50)]
        rows += [{"question": f"How many is {i} and {i}?", "answer": str(2 * i)} for i in range(50)]
        (folder / "text" / "math" / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "set.jsonl").write_text(json.dumps({"id": "a", "prompt": secret.upper() + "!"}) + "\n")
        subprocess.run([sys.executable, ROOT / "data/recipes/make_prompts.py", "--text", folder / "text", "--out", folder / "out.jsonl",
                        "--count", "400", "--prompts", folder / "set.jsonl"], check=True)
        made = (folder / "out.jsonl").read_text()
        assert "How many" in made and "thirteen" not in made


def dialogues_give_beginnings_and_excerpts_each_once():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "text" / "agent").mkdir(parents=True)
        turns = [f"user: This is the question of number {i}, and it is long enough to be one by itself, without what went before it."
                 f"\nassistant: The answer of number {i}.\n" for i in range(12)]
        (folder / "text" / "agent" / "a.jsonl").write_text("".join(json.dumps({"text": "".join(turns)}) + "\n" for _ in range(20)))
        subprocess.run([sys.executable, ROOT / "data/recipes/make_prompts.py", "--text", folder / "text", "--out", folder / "out.jsonl",
                        "--count", "400"], check=True)
        made = [json.loads(line)["prompt"] for line in (folder / "out.jsonl").read_text().splitlines()]
        excerpts = [prompt for prompt in made if not prompt.startswith(turns[0][:50])]
        assert len(set(made)) == len(made) and len(excerpts) < len(made), made
        subprocess.run([sys.executable, ROOT / "data/recipes/make_prompts.py", "--text", folder / "text", "--out", folder / "few.jsonl",
                        "--count", "400", "--shares", "agent=0.01"], check=True)
        assert len((folder / "few.jsonl").read_text().splitlines()) == 4
        wrong = subprocess.run([sys.executable, ROOT / "data/recipes/make_prompts.py", "--text", folder / "text", "--out", folder / "no.jsonl",
                                "--shares", "agents=0.5"], capture_output=True, text=True)
        assert wrong.returncode == 2 and "agents=0.5" in wrong.stderr and not (folder / "no.jsonl").exists(), wrong.stderr
        assert excerpts and all(e.startswith("user: ") and e.endswith("\nassistant:") and 100 < len(e) < 1520 for e in excerpts), excerpts


def a_line_separator_inside_a_prompt_ends_no_line():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "text" / "math").mkdir(parents=True)
        (folder / "text" / "math" / "q.jsonl").write_text(json.dumps({"question": "How many is 1 and 1?", "answer": "2"}) + "\n")
        (folder / "set.jsonl").write_text(json.dumps({"id": "a", "prompt": "one\u2028two\u0085three"}, ensure_ascii=False) + "\n\n")
        made = subprocess.run([sys.executable, ROOT / "data/recipes/make_prompts.py", "--text", folder / "text", "--out", folder / "out.jsonl",
                               "--count", "8", "--prompts", folder / "set.jsonl"], capture_output=True, text=True)
        assert made.returncode == 0 and "How many" in (folder / "out.jsonl").read_text(), made.stderr[-200:]


def derived_text_is_there_when_it_is_whole():
    """The recipes take a folder that is there for done."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "text" / "code").mkdir(parents=True)
        (folder / "text" / "code" / "a.jsonl").write_text(json.dumps({"text": "x = 1"}) + "\n")
        (folder / "math.jsonl").write_text('{"question')
        words = [sys.executable, ROOT / "data/recipes/derive_text.py", "--text", folder / "text", "--scale", "0", "--out", folder / "out"]
        cut = subprocess.run(words + ["--math", folder / "math.jsonl"], capture_output=True)
        assert cut.returncode == 1 and not (folder / "out").exists()
        subprocess.run(words, check=True)
        assert (folder / "out" / "agent" / "service.jsonl").exists() and not (folder / "out.part").exists()
        again = subprocess.run(words, capture_output=True, text=True)
        assert again.returncode == 2 and "is there already" in again.stderr, again.stderr


def main():
    failed = 0
    for test in [value for value in globals().values() if callable(value) and getattr(value, "__module__", "") == "__main__"
                 and value.__name__ != "main" and value.__code__.co_argcount == 0]:
        try:
            test()
            print(f"ok: {test.__name__}")
        except AssertionError as error:
            failed += 1
            print(f"failed: {test.__name__}: {error}")
    sys.exit(failed > 0)


main()
