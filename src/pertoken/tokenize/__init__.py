"""Text to ids: open any tokenizer, see what it costs, train another one, and put it into a model.

``audit(["smollm2", "cl100k"]).to_html()``
``model, tokenizer = transplant(model, tokenizer, train_tokenizer(texts, 32_000, "supertokens"))``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.tokenize._embed import SelfEmbedder
    from pertoken.tokenize.analyzers import ANALYZERS, Analysis, Analyzer, open_analyzer
    from pertoken.tokenize.check import check_transplant, save_transplant
    from pertoken.tokenize.load import as_fast, open_tokenizer
    from pertoken.tokenize.morphology import MorphologyReport, morphology_report
    from pertoken.tokenize.morphology_sweeps import (
        MorphologySweep,
        morphology_sweep,
        read_morphology_sweep,
    )
    from pertoken.tokenize.numbers import (
        NumberDirection,
        direction_of,
        format_number,
        grouping_of,
        number_cuts,
    )
    from pertoken.tokenize.per_byte import bits_per_byte, nats_per_text, perplexity_per_byte
    from pertoken.tokenize.premiums import Premiums, corpus_token_counts, token_premiums
    from pertoken.tokenize.public import PUBLIC, PublicTokenizer
    from pertoken.tokenize.report import SECTIONS, Audit, audit
    from pertoken.tokenize.section import Row, Section
    from pertoken.tokenize.spread import (
        PowerLaw,
        Regression,
        SpreadTest,
        optimal_vocabulary,
        regression,
        spread_test,
    )
    from pertoken.tokenize.supertokens import train_supertokens
    from pertoken.tokenize.sweeps import Sweep, read_sweep, sweep
    from pertoken.tokenize.tokenadapt import Transplant, transplant
    from pertoken.tokenize.train import KINDS, train_tokenizer
    from pertoken.tokenize.ways import count_encodings, encodings, is_canonical, noncanonical_share
    from pertoken.tokenize.word_probes import WordProbe, word_probe

__all__ = [
    "ANALYZERS",
    "KINDS",
    "PUBLIC",
    "SECTIONS",
    "Analysis",
    "Analyzer",
    "Audit",
    "MorphologyReport",
    "MorphologySweep",
    "NumberDirection",
    "PowerLaw",
    "Premiums",
    "PublicTokenizer",
    "Regression",
    "Row",
    "Section",
    "SelfEmbedder",
    "SpreadTest",
    "Sweep",
    "Transplant",
    "WordProbe",
    "as_fast",
    "audit",
    "bits_per_byte",
    "check_transplant",
    "corpus_token_counts",
    "count_encodings",
    "direction_of",
    "encodings",
    "format_number",
    "grouping_of",
    "is_canonical",
    "morphology_report",
    "morphology_sweep",
    "nats_per_text",
    "noncanonical_share",
    "number_cuts",
    "open_analyzer",
    "open_tokenizer",
    "optimal_vocabulary",
    "perplexity_per_byte",
    "read_morphology_sweep",
    "read_sweep",
    "regression",
    "save_transplant",
    "spread_test",
    "sweep",
    "token_premiums",
    "train_supertokens",
    "train_tokenizer",
    "transplant",
    "word_probe",
]

_HOME = {
    "ANALYZERS": "analyzers",
    "Analysis": "analyzers",
    "Analyzer": "analyzers",
    "Audit": "report",
    "KINDS": "train",
    "MorphologyReport": "morphology",
    "MorphologySweep": "morphology_sweeps",
    "NumberDirection": "numbers",
    "PUBLIC": "public",
    "PowerLaw": "spread",
    "Premiums": "premiums",
    "PublicTokenizer": "public",
    "Regression": "spread",
    "Row": "section",
    "SECTIONS": "report",
    "Section": "section",
    "SelfEmbedder": "_embed",
    "SpreadTest": "spread",
    "Sweep": "sweeps",
    "Transplant": "tokenadapt",
    "WordProbe": "word_probes",
    "as_fast": "load",
    "audit": "report",
    "bits_per_byte": "per_byte",
    "check_transplant": "check",
    "corpus_token_counts": "premiums",
    "count_encodings": "ways",
    "direction_of": "numbers",
    "encodings": "ways",
    "format_number": "numbers",
    "grouping_of": "numbers",
    "is_canonical": "ways",
    "morphology_report": "morphology",
    "morphology_sweep": "morphology_sweeps",
    "nats_per_text": "per_byte",
    "noncanonical_share": "ways",
    "number_cuts": "numbers",
    "open_analyzer": "analyzers",
    "open_tokenizer": "load",
    "optimal_vocabulary": "spread",
    "perplexity_per_byte": "per_byte",
    "read_morphology_sweep": "morphology_sweeps",
    "read_sweep": "sweeps",
    "regression": "spread",
    "save_transplant": "check",
    "spread_test": "spread",
    "sweep": "sweeps",
    "token_premiums": "premiums",
    "train_supertokens": "supertokens",
    "train_tokenizer": "train",
    "transplant": "tokenadapt",
    "word_probe": "word_probes",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
