"""The gallery: pages that the commands write, kept in docs/gallery, and the page that shows them.

``PYTHONPATH=docs python -m _generate.gallery [NAME…]`` runs the commands again (minutes: it uses
the embedded model, and the timings in the pages are those of the machine).
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "gallery"

PROMPT = """\
The city council met on Tuesday evening to discuss the new bridge over the river. Most of the
members were in favour of the plan, although two of them said that it was too costly. The bridge
will be paid for by a loan of 12.5 million, and it will be open to cyclists as well. Work is going
to begin in the spring of next year, as soon as the water is low enough.

Who paid for the bridge? Answer with one short sentence.
"""
PLAN = """\
text = "udhr"
languages = ["eng", "deu_1996", "tur", "ell_monotonic", "hin", "mya"]
vocabularies = [288, 320, 384, 448]
kinds = ["bpe", "superword"]
"""
LESSONS = """\
{"question": "A pen costs 3 coins. How much are 4 pens?", "answer": "4 x 3 = 12, so 12 coins."}
{"question": "Ann has 9 pears and eats 2. How many are left?", "answer": "9 - 2 = 7, so 7 pears."}
"""
INPUTS = {"prompt.txt": PROMPT, "plan.toml": PLAN, "lessons.jsonl": LESSONS}


@dataclass(frozen=True)
class Sample:
    """One page: the command that writes it, and what there is to see."""

    title: str
    command: str
    shows: str

    def words(self, page: Path) -> list[str]:
        """The arguments of `pertoken`, with the page written to `page`."""
        return [*shlex.split(self.command)[1:], "--html", str(page)]


SAMPLES = {
    "compare": Sample(
        "Decoders side by side",
        "pertoken compare goose prompt-lookup suffix --limit 3 --max-new-tokens 40",
        "Each text with its tokens coloured by where they came from: the model, a copy, a guess.",
    ),
    "explain": Sample(
        "Which tokens mattered, by every method",
        'pertoken explain "The capital of France is" --no-chat --compare --draws 5 --max-steps 20',
        "The same prompt rated by twelve methods, and how faithful each rating is.",
    ),
    "compress": Sample(
        "A shorter prompt",
        "pertoken compress prompt.txt --keep 0.7 --protect numbers",
        "The dropped words struck out, the protected ones marked.",
    ),
    "caches": Sample(
        "KV caches on one conversation",
        "pertoken compare-caches kv-direct:turn snapkv streaming-llm window --limit 6",
        "How far the next-token distribution is from a full cache's, turn by turn.",
    ),
    "audit": Sample(
        "What tokenizers cost",
        "pertoken audit smollm2 cl100k mistral-v3",
        "Languages, numbers, fidelity and redundancy of three tokenizers.",
    ),
    "premiums": Sample(
        "Token premiums of languages",
        "pertoken premiums sweep plan.toml",
        "Counts over vocabularies, and the vocabulary at which a language pays no more.",
    ),
    "tokens": Sample(
        "Which tokens a training would learn from",
        "pertoken tokens lessons.jsonl --method sstoken",
        "Each answer token in the colour of its score, struck out where it would not be learned.",
    ),
    "arithmetic": Sample(
        "Sums in number formats",
        "pertoken arithmetic smollm2 --each 6 --lengths 1,1 --lengths 1,2",
        "What a model answers to the same sums, digits grouped in different ways.",
    ),
    "gates": Sample(
        "Gates of a policy loss",
        "pertoken train fiberpo --out run",
        "Each token's log ratio after a few steps on two texts, the first rewarded and the second "
        "not, and the gates closed on it. The command writes the same page for its last batch.",
    ),
}


def gates() -> str:
    """The page of the gates: a few steps on two texts, instead of a whole run of the command."""
    import torch

    import pertoken
    from pertoken.train import fiberpo_loss, gates_page

    model, tokenizer = pertoken.load("smollm2")
    tokenizer.padding_side = "right"
    # The first token of each has nothing before it, so it is not rated.
    texts = ["So 7 + 5 = 12, because 7 + 3 is 10 and 2 are left.", "So 7 + 5 = 11, I suppose."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    bounds: dict[str, Any] = {"token": (0.8, 1.25), "trajectory": (0.9, 1.1)}
    advantages = torch.tensor([1.0, -1.0])

    def log_probs() -> torch.Tensor:
        logits = model(**batch).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)

    old = log_probs().detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-6)
    for _ in range(4):
        loss, _ = fiberpo_loss(log_probs(), old, advantages, mask, **bounds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    new = log_probs().detach()
    return gates_page(tokenizer, ids, new, old, advantages, mask, **bounds)


def page() -> str:
    """The page of the gallery, as Markdown."""
    parts = [
        "# Gallery",
        "Pages that the commands write with `--html`: single files that load nothing from outside. "
        "These were made with the built-in model on a small processor; they show what the pages "
        "look like, not how good a method is.",
    ]
    for name, sample in SAMPLES.items():
        parts += [
            f"## {sample.title}",
            sample.shows,
            f"```sh\n{sample.command} --html {name}.html\n```",
            f'<iframe class="sample" src="../gallery/{name}.html" loading="lazy" '
            f'title="{sample.title}"></iframe>',
            f"[The page by itself](gallery/{name}.html)",
        ]
    return "\n\n".join(parts) + "\n"


def main(names: list[str]) -> int:
    """Run the commands of the named samples, of all without a name; the exit code of the first
    that fails."""
    import os

    from pertoken.cli import main as pertoken

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for file, text in INPUTS.items():
            Path(file).write_text(text, encoding="utf-8")
        for name in names or SAMPLES:
            if name == "gates":
                (FOLDER / "gates.html").write_text(gates(), encoding="utf-8")
            elif code := pertoken(SAMPLES[name].words(FOLDER / f"{name}.html")):
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
