"""A drafter guesses what comes next; calling it decodes with those guesses, losslessly.

    model.generate(**inputs, max_new_tokens=64, custom_generate=Goose())

One loop (`speculative.py`) serves all drafters; a method is a subclass that overrides `propose` and
whichever of `begin`, `observe`, `observe_prompt` and `commit` it learns from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pertoken._shown import Shown
from pertoken.decode.stats import DecodeStats, RowTrace
from pertoken.decode.topk import NodeLogits
from pertoken.decode.tree import TokenTree
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer


class Drafter(Shown):
    """Base class of the speculative methods.

    Args:
        budget: nodes verified per step besides the last token; ``"auto"`` chooses it in every step
            from the measured cost of a pass and the chance of acceptance; None is the method's
            published default.
        keep: remember what was learned in the next `generate` call too; see `reset`, `save`.
        streamer: gets the tokens as they are committed. `generate` does not hand its own streamer
            to a callable, so it goes here.
        tokenizer, stop_strings: end a text behind any of these strings; `generate` refuses its own
            `stop_strings` with a callable, for the same reason.

    After a call `stats` counts what happened, and `rows[i]` tells where row i's tokens came from.
    """

    slug: ClassVar[str] = ""
    default_budget: int = 0
    wants_prompt: bool = False
    probes: ClassVar[frozenset[str]] = frozenset()
    """Sources of nodes that ask the model something: they stay where a constraint refuses them."""

    def __init__(
        self,
        *,
        budget: int | Literal["auto"] | None = None,
        keep: bool = False,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        is_count = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
        if budget is not None and budget != "auto" and not is_count:
            raise PertokenError(
                f'budget must be at least 1 or "auto", not {budget!r}; '
                "for decoding without drafts use the method 'plain'"
            )
        self.budget = budget
        self.keep = keep
        self.streamer = streamer
        if isinstance(stop_strings, str):
            stop_strings = [stop_strings]
        if stop_strings and tokenizer is None:
            raise PertokenError("stop_strings need the tokenizer too: pass tokenizer=")
        self.tokenizer = tokenizer
        self.stop_strings = list(stop_strings)
        self.contexts: list[list[int]] = []
        self.stats = DecodeStats()
        self.rows: list[RowTrace] = []
        self._vocab: int | None = None  # ids of the model that what is kept was learned from

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `model.generate(..., custom_generate=self)`; returns what generate returns."""
        from pertoken.decode.speculative import speculate

        return speculate(
            self,
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )

    def fit(self, vocab_size: int) -> None:
        """Raise PertokenError where what is kept was learned from a model with other ids."""
        if self.keep and self._vocab not in (None, vocab_size):
            raise PertokenError(
                f"what this drafter keeps is for a vocabulary of {self._vocab} tokens, the model "
                f"has {vocab_size}; call reset() or use a new one"
            )
        self._vocab = vocab_size

    # What a method overrides.

    def begin(self, vocab_size: int) -> None:
        """A `generate` call starts; `contexts` hold the prompts, one list of ids per row."""

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        """At most `budget` nodes below the row's last token, at most `room` deep."""
        return TokenTree(self.contexts[row][-1])

    def observe(self, row: int, tree: TokenTree, path: list[int], logits: NodeLogits) -> None:
        """The model's logits at all nodes of a verified tree; path: accepted nodes from the root.

        Called before `commit`; the tree may be a part of what was proposed.
        """

    def observe_prompt(
        self, row: int, tokens: list[int], logits: NodeLogits, previous: int | None
    ) -> None:
        """The model's logits at prompt tokens, if `wants_prompt`; previous: the token before."""

    def commit(self, row: int, tokens: list[int]) -> None:
        """Tokens were appended to the row's text."""
        self.contexts[row].extend(tokens)

    # What was learned.

    def reset(self) -> None:
        """Forget everything learned in earlier calls."""
        self._vocab = None

    def state_dict(self) -> dict[str, Any]:
        """What survives from call to call with ``keep=True``, as plain lists and numbers."""
        return {"slug": self.slug}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        if state.get("slug") != self.slug:
            raise PertokenError(
                f"this state was saved by {state.get('slug')!r}, not by {self.slug!r}"
            )

    def save(self, path: str | Path) -> None:
        """Write what was learned to a file (JSON)."""
        import json

        path = Path(path)
        part = path.with_name(path.name + ".part")
        try:
            state = {**self.state_dict(), "vocab_size": self._vocab}
            part.write_text(json.dumps(state), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise PertokenError(f"cannot write {path}: {error.strerror}") from error
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def load(self, path: str | Path) -> None:
        """Read what was learned from a file that `save` wrote, and keep it from call to call.

        Raises PertokenError if the file is missing, not such a file, or of another method.
        """
        import json

        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PertokenError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise PertokenError(f"{path} is not a file written by Drafter.save") from error
        if not isinstance(state, dict):
            raise PertokenError(f"{path} is not a file written by Drafter.save")
        try:
            vocab_size = state.pop("vocab_size", None)
            self.load_state_dict(state)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            self.reset()
            raise PertokenError(f"{path} lacks a part of what Drafter.save writes") from error
        self.keep, self._vocab = True, vocab_size
