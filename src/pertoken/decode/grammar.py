"""Constraints that llguidance parses: JSON schema, Lark-like grammar, regular expression.

llguidance (github.com/guidance-ai/llguidance) runs a lexer of regular-expression derivatives under
an Earley parser over the bytes of the tokens, so a question costs microseconds and the whole
vocabulary little more. That makes these constraints answer more than `accepts` and `complete`: a
mask over the vocabulary (`allowed`), many tokens at once (`accepts_each`) and the tokens of text
that the grammar leaves no choice about (`forced`).

Where text is forced, llguidance's own mask leaves one way to cut it into tokens. The masks here
allow every way, so that they say what `accepts` says and a mask does not change the distribution
over texts; `forced` gives the one way.

Needs the extra: ``pip install "pertoken[constrained]"``.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pertoken._extras import need
from pertoken.errors import PertokenError

__all__ = ["GrammarConstraint", "GrammarRegexConstraint", "JSONSchemaConstraint", "LarkConstraint"]

_KEPT = 64  # parsers kept, one per prefix asked about
_BACK = 32  # how many tokens before a new prefix one of them is looked for
_FEW = 64  # tokens that are asked about one by one; for more a mask is cheaper
_NODES = 500  # parts of a refused schema that are searched for the place
_ANY_CUT = '\n%llguidance {"no_forcing": true}\n'


class GrammarConstraint:
    """What the three constraints here share: every question but how to make one.

    ids are new tokens without the prompt. Special tokens and ids that the tokenizer does not have
    are never allowed, not even where a grammar names them; added tokens that look like ``<this>``
    count as special, as in llguidance. A grammar may lead into a dead end, in which `accepts` was
    true and no token is allowed.

    Where llguidance meets one of its limits of work the methods raise PertokenError, and `forced`
    knows nothing.
    """

    def __init__(
        self, form: dict[str, Any], lark: str, *, tokenizer: Any, refusal: Callable[[str], str]
    ) -> None:
        """form: llguidance's own form of the grammar; lark: the same as Lark text."""
        parser = _tokens(tokenizer)
        self._size = int(parser.vocab_size)
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        special = {token for token in added if parser.is_special_token(token)}
        special |= {*tokenizer.all_special_ids, *parser.eos_tokens}
        self._special = sorted(token for token in special if token < self._size)
        self.vocabulary = torch.ones(self._size, dtype=torch.bool)
        self.vocabulary[self._special] = False
        forcing = _matcher(parser, form, refusal)
        free = _matcher(parser, {"lark_grammar": lark + _ANY_CUT}, refusal)
        refused = frozenset(self._special)
        self._free, self._forcing = (_Matchers(m, refused, self._size) for m in (free, forcing))
        if not self.complete(()) and not self.allowed(()).any():
            raise PertokenError(refusal("no text satisfies it"))

    def accepts(self, ids: Sequence[int]) -> bool:
        """Whether an allowed text may begin with these new tokens."""
        return not ids or self.accepts_each(ids[:-1], ids[-1:])[0]

    def complete(self, ids: Sequence[int]) -> bool:
        """Whether these new tokens are an allowed text as they are."""
        matcher = self._free.at(tuple(ids))
        return matcher is not None and bool(matcher.is_accepting())

    def accepts_each(self, ids: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """``accepts([*ids, token])`` for each of these tokens."""
        if len(tokens) > _FEW:
            index = torch.tensor(tokens)
            inside = (index >= 0) & (index < self._size)
            found: list[bool] = (
                inside & self.allowed(ids)[index.clamp(0, self._size - 1)]
            ).tolist()
            return found
        prefix = tuple(ids)
        matcher = self._free.at(prefix)
        if matcher is None:
            return [False] * len(tokens)
        verdicts = [
            self._free.ordinary(token) and matcher.validate_tokens([token]) == 1 for token in tokens
        ]
        _check(self._free.drop_failed(prefix), prefix)
        return verdicts

    def allowed(self, ids: Sequence[int]) -> torch.Tensor:
        """Which tokens may follow: bool [vocab], the same as `accepts` with each of them.

        Stop ids are not set, `complete` speaks for them. [vocab] is the tokenizer's size;
        ``torch.nn.functional.pad(mask, (0, width - len(mask)))`` fits it to logits of a model that
        has more (or fewer), and no text has those.
        """
        prefix = tuple(ids)
        matcher = self._free.at(prefix)
        if matcher is None:
            return torch.zeros(self._size, dtype=torch.bool)
        found = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
        why = self._free.drop_failed(prefix)
        if why.startswith("NoExtension"):  # an empty mask counts as a failure
            return torch.zeros(self._size, dtype=torch.bool)
        _check(why, prefix)
        mask = found[: self._size] > 0
        mask[self._special] = False
        return mask

    def forced(self, ids: Sequence[int]) -> list[int]:
        """Tokens of the text that must follow, [] if there is a choice.

        The text must follow; of the ways to cut it into tokens this is the tokenizer's own, as far
        as what comes behind it cannot change that (llguidance's fast-forward tokens). So they are
        good drafts, but not the only tokens allowed.
        """
        prefix = tuple(ids)
        try:
            matcher = self._forcing.at(prefix)
        except PertokenError:
            return []
        if matcher is None:
            return []
        tokens: list[int] = matcher.compute_ff_tokens()  # [] where it fails, as with `stop=` rules
        self._forcing.drop_failed(prefix)
        odd = [place for place, token in enumerate(tokens) if not self._forcing.ordinary(token)]
        return tokens[: odd[0]] if odd else tokens


class LarkConstraint(GrammarConstraint):
    """A constraint by a context-free grammar in llguidance's dialect of Lark; the rule is `start`.

    Raises PertokenError for a grammar that llguidance refuses, with its message, line and column.

    >>> from pertoken.testing import ByteTokenizer
    >>> sums = LarkConstraint('start: NUMBER ("+" NUMBER)*\\nNUMBER: /[0-9]+/',
    ...                       tokenizer=ByteTokenizer())
    >>> encode = ByteTokenizer().encode
    >>> sums.accepts(encode("12+")), sums.complete(encode("12+")), sums.complete(encode("12+3"))
    (True, False, True)
    >>> int(sums.allowed(encode("12")).sum())  # ten digits and a plus
    11
    """

    def __init__(self, grammar: str, *, tokenizer: Any) -> None:
        super().__init__(
            {"lark_grammar": grammar},
            grammar,
            tokenizer=tokenizer,
            refusal=lambda message: f"llguidance refuses the grammar: {_one_line(message)}",
        )


class JSONSchemaConstraint(GrammarConstraint):
    """A constraint by a JSON schema, given as a dict or as JSON text.

    Properties come in the order of the schema, and white space is free between the parts unless
    the schema says ``"x-guidance": {"whitespace_flexible": false}``. A keyword that llguidance
    does not know is refused, not skipped.

    Raises PertokenError for text that is no JSON, with line and column, and for a schema that
    llguidance refuses, with its message and the part that it is about.

    >>> from pertoken.testing import ByteTokenizer
    >>> year = JSONSchemaConstraint(
    ...     {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]},
    ...     tokenizer=ByteTokenizer(),
    ... )
    >>> encode = ByteTokenizer().encode
    >>> year.complete(encode('{"year": 2024}')), year.accepts(encode('{"month"'))
    (True, False)
    >>> ByteTokenizer().decode(year.forced(encode('{"')))
    'year"'
    """

    def __init__(self, schema: dict[str, Any] | bool | str, *, tokenizer: Any) -> None:
        tree, text = _json(schema)
        super().__init__(
            {"json_schema": tree},
            f"start: %json {text}",
            tokenizer=tokenizer,
            refusal=lambda message: (
                f"llguidance refuses the JSON schema{_part(tree, message)}: {_one_line(message)}"
            ),
        )


class GrammarRegexConstraint(GrammarConstraint):
    r"""A constraint by a regular expression that the whole text must match, with masks.

    The expressions are those of Rust's regex crate: no look-around, no references back. For those
    take `pertoken.decode.constraint.RegexConstraint`, which can only be asked token by token.

    Raises PertokenError for a pattern that is none, with the place.

    >>> from pertoken.testing import ByteTokenizer
    >>> date = GrammarRegexConstraint(r"\d{4}-\d\d", tokenizer=ByteTokenizer())
    >>> encode = ByteTokenizer().encode
    >>> date.forced(encode("2024")) == encode("-"), date.forced(encode("2024-"))
    (True, [])
    """

    def __init__(self, pattern: str, *, tokenizer: Any) -> None:
        form = json.loads(_llguidance().LLMatcher.grammar_from_regex(pattern))["grammars"][0]
        lark = form["lark_grammar"]

        def refusal(message: str) -> str:
            line = _one_line(message)
            why = line.partition("(in regex): ")[2] or line
            return f"not a regular expression of llguidance: {pattern!r}: {why}"

        super().__init__({"lark_grammar": lark}, lark, tokenizer=tokenizer, refusal=refusal)


class _Matchers:
    """llguidance's parsers at prefixes: a new one is the copy of a near one, a few tokens on.

    A copy shares the lexer, which learns its states once, and costs about a tenth of a
    microsecond per token of the prefix.
    """

    def __init__(self, root: Any, refused: frozenset[int], size: int) -> None:
        self._root, self._refused, self._size = root, refused, size
        self._kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def ordinary(self, token: int) -> bool:
        """Whether it is a token of text; llguidance must not be asked about ids out of range."""
        return 0 <= token < self._size and token not in self._refused

    def at(self, prefix: tuple[int, ...]) -> Any:
        """The parser behind this prefix, None where the prefix is not accepted."""
        found = self._kept.get(prefix)
        if found is None:
            known, near = self._near(prefix)
            rest = list(prefix[known:])
            if not all(map(self.ordinary, rest)):
                return None
            found = near.deep_copy()
            if found.try_consume_tokens(rest) < len(rest):
                _check(found.get_error(), prefix)
                return None
            self._kept[prefix] = found
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(prefix)
        return found

    def drop_failed(self, prefix: tuple[int, ...]) -> str:
        """Forget the parser just asked if it failed, since it stays so; why it did, or ""."""
        why = str(self._kept[prefix].get_error())
        if why:
            del self._kept[prefix]
        return why

    def _near(self, prefix: tuple[int, ...]) -> tuple[int, Any]:
        for known in range(len(prefix) - 1, max(-1, len(prefix) - 1 - _BACK), -1):
            found = self._kept.get(prefix[:known])
            if found is not None:
                return known, found
        return 0, self._root


def _check(why: str, prefix: tuple[int, ...]) -> None:
    if why:
        raise PertokenError(f"llguidance gave up behind {len(prefix)} tokens: {_one_line(why)}")


def _llguidance() -> Any:
    return need("llguidance", "constrained")


def _matcher(parser: Any, form: dict[str, Any], refusal: Callable[[str], str]) -> Any:
    llguidance = _llguidance()
    matcher = llguidance.LLMatcher(
        parser,
        json.dumps({"grammars": [form]}),
        log_level=0,
        limits=llguidance.LLParserLimits(verbose_errors=False),
    )
    if matcher.is_error():
        raise PertokenError(refusal(matcher.get_error()))
    return matcher


# llguidance's view of a tokenizer takes seconds to make where the vocabulary is large; kept with
# the size it had then, because tokens may be added to a tokenizer.
_VIEWS: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()


def _tokens(tokenizer: Any) -> Any:
    """llguidance's view of a Hugging Face tokenizer."""
    known = _VIEWS.get(tokenizer)
    if known is not None and known[0] == len(tokenizer):
        return known[1]
    name = type(tokenizer).__name__
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        raise PertokenError(
            f"llguidance needs a fast tokenizer, one with a tokenizer.json, not {name}; "
            "RegexConstraint and TextConstraint take any"
        )
    if tokenizer.eos_token_id is None:
        raise PertokenError(f"the tokenizer ({name}) has no stop token: set tokenizer.eos_token")
    backend = copy(backend)  # in which texts are neither padded nor cut
    backend.no_padding()
    backend.no_truncation()
    try:
        view = _llguidance().LLTokenizer(backend.to_str(), eos_token=tokenizer.eos_token_id)
    except ValueError as error:
        raise PertokenError(
            f"llguidance cannot read the tokenizer ({name}): {_one_line(str(error))}"
        ) from None
    _VIEWS[tokenizer] = (len(tokenizer), view)
    return view


def _json(schema: dict[str, Any] | bool | str) -> tuple[Any, str]:
    """A schema as a tree and as text."""
    try:
        tree = json.loads(schema) if isinstance(schema, str) else schema
        return tree, json.dumps(tree)
    except json.JSONDecodeError as error:
        raise PertokenError(
            f"the schema is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise PertokenError(f"the schema is not JSON: {error}") from None


def _part(schema: Any, message: str) -> str:
    """Which part of a schema a message of llguidance is about: the deepest that earns it alone."""
    llguidance = _llguidance()
    found: tuple[str, ...] = ()
    for number, (path, node) in enumerate(_nodes(schema, ())):
        if number == _NODES:
            break
        if len(path) > len(found):
            alone = json.dumps({"grammars": [{"json_schema": node}]})
            if llguidance.LLMatcher.validate_grammar(alone) == message:
                found = path
    return f" at #/{'/'.join(found)}" if found else ""


def _nodes(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict):
        yield path, tree
        for key, child in tree.items():
            yield from _nodes(child, (*path, str(key)))
    elif isinstance(tree, list):
        for place, child in enumerate(tree):
            yield from _nodes(child, (*path, str(place)))


_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")
_INNER = re.compile(r"regex parse error:\n {4}.*\n {4}( *)\^+\nerror: (.*)")
_DRAWN = re.compile(r"\s*(?:\d+ \|.*|\^+|<non-verbose/>|)")  # the source shown, and what marks it


def _one_line(message: str) -> str:
    r"""A message of llguidance without the excerpt it draws.

    >>> _one_line('at 1(8): unknown name: "foo"\n   1 | start: foo\n              ^\n')
    'line 1, column 8: unknown name: "foo"'
    """
    message = message.partition("<backtrace>")[0]  # it catches its own panics
    message = _INNER.sub(lambda inner: f"{inner[2]} at position {len(inner[1])}", message)
    place = _PLACE.match(message)
    if place:
        message = f"line {place[1]}, column {place[2]}: {message[place.end() :]}"
    lines = (line.strip() for line in message.splitlines() if not _DRAWN.fullmatch(line))
    return " ".join(lines)
