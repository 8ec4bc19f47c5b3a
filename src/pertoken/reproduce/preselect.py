"""Reproduction of PreSelect (arXiv 2503.00808) with models and a pool small enough to train here.

Six small Llamas read mixes of known parts (`_pool_of_parts`) that differ in the share of school
mathematics; their ability is what they make of other problems, in bits per character. Half of a
pool of other documents, a thirtieth of it mathematics, is read by all six; a scorer learns from the
documents that order them rightly, and the best tenth of the whole pool is kept. Then fresh models
are trained: on what was kept, on documents drawn at random, and on those that the ablest model
finds likeliest. How far is a model on N selected tokens, and how many random ones does that take?
Tokens read are counted, those of a document that comes again too.

The paper has six Llamas of 7B to 65B parameters, benchmarks for their ability, and trains 1B models
on 30B selected tokens beside 300B random ones. Here the parts make known what should be selected,
and an order of abilities without meaning must select nothing.

No setting was tried before the bars were written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pertoken._bootstrap import bootstrap_mean
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row

VERSION = 1
MODEL = "tiny"
DTYPE = "float32"

LENGTH = 128  # tokens of a row; 16 rows are a step
STEPS, READ = 400, 1_500_000  # of a model of known ability, and characters of its mix
RANDOM_STEPS, LOOKS = 450, 25  # of a fresh model, and steps between two looks at its loss
KEEP = 0.1
SEEDS, ORDERS = 3, 20  # fresh models of each kind, and orders of abilities without meaning
TARGET_ROWS = 160
SMALL, LARGE, REPEATS = 60, 240, 3  # megabytes of the files that are timed
SELECTED, AT_RANDOM, LIKELIEST = "selected", "random", "likeliest to the ablest"

SHARE = "the target's share of the selected characters over its share of the pool"
TOKENS = "tokens read of random documents over selected ones, to the same loss on the target"
NO_ORDER = "the target's share, selected by abilities in an order without meaning: mean"
SPEED = "selecting from a file with 2 processes"
FLAT = f"memory on {LARGE} MB over that on {SMALL} MB"
BARS = {SHARE: ">= 3", TOKENS: ">= 3", NO_ORDER: "<= 1.5", SPEED: ">= 20", FLAT: "<= 1.1"}
REASONS: dict[str, str] = {
    TOKENS: (
        "the ratio rises along each of the three trainings (losses in the settings), which end "
        "before its mean is there; the highest of the three reaches it"
    ),
    SPEED: (
        "not measured: in every run other programs used more of the machine than a figure may "
        "stand (settings). bench/select_speed.py measures the same by itself"
    ),
}
CAVEATS: dict[str, str] = {
    SHARE: (
        "nearly as much of what is selected is the same kind of text with its words shuffled "
        "(row): the scorer reads words and pairs of neighbours, nothing longer"
    ),
    NO_ORDER: (
        "most orders without meaning are no document's, so that nothing can be selected by them "
        "(row); few orders are left for the mean, and its interval passes the bar"
    ),
}

SMOKE: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"question": f"{n} and {n + 1}?", "answer": f"It is <<x>>{2 * n + 1}. #### {2 * n + 1}"}
        for n in range(40)
    ],
    "shakespeare": [{"speeches": ["to be or not to be, that is asked\n" * 60]}] * 2,
    "spam-assassin": [{"label": "ham", "text": "we met at noon and went home\n" * 60}] * 2,
}


def run(context: Context) -> Reproduction:
    """All rows; about 80 minutes of one slow core."""
    world = _World(context)
    found = context.remember_all(world.units(), "models")
    scorer, selected = world.scorer(), world.selected()
    kinds = {
        kind: [found[kind, seed] for seed in range(world.seeds)]
        for kind in (SELECTED, AT_RANDOM, LIKELIEST)
    }
    rows = [
        *_share_rows(world, selected),
        *_training_rows(kinds),
        *_order_rows(world),
    ]
    timed, noise = _file_rows(context, scorer, world.documents)
    rows += timed
    most, least = scorer.top_features(15)
    return context.reproduction(
        rows,
        models=[
            {"share": share, "bits_per_character": each["ability"]}
            for share, each in zip(world.shares, world.known(), strict=True)
        ],
        pool={name: len(own) for name, own in world.pool.items()},
        labelled=len(world.read),
        orders=world.orders,
        strengths=np.bincount(np.round(world.strength() * 15).astype(int), minlength=16).tolist(),
        speaks_for=[text for text, _ in most],
        speaks_against=[text for text, _ in least],
        steps={"known": STEPS, "fresh": RANDOM_STEPS, "rows": 16, "length": LENGTH},
        losses={kind: [each["losses"] for each in own] for kind, own in kinds.items()},
        **noise,
    )


class _World:
    """Documents, models of known ability, and what follows from them; every part made once."""

    def __init__(self, context: Context) -> None:
        from pertoken.reproduce import _pool_of_parts as material
        from pertoken.reproduce import _sinks_training as training

        self.context, smoke = context, context.smoke
        rows = {name: context.data(name, smoke_rows=some) for name, some in SMOKE.items()}
        self.train = material.parts(rows, pool=False, most=4000 if smoke else None)
        self.pool = material.parts(rows, pool=True, most=4000 if smoke else None)
        mixed = [(text, name) for name, own in self.pool.items() for text in own]
        # In no order, since at equal scores earlier documents are selected.
        places = np.random.default_rng(context.seed).permutation(len(mixed))
        self.documents = [mixed[place][0] for place in places]
        self.part = np.array([mixed[place][1] for place in places])
        self.sizes = np.array([len(text) for text in self.documents])
        self.is_target = self.part == material.TARGET
        self.read = list(range(0, len(self.documents), 2))
        self.asked = material.mathematics(rows["gsm8k"], 2)
        self.shares = material.SHARES[:2] if smoke else material.SHARES
        self.seeds = 1 if smoke else SEEDS
        self.steps, self.random_steps = (2, 2) if smoke else (STEPS, RANDOM_STEPS)
        self.tokenizer = training.train_tokenizer(
            [text for own in self.train.values() for text in own]
        )
        self.target = self._rows(material.mathematics(rows["gsm8k"], 3))[:TARGET_ROWS]
        self.orders: list[dict[str, float]] = []  # what those without meaning have selected
        self._known: list[dict[str, Any]] | None = None
        self._learned: Any = None

    def _rows(self, documents: Sequence[str]) -> Any:
        from pertoken.reproduce._pool_of_parts import rows_of

        return rows_of(self.tokenizer, documents, 64 if self.context.smoke else LENGTH)

    def units(self) -> dict[Any, tuple[object, Callable[[], Any]]]:
        """Models of known ability, then fresh ones, which wait for those."""
        units: dict[Any, tuple[object, Callable[[], Any]]] = dict(self._known_units())
        for seed in range(self.seeds):
            for kind in (SELECTED, AT_RANDOM, LIKELIEST):
                units[kind, seed] = ([kind, seed], partial(self._fresh, kind, seed))
        return units

    def _known_units(self) -> dict[int, tuple[object, Callable[[], Any]]]:
        return {
            number: (["known", number], partial(self._train_known, number))
            for number in range(len(self.shares))
        }

    def known(self) -> list[dict[str, Any]]:
        """Ability and losses of each model of known ability, in order."""
        if self._known is None:
            checkpoint = self.context.checkpoint
            self._known = [
                compute() if checkpoint is None else checkpoint.wait(key, compute)
                for key, compute in self._known_units().values()
            ]
        return self._known

    def _train_known(self, number: int) -> dict[str, Any]:
        from pertoken.reproduce import _sinks_training as training
        from pertoken.reproduce._pool_of_parts import mix
        from pertoken.train import bits_per_character

        characters = 4000 if self.context.smoke else READ
        texts = mix(self.train, number, characters, self.context.seed)
        rows = self._rows(texts)
        model = training.train("baseline", rows, len(self.tokenizer), self.steps, number)
        bits = [
            bits_per_character(model, self.tokenizer, some) for some in (self.asked, self.documents)
        ]
        sizes = [len(text) for text in self.asked]
        return {"ability": float(np.average(bits[0], weights=sizes)), "losses": bits[1]}

    def _own(self) -> list[str]:
        return [self.documents[place] for place in self.read]

    def losses(self) -> Any:
        """Bits per character [models, documents read]."""
        return np.array([each["losses"] for each in self.known()])[:, self.read]

    def abilities(self) -> list[float]:
        return [-float(each["ability"]) for each in self.known()]

    def strength(self) -> Any:
        from pertoken.train import predictive_strength

        return predictive_strength(self.losses(), self.abilities())

    def scorer(self) -> Any:
        """Learned from the documents read, with the paper's settings."""
        if self._learned is None:
            self._learned = self.learn(self.abilities())
        return self._learned

    def learn(self, abilities: Sequence[float]) -> Any:
        from pertoken.train import NgramScorer, label_extremes, predictive_strength

        labels = label_extremes(predictive_strength(self.losses(), abilities))
        chosen = np.flatnonzero(labels >= 0).tolist()
        texts = self._own()
        return NgramScorer.fit(
            [texts[place] for place in chosen], labels[chosen].tolist(), seed=self.context.seed
        )

    def chosen(self, scores: Any) -> Any:
        """Which documents of the pool are the best tenth."""
        from pertoken.train import select

        return select(self.documents, scores, KEEP)

    def selected(self) -> Any:
        return self.chosen(self.scorer().score(self.documents))

    def likeliest(self) -> Any:
        """Those that the ablest model gives the fewest bits per character."""
        return self.chosen(-np.array(self.known()[int(np.argmax(self.abilities()))]["losses"]))

    def share(self, chosen: Any) -> float:
        """The target's share of these characters over its share of the pool's."""
        ours = self.sizes[chosen & self.is_target].sum() / self.sizes[chosen].sum()
        return float(ours / (self.sizes[self.is_target].sum() / self.sizes.sum()))

    def _fresh(self, kind: str, seed: int) -> dict[str, Any]:
        """Losses on the target along the training of a fresh model, and steps to each."""
        from pertoken.reproduce import _sinks_training as training

        chosen = {
            SELECTED: self.selected,
            LIKELIEST: self.likeliest,
            AT_RANDOM: lambda: np.ones(len(self.documents), dtype=bool),
        }[kind]()
        draw = np.random.default_rng([self.context.seed, seed])
        rows = self._rows([self.documents[n] for n in draw.permutation(np.flatnonzero(chosen))])
        losses: list[list[float]] = []

        def look(step: int, model: Any) -> None:
            if step % LOOKS == 0 or step == self.random_steps:
                losses.append([step, float(np.mean(training.losses(model.eval(), self.target)))])
                model.train()

        start = 1000 + self.context.seed + seed
        training.train("baseline", rows, len(self.tokenizer), self.random_steps, start, look)
        return {"losses": losses}


