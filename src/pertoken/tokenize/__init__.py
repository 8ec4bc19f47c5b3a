"""Text to ids: open any tokenizer, see what it costs, train another one, and put it into a model.

``audit(["smollm2", "cl100k"]).to_html()``
``model, tokenizer = transplant(model, tokenizer, train_tokenizer(texts, 32_000, "supertokens"))``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.tokenize.load import (
        as_fast,
        open_tokenizer,
    )
    from pertoken.tokenize.numbers import (
        NumberDirection,
        direction_of,
        format_number,
        grouping_of,
        number_cuts,
    )
    from pertoken.tokenize.premiums import (
        Premiums,
        corpus_token_counts,
        token_premiums,
    )
    from pertoken.tokenize.public import (
        PUBLIC,
        PublicTokenizer,
    )
    from pertoken.tokenize.report import (
        SECTIONS,
        Audit,
        audit,
    )
    from pertoken.tokenize.section import (
        Row,
        Section,
    )
    from pertoken.tokenize.spread import (
        PowerLaw,
        Regression,
        SpreadTest,
        optimal_vocabulary,
        regression,
        spread_test,
    )
    from pertoken.tokenize.sweeps import (
        Sweep,
        read_sweep,
        sweep,
    )
    from pertoken.tokenize.train import (
        KINDS,
        train_tokenizer,
    )

__all__ = [
    "KINDS",
    "PUBLIC",
    "SECTIONS",
    "Audit",
    "NumberDirection",
    "PowerLaw",
    "Premiums",
    "PublicTokenizer",
    "Regression",
    "Row",
    "Section",
    "SpreadTest",
    "Sweep",
    "as_fast",
    "audit",
    "corpus_token_counts",
    "direction_of",
    "format_number",
    "grouping_of",
    "number_cuts",
    "open_tokenizer",
    "optimal_vocabulary",
    "read_sweep",
    "regression",
    "spread_test",
    "sweep",
    "token_premiums",
    "train_tokenizer",
]

_HOME = {
    "KINDS": "train",
    "PUBLIC": "public",
    "SECTIONS": "report",
    "Audit": "report",
    "NumberDirection": "numbers",
    "PowerLaw": "spread",
    "Premiums": "premiums",
    "PublicTokenizer": "public",
    "Regression": "spread",
    "Row": "section",
    "Section": "section",
    "SpreadTest": "spread",
    "Sweep": "sweeps",
    "as_fast": "load",
    "audit": "report",
    "corpus_token_counts": "premiums",
    "direction_of": "numbers",
    "format_number": "numbers",
    "grouping_of": "numbers",
    "number_cuts": "numbers",
    "open_tokenizer": "load",
    "optimal_vocabulary": "spread",
    "read_sweep": "sweeps",
    "regression": "spread",
    "spread_test": "spread",
    "sweep": "sweeps",
    "token_premiums": "premiums",
    "train_tokenizer": "train",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
