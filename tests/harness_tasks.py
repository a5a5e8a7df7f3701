"""Small tasks for lm-evaluation-harness in a folder: multiple choice, generation and perplexity."""
import json
import random
from pathlib import Path

from tiny import WORDS

DATA = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
TASKS = {
    "tiny_choice": """output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
num_fewshot: 2
fewshot_config:
  sampler: first_n
  samples:
    - {question: red sea, choices: [a plum, a fig], label: 0}
    - {question: blue town, choices: [a pear, world], label: 1}
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tiny_generate": """output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["Q:", "e"], max_gen_toks: 24, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "tiny_perplexity": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""}


def make_documents(count: int, seed: int) -> list[dict]:
    """Questions of very unlike lengths; single-word choices among them, which the harness treats apart."""
    rng = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    return [{"question": text(1, 30), "choices": [text(1, 1 if i % 3 else 6) for _ in range(2 + i % 3)],
             "label": rng.randrange(2), "target": text(1, 2), "text": text(1, 160)} for i in range(count)]


def write_lines(file: Path, documents: list[dict]) -> Path:
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return file


def make_tasks(folder: Path, count: int = 9, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    file = write_lines(folder / "documents.jsonl", make_documents(count, seed))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\ntag: tiny_tag\n{DATA.format(file=file)}{text}")
    return folder
