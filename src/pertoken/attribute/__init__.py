"""Which input tokens mattered for what a model said, and how far such an answer can be trusted.

``attribute(model, tokenizer, "Paris is the capital of").top(3)``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.attribute._question import Question
    from pertoken.attribute._replace import mlm
    from pertoken.attribute._scores import Scores
    from pertoken.attribute.api import attribute, estimate_cost
    from pertoken.attribute.faithfulness import Faithfulness, evaluate_attribution
    from pertoken.attribute.methods import METHODS
    from pertoken.attribute.quantity import QUANTITIES, Quantity, contrast, register

__all__ = [
    "METHODS",
    "QUANTITIES",
    "Faithfulness",
    "Quantity",
    "Question",
    "Scores",
    "attribute",
    "contrast",
    "estimate_cost",
    "evaluate_attribution",
    "mlm",
    "register",
]

_HOME = {
    "METHODS": "methods",
    "QUANTITIES": "quantity",
    "Faithfulness": "faithfulness",
    "Quantity": "quantity",
    "Question": "_question",
    "Scores": "_scores",
    "attribute": "api",
    "contrast": "quantity",
    "estimate_cost": "api",
    "evaluate_attribution": "faithfulness",
    "mlm": "_replace",
    "register": "quantity",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