def _share_rows(world: _World, selected: Any) -> list[Row]:
    part = world.sizes[world.is_target].sum() / world.sizes.sum()
    kept = world.sizes[selected & world.is_target].sum() / world.sizes[world.is_target].sum()
    rows = [
        Row(SHARE, world.share(selected), "x", baseline=f"{part:.1%} of the pool"),
        Row(f"{SHARE}: {LIKELIEST}", world.share(world.likeliest()), "x"),
        Row("share of the target's characters that was selected", float(kept), "share"),
    ]
    for name in world.pool:
        places = world.part == name
        share = world.sizes[selected & places].sum() / world.sizes[selected].sum()
        of_all = world.sizes[places].sum() / world.sizes.sum()
        rows.append(
            Row(
                f"share of the selected: {name}", float(share), baseline=f"{of_all:.1%} of the pool"
            )
        )
    mean = {True: world.sizes[selected].mean(), False: world.sizes.mean()}
    length = Row("mean characters of a selected document", float(mean[True]), "characters")
    length.baseline = f"{mean[False]:.0f} in the pool"
    return [*rows, length]


def _training_rows(kinds: Mapping[str, list[dict[str, Any]]]) -> list[Row]:
    """Losses at the end, and how many tokens of each kind are as good as all the random ones."""
    ends = {kind: [each["losses"][-1][1] for each in own] for kind, own in kinds.items()}
    rows = []
    for kind in (SELECTED, LIKELIEST):
        ratios = [
            _ratio(own["losses"], end)
            for own, end in zip(kinds[kind], ends[AT_RANDOM], strict=True)
        ]
        name = TOKENS if kind == SELECTED else f"{TOKENS}, {kind}"
        row = Row(name, float(np.mean(ratios)), "x", interval=(min(ratios), max(ratios)))
        if kind == SELECTED:
            row.paper = "10"
            row.paper_setting = "1B models, 300B random and 30B selected tokens"
        rows.append(row)
    for kind, own in ends.items():
        name = f"loss on the target at the end: {kind}"
        rows.append(Row(name, float(np.mean(own)), "nats/token", interval=(min(own), max(own))))
    for row in rows:
        row.baseline = f"mean and range of {len(ends[AT_RANDOM])} trainings"
    return rows


