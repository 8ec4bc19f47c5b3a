"""What stands in for a token that is taken away.

A replacer looks at a question once and gives a function `uniforms [..., time] -> ids [..., time]`:
one uniform number in [0, 1) per token decides its replacement, so that a draw does not depend on
how many are drawn at once. The replacements of protected tokens are never used.

"uniform": any token of the vocabulary but the special ones.
"lm_topk": one of the ten likeliest tokens of the model itself, from the text before.
"nearest": one of the ten tokens whose embeddings are most similar.
"pos": any token with the same part-of-speech tag; needs nltk and its tagger.
`mlm(model, tokenizer)`: a proposal of a masked language model, from the text on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pertoken._padded import batches, right_padded
from pertoken._pieces import pieces, special_ids
from pertoken.attribute._forward import most_tokens
from pertoken.attribute._question import Question
from pertoken.errors import PertokenError, nearest

Draw = Callable[[torch.Tensor], torch.Tensor]
Replacer = Callable[[Question], Draw]

_TOP = 10
_WINDOW = 16  # characters for a token of a masked language model's room, at most
_MASKED = 2048  # tokens of a masked language model's forward: it says something at each of them


def prepare(replacer: str | Replacer, question: Question) -> Draw:
    """The draws of a replacer, by name or given, for a question."""
    if not isinstance(replacer, str):
        return replacer(question)
    if replacer == "mlm":
        raise PertokenError(
            'the replacer "mlm" needs a masked language model: replacer=mlm(model, tokenizer), '
            "from pertoken.attribute"
        )
    if replacer not in REPLACERS:
        raise PertokenError(
            f"unknown replacer {replacer!r}{nearest(replacer, REPLACERS)}; there is: "
            f"{', '.join(REPLACERS)}, and mlm(model, tokenizer)"
        )
    return REPLACERS[replacer](question)


def uniform(question: Question) -> Draw:
    """Any token of the vocabulary but the special ones, all with the same chance."""
    return _from_list(_ordinary(question))


def lm_topk(question: Question) -> Draw:
    """One of the model's own ten likeliest tokens after the text before, never the token itself.

    One forward over the text. The first token has no text before it and is replaced uniformly.
    """
    model, ids = question.model, question.ids
    ordinary = _ordinary(question)
    last = len(ids) - 1
    # The head's output is the large part, so positions are read in chunks.
    with torch.no_grad():
        decoded = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state
    table = torch.zeros(len(ids), _size(ordinary), dtype=torch.long, device=ids.device)
    step = max(1, most_tokens(model) // 16)
    head = model.get_output_embeddings()
    for begin in range(0, last, step):
        part = slice(begin, min(begin + step, last))
        with torch.no_grad():
            logits = head(decoded[0, part])
        after = slice(part.start + 1, part.stop + 1)
        table[after] = _best(logits, ids[after], ordinary)
    draw_first = uniform(question)
    chosen = _from_table(table)

    def draw(uniforms: torch.Tensor) -> torch.Tensor:
        return torch.cat((draw_first(uniforms[..., :1]), chosen(uniforms)[..., 1:]), -1)

    return draw


def nearest_embeddings(question: Question) -> Draw:
    """One of the ten tokens whose input embeddings have the largest cosine, never itself."""
    weight = question.model.get_input_embeddings().weight.detach()
    ordinary = _ordinary(question)
    unit = torch.nn.functional.normalize(weight.float(), dim=-1)
    table = []
    step = max(1, most_tokens(question.model) // 16)
    for begin in range(0, len(question.ids), step):
        ids = question.ids[begin : begin + step]
        table.append(_best(unit[ids] @ unit.T, ids, ordinary))
    return _from_table(torch.cat(table))


def part_of_speech(question: Question) -> Draw:
    """Any token whose text alone has the same part-of-speech tag (nltk), as the authors' code."""
    from pertoken._extras import need

    nltk = need("nltk", "attribution")
    tokenizer = question.tokenizer
    ordinary = _ordinary(question).tolist()
    texts = {token: str(tokenizer.decode([token])).strip() for token in ordinary}
    wanted = question.ids.tolist()
    try:
        tags = {token: nltk.pos_tag([text])[0][1] for token, text in texts.items() if text}
    except LookupError:
        raise PertokenError(
            'the tagger of nltk is not there: python -c "import nltk; '
            "nltk.download('averaged_perceptron_tagger_eng')\", or another replacer"
        ) from None
    groups: dict[str, list[int]] = {}
    for token in ordinary:
        groups.setdefault(tags.get(token, ""), []).append(token)
    draws = {
        tag: _from_list(torch.tensor(members, device=question.ids.device))
        for tag, members in groups.items()
    }
    everything = uniform(question)
    each = [draws.get(tags.get(token, ""), everything) for token in wanted]

    def draw(uniforms: torch.Tensor) -> torch.Tensor:
        columns = [one(uniforms[..., i]) for i, one in enumerate(each[: uniforms.shape[-1]])]
        return torch.stack(columns, -1)

    return draw


