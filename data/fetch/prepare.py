"""Make text and prompt sets from upstream files. Usage: prepare.py DIR NAME... (called by fetch.sh)

Reads DIR/upstream/NAME, writes DIR/text and DIR/prompts. Prompts: the first 120 HumanEval problems, the first 160 questions of
GSM8K's test split, the first 60 retail few-shot dialogues of tau-bench, the MT-Bench part of Spec-Bench.
"""
import gzip
import json
import pathlib
import shutil
import sys

ROOT = pathlib.Path(sys.argv[1])
UPSTREAM = ROOT / "upstream"


def lines(name):
    data = (UPSTREAM / name).read_bytes()
    data = gzip.decompress(data) if name.endswith(".gz") else data
    return [json.loads(line) for line in data.decode().splitlines() if line.strip()]


def prompts(scenario, rows):
    path = ROOT / "prompts" / f"{scenario}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def text(name):
    (ROOT / "text").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(UPSTREAM / name, ROOT / "text" / name)


def human_eval(name):
    prompts("coding", [{"id": r["task_id"], "scenario": "coding", "prompt": r["prompt"]} for r in lines(name)[:120]])


def grade_school(name):
    prompts("math", [{"id": f"gsm8k-test-{i}", "scenario": "math", "prompt": r["question"]}
                     for i, r in enumerate(lines(name)[:160])])


def tau_retail(name):
    prompts("agent", [{"id": f"tau-retail-fewshot-{i}", "scenario": "agent", "prompt": r["messages_display"].strip()}
                      for i, r in enumerate(lines(name)[:60])])


def mt_bench(name):
    rows = [r for r in lines(name) if 81 <= r["question_id"] <= 160]
    prompts("chat", [{"id": f"mtbench-{r['question_id']}", "scenario": "chat", "category": r["category"], "turns": r["turns"]}
                     for r in rows])


MAKERS = {"HumanEval.jsonl.gz": human_eval, "gsm8k_test.jsonl": grade_school, "tau_retail_few_shot.jsonl": tau_retail,
          "spec_bench.jsonl": mt_bench, "gsm8k_train.jsonl": text, "tau_airline_trajectories.json": text}

for source in sys.argv[2:]:
    MAKERS[source](source)
    print(source)
