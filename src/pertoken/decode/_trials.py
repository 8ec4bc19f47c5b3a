"""The loop of cautious decoding: trials of many prompts as rows of one cache.

Every pass feeds one token to every row. A row is a prompt's text with what some of its trials have
drawn behind it. Where trials part, their row is copied; where one has ended it waits, its new slots
masked, and is dropped as soon as another of its prompt is better. When all trials of a prompt have
ended the best row goes on. Slots that it lost by waiting lie behind its text, so all rows are then
aligned to the right again, and what they lost becomes left padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from pertoken._forward import text_logits
from pertoken.decode._choose import Chooser
from pertoken.decode._settings import refuse_states, stops
from pertoken.decode.cntp import CautiousStats
from pertoken.decode.rows import keep_rows, start_recording, stop_recording

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import GenerationConfig, PreTrainedModel
    from transformers.cache_utils import Cache

    from pertoken.decode.cntp import CautiousDecoding

Trial = tuple[int, torch.Generator]
"""Its number among those of its place, and what it draws from."""


@dataclass
class _Text:
    """A prompt and what is committed behind it."""

    ids: torch.Tensor  # [1, max_length] buffer
    length: int
    done: bool = False


@dataclass
class _Row:
    """One row of the cache.

    tokens: drawn by all of its trials, not committed yet; nll: of these in nats; trials: none where
    the text goes on by single tokens; idle: slots at its end that are not part of it.
    """

    text: int
    tokens: list[int] = field(default_factory=list)
    nll: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    ended: bool = False
    idle: int = 0

    @property
    def rank(self) -> tuple[float, int]:
        """Of ended trials the least is committed: the perplexity's logarithm, then the first."""
        return self.nll / len(self.tokens), min(number for number, _ in self.trials)