def _ratio(losses: Sequence[Sequence[float]], wanted: float) -> float:
    """All steps over those after which the loss is as low as `wanted`; 0 where it never is.

    >>> _ratio([[25, 3.0], [50, 2.0], [75, 1.0]], 2.5), _ratio([[25, 3.0]], 1.0)
    (1.5, 0.0)
    """
    reached = [step for step, loss in losses if loss <= wanted]
    return losses[-1][0] / reached[0] if reached else 0.0


def _order_rows(world: _World) -> list[Row]:
    """What is selected when abilities are shuffled: the models are the same, their order is not."""
    from pertoken.errors import PertokenError
    from pertoken.train import predictive_strength

    draw = np.random.default_rng(world.context.seed)
    shares, none = [], 0
    for _ in range(2 if world.context.smoke else ORDERS):
        order = draw.permutation(world.abilities()).tolist()
        try:
            scorer = world.learn(order)
        except PertokenError:  # no document has this order: nothing can be selected
            none += 1
            continue
        shares.append(world.share(world.chosen(scorer.score(world.documents))))
        strength = predictive_strength(world.losses(), order)
        world.orders.append({"ratio": shares[-1], "documents": int((strength >= 1).sum())})
    mean = float(np.mean(shares)) if shares else math.nan
    interval = bootstrap_mean(shares, world.context.seed) if len(shares) > 1 else None
    return [
        Row(NO_ORDER, mean, "x", interval=interval, baseline=f"of {len(shares)} orders"),
        Row("orders that no document has", float(none), baseline=f"of {len(shares) + none}"),
    ]


