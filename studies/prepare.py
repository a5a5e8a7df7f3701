"""The records that the studies of real data train and test on, split from published sets.

    python -m studies.prepare --data DIR --output-dir RECORDS

DIR holds, under these names: t0_long_to_short_3k.jsonl (T0's training tasks with long inputs and answers of
a word or two), alpagasus_dolly_3k.jsonl, lima.jsonl, test_user_oriented_252.jsonl (self-instruct's
user-oriented instructions), gsm8k_test.jsonl and HumanEval.jsonl.gz. All are public; none is part of this
repository.

    t0-train, t0-validation, t0-near     records of half of the task families
    t0-families                          records of the other half
    dolly-train, -validation, -near      records of Alpagasus Dolly 3k
    user-oriented, lima                  far from both: other instructions, other answers
    gsm8k, humaneval                     text of other kinds: word problems, Python functions

The split depends on the files alone. No record is in two files of one set.
"""
import gzip
import json
import random
from collections import Counter
from pathlib import Path

from runtime.flags import Parser
from runtime.start import run_program

TRAIN, VALIDATION, NEAR, FAR, OTHER = 480, 96, 160, 100, 80     # records of a file


def read(path: Path) -> list[dict]:
    """The records of a .jsonl or .jsonl.gz file, each different one once."""
    if not path.is_file():
        raise ValueError(f"--data {path.parent}: {path.name} is not in it; studies/prepare.py "
                         "lists what is needed")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        # The last line may have no end.
        return list({line: json.loads(line) for line in map(str.rstrip, file)}.values())


def messages(prompt: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def by_family(records: list[dict]) -> tuple[list[dict], list[dict]]:
    """T0's records in two halves that share no task family. A family is what an id begins with: all tasks
    over one source, like imdb. From the largest to the smallest they take turns, so that the halves are alike
    in size."""
    def family(record: dict) -> str:
        return record["id"].split("_")[0]

    sizes = Counter(family(record) for record in records)
    ranked = sorted(sizes, key=lambda name: (-sizes[name], name))
    halves = [[r for r in records if family(r) in ranked[half::2]] for half in (0, 1)]
    return halves[0], halves[1]


def write(folder: Path, sizes: dict[str, int], records: list[dict]) -> None:
    """Write a file of each of the sizes. The records are drawn from `records`, none for two files."""
    drawn = random.Random(0).sample(records, sum(sizes.values()))
    for name, size in sizes.items():
        part, drawn = drawn[:size], drawn[size:]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
        print(f"{name}.jsonl: {size} records")


def prepare(data: Path, folder: Path) -> None:
    """Write the files into `folder`. ValueError if one of the published sets is missing in `data`."""
    t0, other_families = by_family(read(data / "t0_long_to_short_3k.jsonl"))
    dolly = read(data / "alpagasus_dolly_3k.jsonl")
    gsm8k = [messages(r["question"], r["answer"]) for r in read(data / "gsm8k_test.jsonl")]
    humaneval = [messages(r["prompt"], r["canonical_solution"]) for r in read(data / "HumanEval.jsonl.gz")]
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in {"t0": t0, "dolly": dolly}.items():
        sizes = {f"{name}-train": TRAIN, f"{name}-validation": VALIDATION, f"{name}-near": NEAR}
        write(folder, sizes, records)
    write(folder, {"t0-families": NEAR}, other_families)
    user_oriented = read(data / "test_user_oriented_252.jsonl")
    write(folder, {"user-oriented": len(user_oriented)}, user_oriented)
    write(folder, {"lima": FAR}, read(data / "lima.jsonl"))
    write(folder, {"gsm8k": OTHER}, gsm8k)
    write(folder, {"humaneval": OTHER}, humaneval)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m studies.prepare", description=__doc__.split("\n\n")[0],
                    allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the published sets")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="RECORDS")
    args = parser.parse_args(argv)
    prepare(args.data, args.output_dir)


if __name__ == "__main__":
    run_program(main)
