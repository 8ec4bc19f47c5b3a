"""Write greedy texts of Spec-Bench prompts as JSON lines, for benches that replay them.

    python bench/greedy_texts.py --out texts.jsonl [--per-group 8] [--max-new-tokens 128]
    python bench/greedy_texts.py --out texts.jsonl --prompts mine.jsonl      # or: --prompts sample

One line a prompt: {"question_id", "category", "prompt_ids", "output_ids"}. The texts are those of
transformers' own `generate`, so that no contender has a hand in them. Lines that are already in the
file are kept: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def write_texts(
    out: Path, model: Any, prompts: list[tuple[int, str, list[int]]], max_new_tokens: int
) -> int:
    """Decode the prompts (question id, category, ids) that `out` lacks; returns how many."""
    import torch

    done = {text["question_id"] for text in read_texts(out)} if out.exists() else set()
    missing = [prompt for prompt in prompts if prompt[0] not in done]
    with out.open("a", encoding="utf-8") as file:
        for question_id, category, ids in missing:
            inputs = torch.tensor([ids], device=model.device)
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
            line = {
                "question_id": question_id,
                "category": category,
                "prompt_ids": ids,
                "output_ids": output[0, len(ids) :].tolist(),
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
    return len(missing)


def read_texts(path: Path) -> list[dict[str, Any]]:
    """The texts of a file, in its order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--split", choices=["report", "dev"], default="report")
    parser.add_argument("--per-group", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--prompts", help="a file of your own prompts, or `sample`")
    parser.add_argument("--data", help="your own copy of the data set")
    given = parser.parse_args()

    import pertoken
    from pertoken.reproduce._spec_bench import encode

    try:
        chosen = choose(given)
        model, tokenizer = pertoken.load(given.model, dtype=given.dtype)
    except pertoken.PertokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    prompts = [(number, group, encode(tokenizer, text)) for number, group, text in chosen]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    count = write_texts(given.out, model, prompts, given.max_new_tokens)
    print(f"{given.out}: {count} texts written, {len(prompts) - count} were there")
    return 0


def choose(given: argparse.Namespace) -> list[tuple[int, str, str]]:
    """(number, group, text) of the prompts: a split of Spec-Bench, a file of yours, or ours."""
    import pertoken
    from pertoken.prompts import read_prompts
    from pertoken.reproduce._spec_bench import select

    if given.prompts:
        found = read_prompts(None if given.prompts == "sample" else given.prompts)
        return [(number, prompt.category, prompt.text) for number, prompt in enumerate(found)]
    rows = pertoken.data("spec-bench", path=given.data)
    chosen = select(rows, split=given.split, per_group=given.per_group)
    return [(prompt.question_id, prompt.group, prompt.text) for prompt in chosen]


if __name__ == "__main__":
    sys.exit(main())