def _file_rows(
    context: Context, scorer: Any, documents: Sequence[str]
) -> tuple[list[Row], dict[str, Any]]:
    """Speed and memory, and how quiet the machine was."""
    from pertoken.errors import PertokenError
    from pertoken.reproduce._pool_speed import selecting
    from pertoken.timing import FOREIGN_LIMIT

    small, large, repeats = (1, 2, 1) if context.smoke else (SMALL, LARGE, REPEATS)
    found = selecting(scorer, documents, (small, large), repeats)
    quiet = [one for one in found[large] if one.foreign is None or one.foreign <= FOREIGN_LIMIT]
    if not (quiet or context.smoke):
        raise PertokenError(
            "no run of selecting was quiet: stop what else runs here, then run it again with "
            "--resume; the trainings are kept"
        )
    speeds = [large / one.seconds for one in (found[large] if context.smoke else quiet)]
    memory = {size: max(one.megabytes for one in runs) for size, runs in found.items()}
    noise = {"quiet_runs": len(quiet), "others_used": [one.foreign for one in found[large]]}
    rows = [
        Row(
            SPEED,
            float(np.median(speeds)),
            "MB/s",
            interval=(min(speeds), max(speeds)),
            baseline="start of the processes and writing included; interval: all quiet runs",
        ),
        Row(
            FLAT,
            memory[large] / memory[small],
            "x",
            baseline=f"{memory[small]:.0f} to {memory[large]:.0f} MB",
        ),
    ]
    return rows, noise