def mlm(model: Any, tokenizer: Any) -> Replacer:
    """Proposals of a masked language model (RoBERTa in the paper), as a replacer.

    model, tokenizer: any fill-mask pair. The ten likeliest tokens at the place of the mask, with
    the blank that stood before the token; where the decoder's tokenizer cuts one, its first piece.
    """
    if getattr(tokenizer, "mask_token", None) is None:
        raise PertokenError("this tokenizer has no mask token: mlm needs a fill-mask model")

    def replacer(question: Question) -> Draw:
        parts = pieces(question.tokenizer, question.ids.tolist())
        ordinary = set(_ordinary(question).tolist())
        table = torch.zeros(len(parts), _TOP, dtype=torch.long, device=question.ids.device)
        drawn = uniform(question)
        known = torch.zeros(len(parts), dtype=torch.bool, device=question.ids.device)
        places = [at for at, part in enumerate(parts) if question.free[at] and part.strip()]
        blanks = [parts[at][: len(parts[at]) - len(parts[at].lstrip())] for at in places]
        proposals = _fill(model, tokenizer, parts, places, blanks)
        for place, blank, found in zip(places, blanks, proposals, strict=True):
            own = int(question.ids[place])
            ids = [_first_id(question.tokenizer, blank + word) for word in found]
            kept = [i for i in dict.fromkeys(ids) if i is not None and i != own and i in ordinary]
            if kept:
                table[place] = torch.tensor((kept * _TOP)[:_TOP], device=table.device)
                known[place] = True
        chosen = _from_table(table)

        def draw(uniforms: torch.Tensor) -> torch.Tensor:
            time = uniforms.shape[-1]
            return torch.where(known[:time], chosen(uniforms), drawn(uniforms))

        return draw

    return replacer


@torch.no_grad()
def _fill(
    model: Any, tokenizer: Any, parts: list[str], places: list[int], blanks: list[str]
) -> list[list[str]]:
    """The likeliest words at a mask in each place; as much of the text as the model takes."""
    mask = tokenizer.mask_token_id
    frame = list(tokenizer(tokenizer.mask_token)["input_ids"])
    if frame.count(mask) != 1:
        raise PertokenError(f"the tokenizer makes no mask of its own {tokenizer.mask_token!r}")
    begin, end = frame[: frame.index(mask)], frame[frame.index(mask) + 1 :]
    room = min(getattr(model.config, "max_position_embeddings", 512), 512) - 8
    text, reach, start = "".join(parts), _WINDOW * room, 0
    starts = []
    for part in parts:
        starts.append(start)
        start += len(part)
    rows, masks = [], []
    for place, blank in zip(places, blanks, strict=True):
        low, high = starts[place], starts[place] + len(parts[place])
        left = _ids(tokenizer, text[max(0, low - reach) : low] + blank)[-(room // 2) :]
        right = _ids(tokenizer, text[high : high + reach])[: room - len(left)]
        rows.append(torch.tensor([*begin, *left, mask, *right, *end]))
        masks.append(len(begin) + len(left))
    found: list[list[str]] = [[]] * len(rows)
    for some in batches([len(row) for row in rows], _MASKED):
        ids, real = right_padded([rows[row] for row in some])
        given = {} if real is None else {"attention_mask": real.long().to(model.device)}
        logits = model(input_ids=ids.to(model.device), **given).logits
        best = logits[torch.arange(len(some)), [masks[row] for row in some]].topk(2 * _TOP).indices
        for row, likeliest in zip(some, best.tolist(), strict=True):
            words = [str(tokenizer.decode([i])).strip() for i in likeliest]
            found[row] = [word for word in words if word][: _TOP + 1]
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_id(tokenizer: Any, text: str) -> int | None:
    ids = _ids(tokenizer, text)
    return ids[0] if ids else None


def _ordinary(question: Question) -> torch.Tensor:
    """All ids of the vocabulary that are no special tokens, on the model's device."""
    size = question.model.get_input_embeddings().weight.shape[0]
    known = min(size, len(question.tokenizer))  # rows beyond are there to fill a power of two
    allowed = torch.ones(known, dtype=torch.bool)
    special = [token for token in special_ids(question.tokenizer) if token < known]
    allowed[special] = False
    return allowed.nonzero()[:, 0].to(question.ids.device)


def _size(ordinary: torch.Tensor) -> int:
    return max(1, min(_TOP, len(ordinary) - 1))


def _best(scores: torch.Tensor, own: torch.Tensor, ordinary: torch.Tensor) -> torch.Tensor:
    """The ordinary ids [rows, k] of the highest scores [rows, vocab], without a row's own."""
    scores = scores.clone()
    scores[torch.arange(len(own), device=own.device), own] = -torch.inf
    return ordinary[scores[:, ordinary].topk(_size(ordinary)).indices]


def _from_list(ids: torch.Tensor) -> Draw:
    def draw(uniforms: torch.Tensor) -> torch.Tensor:
        return ids[(uniforms * len(ids)).long().clamp(max=len(ids) - 1)]

    return draw


def _from_table(table: torch.Tensor) -> Draw:
    """table: ids [time, k], a row for each place."""

    def draw(uniforms: torch.Tensor) -> torch.Tensor:
        time, k = uniforms.shape[-1], table.shape[1]
        chosen = (uniforms * k).long().clamp(max=k - 1)
        return table[torch.arange(time, device=table.device), chosen]

    return draw


REPLACERS: dict[str, Replacer] = {
    "lm_topk": lm_topk,
    "uniform": uniform,
    "nearest": nearest_embeddings,
    "pos": part_of_speech,
}