class TrialRun:
    """State of one `generate` call."""

    def __init__(
        self,
        method: CautiousDecoding,
        model: PreTrainedModel,
        cache: Cache,
        mask: torch.Tensor,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        config: GenerationConfig,
    ) -> None:
        refuse_states(logits_processor, method)
        self.method, self.model = method, model
        self.cache, self.mask, self.input_ids = cache, mask, input_ids
        self.stats = CautiousStats()
        self.ends_trial = method.ends_trial()
        self.stop_ids, self.criteria = stops(stopping_criteria, method)
        self.sample = bool(config.do_sample)
        self.chooser = Chooser(logits_processor, sample=self.sample, rows=len(input_ids))
        self.max_length: int = config.max_length
        pad = config._pad_token_tensor
        self.pad = int(pad) if pad is not None else 0
        self.texts = []
        for ids in input_ids:
            buffer = ids.new_full((1, self.max_length), self.pad)
            buffer[0, : len(ids)] = ids
            self.texts.append(_Text(buffer, len(ids)))
        self.rows = [_Row(number) for number in range(len(input_ids))]

    def decode(self) -> torch.Tensor:
        """Ids [batch, longest], padded on the right with the pad id."""
        streamer = self.method.streamer
        if streamer is not None:
            streamer.put(self.input_ids.cpu())
        new = self.input_ids[:, int(self.cache.get_seq_length()) :]
        logits = text_logits(self.model, new, self.mask, self.cache)[:, -1]
        self.stats.prefills += 1
        try:
            start_recording(self.cache)
            self._decide(logits)
            while not all(text.done for text in self.texts):
                self._decide(self._feed())
            self._align()
        finally:
            stop_recording(self.cache)
        if streamer is not None:
            streamer.end()
        longest = max(text.length for text in self.texts)
        return torch.cat([text.ids[:, :longest] for text in self.texts])

    # The cache.

    def _feed(self) -> torch.Tensor:
        """Logits [rows, vocab] behind the last token of every row; the ended ones get a pad."""
        last = [self.pad if row.ended else self._last(row) for row in self.rows]
        going = [[not row.ended] for row in self.rows]
        device = self.mask.device
        column = torch.tensor(going, dtype=self.mask.dtype, device=device)
        self.mask = torch.cat((self.mask, column), -1)
        tokens = torch.tensor(last, device=device).unsqueeze(-1)
        logits = text_logits(self.model, tokens, self.mask, self.cache)[:, -1]
        for row in self.rows:
            row.idle += row.ended
        if not any(row.idle for row in self.rows):
            self._trim()
        self.stats.forwards += 1
        self.stats.rows += sum(not row.ended for row in self.rows)
        return logits

    def _last(self, row: _Row) -> int:
        text = self.texts[row.text]
        return row.tokens[-1] if row.tokens else int(text.ids[0, text.length - 1])

    def _go_on(self, rows: list[_Row], sources: list[int]) -> None:
        """With these rows, each from a row of the cache."""
        self.rows = rows
        if sources != list(range(self.mask.shape[0])):
            index = torch.tensor(sources, device=self.mask.device)
            self.cache.reorder_cache(index)
            self.mask = self.mask[index]
        if any(row.idle and not row.ended for row in rows):
            self._align()

    def _align(self) -> None:
        """Let every row's text end at the last slot."""
        most = max(1, *(row.idle for row in self.rows))
        kept = [range(most - row.idle) for row in self.rows]
        self.mask = keep_rows(self.cache, self.mask[:, :-most], most, kept)
        for row in self.rows:
            row.idle = 0

    def _trim(self) -> None:
        """Let sliding layers drop what is out of their window; nobody waits, so nobody needs it."""
        if any(hasattr(layer, "record_past") for layer in self.cache.layers):
            self._align()

    # The method.

    def _decide(self, logits: torch.Tensor) -> None:
        """Draw behind every row that goes on; logits: [rows, vocab]."""
        going = [place for place, row in enumerate(self.rows) if not row.ended]
        scores = self._scores(going, logits)
        self._begin_trials(going, scores)
        sure = [at for at, place in enumerate(going) if not self.rows[place].trials]
        trying = [at for at, place in enumerate(going) if self.rows[place].trials]
        found: list[list[_Row]] = [[row] for row in self.rows]
        if sure:
            texts = [self.rows[going[at]].text for at in sure]
            for at, token in zip(sure, self._choose(scores[sure], texts), strict=True):
                row = self.rows[going[at]]
                self._commit(row, [token])
        if trying:
            rows = [self.rows[going[at]] for at in trying]
            for at, drawn in zip(trying, self._draw(rows, scores[trying]), strict=True):
                found[going[at]] = drawn
        rows, sources = self._without_losers(found)
        self._go_on(rows, sources)

    def _scores(self, going: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Scores [going, vocab] in float32 behind the logits processors."""
        rows = [self.rows[place] for place in going]
        scores = logits[list(going)].to(dtype=torch.float32, copy=True)
        if not self.chooser.processor:
            return scores
        ids = [self._ids(row) for row in rows]
        for length in {one.shape[1] for one in ids}:
            same = [at for at, one in enumerate(ids) if one.shape[1] == length]
            plain = len(same) == len(self.texts) == len(self.rows)  # the batch as `generate` has it
            if plain or not self.chooser.by_batch:
                texts = torch.cat([ids[at] for at in same])
                scores[same] = self.chooser.processor(texts, scores[same])
                continue
            for at in same:
                scores[at] = self.chooser.at(
                    rows[at].text, self.chooser.processor, ids[at], scores[at]
                )
        return scores

    def _ids(self, row: _Row) -> torch.Tensor:
        """The row's whole text [1, time]."""
        text = self.texts[row.text]
        new = text.ids.new_tensor([row.tokens])
        return torch.cat((text.ids[:, : text.length], new), -1)

    def _begin_trials(self, going: Sequence[int], scores: torch.Tensor) -> None:
        """Trials where the entropy asks for them."""
        sure = [at for at, place in enumerate(going) if not self.rows[place].trials]
        if not sure:
            return
        entropy = torch.special.entr(scores[sure].softmax(-1)).sum(-1)
        self.stats.places += len(sure)
        for at, count in zip(sure, self.method.counts(entropy), strict=True):
            if count > 1:
                seeds = torch.randint(2**62, (count,)).tolist()
                makers = [torch.Generator().manual_seed(seed) for seed in seeds]
                self.rows[going[at]].trials = list(enumerate(makers))
                self.stats.uncertain += 1
                self.stats.trials += count

    def _choose(self, scores: torch.Tensor, texts: Sequence[int]) -> list[int]:
        """One token for each of these texts, as `generate` takes it; scores: [texts, vocab]."""
        if not self.sample:
            return [int(token) for token in scores.argmax(-1)]
        probs = scores.softmax(-1)
        if len(texts) < len(self.texts):
            # generate draws for every row of the batch in one go: so seeds mean the same.
            whole = probs.new_ones(len(self.texts), probs.shape[-1])
            whole[list(texts)] = probs
            probs = whole
        drawn = torch.multinomial(probs, num_samples=1)[list(texts), 0]
        return [int(token) for token in drawn]

    def _draw(self, rows: Sequence[_Row], scores: torch.Tensor) -> list[list[_Row]]:
        """The rows that come of each row when its trials draw; scores: [rows, vocab]."""
        log_probs = scores.log_softmax(-1)
        ends = log_probs.exp().cumsum(-1, dtype=torch.float64)
        points = torch.zeros(len(rows), max(len(row.trials) for row in rows), dtype=torch.float64)
        for at, row in enumerate(rows):
            for place, (_, generator) in enumerate(row.trials):
                points[at, place] = torch.rand((), dtype=torch.float64, generator=generator)
        total = ends[:, -1:]
        points = points.to(ends.device) * total
        # The greatest point may be rounded up to the total, behind which there is no token.
        points = points.minimum(torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(ends, points, right=True)
        losses = -log_probs.gather(-1, tokens).double()
        found = []
        for row, ids, own in zip(rows, tokens.tolist(), losses.tolist(), strict=True):
            self.stats.drawn += len(row.trials)
            parts: dict[int, _Row] = {}
            for trial, token, loss in zip(row.trials, ids, own, strict=False):
                if token not in parts:
                    new = replace(row, tokens=[*row.tokens, token], nll=row.nll + loss, trials=[])
                    new.ended = self._ends(new)
                    parts[token] = new
                parts[token].trials.append(trial)
            found.append(list(parts.values()))
        return found

    def _ends(self, row: _Row) -> bool:
        """Whether a trial ends behind its last token."""
        cap = self.method.cap
        full = cap is not None and len(row.tokens) >= cap
        return full or self.ends_trial(row.tokens[-1]) or self._stops(row)

    def _stops(self, row: _Row) -> bool:
        """Whether the text ends behind the row's last token."""
        length = self.texts[row.text].length + len(row.tokens)
        if length >= self.max_length or row.tokens[-1] in self.stop_ids:
            return True
        return bool(self.criteria and self.criteria(self._ids(row), None).all())

    def _without_losers(self, found: list[list[_Row]]) -> tuple[list[_Row], list[int]]:
        """The rows to go on with, and where each is from; found: what came of each row."""
        best: dict[int, _Row] = {}
        for row in (row for rows in found for row in rows):
            if row.ended and row.trials:
                best[row.text] = min(best.get(row.text, row), row, key=lambda one: one.rank)
        pairs = [
            (row, source)
            for source, rows in enumerate(found)
            for row in rows
            if not row.trials or row.text not in best or self._may_win(row, best[row.text])
        ]
        trying = {row.text for row, _ in pairs if row.trials and not row.ended}
        for number, row in best.items():
            if number not in trying:
                tokens, row.tokens, row.nll, row.trials, row.ended = row.tokens, [], 0.0, [], False
                self.stats.span_tokens += len(tokens)
                self._commit(row, tokens)
        return [row for row, _ in pairs], [source for _, source in pairs]

    def _may_win(self, row: _Row, best: _Row) -> bool:
        """Whether a trial may be committed in place of the best that has ended, which it may be."""
        if row.ended:
            return row is best
        # Were all its tokens to come certain, its mean loss would still be this.
        text = self.texts[row.text]
        longest = min(self.method.cap or self.max_length, self.max_length - text.length)
        return row.nll / longest <= best.rank[0]

    def _commit(self, row: _Row, tokens: list[int]) -> None:
        """Append tokens to the row's text."""
        text = self.texts[row.text]
        row.tokens = tokens
        text.done = row.ended = self._stops(row)
        row.tokens = []
        text.ids[0, text.length : text.length + len(tokens)] = text.ids.new_tensor(tokens)
        text.length += len(tokens)
        self.stats.new_tokens += len(tokens)
        if self.method.streamer is not None:
            self.method.streamer.put(torch.tensor(tokens))
